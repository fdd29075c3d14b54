"""Fisher-vector products and steps against exact matrices, dense solves and the theorem's bound."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import make_finite_kernel, make_kernel, make_pomdp, make_trajectory
from jax.flatten_util import ravel_pytree

from spg.distributions import Categorical, Normal, TanhNormal
from spg.estimators.surrogate import ppo_surrogate
from spg.estimators.trust_region import (
    factor_kl,
    fisher_product,
    natural_gradient,
    trust_region_step,
)
from spg.exact.enumeration import discounted_values, joint_policy
from spg.kernels.networks import trainable
from spg.types import Transition

pytestmark = pytest.mark.usefixtures("float64")

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(5)  # exact for squares of scores
GAMMA = 0.5


def split(kernel):
    """What is trained as one vector, and the kernel of another such vector."""
    params, fixed = eqx.partition(kernel, trainable(kernel))
    flat, unravel = ravel_pytree(params)
    return flat, lambda flat: eqx.combine(unravel(flat), fixed)


def outcomes(kernel, steps):
    """Each z' that may be drawn, for all steps `[T]`, and its chance; none where z' is computed."""
    memory = kernel.state_distribution(steps)
    if isinstance(memory, Categorical):
        for h in range(memory.logits.shape[1]):
            yield jnp.full_like(steps.z_next, h), jax.nn.softmax(memory.logits)[:, h]
    if isinstance(memory, Normal):
        is_complex = jnp.iscomplexobj(memory.loc)
        parts = memory.loc.shape[1] * (2 if is_complex else 1)
        for index in np.ndindex(*parts * (len(NODES),)):
            noise, weight = NODES[list(index)], np.prod(WEIGHTS[list(index)] / WEIGHTS.sum())
            noise = noise[::2] + 1j * noise[1::2] if is_complex else noise
            yield memory.loc + memory.std * noise, jnp.full(len(steps.first), weight)


def exact_fisher(kernel, steps, *, num_actions=2):
    """mean_t E[s sᵀ], outcome by outcome, of the scores s of z' and of actions."""
    flat, build = split(kernel)

    @eqx.filter_jit
    def squares(steps, chance, factor):
        rows = jax.jacobian(lambda flat: factor(build(flat).log_prob(steps)))(flat)
        return jnp.einsum("t,ti,tj->ij", chance, rows, rows) / len(steps.first)

    of_z, of_action = (lambda scores: scores.z), (lambda scores: scores.action)
    total = jnp.zeros((len(flat), len(flat)))
    for z_next, chance in outcomes(kernel, steps):
        total += squares(steps._replace(z_next=z_next), chance, of_z)
    for a in range(num_actions):
        chosen = steps._replace(action=jnp.full_like(steps.action, a))
        total += squares(chosen, jnp.exp(kernel.log_prob(chosen).action), of_action)
    return total


@eqx.filter_jit
def matrix(kernel, steps):
    """The Fisher matrix, a product with each unit vector."""
    flat, build = split(kernel)
    product = fisher_product(lambda flat: build(flat).distributions(steps), flat)
    return jax.vmap(product)(jnp.eye(len(flat)))


@pytest.mark.parametrize(
    ("name", "state_std"), [("gru", 0.3), ("lru", 0.3), ("gru", None), ("finite", None)]
)
def test_fisher_vector_products_are_those_of_the_exact_matrix(name, state_std):
    """z' drawn from a real or complex Normal, computed in a segment with resets, and finite."""
    kernel = make_kernel(name, jr.key(0), state_std=state_std)
    steps = make_trajectory(kernel, jr.key(1))
    found = matrix(kernel, steps)
    assert np.abs(found).max() > 0.05
    assert np.allclose(found, exact_fisher(kernel, steps), rtol=1e-9, atol=1e-12)


def test_the_mean_over_z_is_the_fisher_matrix_of_the_joint_distribution():
    """E[s sᵀ] of s = ∇log ω + ∇log μ has no cross terms, pair (a, z') by pair."""
    kernel = make_finite_kernel(jr.key(0))
    steps = make_trajectory(kernel, jr.key(1), num_steps=3, starts=(0,))
    flat, build = split(kernel)

    @jax.jit
    def square(pair):
        score = jax.jacobian(lambda flat: build(flat).log_prob(pair).joint[0])(flat)
        return jnp.exp(kernel.log_prob(pair).joint[0]) * jnp.outer(score, score)

    joint, found = 0.0, 0.0
    for z_next, chance in outcomes(kernel, steps):
        for t in range(3):
            one = jax.tree.map(lambda x, t=t: x[t : t + 1], steps._replace(z_next=z_next))
            found += chance[t] * matrix(kernel, one)
            joint += sum(square(one._replace(action=jnp.full_like(one.action, a))) for a in (0, 1))
    assert np.allclose(found, joint, rtol=1e-9, atol=1e-12)


