"""REPPO runs with every memory; its returns are those of the recursion; what each part moves."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import largest_difference
from test_scripts import SMALL, run, two_updates, whole_and_half
from test_training_loop import assert_same_run

from scripts import reppo
from spg.training import on_policy, options
from spg.training.on_policy import Agent

REPPO = reppo.Config(
    num_steps=8, num_minibatches=2, num_epochs=2, total_steps=64, checkpoints=1, critic_hidden=(8,),
    env_params={"max_steps_in_episode": 5.0}, **SMALL,
)  # fmt: skip
long = partial(pytest.param, marks=pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["s2pg", *map(long, ("bptt", "window", "none", "oracle"))])
def test_two_updates_with_every_memory(memory, tmp_path):
    data = two_updates(reppo, replace(REPPO, memory=memory, privileged=True), tmp_path)
    for name in ("critic_loss", "policy_loss", "gradient_norm", "explained_variance"):
        assert np.isfinite(data[name]).all()
    assert (data["kl_z"] > 0).all() == (memory == "s2pg")


@pytest.mark.long
def test_a_run_that_was_cut_short_ends_as_the_whole_one(tmp_path):
    config = replace(REPPO, total_steps=128)
    run(reppo, whole_and_half(reppo, config, tmp_path))
    assert_same_run(tmp_path / "whole", tmp_path / "half")


def test_discrete_actions_are_refused():
    with pytest.raises(ValueError, match=r"those of CartPole-v1 are discrete: scripts/ppo\.py"):
        reppo.make(replace(REPPO, env="CartPole-v1", env_params={}))


@pytest.fixture(scope="module")
def rollout():
    env = options.make_env(REPPO)
    state = jax.jit(partial(reppo.init, REPPO, env))(jr.key(0))
    collect = partial(on_policy.collect, REPPO, env)
    return state.learned, jax.jit(collect)(state.learned.kernel, state.world, jr.key(1))[1]


@pytest.mark.slow
def test_returns_are_those_of_the_recursion(rollout, monkeypatch):
    """With what is said of the successors known; episodes are cut after five steps."""
    learned, traj = rollout
    monkeypatch.setattr(reppo, "evaluate", lambda critic, obs, *_: jnp.stack([obs.sum(), 9.0]))
    learned = learned._replace(mean_square=jnp.float32(4.0))
    config = replace(REPPO, gamma=0.9, gae_lambda=0.7)
    terminated = traj.terminated.at[1, 2].set(True)
    traj = traj._replace(terminated=terminated)
    found = reppo.lambda_returns(config, learned, traj, jr.key(2))
    following = 2 * np.minimum(np.asarray(traj.final_obs).sum(-1), 9)
    truncated = np.asarray(traj.truncated)
    assert truncated.any()
    for n, t in np.ndindex(found.shape):
        want, weight = 0.0, 1.0
        for k in range(t, found.shape[1]):
            want += weight * traj.reward[n, k]
            if terminated[n, k]:
                break
            last = truncated[n, k] or k == found.shape[1] - 1
            want += weight * 0.9 * (1.0 if last else 0.3) * following[n, k]
            if last:
                break
            weight *= 0.9 * 0.7
        np.testing.assert_allclose(found[n, t], want, rtol=1e-4)


@pytest.mark.slow
def test_the_policy_does_not_move_the_critics_nor_they_the_policy(rollout):
    """At their targets critics have no gradient, and without a slope of Q the policy has none."""
    learned, traj = rollout
    segments = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), traj)
    agent = Agent(learned.kernel, learned.critic)
    old = jax.vmap(agent.kernel.distributions)(segments)
    keys = jr.key_data(jr.split(jr.key(3), len(segments.reward)))
    one = jax.vmap(jax.vmap(partial(reppo.evaluate, agent.critic)))
    target = one(segments.obs, segments.action, segments.z_next)[..., 0]

    def gradient(agent, target):
        loss = lambda agent: reppo.loss(REPPO, 1.0, agent, (segments, old, target, keys))[0]
        return jax.grad(loss, allow_int=True)(agent)

    at_target = jax.jit(gradient)(agent, target)
    size = lambda tree: largest_difference(tree, jax.tree.map(jnp.zeros_like, tree))
    assert size(at_target.critic.mlps) < 1e-6
    assert size(at_target.kernel.head) > 1e-4
    assert size(at_target.kernel.cell) > 1e-6
    flat = agent._replace(critic=jax.tree.map(jnp.zeros_like, agent.critic))
    without = jax.jit(gradient)(flat, target)
    assert size(without.kernel.head) < 1e-6
    assert size(without.critic.mlps) > 1e-4
