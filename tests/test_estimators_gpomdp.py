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
    make_pomdp,
    make_trajectory,
)

from spg.estimators import gpomdp
from spg.exact import enumeration
from spg.kernels.finite import expected_kernel, finite_kernel, random_controller, start_distribution
from spg.types import Transition
from spg.worlds.models import DensePOMDP

pytestmark = pytest.mark.usefixtures("float64")

LIKELIHOODS = {
    "istate": gpomdp.istate,
    "exp": partial(gpomdp.exp_istate, num_obs=2),
    "exp-observations": partial(gpomdp.exp_istate_by_observations, num_obs=2),
}


def memory_of(name, kernel):
    return jnp.zeros(0) if name == "istate" else start_distribution(kernel)


def integers(traj):
    """The trajectory with integer observations."""
    one_hot = jnp.issubdtype(traj.obs.dtype, jnp.floating)
    return traj._replace(obs=jnp.argmax(traj.obs, -1)) if one_hot else traj


# --- golden numbers


GOLDEN = {
    "exp": (
        (0.69, 0.32826087, 0.47688742), 0.09679211, -4.8203815,
        (-1.10755414, -0.94935865), (-0.35808556, -0.73339119),
    ),
    "exp-observations": (
        (0.69, 0.373, 0.3919), 0.583, -5.1536631,
        (-1.59917150, -0.88754162), (-0.60472421, -0.77576177),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_filter_of_three_steps(name):
    """Two I-states, one observation, actions 0, 1, 1, weights 1, 2, 3: values worked by hand."""
    rows = lambda *p: jnp.log(jnp.array(p))[:, None]
    kernel = finite_kernel(rows((0.7, 0.3), (0.4, 0.6)), rows((0.9, 0.1), (0.2, 0.8)))
    zero, no = jnp.zeros(3, int), jnp.zeros(3, bool)
    first = no.at[0].set(True)
    traj = Transition(zero, zero, jnp.array([0, 1, 1]), zero, jnp.zeros(3), first, no, no, zero)
    likelihood = getattr(gpomdp, {"exp": "exp_istate"}.get(name, "exp_istate_by_observations"))
    weight = jnp.array([1.0, 2.0, 3.0])

    def total(kernel):
        log_m, alpha = likelihood(kernel, start_distribution(kernel), traj, num_obs=1)
        return jnp.vdot(weight, log_m), (log_m, alpha)

    slope = eqx.filter_jit(eqx.filter_value_and_grad(total, has_aux=True))
    (value, (log_m, alpha)), gradient = slope(kernel)
    m, last, total_value, by_cell, by_head = GOLDEN[name]
    assert np.allclose(jnp.exp(log_m), m, atol=1e-8)
    assert np.allclose(alpha, [last, 1 - last], atol=1e-8)
    assert np.allclose(value, total_value, atol=1e-7)
    for logits, golden in (
        (gradient.cell.distribution.logits, by_cell),
        (gradient.head.logits, by_head),
    ):
        assert np.allclose(logits[:, 0], np.outer(golden, [1, -1]), atol=1e-8)


# --- bias, by the sum over every trajectory

T = 3
ONE = {"gamma": 1.0, "num_steps": T}


def estimate(name, kernel, traj, *, baseline=None):
    """Σ_t r_{t+1} e_t - b_t s_t, without discount."""
    state = gpomdp.init(kernel, memory_of(name, kernel))
    traj = integers(traj)
    state = gpomdp.segment(LIKELIHOODS[name], kernel, state, traj, beta=1.0, baseline=baseline)
    return jax.tree.map(lambda x: T * x, state.estimate)


def past_baseline(name, kernel, traj):
    """Something of the past of each action: the observation, the I-state, the reward before."""
    traj = integers(traj)
    before = jnp.append(0.0, traj.reward[:-1]) + 0.7 * traj.obs
    if name == "istate":
        return before + 0.4 * traj.z
    return before + gpomdp.filtered(
        kernel, start_distribution(kernel), traj, num_obs=2
    ) @ jnp.array([0.3, -1.0])


@pytest.mark.parametrize("with_baseline", [False, True])
@pytest.mark.parametrize("name", ["istate", "exp"])
def test_estimates_of_the_controller_are_unbiased(name, with_baseline):
    pomdp, kernel = make_pomdp(jr.key(0)), make_finite_kernel(jr.key(1))

    def estimator(kernel, traj):
        baseline = past_baseline(name, kernel, traj) if with_baseline else None
        return estimate(name, kernel, traj, baseline=baseline)

    mean = eqx.filter_jit(lambda k: enumeration.enumerate_mean(estimator, k, pomdp, num_steps=T))(
        kernel
    )
    value = lambda k: enumeration.expected_return(k, pomdp, **ONE)
    truth = eqx.filter_jit(eqx.filter_grad(value))(kernel)
    assert largest_difference(truth, jax.tree.map(jnp.zeros_like, truth)) > 0.01
    assert_trees_close(mean, eqx.filter(truth, eqx.is_inexact_array), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_exp_by_observations_is_unbiased_for_the_policy_that_draws_actions_apart():
    """Its own gradient is not the controller's, and not what the controller's acts give."""
    pomdp, kernel = make_pomdp(jr.key(0)), make_finite_kernel(jr.key(1))
    name = "exp-observations"
    other = lambda kernel: enumeration.enumerate_return(expected_kernel(kernel), pomdp, **ONE)
    apart, truth = eqx.filter_jit(eqx.filter_value_and_grad(other))(kernel)
    truth = eqx.filter(truth, eqx.is_inexact_array)
    own = lambda _, traj: estimate(name, kernel, traj)
    mean = eqx.filter_jit(
        lambda k: enumeration.enumerate_mean(own, expected_kernel(k), pomdp, num_steps=T)
    )(kernel)
    assert_trees_close(mean, truth, rtol=1e-9, atol=1e-12)

    value = lambda kernel: enumeration.expected_return(kernel, pomdp, **ONE)
    together, gradient = eqx.filter_jit(eqx.filter_value_and_grad(value))(kernel)
    assert abs(together - apart) > 1e-3
    assert largest_difference(truth, eqx.filter(gradient, eqx.is_inexact_array)) > 1e-3
    acted = eqx.filter_jit(
        lambda k: enumeration.enumerate_mean(partial(estimate, name), k, pomdp, num_steps=T)
    )(kernel)
    assert largest_difference(acted, truth) > 1e-3
    assert largest_difference(acted, eqx.filter(gradient, eqx.is_inexact_array)) > 1e-3


def returns_of_both(kernel, pomdp):
    """Of the controller, and of the policy that draws actions apart."""

    @eqx.filter_jit
    def both(kernel):
        apart = enumeration.enumerate_return(expected_kernel(kernel), pomdp, **ONE)
        return enumeration.expected_return(kernel, pomdp, **ONE), apart

    return both(kernel)


def test_the_two_policies_agree_where_successors_are_certain():
    pomdp = make_pomdp(jr.key(0))
    successors = jnp.array([[[1], [0]], [[0], [1]]])
    head = make_finite_kernel(jr.key(1)).head.logits
    kernel = finite_kernel(jnp.zeros((2, 2, 1)), head, successors)
    assert np.allclose(*returns_of_both(kernel, pomdp))


def test_a_held_choice_pays_one_to_the_controller_and_a_half_to_the_other_policy():
    """An I-state drawn once decides every action; a repeated action pays 1."""
    repeat = jnp.zeros((3, 2, 3)).at[:, 0, 1].set(1.0).at[:, 1, 2].set(1.0)  # s' is the action
    pays = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    pomdp = DensePOMDP(repeat, jnp.ones((3, 1)), pays, jnp.array([1.0, 0.0, 0.0]))
    successors = jnp.array([[[1, 2]], [[1, 1]], [[2, 2]]])
    cell = jnp.zeros((3, 1, 2)).at[1:, 0, 1].set(-jnp.inf)
    head = jnp.zeros((3, 1, 2)).at[1, 0, 1].set(-40.0).at[2, 0, 0].set(-40.0)
    kernel = finite_kernel(cell, head, successors)
    assert np.allclose(returns_of_both(kernel, pomdp), [2, 1])


@pytest.mark.slow
def test_the_stationary_mean_is_the_discounted_gradient():
    """E[r_{t+1} e_t] = Σ_n βⁿ d ∇K Kⁿ r over the steps seen, from the stationary law."""
    beta = 0.8
    pomdp = make_pomdp(jr.key(0))
    kernel = make_finite_kernel(jr.key(1), num_z=1)
    law = enumeration.stationary_distribution(kernel, pomdp)
    pomdp = pomdp._replace(start=law[:, 0])

    def estimator(kernel, traj):
        """The last term of the average alone: r_T e_{T-1}."""
        last = traj._replace(reward=traj.reward.at[:-1].set(0.0), obs=integers(traj).obs)
        state = gpomdp.init(kernel, jnp.zeros(0))
        state = gpomdp.segment(gpomdp.istate, kernel, state, last, beta=beta)
        return jax.tree.map(lambda x: T * x, state.estimate)

    mean = eqx.filter_jit(lambda k: enumeration.enumerate_mean(estimator, k, pomdp, num_steps=T))(
        kernel
    )
    chain = enumeration.joint_chain(kernel, pomdp).reshape(2, 2)
    reward = jnp.einsum("sgha,sa->s", enumeration.joint_policy(kernel, pomdp), pomdp.reward)

    def series(kernel):
        moves = enumeration.joint_chain(kernel, pomdp).reshape(2, 2)
        pays = jnp.einsum("sgha,sa->s", enumeration.joint_policy(kernel, pomdp), pomdp.reward)
        later = sum(beta**n * jnp.linalg.matrix_power(chain, n - 1) @ reward for n in range(1, T))
        return law[:, 0] @ (pays + moves @ later)

    assert_trees_close(mean, eqx.filter_grad(series)(kernel), rtol=1e-9, atol=1e-12)


# --- forms


def trajectory(kernel, *, starts=(0,)):
    return integers(make_trajectory(kernel, jr.key(2), num_steps=12, starts=starts))


@pytest.mark.slow
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_segments_give_the_numbers_of_single_steps(name):
    kernel = random_controller(4, 2, 2, out_degree=2, std=1.0, key=jr.key(1))
    baseline = jr.normal(jr.key(3), (12,))
    start = gpomdp.init(kernel, memory_of(name, kernel))
    step = partial(gpomdp.step, LIKELIHOODS[name], kernel, beta=0.9)
    segment = partial(gpomdp.segment, LIKELIHOODS[name], kernel, beta=0.9)

    @eqx.filter_jit
    def streamed(state, traj):
        one = lambda state, x: (step(state, x[0], baseline=x[1]), None)
        return jax.lax.scan(one, state, (traj, baseline))[0]

    @eqx.filter_jit
    def parallel(state, traj):
        for a, b in ((0, 5), (5, 6), (6, 12)):
            part = jax.tree.map(lambda x: x[a:b], (traj, baseline))  # noqa: B023
            state = segment(state, part[0], baseline=part[1])
        return state

    for starts in ((0,), (0, 4, 5, 9)):
        traj = trajectory(kernel, starts=starts)
        one, other = streamed(start, traj), parallel(start, traj)
        assert one.count == other.count == 12
        assert np.allclose(one.memory, other.memory, rtol=1e-12)
        assert largest_difference(one.estimate, jax.tree.map(jnp.zeros_like, one.estimate)) > 0.01
        for field in ("estimate", "trace", "sensitivity"):
            assert_trees_close(getattr(one, field), getattr(other, field), rtol=1e-10, atol=1e-13)


@pytest.mark.long
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradient_is_the_mean_of_segments_with_empty_traces(name):
    kernel = make_finite_kernel(jr.key(1))
    trajs = [
        integers(make_trajectory(kernel, jr.key(i), num_steps=6, starts=(0, 3))) for i in (4, 5)
    ]
    memory, baseline = memory_of(name, kernel), jr.normal(jr.key(3), (2, 6))
    state = gpomdp.init(kernel, memory)
    each = [
        gpomdp.segment(LIKELIHOODS[name], kernel, state, traj, beta=0.9, baseline=b).estimate
        for traj, b in zip(trajs, baseline, strict=True)
    ]
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *each)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *trajs)
    weight = jax.vmap(lambda traj: gpomdp.returns(traj, 0.9))(stacked) - baseline
    memory = jnp.stack([memory] * 2)
    gradient = gpomdp.gradient(LIKELIHOODS[name], kernel, memory, stacked, weight)
    assert_trees_close(gradient, mean, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_the_filter_by_observations_is_the_policy_that_acts():
    """The likelihood equals log π of `expected_kernel` on the same record."""
    kernel = make_finite_kernel(jr.key(1))
    traj = trajectory(kernel, starts=(0, 5))
    log_m, _ = LIKELIHOODS["exp-observations"](kernel, start_distribution(kernel), traj)
    other = expected_kernel(kernel)
    z = jnp.broadcast_to(other.z0, (12, 2))
    scored = other.log_prob(traj._replace(z=z, z_next=z))
    assert np.allclose(scored.joint, log_m, rtol=1e-12)


def test_action_filtering_finds_the_istate_that_actions_reveal():
    """I-states 1 and 2 act differently for certain: after one action α is certain."""
    successors = jnp.array([[[1, 2]], [[1, 2]], [[1, 2]]])
    head = jnp.zeros((3, 1, 2)).at[1, 0, 1].set(-jnp.inf).at[2, 0, 0].set(-jnp.inf)
    kernel = finite_kernel(jnp.zeros((3, 1, 2)), head, successors)
    zero, no = jnp.zeros(2, int), jnp.zeros(2, bool)
    traj = Transition(zero, zero, jnp.array([1, 0]), zero, jnp.zeros(2), no, no, no, zero)
    log_m, alpha = gpomdp.exp_istate(kernel, start_distribution(kernel), traj, num_obs=1)
    assert np.allclose(jnp.exp(log_m), 0.5)
    assert np.allclose(alpha, [0, 1, 0])
    alphas = gpomdp.filtered(kernel, start_distribution(kernel), traj, num_obs=1)
    assert np.allclose(alphas, [[1, 0, 0], [0, 0, 1]])


def test_values_are_mean_returns_by_istate_and_observation():
    kernel = make_finite_kernel(jr.key(1))
    trajs = [trajectory(kernel, starts=(0, 5)), trajectory(kernel, starts=(0,))]
    trajs = jax.tree.map(lambda *x: np.stack(x), *trajs)

    @jax.jit
    def baselines(trajs):
        certain = jax.nn.one_hot(trajs.z, 2)
        returns = jax.vmap(lambda traj: gpomdp.returns(traj, 0.9))(trajs)
        values = gpomdp.collect(certain, trajs.obs, returns, num_places=2)
        one = partial(gpomdp.value_baseline, values)
        even = one(jnp.full((2, 12, 2), 0.5), trajs.obs)
        return values, returns, one(certain, trajs.obs), even

    values, returns, baseline, even = baselines(trajs)
    for g, o in np.ndindex(2, 2):
        here = (trajs.z == g) & (trajs.obs == o)
        assert np.allclose(baseline[here], returns[here].mean())
    table = values.sums / values.counts
    assert np.allclose(even, table.mean(0)[trajs.obs])