def test_kl_is_the_mean_log_ratio():
    """By quadrature and by sums; that of tanh(u) is that of u."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    old = Normal(jnp.array([0.3, -1.0]), jnp.array([0.5, 2.0]))
    new = Normal(jnp.array([0.1, -0.5]), jnp.array([0.7, 1.5]))
    each = lambda p, q: sum(
        w * (p.log_prob(x) - q.log_prob(x))
        for w, x in zip(weights / weights.sum(), p.loc + p.std * nodes[:, None], strict=True)
    )
    one = lambda p, i: Normal(p.loc[i : i + 1], p.std[i : i + 1])
    truth = sum(each(one(old, i), one(new, i)) for i in range(2))
    assert np.isclose(old.kl(new), truth, rtol=1e-10)
    assert np.isclose(TanhNormal(old.loc, old.std).kl(TanhNormal(new.loc, new.std)), truth)
    both = lambda p: Normal(p.loc[:1] + 1j * p.loc[1:], p.std[:1])  # one σ for both parts
    same = lambda p: Normal(p.loc, p.std[:1].repeat(2))
    assert np.isclose(both(old).kl(both(new)), same(old).kl(same(new)))
    p, q = Categorical(jnp.array([1.0, 0.0, -jnp.inf])), Categorical(jnp.array([0.0, 0.5, -1.0]))
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x.logits))[:2] for x in (p, q))
    truth = np.exp(log_p) @ (log_p - log_q)
    assert np.isclose(p.kl(q), truth, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_the_natural_gradient_is_that_of_a_dense_solve(scale):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(8, 8))
    fisher, g = jnp.asarray(scale * root @ root.T), {"x": jnp.asarray(rng.normal(size=8))}
    found = natural_gradient(lambda v: {"x": fisher @ v["x"]}, g, damping=0.1 * scale, cg_steps=40)[
        "x"
    ]
    truth = np.linalg.solve(fisher + 0.1 * scale * np.eye(8), g["x"])
    assert np.allclose(found, truth, rtol=1e-6)
    first = natural_gradient(lambda v: {"x": fisher @ v["x"]}, g, damping=0.0, cg_steps=1)["x"]
    assert np.allclose(first, g["x"] * (g["x"] @ g["x"]) / (g["x"] @ fisher @ g["x"]))


@eqx.filter_jit
def stepped(kernel, steps, advantage, max_kl, cg_steps=10):
    """A step on the surrogate of these advantages, its vectors, and the policy of a vector."""
    flat, build = split(kernel)
    old = kernel.log_prob(steps)
    policy = lambda flat: build(flat).distributions(steps)

    def objective(flat):
        new = build(flat).log_prob(steps)
        return ppo_surrogate(new, old, advantage, clip=jnp.inf).objective.mean()

    moved, found, _ = trust_region_step(
        objective, policy, fisher_product(policy, flat), flat,
        max_kl=max_kl, damping=1e-6, cg_steps=cg_steps,
    )  # fmt: skip
    kl = factor_kl(policy(flat), policy(moved))
    return build(moved), found, jnp.abs(moved - flat).max(), kl, objective(moved) - objective(flat)


def around(x):
    """One step of a policy that draws z' ~ N(x, 1), and its only action."""
    one = lambda _: (Normal(x, jnp.ones(x.shape)), Categorical(jnp.zeros(1)))
    return jax.vmap(one)(jnp.zeros(1))


