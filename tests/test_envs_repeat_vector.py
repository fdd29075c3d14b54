"""Repeating a vector: what is shown, what an answer pays, and what memory is worth."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

from spg import envs
from spg.envs.repeat_vector import RepeatVector, RepeatVectorState


def play(env, params, policy, num_episodes, seed=0):
    """Episodes of `policy(state, obs, key)`: observations (and the last), cues, rewards, ends."""

    def episode(key):
        obs, start = env.reset_env(key, params)

        def step(carry, key):
            obs, state = carry
            action = policy(state, obs, jr.fold_in(key, 1))
            after, state, reward, terminated, _ = env.step_env(key, state, action, params)
            return (after, state), (after, reward, terminated)

        keys = jr.split(jr.fold_in(key, 2), params.max_steps_in_episode)
        _, (later, reward, terminated) = lax.scan(step, (obs, start), keys)
        return jnp.concatenate([obs[None], later]), start.cue, reward, terminated

    keys = jr.split(jr.key(seed), num_episodes)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(episode))(keys))


def test_cue_and_distractors_come_by_the_same_entries_and_flags_tell_them_apart():
    env = RepeatVector(2)
    params = env.default_params.replace(delay=3, distractors=3.0)
    obs, cue, reward, terminated = play(env, params, lambda s, o, k: jnp.zeros(2), 4000)
    np.testing.assert_array_equal(obs[:, 0, :2], cue)
    assert (obs[0, :5, 2:] == [[1, 0], [0, 0], [0, 0], [0, 0], [0, 1]]).all()
    assert not obs[:, 4, :2].any()
    assert (obs[:, :5, 2:] == obs[0, :5, 2:]).all()
    assert not reward[:, :4].any()
    assert (terminated == [False] * 4 + [True]).all()
    # uniform on [-1, 1] and [-3, 3], all entries of all steps independent
    shown = obs[:, :4, :2].reshape(-1, 8)
    sizes = np.repeat([1.0, 3.0], [2, 6])
    assert (abs(shown) <= sizes).all()
    square = shown**2 / sizes**2  # mean 1/3, variance 4/45
    np.testing.assert_allclose(square.mean(0), 1 / 3, atol=4 * (4 / 45 / 4000) ** 0.5)
    assert abs(np.corrcoef(shown.T) - np.eye(8)).max() < 4.5 / 4000**0.5  # of 28 pairs


@pytest.mark.parametrize(("size", "delay"), [(1, 0), (2, 8)])
def test_the_expected_return_is_the_share_of_the_cues_variance_that_answers_explain(size, delay):
    env = RepeatVector(size)
    params = env.default_params.replace(delay=delay)
    n = 4000

    def returns(policy):
        reward = play(env, params, policy, n)[2].sum(1)
        return reward.mean(), 4 * reward.std() / n**0.5

    knows = lambda state, obs, key: state.cue
    np.testing.assert_allclose(returns(knows)[0], 1.0, atol=1e-6)
    # without memory the answer is independent of the cue: 1 - (3/d) (|a|² + d/3) = -3 |a|²/d
    for answer in (0.0, 0.4, -1.0):
        mean, error = returns(lambda s, o, k: jnp.full(size, answer))  # noqa: B023
        np.testing.assert_allclose(mean, -3 * answer**2, atol=error)
    blurred = lambda state, obs, key: 0.5 * state.cue + 0.1 * jr.normal(key, (size,))
    mean, error = returns(blurred)  # 1 - 3 (.25/3 + .01)
    np.testing.assert_allclose(mean, 0.72, atol=error)


def test_state_and_critic_know_the_cue_and_the_policy_sees_it_once():
    env = envs.make("RepeatVector-memory", privileged=True, size=3, delay=2)
    assert (env.spec.obs_size, env.spec.critic_size, env.spec.num_actions) == (5, 6, 3)
    assert not env.spec.discrete

    def step(carry, key):
        obs, state = carry
        after, state, _, terminated, truncated, info = env.step(key, state, jnp.full(3, 2.0))
        return (after, state), (obs, state.env.cue, terminated, truncated, info)

    start = env.reset(jr.key(0))
    walk = jax.jit(lambda: lax.scan(step, start, jr.split(jr.key(1), 8))[1])
    obs, cue, terminated, truncated, info = jax.tree.map(np.asarray, walk())
    assert terminated.tolist() == [False, False, False, True] * 2
    assert not truncated.any()
    for episode in (slice(0, 4), slice(4, 8)):
        seen = obs.critic[episode]
        np.testing.assert_array_equal(seen[:, 2:5], np.tile(obs.policy[episode][0, :3], (4, 1)))
        np.testing.assert_array_equal(seen[:, :2], obs.policy[episode][:, 3:])
        assert seen[:, 5].tolist() == [0, 1, 2, 3]
    assert not (obs.policy[:, :3] == obs.critic[:, 2:5]).all(1)[[1, 2, 3, 5, 6, 7]].any()
    assert (cue[2] == obs.critic[0, 2:5]).all()
    assert (cue[3] != cue[2]).all()  # a new one where an episode opens
    assert info["final_observation"].critic[3, 5] == 4


def test_answers_beyond_the_bounds_are_clipped():
    env = RepeatVector(2)
    params = env.default_params.replace(delay=0)
    state = RepeatVectorState(jnp.array([1.0, -0.5]), jnp.int32(1))
    assert env.step_env(jr.key(0), state, jnp.array([9.0, -0.5]), params)[2] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"size": 0}, "size is 0; it has to be at least 1"),
        ({"delay": -1}, "delay is -1; it has to be"),
        ({"delay": 1.5}, "delay is 1.5; it has to be"),
        ({"distractors": -0.1}, "distractors is -0.1; it has to be"),
        ({"max_steps_in_episode": 3}, "unknown parameter of RepeatVector-memory"),
    ],
)
def test_what_cannot_be_is_named(words, message):
    with pytest.raises(ValueError, match=message):
        envs.make("RepeatVector-memory", **words)
