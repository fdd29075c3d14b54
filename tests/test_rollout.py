"""Evaluation over whole episodes."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import spg
from spg import envs
from spg.types import Env
from spg.worlds import DensePOMDP


def coin(clock):
    """One state, two actions: the first earns 1, the second 0."""
    one = jnp.ones((1, 2, 1))
    world = DensePOMDP(one, jnp.ones((1, 1)), jnp.array([[1.0, 0.0]]), jnp.ones(1))
    tabular = envs.Tabular(world, max_steps_in_episode=clock)
    return Env(tabular, tabular.default_params)


@pytest.fixture(scope="module")
def kernel():
    """Takes the first action with probability 3/4."""
    return spg.finite_kernel(jnp.zeros((1, 1, 1)), jnp.log(jnp.array([[[3.0, 1.0]]])))


@pytest.mark.parametrize(("clock", "max_steps"), [(8, None), (None, 8), (20, 8)])
def test_returns_are_those_of_the_sampled_and_of_the_noise_free_policy(clock, max_steps, kernel):
    words = {"num_episodes": 400, "max_steps": max_steps, "key": jr.key(0)}
    env = coin(clock)
    returns = jax.jit(lambda k: spg.episode_returns(k, env, **words))(kernel)
    assert returns.sampled.shape == returns.noise_free.shape == (400,)
    assert (returns.noise_free == 8).all()
    error = np.sqrt(8 * 3 / 16 / 400)
    assert abs(returns.sampled.mean() - 6) < 4 * error
    mean = jax.jit(lambda k: spg.evaluation(k, env, **words))(kernel)
    np.testing.assert_allclose(mean, [returns.sampled.mean(), 8], rtol=1e-6)


def test_a_world_without_a_clock_has_no_return(kernel):
    for evaluate in (spg.evaluation, spg.episode_returns):
        with pytest.raises(ValueError, match=r"goes on for ever.*by max_steps, or by"):
            evaluate(kernel, coin(None), num_episodes=2, key=jr.key(0))


def test_what_is_watched_is_the_mode_or_with_noise_a_sample(kernel):
    env = coin(8)

    def play(noise):
        run = lambda k: spg.watch(k, env, num_steps=400, noise=noise, key=jr.key(0))[1].action
        return jax.jit(run)(kernel)

    assert (play(False) == 0).all()
    assert abs(play(True).mean() - 0.25) < 4 * np.sqrt(3 / 16 / 400)