LIMITS = (1e-4, 0.1, 3.0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "state_std"), [("gru", 0.3), ("finite", None)])
def test_no_step_is_taken_beyond_the_limit_of_kl_or_downhill(name, state_std):
    """For limits of any size and advantages of any sign, alone and side by side."""
    kernel = make_kernel(name, jr.key(0), state_std=state_std)
    steps = make_trajectory(kernel, jr.key(1))
    limits = jnp.repeat(jnp.array(LIMITS), 8)
    advantages = jr.normal(jr.key(2), (len(limits), 12))
    lanes = eqx.filter_vmap(stepped, in_axes=(None, None, 0, 0))
    _, found, moves, kl, gain = lanes(kernel, steps, advantages, limits)
    assert np.all(kl.kl.mean(1) <= limits)
    assert np.allclose(kl.kl.mean(1), found.kl.kl, rtol=1e-9, atol=1e-15)
    assert np.allclose(gain, found.gain, atol=1e-12)
    assert np.array_equal(found.accepted, found.share > 0)
    assert np.array_equal(found.accepted, gain > 0)
    assert np.array_equal(found.accepted, moves > 0)
    assert found.accepted.mean() > 0.7
    assert {1.0} < set(np.asarray(found.share))  # some had to go less far
    few = partial(stepped, cg_steps=3)  # more of them magnify the last digits
    _, *lanes = eqx.filter_vmap(few, in_axes=(None, None, 0, 0))(kernel, steps, advantages, limits)
    for i in (0, 9, 23):
        _, *alone = few(kernel, steps, advantages[i], limits[i])
        beside = jax.tree.map(lambda x, i=i: x[i], lanes)
        for a, b in zip(*map(jax.tree.leaves, (alone, beside)), strict=True):
            assert np.allclose(a, b, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("objective", "product"),
    [
        (lambda x: x.sum() - 1e6 * (x != 1.0).any(), lambda v: v),  # uphill it falls at once
        (jnp.sum, jnp.negative),  # curves downwards
        (jnp.sum, lambda v: jnp.nan * v),
        (jnp.sum, jnp.zeros_like),  # does not curve at all
        (lambda x: 0.0 * x.sum(), lambda v: v),  # no gradient
        (lambda x: jnp.inf * x.sum(), lambda v: v),
    ],
)
def test_parameters_stay_where_no_step_is_found(objective, product):
    params = jnp.ones(3)
    step = jax.jit(
        partial(trust_region_step, objective, around, product, max_kl=0.01, damping=0.0, cg_steps=4)
    )
    moved, found, _ = step(params)
    assert np.array_equal(moved, params)
    assert not found.accepted
    assert not any(np.any(x) for x in jax.tree.leaves(found))


def test_a_step_along_a_line_is_as_long_as_the_limit():
    """For N(x, 1) KL is x²/2: from 0 the step is √(2 max_kl)."""
    params = jnp.zeros(1)
    product = fisher_product(around, params)
    words = {"max_kl": 0.02, "damping": 0.0, "cg_steps": 3}
    moved, found, gradient = trust_region_step(jnp.sum, around, product, params, **words)
    assert np.isclose(moved[0], 0.2, rtol=1e-12) == bool(found.share == 1)
    assert np.isclose(moved[0], 0.2 * found.share)
    assert gradient[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("max_kl", [1e-8, 1e-3, 0.3])
def test_the_return_improves_at_least_as_the_theorem_says(max_kl):
    """Schulman et al. (2015), theorem 1, on the chain of (s, z) with choices (a, z'):

        J(π̃) ≥ L(π̃) - 4 ε γ / (1 - γ)² max KL,   L(π̃) = J(π) + Σ ρ_π Σ π̃ A_π,   ε = max |A_π|

    The step is on every (o, z, z', a), with ρ_π A_π for its advantage; lemma A.1 is L with ρ_π̃.
    """
    pomdp, kernel = make_pomdp(jr.key(3)), make_finite_kernel(jr.key(4))
    values = jax.jit(lambda kernel: discounted_values(kernel, pomdp, gamma=GAMMA))
    exact = values(kernel)
    advantage = exact.q_value.swapaxes(1, 2)[:, None] - exact.value[:, :, None, None]  # [s z z' a]

    o, z, h, a = (x.ravel() for x in np.indices((2, 2, 2, 2)))
    no = jnp.zeros(len(o), bool)
    steps = Transition(
        jnp.asarray(o), jnp.asarray(z), jnp.asarray(a), jnp.asarray(h), jnp.zeros(len(o)), no, no,
        no, jnp.asarray(o),
    )  # fmt: skip
    visits = jnp.einsum("sg,so,sgha->ogha", exact.occupancy, pomdp.observation, advantage)
    weight = visits[o, z, h, a] * jnp.exp(kernel.log_prob(steps).joint) * len(o)
    moved, found, _, kl, gain = stepped(kernel, steps, weight, max_kl, cg_steps=24)
    assert found.accepted

    after, changed = values(moved), joint_policy(moved, pomdp)
    change = after.expected_return - exact.expected_return
    difference = jnp.einsum("sg,sgha,sgha->", after.occupancy, changed, advantage)
    assert np.isclose(change, difference, rtol=1e-9, atol=1e-14)  # lemma A.1
    expected = jnp.einsum("sg,sgha,sgha->", exact.occupancy, changed, advantage)
    assert np.isclose(gain, expected, rtol=1e-7, atol=1e-14)
    chance = jnp.exp(kernel.log_prob(steps).z)  # KL(o, z) of (a, z'), from the factors
    pairs = jnp.zeros((2, 2)).at[o, z].add(chance * kl.kl_action / 2)
    largest = jnp.max(pairs + kl.kl_z.reshape(2, 2, 4)[:, :, 0])
    penalty = 4 * jnp.abs(advantage).max() * GAMMA / (1 - GAMMA) ** 2 * largest
    assert change >= gain - penalty
    assert (gain > penalty) == (max_kl < 1e-6)  # small steps are sure to improve
    assert change > 0
