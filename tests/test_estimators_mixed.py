from operator import itemgetter

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, largest_difference, make_kernel, make_trajectory

from spg.estimators.mixed import Recorded, mixed_surrogate, value_slope
from spg.estimators.surrogate import ppo_surrogate
from spg.kernels.critics import Critic
from spg.kernels.networks import Flat
from spg.types import Transition

pytestmark = pytest.mark.usefixtures("float64")

GAMMA, STD, ACTIONS = 0.9, 0.3, 2
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)


def record(kernel, critic, steps, delta, rest):
    score = kernel.log_prob(steps)
    slope = value_slope(critic, steps, gamma=GAMMA)
    return score, Recorded(score, kernel.memory(steps), delta, rest, slope)


def make_critic(kernel, obs_size=2):
    return Critic(obs_size, kernel.feature(kernel.z0).size, [5], key=jr.key(7))


def every_outcome(kernel, obs, z):
    """All (z', a) of one step, z' at the nodes of a quadrature, and the weight of each."""
    memory = kernel.cell(obs, z)
    noise = np.stack(np.meshgrid(NODES, NODES), -1).reshape(-1, 2)
    weight = (np.outer(WEIGHTS, WEIGHTS) / WEIGHTS.sum() ** 2).ravel()
    noise = noise[:, 0] + 1j * noise[:, 1] if jnp.iscomplexobj(z) else noise
    noise = noise[:, None] if noise.ndim == 1 else noise
    z_next = jnp.repeat(memory.loc + memory.std * noise, ACTIONS, 0)
    action = jnp.tile(jnp.arange(ACTIONS), len(noise))
    chance = jax.vmap(lambda z, a: jnp.exp(kernel.head(obs, z).log_prob(a)))(z_next, action)
    return z_next, action, jnp.repeat(weight, ACTIONS) * chance


@pytest.mark.parametrize("name", ["gru", "linear", "lru"])
def test_the_expected_gradient_is_that_of_the_score(name):
    """For any V, reward and rest: the mean over z' by quadrature, over actions by enumeration."""
    kernel = make_kernel(name, jr.key(0), state_std=STD, num_actions=ACTIONS)
    critic = make_critic(kernel)
    obs, z = jnp.array([1.0, 0.0]), kernel.z0
    z_next, action, weight = every_outcome(kernel, obs, z)
    n = len(weight)
    same = lambda x: jnp.broadcast_to(x, (n, *x.shape))
    no = jnp.zeros(n, bool)
    successor = jnp.array([[0.3, -1.0], [2.0, 0.5]])[action]
    steps = Transition(same(obs), same(z), action, z_next, jnp.zeros(n), no, no, no, successor)
    value = jax.vmap(critic)(successor, z_next)
    delta = jnp.array([1.0, -0.5])[action] + GAMMA * value - 0.7
    flat = jax.vmap(kernel.feature)(z_next)
    rest = jnp.sin(3 * flat[:, 0]) * flat[:, 1] + 2.0 * action  # any function of what follows

    def gradients(kernel):
        old = record(kernel, critic, steps, delta, rest)[1]

        def mixed(kernel):
            new = kernel.log_prob(steps)
            return weight @ mixed_surrogate(kernel, steps, new, old, clip=0.2).objective

        def score(kernel):
            new = kernel.log_prob(steps)
            return weight @ ppo_surrogate(new, old.log_prob, delta + rest, clip=0.2).objective

        return eqx.filter_grad(mixed)(kernel), eqx.filter_grad(score)(kernel)

    mixed, score = eqx.filter_jit(gradients)(kernel)
    assert largest_difference(score, jax.tree.map(jnp.zeros_like, score)) > 1e-2
    assert_trees_close(mixed, score, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "lru"])
def test_slope_of_the_value_is_its_central_difference(name):
    kernel = make_kernel(name, jr.key(0), state_std=STD)
    critic, steps = make_critic(kernel), make_trajectory(kernel, jr.key(1))
    slope = jax.vmap(Flat())(value_slope(critic, steps, gamma=GAMMA))
    assert np.all(np.asarray(slope)[np.asarray(steps.terminated)] == 0)
    units = [1e-5, 1e-5j] if name == "lru" else np.eye(2) * 1e-5
    value = lambda change: GAMMA * jax.vmap(critic)(steps.final_obs, steps.z_next + change)
    truth = np.stack([(value(u) - value(-u)) / 2e-5 for u in units], -1)
    truth[np.asarray(steps.terminated)] = 0
    assert np.allclose(slope, truth, atol=1e-9)
    assert np.abs(truth).max() > 1e-2


def worse(log_ratio, advantage, clip):
    ratio = float(jnp.exp(log_ratio))
    return min(ratio * advantage, float(np.clip(ratio, 1 - clip, 1 + clip)) * advantage)


def slow_objective(kernel, old, step, slope, delta, rest, clip):
    """Of one step, entry by entry, as the docstring says."""
    before, now = old.cell(step.obs, step.z), kernel.cell(step.obs, step.z)
    followed = now.loc + now.std * (step.z_next - before.loc) / before.std
    recorded = old.head(step.obs, step.z_next).log_prob(step.action)
    change = lambda z: kernel.head(step.obs, z).log_prob(step.action) - recorded
    joint = change(step.z_next) + now.log_prob(step.z_next) - before.log_prob(step.z_next)
    total = worse(change(followed), delta, clip) + worse(joint, rest, clip)
    for i in range(step.z.size):
        move, bound = float(followed[i] - step.z_next[i]), clip * float(before.std[i])
        total += min(slope[i] * move, slope[i] * float(np.clip(move, -bound, bound)))
    return total


DELTA, REST = np.random.default_rng(0).normal(size=(2, 12))


@pytest.mark.parametrize("clip", [0.05, 0.5])
def test_away_from_the_recorded_policy_moves_are_clipped(clip):
    old = make_kernel("linear", jr.key(0), state_std=STD)
    nearby = lambda x: x + 0.1 * jr.normal(jr.key(x.size), x.shape)
    kernel = jax.tree.map(lambda x: nearby(x) if eqx.is_inexact_array(x) else x, old)
    kernel = eqx.tree_at(lambda k: (k.normalizer, k.z0), kernel, (old.normalizer, old.z0))
    critic, steps = make_critic(old), make_trajectory(old, jr.key(1))
    recorded = record(old, critic, steps, jnp.asarray(DELTA), jnp.asarray(REST))[1]
    out = mixed_surrogate(kernel, steps, kernel.log_prob(steps), recorded, clip=clip)
    truth = [
        slow_objective(
            kernel, old, jax.tree.map(itemgetter(t), steps), slope, DELTA[t], REST[t], clip
        )
        for t, slope in enumerate(np.asarray(recorded.slope))
    ]
    assert np.allclose(out.objective, truth, rtol=1e-9)
    assert 0 < out.clipped.mean() < 1


def test_a_state_that_cannot_follow_is_refused():
    kernel = make_kernel("finite", jr.key(0))
    steps = make_trajectory(kernel, jr.key(1))
    new = kernel.log_prob(steps)
    old = Recorded(new, None, new.z, new.z, new.z)
    with pytest.raises(
        TypeError, match="only a Normal z' can follow V; the cell draws Categorical"
    ):
        mixed_surrogate(kernel, steps, new, old, clip=0.2)
