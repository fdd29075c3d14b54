import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import make_pomdp
from jax import lax

from spg.envs.tabular import Tabular, TabularState, tabular_params
from spg.worlds.models import DensePOMDP, SparsePOMDP, dense, sparse

pytestmark = pytest.mark.usefixtures("float64")


def sparse_world(seed=0, size=5, num_actions=2, width=4, num_obs=3):
    """Lists whose zeros stand anywhere, not only behind; rewards tell (s, a, i) apart."""
    rng = np.random.default_rng(seed)

    def law(*shape):
        p = rng.exponential(size=shape) * (rng.random(shape) < 0.6)
        p[..., rng.integers(shape[-1])] += 0.1  # no empty row
        return jnp.asarray(p / p.sum(-1, keepdims=True))

    shape = size, num_actions, width
    successor = rng.permuted(np.broadcast_to(np.arange(size), (*shape[:2], size)), axis=-1)
    return SparsePOMDP(
        successor=jnp.asarray(successor[..., :width], jnp.int32),
        probability=law(*shape),
        reward=jnp.arange(float(np.prod(shape))).reshape(shape),
        observation=jnp.asarray(np.tile(np.arange(num_obs)[::-1], (size, 1)), jnp.int32),
        emission=law(size, num_obs),
        start=law(size),
        num_obs=num_obs,
    )


def cycle(size=4):
    """States that follow one another, each with its own observation; starts in 0."""
    following = jnp.roll(jnp.eye(size), 1, 1)[:, None]
    reward = 10.0 * jnp.arange(size)[:, None]
    return DensePOMDP(following, jnp.eye(size), reward, jnp.eye(size)[0])


def at(state):
    return TabularState(jnp.int32(state), jnp.int32(0), jnp.int32(0))


def walk(env, params, num_steps):
    """`step` from a reset: observations, states, rewards, flags and final observations."""

    @eqx.filter_jit
    def episode(params, key):
        def step(state, key):
            obs, state, reward, terminated, truncated, info = env.step(key, state, 0, params)
            return state, (obs, state, reward, terminated, truncated, info["final_observation"])

        obs, state = env.reset(key, params)
        return obs, state, lax.scan(step, state, jr.split(key, num_steps))[1]

    return episode(params, jr.key(0))


def assert_frequencies(counts, law):
    """Within four standard errors, and never where the law is zero."""
    num = counts.sum(-1, keepdims=True)
    law = np.asarray(law)
    assert not counts[law == 0].any()
    error = np.sqrt(law * (1 - law) / num)
    assert (np.abs(counts / num - law) <= 4 * error + 1e-12).all()


@pytest.mark.parametrize("form", [lambda x: x, dense])
def test_frequencies_are_those_of_the_model(form):
    """Of successors of each (s, a), of what these emit and pay; and of the start."""
    pomdp, num = sparse_world(), 2000
    env, world = Tabular(form(pomdp)), dense(pomdp)
    size, num_actions, _ = pomdp.successor.shape

    @jax.jit
    def draw(key):
        def one(s, a, key):
            obs, state, reward, *_ = env.step_env(key, at(s), a, env.default_params)
            return obs, state.obs, state.state, reward

        pairs = jnp.indices((size, num_actions)).reshape(2, -1)
        keys = jr.split(key, (pairs.shape[1], num))
        return jax.vmap(jax.vmap(one, (None, None, 0)))(*pairs, keys)

    obs, same_obs, successor, reward = map(np.asarray, draw(jr.key(0)))
    assert np.array_equal(obs, same_obs)
    count = lambda x, n: np.apply_along_axis(np.bincount, -1, x, minlength=n)
    assert_frequencies(count(successor, size), world.transition.reshape(-1, size))
    emitted = np.zeros((size, 3))
    np.add.at(emitted, (successor, obs), 1)
    assert_frequencies(emitted, world.observation)
    paid = np.asarray(dense(pomdp).reward)  # the dense form pays the mean
    for i, (s, a) in enumerate(np.ndindex(size, num_actions)):
        for t in np.unique(successor[i]):
            place = np.flatnonzero(pomdp.successor[s, a] == t)[0]
            expected = paid[s, a] if form is dense else pomdp.reward[s, a, place]
            assert np.allclose(reward[i][successor[i] == t], expected, rtol=1e-6)

    reset = jax.jit(jax.vmap(lambda key: env.reset_env(key, env.default_params)))
    obs, state = reset(jr.split(jr.key(1), 4000))
    assert np.array_equal(obs, state.obs)
    assert not state.time.any()
    assert_frequencies(np.bincount(state.state, minlength=size), world.start)
    emitted = np.zeros((size, 3))
    np.add.at(emitted, (np.asarray(state.state), np.asarray(obs)), 1)
    seen = emitted.sum(1) > 0
    assert_frequencies(emitted[seen], world.observation[seen])


