from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import (
    assert_trees_close,
    largest_difference,
    make_kernel,
    make_pomdp,
    make_trajectory,
)
from jax import lax
from jax.flatten_util import ravel_pytree

from spg.estimators.bounds import path_sums
from spg.estimators.returns import returns_to_go
from spg.estimators.score import episodic_gpomdp, reinforce, score_estimate
from spg.exact import enumeration
from spg.types import Transition

pytestmark = pytest.mark.usefixtures("float64")

GAMMA = 0.9
estimate = eqx.filter_jit(score_estimate)

# --- identities: when the segment length matters and when it does not


@pytest.mark.parametrize("segment_length", [1, 3])
@pytest.mark.parametrize("name", ["gru", "finite"])
def test_noise_makes_segment_length_irrelevant(name, segment_length):
    kernel = make_kernel(name, jr.key(0), state_std=0.3)
    traj = make_trajectory(kernel, jr.key(1))
    whole = estimate(kernel, traj, traj.reward, segment_length=12)
    short = estimate(kernel, traj, traj.reward, segment_length=segment_length)
    assert_trees_close(short, whole, rtol=1e-11, atol=1e-13)


def test_a_cell_without_parameters_makes_segment_length_irrelevant():
    kernel = make_kernel("window", jr.key(0))
    traj = make_trajectory(kernel, jr.key(1))
    whole = estimate(kernel, traj, traj.reward, segment_length=12)
    short = estimate(kernel, traj, traj.reward, segment_length=1)
    assert_trees_close(short, whole, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["gru", "linear"])
def test_segment_length_matters_for_a_computed_state(name):
    kernel = make_kernel(name, jr.key(0))
    traj = make_trajectory(kernel, jr.key(1))
    whole = estimate(kernel, traj, traj.reward, segment_length=12)
    short = estimate(kernel, traj, traj.reward, segment_length=1)
    assert largest_difference(whole, short) > 1e-2


@pytest.mark.parametrize("name", ["gru", "linear"])
def test_no_gradient_crosses_the_start_of_an_episode(name):
    """Segments that are the episodes give what one segment over both gives."""
    kernel = make_kernel(name, jr.key(0))
    traj = make_trajectory(kernel, jr.key(1), starts=(0, 6))
    whole = estimate(kernel, traj, traj.reward, segment_length=12)
    episodes = estimate(kernel, traj, traj.reward, segment_length=6)
    assert_trees_close(whole, episodes, rtol=1e-11, atol=1e-13)


def test_one_step_is_a_trajectory():
    kernel = make_kernel("gru", jr.key(0))
    traj = make_trajectory(kernel, jr.key(1), num_steps=1, starts=(0,))
    one = estimate(kernel, traj, traj.reward, segment_length=1)
    obs, action = traj.obs[0], traj.action[0]
    log_prob = lambda k: k.head(obs, k.cell(obs, k.z0).loc).log_prob(action)
    truth = eqx.filter_jit(eqx.filter_grad(log_prob))(kernel)
    truth = eqx.tree_at(lambda k: k.z0, truth, jnp.zeros_like(truth.z0))  # z0 is not learned
    scaled = jax.tree.map(lambda g: traj.reward[0] * g, truth)
    assert_trees_close(one, scaled, rtol=1e-11, atol=1e-13)


# --- bias, by the sum over every trajectory


def whole_return(traj):
    """J(τ), the same weight at every step."""
    total = jnp.vdot(traj.reward, GAMMA ** jnp.arange(len(traj.reward)))
    return jnp.full_like(traj.reward, total)


def reward_to_go(traj):
    """γ^t G_t."""
    zeros = jnp.zeros_like(traj.reward)
    returns = returns_to_go(traj.reward, zeros, traj.terminated, traj.truncated, gamma=GAMMA)
    return GAMMA ** jnp.arange(len(returns)) * returns


@cache  # so that each kind of kernel is compiled once
def mean_estimate(weight, segment_length):
    """Σ_τ p(τ) ĝ(τ), a function of the kernel."""
    estimator = lambda kernel, traj: score_estimate(
        kernel, traj, weight(traj), segment_length=segment_length
    )
    pomdp = make_pomdp(jr.key(0))
    return eqx.filter_jit(lambda k: enumeration.enumerate_mean(estimator, k, pomdp, num_steps=3))


