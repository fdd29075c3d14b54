"""Gradients through exact Q against derivatives of J, targets against soft values, and the rest."""

import math
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, jitter, largest_difference, make_finite_kernel, make_pomdp
from jax import lax

from spg.distributions import Normal, TanhNormal
from spg.estimators.actor_critic import (
    Choice,
    Smoothing,
    choose,
    polyak,
    q_target,
    smoothed_choice,
    soft_loss,
    temperature_loss,
)
from spg.exact import enumeration
from spg.kernels.cells import GRU, Computed, Drawn, NormalAround
from spg.kernels.critics import QCritic
from spg.kernels.heads import DeterministicHead
from spg.kernels.kernel import Kernel
from spg.kernels.networks import MLP, Normalizer
from spg.scans import split_segments
from spg.types import Observation, Transition

pytestmark = pytest.mark.usefixtures("float64")

GAMMA, HORIZON, STD = 0.9, 4, 0.3
START = jnp.array([0.4, -0.3])


class SmoothHead(eqx.Module):
    """As TanhNormalHead but without the kinks of relu, at which quadrature errs."""

    mlp: MLP

    def __init__(self, sizes, *, std, key):
        self.mlp = MLP([*sizes[:-1], 2], gain=1.0, key=key)

    def __call__(self, obs, z_next):
        mean, change = jnp.split(self.mlp(jnp.concatenate([obs, z_next])), 2)
        return TanhNormal(mean, 0.4 * jnp.exp(0.3 * jnp.tanh(change)))


def make_policy(cell="drawn", head: Any = DeterministicHead, *, z_size=3, key=0):
    return _make_policy(cell, head, z_size, jr.key(key))


@eqx.filter_jit  # compiled once: eager operations compile one by one
def _make_policy(cell, head, z_size, key):
    cell_key, head_key, jitter_key = jr.split(key, 3)
    location = GRU(2, z_size, key=cell_key)
    noisy = Drawn(NormalAround(location, jnp.full(z_size, math.log(STD))))
    parts = (
        noisy if cell == "drawn" else Computed(location),
        head([2 + z_size, 16, 1], std=0.2, key=head_key),
    )
    cell, head = jitter(parts, jitter_key, 0.3)
    return Kernel(cell, head, Normalizer(2), 0.2 * jnp.ones(z_size))


# a smooth world: what the policy sees, what follows, what is paid


def see(state):
    return jnp.sin(jnp.array([[1.0, 0.5], [-0.7, 1.2]]) @ state)


def move(state, action):
    return jnp.tanh(jnp.array([[0.9, -0.4], [0.3, 0.8]]) @ state + jnp.array([0.7, -0.5]) * action)


def pay(state, action):
    return jnp.cos(state[0] - 0.5) + state[1] * action[0] - 0.3 * action[0] ** 2


def mode_value(kernel, state, z, num_steps):
    """The noise-free policy's return of the next `num_steps`, by unrolling."""
    total = jnp.zeros(())
    for t in range(num_steps):
        action, z = kernel.mode(see(state), z)
        total += GAMMA**t * pay(state, action)
        state = move(state, action)
    return total


def mode_q(kernel):
    """Q_t(s, a, z') of the noise-free policy, [1], where the critic sees s and which t it is."""

    def q(obs, action, z_next):
        state, time = obs.critic[:2], obs.critic[2:]
        after = [
            mode_value(kernel, move(state, action), z_next, HORIZON - 1 - t) for t in range(HORIZON)
        ]
        return (pay(state, action) + GAMMA * jnp.dot(time, jnp.stack(after)))[None]

    return q


def mode_trajectory(kernel):
    state, z, steps = START, kernel.z0, []
    for _ in range(HORIZON):
        action, z_next = kernel.mode(see(state), z)
        steps.append((state, z, action, z_next))
        state, z = move(state, action), z_next
    states, z, action, z_next = (jnp.stack(x) for x in zip(*steps, strict=True))
    critic = jnp.concatenate([states, jnp.eye(HORIZON)], 1)
    obs = Observation(jax.vmap(see)(states), critic)
    first = jnp.arange(HORIZON) == 0
    reward = jax.vmap(pay)(states, action)
    return Transition(obs, z, action, z_next, reward, first, first[::-1], ~first & first, obs)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["drawn", "computed"])
