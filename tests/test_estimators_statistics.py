"""Statistics of observations move without a jump of policy or value; and the step of PPO."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import make_kernel, make_trajectory

from scripts import ppo, reinforce
from spg.estimators import statistics
from spg.estimators.mixed import mixed_terms
from spg.estimators.statistics import joint_kl, start_statistics
from spg.kernels.critics import Critic
from spg.rollout import rollout
from spg.training import on_policy, options
from spg.training.metrics import Table, read_metrics
from spg.types import policy_view

SMALL = {"num_envs": 16, "num_steps": 32, "num_minibatches": 8, "hidden": (16,)}
SMALL |= {"cell": "linear", "z_size": 8}


def record(config, env, kernel, carry, key):
    """Steps of the kernel that no update has seen."""
    run = partial(rollout, kernel, env, num_steps=config.num_steps)
    keys = jr.split(key, config.num_envs)
    return jax.vmap(lambda c, k: run(c, key=k))(carry, keys)[1]


def statistics_of(module, like):
    return eqx.tree_at(lambda m: m.normalizer, module, like.normalizer)


def distance(new, old, traj):
    value = lambda critic: jax.vmap(jax.vmap(critic))(traj.obs, traj.z)
    return jnp.mean((value(new) - value(old)) ** 2)


ENVS = [
    "CartPole-v1",
    pytest.param("MountainCarContinuous-v0", marks=pytest.mark.slow),
    pytest.param("Pendulum-v1", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("env", ENVS)
def test_statistics_move_ppo_by_less_than_its_updates_do(env):
    """From the first update on: KL of the joint policy, mean square of the value."""
    config = ppo.Config(env=env, total_steps=50 * 16 * 32, **SMALL)
    env = options.make_env(config)

    def train(key):
        state = ppo.init(config, env, key)

        def one(state, key):
            after, _ = ppo.step(config, env, state)
            old, new = state.learned, after.learned
            traj = record(config, env, old.kernel, state.world, key)
            kernel = statistics_of(new.kernel, old.kernel)  # after the gradients
            critic = statistics_of(new.critic, old.critic)
            policy = joint_kl(kernel, old.kernel, traj), joint_kl(new.kernel, kernel, traj)
            value = distance(critic, old.critic, traj), distance(new.critic, critic, traj)
            return after, (*policy, *value, new.kernel.normalizer.count)

        return state.learned, jax.lax.scan(one, state, jr.split(key, 6))[1]

    start, (update, jump, update_of_value, jump_of_value, count) = jax.jit(train)(jr.key(0))
    assert start.kernel.normalizer.count == start.critic.normalizer.count == 16 * 32
    assert (jump <= update).all()
    assert (jump_of_value <= update_of_value).all()
    assert count[-1] > 16 * 32  # yet they move


def test_statistics_from_nothing_would_be_a_jump():
    """What the first update did to a policy without statistics of a rollout."""
    config = ppo.Config(**SMALL)
    env = options.make_env(config)

    @jax.jit
    def jump(key):
        state = ppo.init(config, env, key)
        kernel = state.learned.kernel
        blank = eqx.tree_at(lambda k: k.normalizer, kernel, type(kernel.normalizer)(2))
        traj = record(config, env, blank, state.world, key)
        return joint_kl(start_statistics(blank, policy_view(traj.obs)), blank, traj)

    assert jump(jr.key(0)) > 0.3


@pytest.mark.slow
def test_statistics_move_reinforce_by_less_than_its_updates_do():
    config = reinforce.Config(
        env="TMaze-memory", env_params={"length": 5}, num_envs=32, cell="linear", z_size=8
    )
    env = options.make_env(config)

    def train(key):
        def one(state, key):
            after, _ = reinforce.step(config, env, state)
            old, new = state.learned.kernel, after.learned.kernel
            trajs = reinforce.episodes(config, env, old, key)
            kernel = statistics_of(new, old)
            return after, (joint_kl(kernel, old, trajs), joint_kl(new, kernel, trajs))

        return jax.lax.scan(one, reinforce.init(config, env, key), jr.split(key, 5))[1]

    update, jump = jax.jit(train)(jr.key(0))
    assert (jump <= update).all()


observe = eqx.filter_jit(statistics.observe)
observe_critic = eqx.filter_jit(statistics.observe_critic)


def trajectories(kernel):
    trajs = jax.vmap(lambda key: make_trajectory(kernel, key))(jr.split(jr.key(1), 3))
    return trajs._replace(obs=3 * trajs.obs)


@pytest.mark.slow
def test_statistics_of_a_kernel_stay_without_an_update_and_go_all_the_way_after_a_large_one():
    kernel = make_kernel("gru", jr.key(0), state_std=0.3)
    trajs = trajectories(kernel)
    assert eqx.tree_equal(observe(kernel, kernel, trajs), kernel)
    noise = lambda k: k.cell.distribution.log_std
    moved = observe(kernel, eqx.tree_at(noise, kernel, noise(kernel) - 3), trajs)
    assert np.allclose(moved.normalizer.mean, trajs.obs.mean((0, 1)), rtol=1e-5)
    assert np.allclose(moved.normalizer.var, trajs.obs.var((0, 1)), rtol=1e-5)
    assert eqx.tree_equal(moved.head, kernel.head)
    finite = make_kernel("finite", jr.key(0))
    assert eqx.tree_equal(observe(finite, finite, trajectories(finite)), finite)


def test_statistics_of_a_critic_stay_without_an_update_and_go_all_the_way_after_a_large_one():
    kernel = make_kernel("gru", jr.key(0), state_std=0.3)
    critic, trajs = Critic(2, 2, [4], key=jr.key(1)), trajectories(kernel)
    assert eqx.tree_equal(observe_critic(critic, critic, trajs), critic)
    far = eqx.tree_at(lambda c: c.mean_square, critic, jnp.array(100.0))
    moved = observe_critic(critic, far, trajs)
    assert np.allclose(moved.normalizer.mean, trajs.obs.mean((0, 1)), rtol=1e-5)
    assert moved.normalizer.count == 36


@pytest.mark.slow
def test_a_gradient_step_of_ppo_survives_any_ratio():
    """In single precision, with advantages of both signs."""
    config = ppo.Config(**SMALL)
    once = replace(config, num_epochs=1, num_minibatches=1)
    env = options.make_env(config)

    @jax.jit
    def step(key, shift):
        state = ppo.init(config, env, key)
        kernel, critic, opt_state = state.learned
        segments = record(config, env, kernel, state.world, key)
        advantage = jr.normal(key, segments.reward.shape)
        one = partial(mixed_terms, kernel, critic, gamma=config.gamma)
        old = jax.vmap(one)(segments, advantage, advantage)
        log_prob = old.log_prob._replace(action=old.log_prob.action - shift)
        old = old._replace(log_prob=log_prob)
        batch = segments, old, advantage, advantage
        before = ppo.Agent(kernel, critic)
        of_batch = partial(ppo.loss, config)
        after, _, metrics = on_policy.descend(once, of_batch, before, opt_state, batch, key)
        return before, after, metrics

    weight = lambda module: module.mlp.layers[0].weight
    for shift in (-1e3, 1e3):
        before, after, metrics = step(jr.key(0), shift)
        assert all(np.isfinite(x) for x in metrics.values())
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
        assert np.any(weight(after.critic) != weight(before.critic))
        moved = np.any(weight(after.kernel.head) != weight(before.kernel.head))
        assert moved == (shift > 0)  # a ratio of 0 has no gradient, as without a bound


@pytest.mark.parametrize("script", [ppo, reinforce])
def test_the_rollout_of_init_counts_as_environment_steps(script, tmp_path):
    config = script.Config(num_envs=4, num_steps=8)
    algorithm = script.make(config)
    assert algorithm.first_steps == algorithm.steps_per_update == 32
    table = Table(
        tmp_path / "metrics.csv", seeds=np.arange(1), first_steps=algorithm.first_steps,
        steps_per_update=32, metrics=["return"], measure=algorithm.measure,
    )  # fmt: skip
    table.start()
    table.append(2, {"return": np.zeros((1, 2))})
    assert read_metrics(tmp_path)["env_steps"].tolist() == [[64, 96]]


def test_one_environment_of_reinforce_is_refused():
    with pytest.raises(ValueError, match="num_envs is 1"):
        reinforce.make(reinforce.Config(num_envs=1))