def test_state_and_observation_are_drawn_independently():
    """All states lead to all, and emit both observations, with the same probabilities."""
    half = jnp.full((2, 1, 2), 0.5)
    env = Tabular(DensePOMDP(half, half[:, 0], jnp.zeros((2, 1)), half[0, 0]))
    _, _, (obs, state, *_) = walk(env, env.default_params, 4000)
    signs = 2 * np.stack([state.state, obs, np.roll(state.state, 1), np.roll(obs, 1)]) - 1
    products = signs @ signs.T / 4000
    assert (np.abs(products[~np.eye(4, dtype=bool)]) < 4 / np.sqrt(4000)).all()


@pytest.mark.parametrize("seed", range(3))
def test_what_has_probability_zero_is_never_drawn(monkeypatch, seed):
    """Even with u = 0, u just below 1, and u at or beside any cumulative probability."""
    pomdp = sparse_world(seed, width=5, num_obs=6)
    env, world = Tabular(pomdp), jax.tree.map(np.asarray, dense(pomdp))
    params = env.default_params
    laws = params.successor_cumulative, params.observation_cumulative, params.start_cumulative
    edges = np.concatenate([np.asarray(x, np.float64).ravel() for x in laws])
    edges = np.unique(edges[edges < 1])
    single = edges.astype(np.float32)
    near = (np.nextafter(edges, 0), edges, np.nextafter(edges, 1), np.nextafter(single, 0))
    ends = [0.0, np.nextafter(1.0, 0), np.nextafter(np.float32(1), np.float32(0))]
    grid = np.unique(np.concatenate([*near, ends]))
    grid = jnp.asarray(grid[(grid >= 0) & (grid < 1)])
    monkeypatch.setattr("spg.envs.tabular.jr.uniform", lambda key, shape: grid[key])
    (i,) = np.indices(grid.shape, np.uint32)
    keys = jnp.asarray(np.stack([np.repeat(i, 2), np.stack([i, i[::-1]], 1).ravel()], 1))

    @jax.jit
    def draw(s, a):
        step = lambda key: env.step_env(key, at(s), a, params)[:2]
        return jax.vmap(step)(keys), jax.vmap(lambda key: env.reset_env(key, params))(keys)

    for s, a in np.ndindex(world.transition.shape[:2]):
        (obs, state), (first_obs, first) = draw(s, a)
        assert (world.transition[s, a, state.state] > 0).all()
        assert (world.observation[state.state, obs] > 0).all()
        assert (world.start[first.state] > 0).all()
        assert (world.observation[first.state, first_obs] > 0).all()
        # What the wide grid misses is nothing: each possible successor does occur.
        assert set(np.flatnonzero(world.transition[s, a])) == set(np.asarray(state.state).tolist())


def test_long_rows_do_not_round_to_a_zero():
    """A thousand times 1/1000, and a zero behind, in single precision."""
    size = 1001
    law = jnp.where(jnp.arange(size) < 1000, 1e-3, 0.0)
    params = tabular_params(
        SparsePOMDP(
            jnp.zeros((size, 1, 1), jnp.int32), jnp.ones((size, 1, 1)), jnp.zeros((size, 1, 1)),
            jnp.tile(jnp.arange(size, dtype=jnp.int32), (size, 1)), jnp.tile(law, (size, 1)),
            law, size,
        )
    )  # fmt: skip
    for cumulative in (params.start_cumulative, params.observation_cumulative[0]):
        assert cumulative.dtype == jnp.float32
        assert (cumulative[998] < 1) & (cumulative[999] > 1)
        assert (jnp.diff(cumulative) >= 0).all()


def test_world_without_a_clock_never_ends():
    env = Tabular(cycle())
    obs, state, later = walk(env, env.default_params, 50)
    next_obs, next_state, reward, terminated, truncated, final_obs = later
    assert obs == state.state == 0
    assert np.array_equal(next_state.state, np.arange(1, 51) % 4)
    assert np.array_equal(next_obs, np.arange(1, 51) % 4)
    assert np.array_equal(final_obs, next_obs)
    assert np.array_equal(reward, 10.0 * (np.arange(50) % 4))
    assert np.array_equal(next_state.time, np.arange(1, 51))
    assert not terminated.any()
    assert not truncated.any()