def test_without_noise_the_gradient_is_that_of_the_return(cell):
    """Theorem 2.3, at any L where z' is drawn; where z' is computed, L is the episode's or more."""

    @eqx.filter_jit
    def gradients(kernel):
        q, traj = mode_q(kernel), mode_trajectory(kernel)

        def estimate(kernel, length):
            segments = split_segments(traj, length)
            choice = jax.vmap(lambda x: choose(kernel, q, x, key=None))(segments)
            return GAMMA ** jnp.arange(HORIZON) @ choice.q_value.reshape(-1)

        value = lambda kernel: mode_value(kernel, START, lax.stop_gradient(kernel.z0), HORIZON)
        estimates = [eqx.filter_grad(partial(estimate, length=n))(kernel) for n in (HORIZON, 1)]
        return *estimates, eqx.filter_grad(value)(kernel)

    whole, steps, exact = gradients(make_policy(cell))
    gru = exact.cell.distribution.location if cell == "drawn" else exact.cell.location
    assert np.abs(gru.recurrent).max() > 1e-3
    assert_trees_close(whole, exact, rtol=1e-8, atol=1e-12)
    if cell == "drawn":
        assert_trees_close(steps, exact, rtol=1e-8, atol=1e-12)
    else:
        assert largest_difference(steps, exact) > 1e-3


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
TAU_A, TAU_Z = 0.2, 0.1


def log_normal(x, loc, std):
    return -0.5 * ((x - loc) / std) ** 2 - jnp.log(std) - 0.5 * math.log(2 * math.pi)


def soft_value(kernel, state, z, q):
    """E[q(s, a, z') - τ_a log μ - τ_z log ω], z' and a of size 1, by Gauss-Hermite quadrature."""
    memory = kernel.cell(see(state), z)

    def given(x):
        z_next = memory.loc + memory.std * x
        actions = kernel.head(see(state), z_next)
        u = actions.loc + actions.std * NODES
        action = jnp.tanh(u)
        log_mu = log_normal(u, actions.loc, actions.std) - jnp.log(1 - action**2)
        q_value = jax.vmap(lambda a: q(state, a[None], z_next))(action)
        log_omega = log_normal(z_next, memory.loc, memory.std)[0]
        return jnp.dot(WEIGHTS, q_value - TAU_A * log_mu) - TAU_Z * log_omega

    return jnp.dot(WEIGHTS, jax.vmap(given)(jnp.asarray(NODES)))


def test_with_noise_the_expected_gradient_is_that_of_the_soft_return():
    """Of two steps, γ^t-weighted, with the exact soft Q; four standard errors."""
    kernel = make_policy(head=SmoothHead, z_size=1)
    last = lambda state, action, z_next: pay(state, action)
    value = lambda kernel, state, z: soft_value(kernel, state, z, last)

    def earlier(kernel, state, action, z_next):
        return pay(state, action) + GAMMA * value(kernel, move(state, action), z_next)

    def whole(kernel):
        return soft_value(kernel, START, lax.stop_gradient(kernel.z0), partial(earlier, kernel))

    def q(obs, action, z_next):
        state, time = obs.critic[:2], obs.critic[2]
        after = value(kernel, move(state, action), z_next)
        return (pay(state, action) + jnp.where(time == 0, GAMMA * after, 0.0))[None]

    def estimate(key):
        keys = jr.split(key, 3)
        action, z_next = kernel.sample(see(START), kernel.z0, key=keys[0])
        states = jnp.stack([START, move(START, action)])
        obs = Observation(jax.vmap(see)(states), jnp.concatenate([states, jnp.eye(2)[:, 1:]], 1))
        zeros, no = jnp.zeros((2, 1)), jnp.zeros(2, bool)
        z = jnp.stack([kernel.z0, z_next])
        traj = Transition(obs, z, zeros, zeros, zeros[:, 0], no, no, no, obs)
        segments = split_segments(traj, 1)

        def loss(kernel):
            one = lambda segment, key: soft_loss(
                choose(kernel, q, segment, key=key), temperature=TAU_A, state_temperature=TAU_Z
            )
            return jnp.array([1.0, GAMMA]) @ jax.vmap(one)(segments, keys[1:])[:, 0]

        return eqx.filter_grad(loss)(kernel)

    exact = eqx.filter_jit(eqx.filter_grad(whole))(kernel)
    number = 2000
    drawn = jax.jit(lambda keys: lax.map(estimate, keys, batch_size=100))(
        jr.split(jr.key(1), number)
    )
    certain: list[float] = []
    pairs = zip(*map(jax.tree.leaves, (drawn, exact)), strict=True)
    for samples, true in pairs:
        error = samples.std(0) / math.sqrt(number)
        assert np.all(np.abs(samples.mean(0) + true) <= 4 * error + 1e-12)
        certain.append(np.abs(true).max(initial=0.0) / error.max(initial=1e-12))
    assert np.median(certain) > 5


