"""Optima of imitation on enumerable worlds, golden numbers, likelihoods of cloned actions."""

import itertools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import (
    assert_trees_close,
    largest_difference,
    make_finite_kernel,
    make_kernel,
    make_pomdp,
)

from spg.estimators import imitation
from spg.exact import enumeration
from spg.types import Transition

pytestmark = pytest.mark.usefixtures("float64")

LN2 = float(np.log(2))
ONE, ZERO, NO = jnp.ones(()), jnp.zeros(()), jnp.zeros((), bool)


@pytest.fixture(scope="module")
def occupancies(float64):
    """d_E(s, a) and d_π(s, a) of two policies with two I-states, discounted by .9, exactly."""
    pomdp = make_pomdp(jr.key(0))

    @jax.jit
    def occupancy(kernel):
        rho = enumeration.discounted_values(kernel, pomdp, gamma=0.9).occupancy
        return 0.1 * jnp.einsum("sg,sgha->sa", rho, enumeration.joint_policy(kernel, pomdp))

    found = [occupancy(make_finite_kernel(jr.key(k))) for k in (1, 2)]
    assert all(np.isclose(d.sum(), 1) and d.min() > 0 for d in found)
    return found


def minimise(loss, occupancies):
    """The table `[S, A]` at which Σ d_E loss(x, 1) + Σ d_π loss(x, 0) is least, by Newton."""
    expert, policy = occupancies

    def total(x):
        x = x.reshape(expert.shape)
        return jnp.sum(expert * loss(x, jnp.ones_like(x)) + policy * loss(x, jnp.zeros_like(x)))

    def newton(_, x):
        return x - jnp.linalg.solve(jax.hessian(total)(x), jax.grad(total)(x))

    x = jax.jit(lambda x: jax.lax.fori_loop(0, 20, newton, x))(jnp.zeros(expert.size))
    return x.reshape(expert.shape)


def test_the_best_discriminator_is_the_log_ratio_of_occupancies(occupancies):
    expert, policy = occupancies
    ratio = jnp.log(expert / policy)
    assert np.abs(ratio).max() > 0.2
    assert np.allclose(minimise(imitation.logistic_loss, occupancies), ratio, rtol=1e-10)
    flat = minimise(partial(imitation.logistic_loss, entropy_coef=0.3), occupancies)
    assert np.all(np.abs(flat) < 0.95 * np.abs(ratio))
    assert np.all(flat * ratio > 0)
    squares = minimise(imitation.least_squares_loss, occupancies)
    assert np.allclose(squares, (expert - policy) / (expert + policy), rtol=1e-12)


def test_the_logistic_loss_is_that_of_labels_less_entropy_in_nats():
    logit, label, share = jnp.array([-3.0, 0.5, 40.0]), jnp.array([1.0, 0.0, 0.9]), 0.25
    p, q = (1 / (1 + np.exp(-s * np.asarray(logit))) for s in (1, -1))
    cross = -label * np.log(p) - (1 - label) * np.log(q)
    entropy = -p * np.log(p) - q * np.log(q)
    found = imitation.logistic_loss(logit, label, entropy_coef=share)
    assert np.allclose(found, cross - share * entropy, rtol=1e-12)


def test_golden_numbers_of_a_discriminator_that_knows_nothing():
    """Its loss is (1 - c_H) log 2 = .692454 for either label, and its reward log 2."""
    for label in (ONE, ZERO):
        found = imitation.logistic_loss(ZERO, label, entropy_coef=1e-3)
        assert np.isclose(found, 0.692454, atol=5e-7)
        assert np.isclose(imitation.least_squares_loss(ZERO, label), 1)
    assert np.isclose(imitation.logistic_reward(ZERO), LN2)
    least_squares = imitation.least_squares_reward(jnp.array([-2.0, -1.0, 0.0, 1.0, 3.0]))
    assert np.allclose(least_squares, [0, 0, 0.75, 1, 0])


def test_soft_labels_stay_in_their_ranges():
    drawn = imitation.soft_labels(jnp.repeat(jnp.array([1.0, 0.0]), 2000), key=jr.key(0))
    for part, (low, high) in zip(drawn.reshape(2, -1), [(0.8, 0.99), (0.01, 0.1)], strict=True):
        assert low <= part.min() < low + 0.01 * (high - low)
        assert high >= part.max() > high - 0.01 * (high - low)


def test_the_squared_slope_is_that_of_finite_differences_in_all_inputs():
    weight, (state, action) = jr.normal(jr.key(0), (3,)), jnp.split(jr.normal(jr.key(1), (3,)), [2])
    discriminator = lambda s, a: jnp.sin(jnp.concatenate([s, a]) @ weight)
    value = lambda x: discriminator(*jnp.split(x, [2]))
    here, steps = jnp.concatenate([state, action]), 1e-5 * jnp.eye(3)
    slope = [(value(here + step) - value(here - step)) / 2e-5 for step in steps]
    found = imitation.squared_slope(discriminator, state, action)
    assert np.isclose(found, np.sum(np.square(slope)), rtol=1e-8)