@cache
def exact_gradient(num_steps=3):
    """∇J, a function of the kernel whose z' is computed."""
    pomdp = make_pomdp(jr.key(0))
    value = lambda k: enumeration.enumerate_return(k, pomdp, gamma=GAMMA, num_steps=num_steps)
    return eqx.filter_jit(eqx.filter_grad(value))


@pytest.mark.parametrize("weight", [whole_return, reward_to_go])
@pytest.mark.parametrize("segment_length", [1, 3])
def test_score_estimate_of_controller_is_unbiased(segment_length, weight):
    pomdp = make_pomdp(jr.key(0))
    kernel = make_kernel("finite", jr.key(1))
    mean = mean_estimate(weight, segment_length)(kernel)
    truth = eqx.filter_grad(enumeration.expected_return)(kernel, pomdp, gamma=GAMMA, num_steps=3)
    assert_trees_close(mean, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("gru", reward_to_go), ("linear", reward_to_go)],
)
def test_bptt_through_the_whole_episode_is_unbiased(name, weight):
    kernel = make_kernel(name, jr.key(1))
    mean = mean_estimate(weight, 3)(kernel)
    assert_trees_close(mean, exact_gradient()(kernel), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["gru", "linear"])
def test_truncated_bptt_is_biased(name):
    kernel = make_kernel(name, jr.key(1))
    mean, truth = mean_estimate(reward_to_go, 1)(kernel), exact_gradient()(kernel)
    assert largest_difference(mean.head, truth.head) < 1e-12
    size = largest_difference(truth.cell, jax.tree.map(jnp.zeros_like, truth.cell))
    assert largest_difference(mean.cell, truth.cell) > 0.01 * size


@pytest.mark.parametrize("name", ["window", "empty"])
def test_cells_without_parameters_are_unbiased_at_length_one(name):
    kernel = make_kernel(name, jr.key(1))
    mean = mean_estimate(reward_to_go, 1)(kernel)
    assert_trees_close(mean, exact_gradient()(kernel), rtol=1e-10, atol=1e-12)


# --- Gaussian internal states, against quadrature over z'


def quadrature_return(kernel, pomdp, num_steps, nodes=24):
    """J for a one-dimensional Gaussian z', by nested Gauss-Hermite sums; no score anywhere."""
    x, weight = np.polynomial.hermite_e.hermegauss(nodes)
    num_states, num_obs = pomdp.observation.shape

    def value(s, z, steps):
        if steps == 0:
            return 0.0
        total = 0.0
        for o in range(num_obs):
            obs = jnp.eye(num_obs)[o]
            law = kernel.cell(obs, z)

            def after(z, obs=obs):
                future = jnp.stack([value(t, z, steps - 1) + 0 * z[0] for t in range(num_states)])
                q_value = pomdp.reward[s] + GAMMA * pomdp.transition[s] @ future
                return jnp.vdot(jax.nn.softmax(kernel.head(obs, z).logits), q_value)

            z_next = law.loc + law.std * x[:, None]
            mean = jnp.vdot(weight / weight.sum(), jax.vmap(after)(z_next))
            total += pomdp.observation[s, o] * mean
        return total

    return sum(pomdp.start[s] * value(s, kernel.z0, num_steps) for s in range(num_states))


@eqx.filter_jit
def quadrature_gradient(kernel, pomdp, num_steps):
    grad = eqx.filter_grad(quadrature_return)(kernel, pomdp, num_steps)
    return eqx.tree_at(lambda k: k.z0, grad, jnp.zeros_like(grad.z0))  # not learned


def simulate(kernel, pomdp, num_steps, key):
    """A sampled trajectory of the tabular problem, by hand."""

    def step(carry, key):
        s, z = carry
        obs_key, policy_key, state_key = jr.split(key, 3)
        num_obs = pomdp.observation.shape[1]
        obs = jax.nn.one_hot(jr.categorical(obs_key, jnp.log(pomdp.observation[s])), num_obs)
        action, z_next = kernel.sample(obs, z, key=policy_key)
        reward = pomdp.reward[s, action]
        s = jr.categorical(state_key, jnp.log(pomdp.transition[s, action]))
        return (s, z_next), (obs, z, action, z_next, reward)

    start_key, key = jr.split(key)
    start = jr.categorical(start_key, jnp.log(pomdp.start)), kernel.z0
    obs, z, action, z_next, reward = lax.scan(step, start, jr.split(key, num_steps))[1]
    first, last = (jnp.zeros(num_steps, bool).at[t].set(True) for t in (0, -1))
    return Transition(obs, z, action, z_next, reward, first, last, jnp.zeros_like(last), obs)