def test_clock_truncates_and_opens_the_next_episode():
    env = Tabular(cycle())
    params = env.default_params.replace(max_steps_in_episode=3)
    _, _, later = walk(env, params, 9)
    obs, state, reward, terminated, truncated, final_obs = later
    assert truncated.tolist() == [False, False, True] * 3
    assert not terminated.any()
    assert state.state.tolist() == obs.tolist() == [1, 2, 0] * 3
    assert state.time.tolist() == [1, 2, 0] * 3
    assert final_obs.tolist() == [1, 2, 3] * 3  # the true successor, before the reset
    assert reward.tolist() == [0, 10, 20] * 3


def test_reset_with_a_clock_draws_from_the_start():
    """Episodes of one step in a world that stays where it is: the states are fresh draws."""
    start = jnp.array([0.2, 0.0, 0.8])
    stay = DensePOMDP(jnp.eye(3)[:, None], jnp.eye(3), jnp.zeros((3, 1)), start)
    env = Tabular(stay)
    params = env.default_params.replace(max_steps_in_episode=1)
    _, first, (obs, state, _, _, truncated, final_obs) = walk(env, params, 2000)
    assert truncated.all()
    assert np.array_equal(obs, state.state)
    assert np.array_equal(final_obs, np.append(first.state, obs[:-1]))
    assert_frequencies(np.bincount(state.state, minlength=3), start)
    _, first, (_, state, *_) = walk(env, env.default_params, 100)
    assert (state.state == first.state).all()  # without a clock nothing is drawn anew


def test_jit_and_vmap_agree_with_the_plain_call():
    env = Tabular(sparse_world())
    keys, states, actions = jr.split(jr.key(0), 6), jnp.arange(6) % 5, jnp.arange(6) % 2
    for limit in (None, 1):
        params = env.default_params.replace(max_steps_in_episode=limit)
        plain = [
            env.step(key, at(s), a, params) for key, s, a in zip(keys, states, actions, strict=True)
        ]
        step = lambda key, s, a, params=params: env.step(key, at(s), a, params)
        batched = jax.jit(jax.vmap(step))(keys, states, actions)
        plain = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *plain)
        for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(batched), strict=True):
            assert np.array_equal(x, y)


def test_step_is_traced_once_for_all_models_of_a_shape():
    env, traced = Tabular(sparse_world()), []

    @jax.jit
    def step(key, s, params):
        traced.append(1)
        return env.step(key, at(s), 0, params)

    for seed in range(3):
        step(jr.key(seed), seed, tabular_params(sparse_world(seed)))
    assert len(traced) == 1


def test_vmap_over_models():
    worlds = [make_pomdp(jr.key(i), num_states=3, num_obs=2, num_actions=2) for i in range(4)]
    env = Tabular(worlds[0])
    params = [tabular_params(world) for world in worlds]
    together = jax.tree.map(lambda *x: jnp.stack(x), *params)
    key, action = jr.key(5), jnp.int32(1)

    def play(params, key):
        reset_key, step_key = jr.split(key)
        _, state = env.reset(reset_key, params)
        return env.step(step_key, state, action, params)

    keys = jr.split(key, 200)
    per_model = jax.vmap(play, (None, 0))
    batched = jax.jit(jax.vmap(per_model, (0, None)))(together, keys)
    single = jax.jit(per_model)
    for i, one in enumerate(params):
        for x, y in zip(jax.tree.leaves(single(one, keys)), jax.tree.leaves(batched), strict=True):
            assert np.array_equal(x, y[i])
    assert len(np.unique(batched[2])) > 6  # rewards of each model are its own


def test_spaces_and_observe():
    env = Tabular(sparse_world())
    assert env.num_actions == env.action_space().n == 2
    assert env.observation_space().n == 3
    assert env.name == "Tabular"
    state = TabularState(jnp.int32(1), jnp.int32(2), jnp.int32(0))
    assert env.observe(jr.key(0), state, 0, env.default_params) == 2
    assert not env.is_truncated(state, env.default_params)
    assert np.array_equal(tabular_params(dense(sparse(cycle()))).successor[:, 0, 0], [1, 2, 3, 0])