C, GAMMA = 0.5, 0.99


def test_golden_numbers_of_ls_iq():
    """c = .5, γ = .99: rewards ±2, values ±200; with Q = V = 0 the losses are 200², and 2² each."""
    words = {"c": C, "gamma": GAMMA}
    assert np.isclose(imitation.q_bound(**words), 200)
    target = partial(imitation.lsiq_target, **words)
    ends = ~NO
    assert np.isclose(target(ZERO, NO, ONE), 200)
    assert np.isclose(target(ZERO, NO, ZERO), -2)
    assert np.isclose(target(5.0 * ONE, ends, ZERO), -200)
    assert np.isclose(target(1e4 * ONE, NO, ZERO), -2 + 0.99 * 200)
    assert np.isclose(target(-1e4 * ONE, NO, ZERO), -200)  # clipped, the target is the bound
    free = partial(target, fixed=False)
    assert np.isclose(free(10.0 * ONE, NO, ONE), 2 + 9.9)
    assert np.isclose(free(10.0 * ONE, ends, ONE), 200)
    assert np.isclose(free(10.0 * ONE, NO, ZERO), -2 + 9.9)


def test_regularised_loss_is_that_of_the_objective(occupancies):
    """1/c less E_E[r] - E_π[r] - c/2 (E_E[r²] + E_π[r²]): for any r; and it is IQ-Learn's."""
    expert, policy = jr.normal(jr.key(0), (2, 7))
    loss = imitation.regularised_loss
    both = loss(expert, jnp.ones(7), c=C).mean() + loss(policy, jnp.zeros(7), c=C).mean()
    squares = (expert**2).mean() + (policy**2).mean()
    objective = expert.mean() - policy.mean() - C / 2 * squares
    assert np.isclose(both, 1 / C - objective, rtol=1e-12)
    reward, alive = jnp.concatenate([expert, policy]), jnp.zeros(14, bool)
    words = {"c": C, "gamma": GAMMA}
    assert np.isclose(imitation.iq_learn_loss(expert, policy, reward, alive, **words), -objective)
    ended = imitation.iq_learn_loss(expert, policy, reward, ~alive, **words)
    assert np.isclose(ended + objective, C / 2 * (0.01 - 1) * squares, rtol=1e-9)


def test_optimum_of_ls_iq_on_a_tabular_mixture(occupancies):
    """r* = (d_E - d_π) / (c (d_E + d_π)), reached by Q on a deterministic world; |Q*| <= bound."""
    expert, policy = occupancies
    after = jnp.array([[1, 0], [0, 1]])  # the state that follows (s, a)
    choice = jnp.array([[0.3, 0.7], [0.6, 0.4]])  # μ(a | s), whose V it is
    alive = jnp.zeros((2, 2), bool)

    def reward(q_value):
        v_next = (choice * q_value).sum(1)[after]
        return imitation.implicit_reward(q_value, v_next, alive, gamma=0.9)

    loss = lambda q, label: imitation.regularised_loss(reward(q), label, c=C)
    best = minimise(loss, occupancies)
    exact = (expert - policy) / (expert + policy) / C
    assert np.allclose(reward(best), exact, rtol=1e-9)
    assert np.abs(exact).max() <= 1 / C
    assert np.abs(best).max() <= imitation.q_bound(c=C, gamma=0.9)
    assert np.allclose(imitation.implicit_reward(best, best, ~alive, gamma=0.9), best)


@pytest.mark.slow
def test_baselines_of_iq_learn_have_the_same_mean(occupancies):
    """E_π[Q - γ V'] = E_d[V - γ V'] = (1 - γ) E V(s_0), d of the policy and d of the expert."""
    gamma, q_value = 0.9, jr.normal(jr.key(3), (2, 2))
    pomdp = make_pomdp(jr.key(0))._replace(observation=jnp.eye(2))
    expert, policy = (make_finite_kernel(jr.key(k), num_z=1) for k in (1, 2))

    def steps(kernel):
        choice = enumeration.joint_policy(kernel, pomdp)[:, 0, 0]
        rho = enumeration.discounted_values(kernel, pomdp, gamma=gamma).occupancy[:, 0]
        return choice, (1 - gamma) * (rho[:, None] * choice)[:, :, None] * pomdp.transition

    choice, visited = steps(policy)
    value = (choice * q_value).sum(1)
    shape = visited.shape
    q, v, v_next = (
        jnp.broadcast_to(x, shape) for x in (q_value[..., None], value[:, None, None], value)
    )
    alive = jnp.zeros(shape, bool)
    taken = imitation.implicit_reward(q, v_next, alive, gamma=gamma)
    left = imitation.implicit_reward(v, v_next, alive, gamma=gamma)
    start = (1 - gamma) * pomdp.start @ value
    means = [(visited * taken).sum(), (visited * left).sum(), (steps(expert)[1] * left).sum()]
    assert np.allclose(means, start, rtol=1e-10)
    assert not np.isclose((steps(expert)[1] * taken).sum(), start, rtol=1e-2)