@pytest.mark.parametrize("name", ["linear", pytest.param("gru", marks=pytest.mark.slow)])
def test_score_estimate_of_gaussian_kernel_is_unbiased(name):
    """10,000 trajectories, every parameter within four standard errors, log_std among them."""
    pomdp = make_pomdp(jr.key(0))
    kernel = make_kernel(name, jr.key(1), z_size=1, state_std=0.7)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, 0))
    def estimates(kernel, key):
        traj = simulate(kernel, pomdp, 2, key)
        return ravel_pytree(score_estimate(kernel, traj, reward_to_go(traj), segment_length=1))[0]

    g = np.asarray(estimates(kernel, jr.split(jr.key(2), 10_000)))
    truth = np.asarray(ravel_pytree(quadrature_gradient(kernel, pomdp, 2))[0])
    error = g.std(0) / len(g) ** 0.5
    assert (np.abs(g.mean(0) - truth) <= 4 * error).all()
    assert (np.abs(truth) > 4 * error).any()  # the test can tell the gradient from zero


@pytest.mark.parametrize("name", ["linear", pytest.param("gru", marks=pytest.mark.slow)])
def test_vanishing_noise_recovers_the_gradient_of_the_computed_kernel(name):
    """∇J of the noisy kernel is that of the computed one + O(σ²): halving σ quarters the gap."""
    pomdp = make_pomdp(jr.key(0))
    truth = exact_gradient(num_steps=2)(make_kernel(name, jr.key(1), z_size=1))

    def gap(state_std):
        kernel = make_kernel(name, jr.key(1), z_size=1, state_std=state_std)
        grad = quadrature_gradient(kernel, pomdp, 2)
        return largest_difference(
            (grad.cell.distribution.location, grad.head), (truth.cell.location, truth.head)
        )

    assert gap(1e-5) < 1e-9
    assert 3.8 < gap(0.1) / gap(0.05) < 4.2


# --- estimators with baselines, against loops


LENGTHS = (6, 4, 6, 1, 3)  # of the episodes, padded to 6 steps


def episodes(name, state_std=0.3):
    """N episodes that end early: trajectories, alive, discounted reward (0 after the end)."""
    kernel = make_kernel(name, jr.key(0), state_std=state_std)
    one = lambda key: make_trajectory(kernel, key, num_steps=6, starts=(0,))
    trajs = jax.vmap(one)(jr.split(jr.key(1), len(LENGTHS)))
    alive = (jnp.arange(6) < jnp.array(LENGTHS)[:, None]).astype(float)
    return kernel, trajs, alive, trajs.reward * alive * GAMMA ** jnp.arange(6)


def step_scores(kernel, trajs):
    """∇ log π of each step on its own, by calling the laws: [N, T, number of parameters]."""

    def score(obs, z, action, z_next):
        log_prob = lambda k: k.cell(obs, z).log_prob(z_next) + k.head(obs, z_next).log_prob(action)
        return ravel_pytree(eqx.filter_grad(log_prob)(kernel))[0]

    scores = jax.jit(jax.vmap(jax.vmap(score)))
    return np.asarray(scores(trajs.obs, trajs.z, trajs.action, trajs.z_next))


def slow_baseline(score, reward):
    """mean[S² r] / mean[S²] of one parameter over episodes, 0/0 := 0."""
    numerator = sum(s * s * r for s, r in zip(score, reward, strict=True))
    denominator = sum(s * s for s in score)
    return numerator / denominator if denominator > 0 else 0.0


def slow_reinforce(score, alive, reward):
    out = np.zeros(score.shape[-1])
    for j in range(len(out)):
        s = [sum(score[n, t, j] for t in range(6) if alive[n, t]) for n in range(len(score))]
        returns = [sum(r) for r in reward]
        baseline = slow_baseline(s, returns)
        out[j] = np.mean([s * (r - baseline) for s, r in zip(s, returns, strict=True)])
    return out


def slow_gpomdp(score, alive, reward):
    out = np.zeros(score.shape[-1])
    for j in range(len(out)):
        partial = np.zeros(len(score))
        for t in range(6):
            for n in range(len(score)):
                if alive[n, t]:
                    partial[n] += score[n, t, j]
            baseline = slow_baseline(partial, reward[:, t])
            out[j] += np.mean(partial * (reward[:, t] - baseline))
    return out


