from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

from spg.envs.memory import DOWN, LEFT, RIGHT, UP, RepeatFirst, TMaze, TMazeState
from spg.envs.memory import RepeatFirstState as State

ENVS = [(TMaze(), {"length": 3}), (RepeatFirst(3), {"delay": 2})]


def play(env, params, key, policy, state=None):
    """One episode under `policy(t, state, obs)`: observations (and the last), rewards, ends."""

    @jax.jit  # eager operations compile one by one
    def episode(key, state):
        obs, start = env.reset_env(key, params)
        if state is not None:  # a chosen start instead of a random one
            start, obs = state, env.observe(key, state, None, params)

        def step(carry, t):
            obs, state = carry
            after = env.step_env(jr.fold_in(key, t), state, policy(t, state, obs), params)
            next_obs, state, reward, terminated, _ = after
            return (next_obs, state), (next_obs, reward, terminated)

        steps = jnp.arange(params.max_steps_in_episode)
        _, (later, reward, terminated) = lax.scan(step, (obs, start), steps)
        return jnp.concatenate([obs[None], later]), reward, terminated

    return episode(key, state)


def starts(env):
    """All equally likely hidden states in which an episode can open."""
    values = jnp.arange(2 if isinstance(env, TMaze) else env.num_symbols, dtype=jnp.int32)
    zeros = jnp.zeros_like(values)
    return TMazeState(values, zeros, zeros) if isinstance(env, TMaze) else State(values, zeros)


def mean_return(env, params, policy):
    """Expected return of a deterministic policy, by enumerating the starts."""
    returns = jax.vmap(lambda s: play(env, params, jr.key(0), policy, s)[1].sum())
    return returns(starts(env)).mean()


@pytest.mark.parametrize("length", [1, 2, 7, 50])
def test_tmaze_policy_with_memory_returns_exactly_one(length):
    env, params = TMaze(), TMaze().default_params.replace(length=length)
    optimal = lambda t, state, obs: jnp.where(t < length, RIGHT, state.goal)
    assert mean_return(env, params, optimal) == 1.0


def test_best_memoryless_tmaze_policy_returns_one_half():
    env, params = TMaze(), TMaze().default_params.replace(length=3)
    policies = jnp.array(list(product(range(4), repeat=4)))  # an action for each clean observation
    memoryless = lambda table, t, state, obs: table[obs.argmax()]
    evaluate = jax.jit(jax.vmap(lambda table: mean_return(env, params, partial(memoryless, table))))
    returns = evaluate(policies)
    assert returns.max() == 0.5
    assert returns.min() == -1.0


def test_tmaze_reward_follows_the_schedule():
    env, params = TMaze(), TMaze().default_params.replace(length=4)
    actions = jnp.array([UP, RIGHT, LEFT, RIGHT, UP])  # positions 0, 1, 0, 1: always behind
    _, reward, terminated = play(env, params, jr.key(0), lambda t, state, obs: actions[t])
    np.testing.assert_allclose(reward, [-0.25, -0.25, -0.25, -0.25, 0.0])
    assert terminated.tolist() == [False] * 4 + [True]
    late = jnp.array([RIGHT, RIGHT, RIGHT, DOWN, RIGHT])  # reaches the junction, but turns too late
    _, reward, _ = play(env, params, jr.key(0), lambda t, state, obs: late[t])
    np.testing.assert_allclose(reward, [0.0, 0.0, 0.0, -0.25, 0.0])


def test_tmaze_shows_its_cue_in_the_first_observation_alone():
    env, params = TMaze(), TMaze().default_params.replace(length=3)
    right = lambda t, state, obs: RIGHT
    for goal in (UP, DOWN):
        start = jax.tree.map(lambda x: x[goal], starts(env))  # noqa: B023
        obs, *_ = play(env, params, jr.key(0), right, start)
        assert obs.argmax(1).tolist() == [goal, 2, 2, 3, 3]
        assert (obs.sum(1) == 1).all()