# behaviour cloning: five steps, of which the fourth opens an episode

FIRST = np.array([True, False, False, True, False])
OBS, ACTION = np.array([0, 1, 1, 0, 1]), np.array([1, 0, 0, 1, 1])


def record(kernel, obs):
    z = jnp.broadcast_to(kernel.z0, (5, *kernel.z0.shape))
    obs, action, first = jnp.asarray(obs), jnp.asarray(ACTION), jnp.asarray(FIRST)
    ends = jnp.roll(first, -1).at[-1].set(False)
    return Transition(obs, z, action, z, jnp.zeros(5), first, ends, jnp.zeros(5, bool), obs)


def by_z(kernel, steps):
    """log ω and Σ log μ for every sequence of z', `[2^5]`."""

    def one(z_next):
        z, omega, mu = kernel.z0, 0.0, 0.0
        for t in range(5):
            z = kernel.z0 if FIRST[t] else z
            omega += kernel.cell(steps.obs[t], z).log_prob(z_next[t])
            mu += kernel.head(steps.obs[t], z_next[t]).log_prob(steps.action[t])
            z = z_next[t]
        return omega, mu

    every = jnp.array(list(itertools.product(range(2), repeat=5)), kernel.z0.dtype)
    return jax.vmap(one)(every)


@pytest.mark.parametrize("num_draws", [1, 3])
def test_the_gradient_of_a_drawn_memory_is_that_of_the_bound(num_draws):
    """E_ω Σ log μ by enumeration; four standard errors. With γ = 0 it is biased."""
    kernel = make_finite_kernel(jr.key(0))
    steps = record(kernel, OBS)

    def bound(kernel):
        omega, mu = by_z(kernel, steps)
        return jnp.vdot(jnp.exp(omega), mu)

    @partial(jax.jit, static_argnums=1)
    def estimates(keys, gamma):
        def one(key):
            found = lambda kernel: imitation.clone_surrogate(
                kernel, steps, num_draws=num_draws, gamma=gamma, key=key
            )[0].sum()
            return eqx.filter_grad(found)(kernel)

        return jax.vmap(one)(keys)

    exact = eqx.filter_jit(eqx.filter_grad(bound))(kernel)

    def errors(gamma):
        found = estimates(jr.split(jr.key(1), 20_000), gamma)
        pairs = zip(*map(jax.tree.leaves, (found, exact)), strict=True)
        far = [np.abs(x.mean(0) - y) / (x.std(0) / 20_000**0.5 + 1e-12) for x, y in pairs]
        return max(x.max(initial=0) for x in far)

    assert errors(1.0) < 4.5
    assert errors(0.0) > 6


@pytest.mark.slow
def test_the_likelihood_of_draws_is_a_bound_that_tightens():
    kernel = make_finite_kernel(jr.key(0))
    steps = record(kernel, OBS)
    omega, mu = by_z(kernel, steps)
    exact, bound = jax.nn.logsumexp(omega + mu), jnp.vdot(jnp.exp(omega), mu)

    def mean(num_draws):
        one = partial(imitation.clone_log_likelihood, kernel, steps, num_draws=num_draws)
        found = jax.jit(jax.vmap(lambda key: one(key=key)))(jr.split(jr.key(2), 8000))
        return found.mean(), 4 * found.std() / 8000**0.5

    one, few, many = mean(1), mean(4), mean(64)
    assert abs(one[0] - bound) < one[1]
    assert one[0] + one[1] < few[0] - few[1]
    assert few[0] + few[1] < many[0]
    assert abs(many[0] - exact) < 0.03 < exact - bound


@pytest.mark.slow
def test_the_likelihood_of_a_computed_memory_is_exact_with_its_gradient():
    """Against a loop over the steps, through time."""
    kernel = make_kernel("gru", jr.key(0))
    steps = record(kernel, jr.normal(jr.key(1), (5, 2)))

    def loop(kernel):
        z0 = jax.lax.stop_gradient(kernel.z0)
        z, total = z0, 0.0
        for t in range(5):
            seen = kernel.normalizer(steps.obs[t])
            z = kernel.cell(seen, z0 if FIRST[t] else z).loc
            total += kernel.head(seen, z).log_prob(steps.action[t])
        return total

    surrogate = lambda kernel: imitation.clone_surrogate(kernel, steps, num_draws=1, key=jr.key(0))[
        0
    ].sum()
    both = eqx.filter_jit(lambda k: [eqx.filter_value_and_grad(f)(k) for f in (surrogate, loop)])
    (found, gradient), (exact, slope) = both(kernel)
    assert np.isclose(found, exact, rtol=1e-12)
    assert_trees_close(gradient, slope, rtol=1e-9, atol=1e-12)
    assert largest_difference(slope.cell, jax.tree.map(jnp.zeros_like, slope.cell)) > 1e-3
    likelihood = imitation.clone_log_likelihood(kernel, steps, num_draws=1, key=jr.key(0))
    assert np.isclose(likelihood, exact, rtol=1e-12)
