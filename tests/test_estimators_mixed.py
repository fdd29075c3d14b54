from functools import partial
from itertools import product
from operator import itemgetter

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, largest_difference, make_kernel, make_trajectory

from scripts import ppo
from spg.estimators.mixed import mixed_surrogate, mixed_terms
from spg.estimators.surrogate import ppo_surrogate
from spg.kernels.critics import Critic
from spg.kernels.networks import Flat
from spg.rollout import rollout
from spg.training import on_policy, options
from spg.types import Transition

pytestmark = pytest.mark.usefixtures("float64")

GAMMA, STD, ACTIONS = 0.9, 0.3, 2
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
DELTA, REST = np.random.default_rng(0).normal(size=(2, 12))


def objective(kernel, steps, old, clip, kl_coef=0.3):
    state = kernel.state_distribution(steps)
    new = kernel.log_prob(steps, state)
    return mixed_surrogate(steps, new, state, old, clip=clip, kl_coef=kl_coef)


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


@pytest.mark.parametrize("name", ["gru", "lru"])
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
        old = mixed_terms(kernel, critic, steps, delta, rest, gamma=GAMMA)

        def mixed(kernel):
            return weight @ objective(kernel, steps, old, 0.2).objective

        def score(kernel):
            new = kernel.log_prob(steps)
            return weight @ ppo_surrogate(new, old.log_prob, delta + rest, clip=0.2).objective

        return eqx.filter_grad(mixed)(kernel), eqx.filter_grad(score)(kernel)

    mixed, score = eqx.filter_jit(gradients)(kernel)
    assert largest_difference(score, jax.tree.map(jnp.zeros_like, score)) > 1e-2
    assert_trees_close(mixed, score, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "lru"])
def test_slope_is_the_central_difference_of_what_the_action_and_the_value_bring(name):
    kernel = make_kernel(name, jr.key(0), state_std=STD)
    critic, steps = make_critic(kernel), make_trajectory(kernel, jr.key(1))
    delta = jnp.asarray(DELTA)
    terms = partial(mixed_terms, kernel, critic, steps, delta, delta, gamma=GAMMA)
    slope = jax.jit(lambda: jax.vmap(Flat())(terms().slope))()
    units = [1e-5, 1e-5j] if name == "lru" else np.eye(2) * 1e-5

    @jax.jit
    def brought(u):
        value = jax.vmap(critic)(steps.final_obs, steps.z_next + u)
        action = kernel.log_prob_action(steps, steps.z_next + u)
        return delta * action, GAMMA * value

    action, value = (np.stack(x, -1) for x in zip(*map(difference(brought), units), strict=True))
    truth = action + np.where(np.asarray(steps.terminated)[:, None], 0, value)
    assert np.allclose(slope, truth, atol=1e-9)
    assert min(np.abs(action).max(), np.abs(value).max()) > 1e-2


def difference(f):
    """Of f's values, central."""
    return lambda u: [(np.asarray(a) - b) / 2e-5 for a, b in zip(f(u), f(-u), strict=True)]


def worse(log_ratio, advantage, clip):
    ratio = float(jnp.exp(log_ratio))
    return min(ratio * advantage, float(np.clip(ratio, 1 - clip, 1 + clip)) * advantage)


def slow_objective(kernel, old, step, slope, delta, rest, clip, kl_coef=0.3):
    """Of one step, entry by entry, as the docstring says."""
    before, now = old.cell(step.obs, step.z), kernel.cell(step.obs, step.z)
    followed = now.loc + now.std * (step.z_next - before.loc) / before.std
    log_prob = lambda kernel: kernel.head(step.obs, step.z_next).log_prob(step.action)
    change = log_prob(kernel) - log_prob(old)
    joint = change + now.log_prob(step.z_next) - before.log_prob(step.z_next)
    total = worse(change, delta, clip) + worse(joint, rest, clip)
    parts = (np.real, np.imag) if np.iscomplexobj(step.z) else (np.real,)
    for part, i in product(parts, range(step.z.size)):
        move, bound = float(part(followed[i] - step.z_next[i])), clip * float(before.std[i])
        along = float(part(slope[i]))
        total += min(along * move, along * float(np.clip(move, -bound, bound)))
        wider, apart = now.std[i] / before.std[i], part(now.loc[i] - before.loc[i]) / now.std[i]
        total -= kl_coef * (np.log(wider) + (wider**-2 + apart**2 - 1) / 2)
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("name", "clip"), [("linear", 0.05), ("linear", 0.5), ("lru", 0.5)])
def test_away_from_the_recorded_policy_moves_are_clipped(name, clip):
    old = make_kernel(name, jr.key(0), state_std=STD)
    nearby = lambda x: x + 0.1 * jr.normal(jr.key(x.size), x.shape)
    kernel = jax.tree.map(lambda x: nearby(x) if eqx.is_inexact_array(x) else x, old)
    kernel = eqx.tree_at(lambda k: (k.normalizer, k.z0), kernel, (old.normalizer, old.z0))
    critic, steps = make_critic(old), make_trajectory(old, jr.key(1))

    @eqx.filter_jit
    def both(kernel, clip):
        parts = jnp.asarray(DELTA), jnp.asarray(REST)
        recorded = mixed_terms(old, critic, steps, *parts, gamma=GAMMA)
        return recorded, objective(kernel, steps, recorded, clip)

    recorded, out = both(kernel, clip)
    truth = [
        slow_objective(
            kernel, old, jax.tree.map(itemgetter(t), steps), slope, DELTA[t], REST[t], clip
        )
        for t, slope in enumerate(np.asarray(recorded.slope))
    ]
    assert np.allclose(out.objective, truth, rtol=1e-9)
    assert out.clipped.any()
    assert name == "lru" or not out.clipped.all()