@eqx.filter_jit
def record(kernel, key):
    """Random observations of 5 steps, of which two open episodes, and any z."""
    obs_key, z_key = jr.split(key)
    obs = jr.normal(obs_key, (5, 2))
    first = jnp.zeros(5, bool).at[jnp.array([0, 3])].set(True)
    z = jr.normal(z_key, (5, *kernel.z0.shape))
    z = jnp.where(first[:, None], kernel.z0, z)
    no, zeros = jnp.zeros(5, bool), jnp.zeros((5, 1))
    return Transition(obs, z, zeros, z, zeros[:, 0], first, no, no, obs)


def make_critic(kernel, key=5):
    return _make_critic(kernel.z0.size, jr.key(key), jr.key(key + 1))


@eqx.filter_jit
def _make_critic(z_size, key, jitter_key):
    critic = QCritic(2, 1, z_size, [6], num_critics=2, layer_norm=False, key=key)
    return jitter(critic, jitter_key)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["computed", "drawn"])
def test_gradients_run_in_time_by_actions_where_z_is_computed_and_nowhere_else(cell):
    """Against loops over the steps: stop_gradient at Q's z', or at the z of each step."""
    kernel = make_policy(cell)
    critic, steps = make_critic(kernel), record(kernel, jr.key(2))

    def loop(kernel):
        z, found = steps.z[0], []
        for t in range(5):
            z = lax.stop_gradient(kernel.z0) if t in (0, 3) else z
            z = lax.stop_gradient(z) if cell == "drawn" else z
            action, z = kernel.mode(steps.obs[t], z)
            seen = lax.stop_gradient(z) if cell == "computed" else z
            found.append(critic(steps.obs[t], action, seen))
        return jnp.stack(found)

    def slopes(f, weight):
        return eqx.filter_value_and_grad(lambda kernel: jnp.vdot(weight, f(kernel)))(kernel)

    @jax.jit
    def both(weight):
        """Of all steps, and of the last alone."""
        chosen = lambda kernel, last: choose(kernel, critic, steps, last=last, key=None).q_value
        every = slopes(partial(chosen, last=False), weight), slopes(loop, weight)
        end = slopes(lambda k: loop(k)[-1:], weight[-1:])
        return every, (slopes(partial(chosen, last=True), weight[-1:]), end)

    for (found, found_grad), (true, true_grad) in both(jr.normal(jr.key(3), (5, 2))):
        assert np.allclose(found, true, rtol=1e-12)
        assert_trees_close(found_grad, true_grad, rtol=1e-10, atol=1e-13)


def test_soft_loss_of_a_step_is_entropy_cost_less_the_smallest_value():
    q_value, none = jnp.array([[3.0, 1.0], [-2.0, 5.0]]), jnp.zeros((2, 0))
    choice = Choice(q_value, none, none, jnp.array([0.5, -1.0]), jnp.array([2.0, 4.0]))
    loss = soft_loss(choice, temperature=0.1, state_temperature=0.01)
    assert np.allclose(loss, [0.05 + 0.02 - 1, -0.1 + 0.04 + 2])