@pytest.mark.parametrize("name", ["gru", "finite"])
def test_reinforce_is_the_loop_over_parameters(name):
    kernel, trajs, alive, reward = episodes(name)
    scores = eqx.filter_jit(
        jax.vmap(lambda traj, alive: score_estimate(kernel, traj, alive, segment_length=1))
    )(trajs, alive)
    out = ravel_pytree(jax.jit(reinforce)(scores, reward.sum(1)))[0]
    truth = slow_reinforce(*map(np.asarray, (step_scores(kernel, trajs), alive, reward)))
    assert np.isfinite(out).all()
    assert np.any(out)
    assert np.allclose(out, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "segment_length"), [("gru", 3), ("finite", 6)])
def test_gpomdp_is_the_loop_over_parameters_and_steps(name, segment_length):
    kernel, trajs, alive, reward = episodes(name)
    out = eqx.filter_jit(episodic_gpomdp)(
        kernel, trajs, reward, alive, segment_length=segment_length
    )
    truth = slow_gpomdp(*map(np.asarray, (step_scores(kernel, trajs), alive, reward)))
    out = ravel_pytree(out)[0]
    assert np.isfinite(out).all()
    assert np.any(out)
    assert np.allclose(out, truth, rtol=1e-10, atol=1e-12)


def test_gpomdp_of_a_computed_state_is_bptt():
    """One segment: S_t is the derivative of Σ_{i≤t} log π through the recurrence."""
    kernel, trajs, alive, reward = episodes("linear", state_std=None)
    log_prob = lambda kernel: jax.vmap(kernel.log_prob)(trajs).joint
    params, static = eqx.partition(kernel, eqx.is_inexact_array)
    jacobian = jax.jit(jax.jacfwd(lambda p: log_prob(eqx.combine(p, static))))(params)
    leaves = [np.asarray(x).reshape(len(LENGTHS), 6, -1) for x in jax.tree.leaves(jacobian)]
    truth = slow_gpomdp(np.concatenate(leaves, -1), *map(np.asarray, (alive, reward)))
    out = eqx.filter_jit(episodic_gpomdp)(kernel, trajs, reward, alive, segment_length=6)
    out = ravel_pytree(out)[0]
    assert np.allclose(out, truth, rtol=1e-10, atol=1e-12)


def test_the_baseline_removes_a_constant_return():
    score = {"a": jr.normal(jr.key(0), (7, 2, 3)), "b": jr.normal(jr.key(1), (7,))}
    returns = jr.normal(jr.key(2), (7,))
    jitted = jax.jit(reinforce)
    assert_trees_close(jitted(score, returns), jitted(score, returns + 5), rtol=1e-10)
    flat = jitted(score, jnp.full(7, 3.0))
    assert largest_difference(flat, jax.tree.map(jnp.zeros_like, flat)) < 1e-14


def test_one_episode_is_refused():
    """Its baseline would be its own return, and the estimate 0 whatever happened."""
    with pytest.raises(ValueError, match="1 episode: the baseline is fitted"):
        reinforce(jnp.ones((1, 3)), jnp.ones(1))
    kernel = make_kernel("finite", jr.key(0))
    trajs = jax.tree.map(lambda x: x[None], make_trajectory(kernel, jr.key(1)))
    with pytest.raises(ValueError, match="1 episode: the baseline is fitted"):
        episodic_gpomdp(kernel, trajs, trajs.reward, jnp.ones((1, 12)), segment_length=1)


def test_a_parameter_without_a_score_has_no_gradient():
    score = jnp.stack([jnp.zeros(4), jnp.arange(4.0)], 1)
    out = reinforce(score, jnp.array([1.0, -2.0, 0.5, 3.0]))
    assert out[0] == 0
    assert np.isfinite(out[1])
    assert out[1] != 0


@pytest.mark.slow
def test_path_sums_of_the_variance_bounds_have_their_closed_forms():
    """Golden: Z = ½, T = 5 gives 0 + 1 + 1.5 + 1.75 + 1.875 = 6.125, squares 9.828125."""
    assert path_sums(0.5, 5) == (6.125, 9.828125)
    for z, t in [(0.5, 5), (0.9, 17), (1.1, 30)]:
        mixed, square = path_sums(z, t)
        assert np.isclose(mixed, t / (1 - z) + (z**t - 1) / (1 - z) ** 2)
        tail = (z**t - 1) * (2 * z + 1 - z**t) / ((1 - z) ** 3 * (1 + z))
        assert np.isclose(square, t / (1 - z) ** 2 + tail)
    assert path_sums(0.7, 1) == (0, 0)