@pytest.mark.parametrize(("num_symbols", "delay"), [(2, 0), (3, 1), (5, 6)])
def test_repeat_first_returns_one_with_memory_and_zero_without(num_symbols, delay):
    env = RepeatFirst(num_symbols)
    params = env.default_params.replace(delay=delay)
    # A memoryless policy answers the one query alike whatever the symbol was: by `shift` alone.
    policy = lambda memory, shift, t, state, obs: memory * state.symbol + shift
    evaluate = jax.vmap(lambda m, a: mean_return(env, params, partial(policy, m, a)))
    memory = jnp.arange(num_symbols + 1) == num_symbols
    returns = evaluate(memory, jnp.append(jnp.arange(num_symbols), 0))
    np.testing.assert_allclose(returns, memory, atol=1e-6)


def test_repeat_first_flags_the_symbol_and_the_query():
    env = RepeatFirst(3)
    params = env.default_params.replace(delay=2)
    start = jax.tree.map(lambda x: x[1], starts(env))
    obs, reward, terminated = play(env, params, jr.key(0), lambda t, s, o: 0, start)
    assert obs[:4].tolist() == [
        [0, 1, 0, 1, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
    ]
    assert reward.tolist() == [0, 0, 0, -0.5]
    assert terminated.tolist() == [False] * 3 + [True]


def test_distractors_fill_the_delay_and_nothing_else():
    env = RepeatFirst(3)
    params = env.default_params.replace(delay=30, distractors=1.0)
    obs, *_ = play(env, params, jr.key(0), lambda t, s, o: 0)
    assert (obs[:31, :3].sum(1) == 1).all()
    assert (obs[1:31, :3].sum(0) > 0).all()  # every symbol occurs
    assert not obs[31:, :3].any()
    assert np.flatnonzero(obs[:, 3]).tolist() == [0]
    assert np.flatnonzero(obs[:, 4]).tolist() == [31]
    rare = env.default_params.replace(delay=1000, distractors=0.2)
    obs, *_ = play(env, rare, jr.key(0), lambda t, s, o: 0)
    assert abs(obs[1:1001, :3].sum() / 1000 - 0.2) < 4 * (0.2 * 0.8 / 1000) ** 0.5


@pytest.mark.parametrize(("env", "size"), ENVS)
def test_noise_has_the_given_deviation_and_is_fresh_in_every_step(env, size):
    key = "length" if "length" in size else "delay"
    params = env.default_params.replace(**{key: 4000})
    still = lambda t, state, obs: 0
    clean, *_ = play(env, params, jr.key(0), still)
    noisy, *_ = play(env, params.replace(noise=0.3), jr.key(0), still)
    noise = np.asarray(noisy - clean)
    error = 0.3 / np.sqrt(noise.size)
    assert abs(noise.mean()) < 4 * error
    assert abs(noise.std() - 0.3) < 4 * error / np.sqrt(2)
    assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 4 / np.sqrt(len(noise))
    assert abs(np.corrcoef(noise.T)[0, 1]) < 4 / np.sqrt(len(noise))


@pytest.mark.parametrize(("env", "size"), ENVS)
def test_starts_are_equally_likely(env, size):
    draw = jax.jit(jax.vmap(lambda key: env.reset_env(key, env.default_params)[1][0]))
    drawn = draw(jr.split(jr.key(0), 3000))
    n = len(starts(env)[0])
    deviation = (1 / n * (1 - 1 / n) / 3000) ** 0.5
    np.testing.assert_allclose(np.bincount(drawn, minlength=n) / 3000, 1 / n, atol=4 * deviation)


@pytest.mark.parametrize(("env", "size"), ENVS)
def test_clock_terminates_and_never_truncates(env, size):
    params = env.default_params.replace(**size)
    _, state = env.reset(jr.key(0), params)
    ends = []
    for t in range(2 * params.max_steps_in_episode):
        _, state, _, terminated, truncated, _ = env.step(jr.key(t), state, 0, params)
        ends.append(bool(terminated))
        assert not truncated
    one = [False] * (params.max_steps_in_episode - 1) + [True]
    assert ends == one * 2