def test_target_is_the_soft_bellman_operator_and_ends_at_terminal_steps():
    """Iterated under softmax policies it finds τ log Σ exp(Q / τ) for values, on a random MDP."""
    rng, tau = np.random.default_rng(0), 0.3
    transition = rng.dirichlet(np.ones(4), (4, 3))
    reward = jnp.asarray(rng.normal(size=(4, 3)))
    ends = jnp.arange(4) == 2  # what follows from this state on is not counted

    @jax.jit
    def backup(q_value):
        log_pi = jax.nn.log_softmax(q_value / tau)
        one = lambda r, end, q, lp: q_target(r, end, jnp.stack([q, q + 7]), -tau * lp, gamma=GAMMA)
        every = jax.vmap(jax.vmap(one, (None, None, 0, 0)), (None, None, 0, 0))  # over s', a'
        goals = jax.vmap(jax.vmap(every, (0, None, None, None)), (0, 0, None, None))
        mean = jnp.einsum("xasb,sb->xas", goals(reward, ends, q_value, log_pi), jnp.exp(log_pi))
        return (mean * transition).sum(-1)

    @jax.jit
    def bellman(q_value):
        value = tau * jax.nn.logsumexp(q_value / tau, 1)
        return reward + GAMMA * jnp.where(ends[:, None], 0.0, transition @ value)

    q_value = jnp.asarray(rng.normal(size=(4, 3)))
    assert np.allclose(backup(q_value), bellman(q_value), rtol=1e-12)
    for _ in range(300):
        q_value = backup(q_value)
    assert np.allclose(q_value, bellman(q_value), rtol=1e-10)
    assert np.allclose(q_value[2], reward[2], rtol=1e-12)


@pytest.mark.parametrize("start", [0.02, 1.0])
def test_one_nat_less_for_each_dimension_settles_at_a_deviation_of_0_089(start):
    """σ = e^-1 / √(2πe), where Q is -½ κ |x|²: the temperature ends at κ σ²."""
    size, kappa = 3, 50.0
    rate = 0.02

    def step(_, params):
        log_std, log_tau = params

        def loss(log_std, log_tau):
            law = Normal(jnp.zeros(size), jnp.exp(log_std))
            log_prob = -law.entropy()
            q_value, none = -0.5 * kappa * jnp.sum(law.std**2), jnp.zeros((1, 0))
            choice = Choice(q_value[None, None], none, none, log_prob[None], jnp.zeros(1))
            tau = lax.stop_gradient(jnp.exp(log_tau))
            cost = soft_loss(choice, temperature=tau, state_temperature=0.0)
            return cost.sum() + temperature_loss(log_tau, log_prob, -1.0 * size)

        slopes = jax.grad(loss, (0, 1))(log_std, log_tau)
        return tuple(x - rate * g for x, g in zip(params, slopes, strict=True))

    params = jnp.full(size, math.log(start)), jnp.zeros(())
    log_std, log_tau = jax.jit(lambda p: lax.fori_loop(0, 20_000, step, p))(params)
    sigma = math.exp(-1) / math.sqrt(2 * math.pi * math.e)
    assert round(sigma, 4) == 0.0890
    assert np.allclose(jnp.exp(log_std), sigma, rtol=1e-6)
    assert np.allclose(jnp.exp(log_tau), kappa * sigma**2, rtol=1e-6)


def test_temperature_gives_no_gradient_to_the_policy():
    assert jax.grad(lambda x: temperature_loss(jnp.zeros(()), x, -1.0))(2.0) == 0.0


