import re

import gymnax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams, EnvState
from jax import lax

from spg import envs
from spg.envs.adapters import own
from spg.types import Observation

OWN = [
    "TMaze-memory",
    "RepeatFirst-memory",
    "RepeatVector-memory",
    "PointMass-memory",
    "Doors-memory",
    "tiger-pomdp",
]
NAMES = [*(n for n in gymnax.registered_envs if n != "MNISTBandit-bsuite"), *OWN]  # a download


def run(env, params, key, num_steps, policy=None):
    """A trajectory of uniformly random actions unless `policy(obs, t)` is given."""
    space = env.action_space(params)

    def step(carry, x):
        obs, state = carry
        t, key = x
        action_key, step_key = jr.split(key)
        action = space.sample(action_key) if policy is None else policy(obs, t)
        after = env.step(step_key, state, action, params)
        next_obs, state, reward, terminated, truncated, info = after
        out = obs, next_obs, action, reward, terminated, truncated, info["final_observation"]
        return (next_obs, state), out

    @jax.jit  # eager operations compile one by one
    def walk(key):
        steps = jnp.arange(num_steps), jr.split(key, num_steps)
        return lax.scan(step, env.reset(key, params), steps)[1]

    return walk(key)


def assert_all_equal(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.mark.parametrize("name", ["CartPole-v1", "MountainCarContinuous-v0", "FrozenLake-misc"])
def test_adapter_replays_the_raw_environment(name):
    raw, params = gymnax.make(name)
    env, _ = envs.make(name)
    obs, next_obs, action, *rest, final_obs = run(raw, params, jr.key(0), 60)
    mine = run(env, params, jr.key(0), 60)
    if name == "FrozenLake-misc":
        obs, next_obs, final_obs = (jax.nn.one_hot(x, 16) for x in (obs, next_obs, final_obs))
        assert any(jnp.any(x) for x in rest[1:])  # an episode ended
    assert_all_equal(mine, (obs, next_obs, action, *rest, final_obs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "velocities", "size"),
    [
        ("CartPole-v1", [1, 3], 4),  # x, x', θ, θ'
        ("Pendulum-v1", [2], 3),  # cos θ, sin θ, θ'
        ("Acrobot-v1", [4, 5], 6),  # cos, sin, cos, sin, θ₁', θ₂'
        ("MountainCar-v0", [1], 2),  # x, x'
        ("MountainCarContinuous-v0", [1], 2),
        ("Reacher-misc", [4, 5], 8),  # cos ×2, sin ×2, angular velocities, goal
        ("Swimmer-misc", [12, 13], 16),  # 5 urchins, xy, xy', goal
    ],
)
def test_velocities_are_where_the_documented_layout_has_them(name, velocities, size):
    positions = [i for i in range(size) if i not in velocities]
    opened = {o: envs.make(name, observe=o) for o in ("all", "positions", "velocities", "state")}

    @jax.jit
    def start(key):
        return {o: env.reset_env(key, params)[0] for o, (env, params) in opened.items()}

    seen = start(jr.key(0))
    for observe, (env, params) in opened.items():
        assert seen[observe].shape == env.observation_space(params).shape
    assert_all_equal(seen["positions"], seen["all"][jnp.array(positions)])
    assert_all_equal(seen["velocities"], seen["all"][jnp.array(velocities)])
    assert_all_equal(seen["state"], seen["all"])


def test_privileged_critic_sees_everything_also_at_the_end_of_an_episode():
    env, params = envs.make(
        "CartPole-v1", observe="positions", privileged=True, max_steps_in_episode=3
    )
    plain, _ = envs.make("CartPole-v1", max_steps_in_episode=3)
    obs, *_, final_obs = run(env, params, jr.key(0), 7)
    full, *_, final_full = run(plain, params, jr.key(0), 7)
    assert isinstance(final_obs, Observation)
    assert_all_equal(obs, Observation(full[:, ::2], full))
    assert_all_equal(final_obs, Observation(final_full[:, ::2], final_full))
    assert (env.observation_space(params).shape, env.critic_size(params)) == ((2,), 4)
    assert (plain.observation_space(params).shape, plain.critic_size(params)) == ((4,), 4)


def test_previous_discrete_action_is_one_hot_and_zero_at_starts():
    env, params = envs.make(
        "CartPole-v1", previous_action=True, privileged=True, max_steps_in_episode=3
    )
    obs, _, action, _, _, truncated, final_obs = run(env, params, jr.key(0), 12)
    assert truncated.sum() == 4
    taken = jax.nn.one_hot(action, 2)
    first = jnp.arange(12) % 3 == 0
    expected = jnp.where(first[:, None], 0.0, jnp.roll(taken, 1, 0))
    for seen, final in [(obs.policy, final_obs.policy), (obs.critic, final_obs.critic)]:
        assert_all_equal(seen[:, 4:], expected)
        assert_all_equal(final[:, 4:], taken)


def test_previous_continuous_action_is_clipped():
    env, params = envs.make("Pendulum-v1", previous_action=True, max_steps_in_episode=2)
    _, state = env.reset(jr.key(0), params)
    obs, state, *_ = env.step(jr.key(1), state, jnp.array([1.7]), params)
    assert_all_equal(obs[3:], jnp.array([1.0]))
    obs, state, *_, info = env.step(jr.key(1), state, jnp.array([-0.3]), params)
    assert_all_equal(obs[3:], jnp.array([0.0]))
    assert_all_equal(info["final_observation"][3:], jnp.array([-0.3]))


@pytest.mark.parametrize(
    ("name", "bounds"), [("Pendulum-v1", [-2.0, 2.0]), ("PointRobot-misc", [-0.1, 0.1])]
)
def test_actions_are_clipped_and_mapped_onto_the_own_bounds(name, bounds):
    env, params = envs.make(name)
    raw, _ = gymnax.make(name)
    space = env.action_space(params)
    assert (space.low, space.high) == (-1.0, 1.0)
    _, state = env.reset_env(jr.key(0), params)
    for action, fraction in [(-1.0, 0.0), (0.5, 0.75), (3.0, 1.0)]:
        own_action = jnp.full(space.shape, bounds[0] + fraction * (bounds[1] - bounds[0]))
        obs, *_ = env.step_env(jr.key(1), state, jnp.full(space.shape, action), params)
        expected, *_ = raw.step_env(jr.key(1), state.env, own_action, params)
        np.testing.assert_allclose(obs, expected, rtol=1e-6)


def test_every_episode_starts_afresh_and_keeps_its_true_end():
    env, params = envs.make("CartPole-v1")
    obs, next_obs, _, _, terminated, _, final_obs = run(env, params, jr.key(0), 200)
    ends = np.flatnonzero(terminated)
    starts = np.asarray(next_obs)[ends]
    assert len(ends) > 5
    assert len(np.unique(starts, axis=0)) == len(ends)
    assert (np.abs(starts) <= 0.05).all()
    # The true successor x + τ x' of x, whatever the reset did; τ = 0.02.
    np.testing.assert_allclose(final_obs[:, 0], obs[:, 0] + 0.02 * obs[:, 1], atol=1e-7)


def test_time_limit_truncates_and_a_fall_terminates():
    limited, params = envs.make("CartPole-v1", max_steps_in_episode=5)
    balance = lambda obs, t: t % 2
    *_, terminated, truncated, _ = run(limited, params, jr.key(0), 10, balance)
    assert truncated.tolist() == [False, False, False, False, True] * 2
    assert not terminated.any()
    env, params = envs.make("CartPole-v1")
    *_, terminated, truncated, _ = run(env, params, jr.key(0), 30, lambda obs, t: 1)
    assert terminated.any()
    assert not truncated.any()


class Counter(Environment):
    """Counts how often its transition and its reset are traced."""

    steps = resets = 0

    def reset_env(self, key, params):
        self.resets += 1
        return jnp.zeros(1), EnvState(time=0)  # pyright: ignore

    def step_env(self, key, state, action, params):
        self.steps += 1
        state = EnvState(time=state.time + 1)  # pyright: ignore
        return jnp.ones(1), state, 1, state.time >= 3, {}

    num_actions = 2

    def action_space(self, params=None):
        return spaces.Discrete(2)

    def observation_space(self, params=None):
        return spaces.Box(0, 1, (1,))


def test_a_step_holds_one_transition_and_one_reset_and_is_traced_once():
    inner, params = Counter(), EnvParams(max_steps_in_episode=5)  # pyright: ignore
    env = envs.Adapter(inner, params, policy=own)
    _, state = env.reset(jr.key(0), params)
    inner.steps = inner.resets = 0
    for t in range(4):
        _, state, reward, *_ = env.step(jr.key(t), state, 0, params)
    assert (inner.steps, inner.resets) == (1, 1)
    assert reward.dtype == jnp.float32
    assert state.env.time == 1  # terminated after three steps


def test_unbounded_actions_are_refused():
    inner = Counter()
    inner.action_space = lambda params=None: spaces.Box(-jnp.inf, jnp.inf, (2,))
    with pytest.raises(ValueError, match="actions of Counter are unbounded: Box"):
        envs.Adapter(inner, EnvParams(), policy=own)


@pytest.mark.parametrize("name", NAMES)
def test_every_environment_fits_a_vmapped_scan(name):
    env, params = envs.make(name, observe="state", privileged=True, previous_action=True)
    keys = jr.split(jr.key(0), 3)
    shapes = jax.eval_shape(jax.vmap(lambda key: run(env, params, key, 50)), keys)
    obs, _, _, reward, terminated, truncated, final_obs = shapes
    size = env.observation_space(params).shape[0]
    for x in (obs.policy, final_obs.policy):
        assert (x.shape, x.dtype) == ((3, 50, size), jnp.float32)
    assert obs.critic.shape == (3, 50, env.critic_size(params))
    assert (reward.shape, reward.dtype) == ((3, 50), jnp.float32)
    assert terminated.dtype == truncated.dtype == bool
    assert params.max_steps_in_episode > 0


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_environment_stays_finite(name):
    env, params = envs.make(name, observe="state", privileged=True, previous_action=True)
    out = jax.vmap(lambda key: run(env, params, key, 50))(jr.split(jr.key(0), 3))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "UmbrellaChain-bsuite", *OWN])