def test_what_was_moved_far_is_brought_back_by_the_divergence():
    """There the joint ratio is 0, and its gradient too; at the recorded policy nothing changes."""
    old = make_kernel("linear", jr.key(0), state_std=STD)
    unit = lambda kernel: kernel.cell.distribution.location
    bias = lambda kernel: unit(kernel).inputs.bias
    far = eqx.tree_at(bias, old, bias(old) + 20.0)
    critic, steps = make_critic(old), make_trajectory(old, jr.key(1))

    @eqx.filter_jit
    def gradient(kernel, kl_coef, rest):
        terms = mixed_terms(old, critic, steps, 0 * rest, rest, gamma=GAMMA)
        whole = lambda kernel: objective(kernel, steps, terms, 0.2, kl_coef).objective.sum()
        return bias(eqx.filter_grad(whole)(kernel))

    rest = jnp.asarray(REST)
    assert jnp.allclose(gradient(far, 0.0, rest), gradient(far, 0.0, 0 * rest), atol=1e-12)
    pull = -0.1 * len(rest) * 20.0 * (unit(old).write / STD) ** 2
    assert jnp.allclose(gradient(far, 0.1, rest) - gradient(far, 0.0, rest), pull, rtol=1e-6)
    assert jnp.allclose(gradient(old, 0.1, rest), gradient(old, 0.0, rest), atol=1e-9)
    assert largest_difference(gradient(old, 0.1, rest), gradient(old, 0.1, 0 * rest)) > 1e-2


def test_a_state_that_cannot_follow_is_refused():
    kernel = make_kernel("finite", jr.key(0))
    steps = make_trajectory(kernel, jr.key(1))
    delta = jnp.zeros(steps.first.shape)
    with pytest.raises(
        TypeError, match="only a Normal z' can follow V; the cell draws Categorical"
    ):
        mixed_terms(kernel, lambda obs, z: 0.0, steps, delta, delta, gamma=GAMMA)


@pytest.mark.slow
def test_ppo_divides_what_it_has_into_parts_that_make_up_the_advantage():
    """Segment by segment, in whatever order: slopes of the critic before it is rescaled, too."""
    config = ppo.Config(num_envs=3, num_steps=8, num_minibatches=3, segment_length=4, hidden=(4,))
    env = options.make_env(config)

    @jax.jit
    def weighed(key):
        kernel, critic, _ = (state := ppo.init(config, env, key)).learned
        run = partial(rollout, kernel, env, num_steps=8)
        traj = jax.vmap(lambda c, k: run(c, key=k))(state.world, jr.split(key, 3))[1]
        traj = traj._replace(reward=jr.normal(key, (3, 8)), truncated=traj.first)
        value = jax.vmap(jax.vmap(critic))
        ahead = value(traj.final_obs, traj.z_next)
        delta = traj.reward + config.gamma * ~traj.terminated * ahead - value(traj.obs, traj.z)
        by_value = jax.grad(lambda z, step: critic(step.final_obs, z))
        seen = kernel.normalizer
        by_action = jax.grad(lambda z, step: kernel.head(seen(step.obs), z).log_prob(step.action))
        slopes = [jax.vmap(jax.vmap(f))(traj.z_next, traj) for f in (by_action, by_value)]
        return on_policy.weigh(config, kernel, critic, traj)[0], traj, delta, slopes

    (segments, old, advantage, _), traj, delta, (by_action, by_value) = weighed(jr.key(0))
    assert segments.reward.shape == advantage.shape == (6, 4)
    assert np.array_equal(segments.reward.reshape(3, 8), traj.reward)
    assert np.allclose(old.delta + old.rest, advantage, atol=1e-9)
    assert np.isclose(np.std(advantage), 1, rtol=1e-6)
    scale = np.std(delta) / np.std(old.delta)  # that of the advantage
    centred = (delta - delta.mean()) / scale
    assert np.allclose(old.delta.reshape(3, 8), centred, atol=1e-6)
    alive = ~np.asarray(traj.terminated)[..., None]
    truth = config.gamma * alive * np.asarray(by_value) / scale
    truth += np.asarray(old.delta).reshape(3, 8, 1) * by_action
    assert np.allclose(old.slope.reshape(3, 8, -1), truth, rtol=1e-5, atol=1e-8)


def test_a_policy_whose_state_cannot_follow_is_refused_before_training():
    finite = lambda config, spec, *, key: make_kernel("finite", key, obs_size=spec.obs_size)
    with pytest.raises(ValueError, match="this policy's is Categorical, not Normal; 'score' takes"):
        ppo.make(ppo.Config(), policy=finite)
    ppo.make(ppo.Config(memory_gradient="score"), policy=finite)