@pytest.mark.parametrize("cell", ["drawn", "computed"])
def test_smoothing_stays_within_its_bounds_around_the_mode(cell):
    """Of z' in units of its deviation, and only if z' is drawn; of the action around f(o, z'')."""
    kernel = make_policy(cell)
    obs, z, keys = jnp.array([0.5, -1.0]), jnp.array([0.1, 0.2, -0.3]), jr.split(jr.key(0), 2000)
    draw = lambda noise, key: smoothed_choice(kernel, obs, z, noise, key=key)
    smooth = jax.jit(jax.vmap(draw, (None, 0)))  # one program
    best, at = jax.jit(lambda: kernel.mode(obs, z))()
    for none in (Smoothing(0.0, 0.5, 0.0, 1.25), Smoothing(1.0, 0.0, 1.0, 0.0)):
        action, z_next = smooth(none, keys)
        assert np.allclose(z_next, at, rtol=1e-12)
        assert np.allclose(action, best, rtol=1e-12)
    action, z_next = smooth(Smoothing(), keys)
    if cell == "computed":
        assert np.array_equal(z_next, np.broadcast_to(at, z_next.shape))
    else:
        law: Any = kernel.cell(obs, z)
        apart = (z_next - at) / law.std
        assert np.allclose(np.abs(apart).max(0), 1.25)
        inside = apart[np.abs(apart) < 1.2499].ravel()  # ±2.5 deviations of the noise
        cut = math.sqrt(2 / math.pi) * 2.5 * math.exp(-(2.5**2) / 2) / math.erf(2.5 / math.sqrt(2))
        assert np.isclose(
            inside.std(), 0.5 * math.sqrt(1 - cut), rtol=4 / math.sqrt(2 * inside.size)
        )
    around = jax.jit(jax.vmap(lambda z: kernel.head(obs, z).mode()))(z_next)
    assert np.all(np.abs(action) <= 1)
    assert np.abs(action - around).max() <= 0.5 + 1e-12
    wide, _ = smooth(Smoothing(5.0, 5.0, 0.0, 0.0), keys)
    assert wide.min() == -1
    assert wide.max() == 1


def test_polyak_averages_what_is_trained_and_copies_the_rest():
    make = lambda i: (make_policy(key=i), make_critic(make_policy(), key=i))
    slow, fast = make(0), make(1)
    fast = jax.tree.map(lambda x: x + 0.5 if x.ndim == 0 else x, fast)  # the statistics' counts
    moved = jax.jit(lambda s, f, rate: polyak(s, f, rate))(slow, fast, 0.25)
    kernel, critic = moved
    copies = lambda t: (t[0].normalizer, t[0].z0, t[0].head.log_std, t[1].normalizer)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), copies(moved), copies(fast))
    )
    averages = lambda t: (t[0].cell, t[0].head.mlp, t[1].mlps)
    mixed = jax.tree.map(lambda s, f: 0.75 * s + 0.25 * f, averages(slow), averages(fast))
    assert_trees_close(averages(moved), mixed, rtol=1e-14)
    assert largest_difference(averages(fast), averages(slow)) > 0.1
    counted = len(jax.tree.leaves((copies(moved), averages(moved))))
    assert counted == len(jax.tree.leaves((kernel, critic)))


class Moment(NamedTuple):
    """The returns that follow each (seen, z, a, z'), and their probabilities."""

    weight: np.ndarray
    q_value: np.ndarray


def conditional(seen, traj, prob, t):
    """E[Σ γ^k r_{t+k} | seen, z_t, a_t, z_{t+1}], from every trajectory."""
    index = tuple(
        np.asarray(x, int) for x in (seen, traj.z[:, t], traj.action[:, t], traj.z_next[:, t])
    )
    reward = np.asarray(traj.reward)
    returns = sum(GAMMA**k * reward[:, t + k] for k in range(reward.shape[1] - t))
    weight, total = np.zeros((2, 2, 2, 2)), np.zeros((2, 2, 2, 2))
    np.add.at(weight, index, prob)
    np.add.at(total, index, prob * returns)
    return Moment(weight, total / weight)


@pytest.mark.slow
def test_a_markov_critic_needs_z_next_alone_and_another_needs_z_too():
    """Q(s, z, a, z') is the same for both z, and that of the linear equations; Q(o, z, a, z') not.

    In state s after one step; the trajectories tell o, and s where observations show the state.
    """
    pomdp, kernel = make_pomdp(jr.key(0)), make_finite_kernel(jr.key(1))
    for shown in (True, False):
        world = pomdp._replace(observation=jnp.eye(2)) if shown else pomdp
        traj, prob = enumeration.trajectories(kernel, world, num_steps=3)
        prob = np.asarray(prob * jnp.exp(jax.vmap(lambda x: kernel.log_prob(x).joint.sum())(traj)))
        assert np.isclose(prob.sum(), 1)
        found = conditional(traj.obs[:, 1], traj, prob, 1)
        assert found.weight.min() > 0
        apart = np.abs(found.q_value[:, 0] - found.q_value[:, 1]).max()
        assert (apart < 1e-12) if shown else (apart > 1e-3), apart