def test_float32_comes_out_of_64_bit_jax_too(name):
    with jax.enable_x64(True):
        env, params = envs.make(name, privileged=True)
        out = jax.eval_shape(lambda: run(env, params, jr.key(0), 5))
    floats = [x for x in jax.tree.leaves(out) if x.dtype not in (bool, jnp.int32)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_typed_and_legacy_keys_agree():
    env, params = envs.make("CartPole-v1")
    typed = run(env, params, jr.key(3), 20)
    assert_all_equal(typed, run(env, params, jr.PRNGKey(3), 20))


def test_parameters_can_be_vmapped():
    env, params = envs.make("MemoryChain-bsuite")
    lengths = params.replace(memory_length=jnp.array([2, 5]))
    axes = params.replace(memory_length=0, max_steps_in_episode=None)
    out = jax.vmap(lambda p: run(env, p, jr.key(0), 12)[4], in_axes=(axes,))(lengths)
    assert [np.flatnonzero(x)[0] for x in out] == [2, 5]


def test_keywords_reach_parameters_and_constructor():
    env, params = envs.make("MemoryChain-bsuite", num_bits=4, memory_length=7)
    assert (params.memory_length, env.observation_space(params).shape) == (7, (6,))
    assert env.default_params.memory_length == 7
    env, params = envs.make("RepeatFirst-memory", num_symbols=3, delay=20)
    assert (env.action_space(params).n, params.max_steps_in_episode) == (3, 22)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CartPol-v1",), "unknown environment 'CartPol-v1'; did you mean 'CartPole-v1'"),
        (("t-maze",), "did you mean 'TMaze-memory'"),
        (("halfcheetah",), "did you mean 'brax/halfcheetah'"),
        (("brax/hoper",), "unknown environment 'brax/hoper'; did you mean 'brax/hopper'"),
        (("xyz",), "unknown environment 'xyz'; choose from TMaze-memory"),
        (("CartPole-v1", {"observe": "position"}), "'position'; did you mean 'positions'"),
        (("brax/ant", {"backend": "springs"}), "unknown backend 'springs'; did you mean 'spring'"),
        (
            ("TMaze-memory", {"lenght": 3}),
            "unknown parameter of TMaze-memory 'lenght'; did you mean 'length'",
        ),
        (("MemoryChain-bsuite", {"num_bit": 3}), "did you mean 'num_bits'"),
        (("Catch-bsuite", {"observe": "positions"}), "'Catch-bsuite' shows no velocities to hide"),
        (("RepeatFirst-memory", {"num_symbols": 1}), "num_symbols is 1; it has to be at least 2"),
    ],
)
def test_misspelt_names_raise_with_the_near_matches(arguments, message):
    name, keywords = arguments if len(arguments) == 2 else (*arguments, {})
    with pytest.raises(ValueError, match=re.escape(message)):
        envs.make(name, **keywords)
