"""The memory point mass and the maze with doors, walked by scripted policies."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

from spg import envs
from spg.envs.point_mass import COLUMNS, Doors, DoorsState, PointMass, PointMassState, reached

GOAL = jnp.array(Doors.goal)
NEW = jnp.array(False), jnp.int32(0)  # an episode opens


def point_mass(x, goal_x):
    start = jnp.array([x, 15.0])
    return PointMassState(start, start, jnp.array([goal_x, 130.0]), *NEW)


def doors(e1=55.0, e2=55.0, x=75.0, y=10.0):
    return DoorsState(jnp.array([x, y]), jnp.array([e1, e2]), *NEW)


def action(angle):
    """The action whose heading is `angle`."""
    return ((angle / jnp.pi) % 2 - 1)[None]


def towards(goal, position):
    return action(jnp.arctan2(*(goal - position)[::-1]))


def landing(goal, position):
    """Straight on, but for a bend in the last two steps, which end exactly at the goal."""
    way = goal - position
    length = jnp.hypot(*way)
    bends = (length > 1.8001) & (length < 3.6)
    return action(jnp.arctan2(*way[::-1]) + jnp.where(bends, jnp.arccos(length / 3.6), 0.0))


def up(goal, position):
    return jnp.array([-0.5])


def play(env, starts, policy, num_steps=1000):
    """Steps of `policy(goal, position)` from each start: positions, rewards, crashes, and what is
    seen after them, `[N, T, ...]`. A point that crashed is walked on, for tests to ignore."""

    def step(state, _):
        chosen = policy(state.goal if isinstance(env, PointMass) else GOAL, state.position)
        obs, state, reward, crashed, _ = env.step_env(
            jr.key(0), state, chosen, env.default_params
        )  # fmt: skip
        return state, (state.position, reward, crashed, obs)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    return jax.jit(jax.vmap(lambda s: lax.scan(step, s, None, num_steps)[1]))(stacked)


def test_the_straight_way_takes_as_long_as_the_distance_says():
    # |x' - x| = 0, 31, 32, 63, 95 over 115 in height, 1.8 a step: 63.9, 66.2, 66.3, 72.8, 82.9
    starts = [point_mass(x, g) for x, g in ((25, 25), (57, 88), (25, 57), (25, 88), (25, 120))]
    expected = np.hypot([0, 31, 32, 63, 95], 115) / 1.8
    assert np.round(expected, 1).tolist() == [63.9, 66.2, 66.3, 72.8, 82.9]
    position, reward, crashed, obs = play(PointMass(), starts, towards)
    goals = np.stack([s.goal for s in starts])[:, None]
    distance = np.linalg.norm(position - goals, axis=-1)
    assert (distance <= 1.8).argmax(1).tolist() == (np.floor(expected) - 1).tolist()
    np.testing.assert_allclose(np.linalg.norm(np.diff(position, axis=1), axis=-1), 1.8, rtol=1e-3)
    np.testing.assert_allclose(reward, np.exp(-0.1 * distance), rtol=1e-4)
    assert not crashed.any()
    assert ((obs[:, :, 2] > 0).sum(1) == 16).all()  # and at the start: 17 steps, 30/1.8 = 16.7
    np.testing.assert_allclose(reward.sum(1)[0], 863.7, atol=0.1)  # about 936 × .9176 + 5.07


def test_the_best_at_the_goal_is_to_alternate():
    starts = [point_mass(25, 25), point_mass(25, 120)]
    _, reward, _, _ = play(PointMass(), starts, landing)
    np.testing.assert_allclose(np.sort(reward[:, -2:]), [[np.exp(-0.18), 1.0]] * 2, atol=1e-4)
    np.testing.assert_allclose(reward[:, -100:].mean(1), 0.9176, atol=1e-4)
    np.testing.assert_allclose(reward.sum(1)[0], 865.1, atol=0.1)
    discounted = (reward * 0.99 ** np.arange(1000)).sum(1)
    np.testing.assert_allclose(discounted, [51.7, 42.7], atol=0.1)
    assert reward[0, 0] == pytest.approx(np.exp(-11.32), rel=1e-3)  # 1e-5: sparse in effect


def test_leaving_the_field_terminates_and_ends_the_step():
    start = point_mass(25, 25)._replace(position=jnp.array([0.7, 50.0]))
    env = PointMass()
    step = jax.jit(lambda a: env.step_env(jr.key(0), start, a, env.default_params))
    _, state, reward, terminated, _ = step(jnp.zeros(1))  # left: .7, .1, then out
    assert (state.position[0], reward, terminated) == (0.0, -2.0, True)
    assert env.is_terminated(state, env.default_params)
    _, state, reward, terminated, _ = step(jnp.full(1, 3.0))  # clipped to 1: right
    np.testing.assert_allclose(state.position, [2.5, 50.0], atol=1e-5)
    assert not terminated
    corner = jnp.array([-0.25])  # left and up, each .6/√2 = .424: out in the second substep
    _, state, reward, terminated, _ = step(corner)
    np.testing.assert_allclose(state.position, [0.0, 50.849], atol=1e-3)
    assert (reward, terminated) == (-2.0, True)


def test_doors_let_pass_whoever_goes_through_them():
    position, reward, crashed, obs = play(Doors(), [doors()], landing)
    distance = np.linalg.norm(position[0] - GOAL, axis=-1)
    assert not crashed.any()
    assert (distance < 0.01).argmax() == 72  # after 73 steps, 130/1.8 = 72.2
    np.testing.assert_allclose(reward[0], 10 * np.exp(-0.03 * distance), rtol=1e-4)
    np.testing.assert_allclose(reward[0, -2:].mean(), 9.737, atol=1e-3)
    np.testing.assert_allclose(reward[0].sum(), 9219.8, atol=1)  # about 928 × 9.737 + 180
    assert (obs[0, :, 2] >= 0).sum() == 11  # and at the start: 12 steps, 20/1.8 = 11.1
    assert (obs[0, 11:, 2:] == -1).all()


def test_a_wall_is_touched_outside_its_door():
    # 57.5 is where a touch of the first wall begins, and the walls are 60 and 90 high
    starts = [doors(e1=55), doors(e1=74), doors(e1=73 - 1e-3), doors(e1=36.9), doors(e1=37.1)]
    starts += [doors(e2=74), doors(y=57.4, e1=80), doors(y=62.5, e1=80), doors(y=92.5, e2=80)]
    _, reward, crashed, _ = play(Doors(), starts, up, 60)
    passes = ~crashed.any(1)
    assert passes.tolist() == [True, False, True, False, True, False, False, True, True]
    assert (reward[crashed] == -2).all()
    assert crashed[6, 0]  # already the place before the first substep touches
    first = crashed[1].argmax()  # a step begins at 10 + 1.8 t, its last substep .6 × 2 higher
    assert first == np.ceil((57.5 - 10 - 1.2) / 1.8)


def test_a_blind_straight_line_passes_one_wall_in_four_of_ten_and_both_in_16_of_100():
    x, n = jnp.array([49.0, 75.0, 101.0]), 4000
    env = Doors()
    edges = jax.vmap(lambda k: env.reset_env(k, env.default_params)[1].edges)(
        jr.split(jr.key(0), 3 * n)
    )
    lines = jax.vmap(lambda x, e: doors(*e, x=x, y=50.0))(jnp.repeat(x, n), edges)
    step = lambda s, _: (env.step_env(jr.key(0), s, jnp.array([-0.5]), env.default_params)[1],) * 2
    walk = jax.jit(jax.vmap(lambda s: lax.scan(step, s, None, 26)[1]))(lines)
    alive = ~np.logical_or.accumulate(walk.crashed.reshape(3, n, 26), 2)
    for steps, chance in ((10, 0.4), (26, 0.16)):  # at 68, at 96.8
        deviation = (chance * (1 - chance) / n) ** 0.5
        np.testing.assert_allclose(alive[..., steps - 1].mean(1), chance, atol=4 * deviation)


def test_waiting_below_the_walls_pays_little_and_the_field_of_doors_has_no_way_out():
    wait = lambda goal, position: towards(jnp.array([75.0, 57.0]), position)
    _, reward, crashed, _ = play(Doors(), [doors()], wait)
    assert not crashed.any()
    assert 800 < reward.sum() < 850  # 10 exp(-.03 × 83) = .83 per step
    down = lambda goal, position: jnp.array([0.5])
    position, _, crashed, _ = play(Doors(), [doors()], down, 10)
    assert not crashed.any()
    assert position[0, -1].tolist() == [75.0, 0.0]


@pytest.mark.parametrize(
    ("env", "starts", "enough"),
    [
        (PointMass(), [point_mass(25, 25), point_mass(25, 120)], np.exp(-0.5)),
        (Doors(), [doors(), doors(e2=80)], 8.60708),
    ],
)
def test_success_follows_from_rewards_alone(env, starts, enough):
    position, reward, crashed, _ = play(env, starts, towards, 72)
    goals = [s.goal if isinstance(env, PointMass) else GOAL for s in starts]
    near = np.linalg.norm(position - np.stack(goals)[:, None], axis=-1) <= 5
    alive = ~np.logical_or.accumulate(crashed, 1)
    assert env.success_reward == pytest.approx(enough, rel=1e-6)
    np.testing.assert_array_equal((reward >= enough)[alive], near[alive])
    ways = [jnp.array(x[a]) for x, a in zip(position, alive, strict=True)]
    assert [bool(reached(*x)) for x in zip(ways, goals, strict=True)] == [True, False]


def test_starts_and_goals_are_independent_and_uniform():
    env, n = PointMass(), 4000
    draw = jax.jit(jax.vmap(lambda k: env.reset_env(k, env.default_params)[1]))
    state = draw(jr.split(jr.key(0), n))
    columns = [np.searchsorted(COLUMNS, x[:, 0]) for x in (state.start, state.goal)]
    counts = np.bincount(4 * columns[0] + columns[1], minlength=16)
    np.testing.assert_allclose(counts / n, 1 / 16, atol=4 * (15 / 256 / n) ** 0.5)
    assert (state.start[:, 1] == 15).all()
    assert (state.goal[:, 1] == 130).all()
    env = Doors()
    draw = jax.jit(jax.vmap(lambda k: env.reset_env(k, env.default_params)[1].edges))
    edges = np.asarray(draw(jr.split(jr.key(0), n)))
    assert edges.min() >= 10
    assert edges.max() <= 100
    np.testing.assert_allclose(edges.mean(0), 55, atol=4 * 90 / (12 * n) ** 0.5)
    assert abs(np.corrcoef(edges.T)[0, 1]) < 4 / n**0.5


@pytest.mark.parametrize("name", ["PointMass-memory", "Doors-memory"])
def test_what_is_remembered_is_hidden_from_the_policy_and_shown_to_critic_and_oracle(name):
    env = envs.make(name, privileged=True)
    oracle = envs.make(name, observe="state")
    assert (env.spec.obs_size, env.spec.critic_size, oracle.spec.obs_size) == (4, 4, 4)
    assert not env.spec.discrete

    @jax.jit
    def walk(key):
        def step(state, _):
            obs, state, *_ = env.step(key, state, jnp.array([-0.5]))
            seen = oracle.environment.observe(key, state, None, oracle.params)
            return state, (obs, state.env, seen)

        return lax.scan(step, env.reset(key)[1], None, 24)[1]

    obs, state, seen = walk(jr.key(1))
    hidden = state.goal if name == "PointMass-memory" else state.edges
    full = np.concatenate([state.position, hidden], 1) / 150
    np.testing.assert_allclose(obs.critic, full, rtol=1e-6)
    np.testing.assert_allclose(seen, full, rtol=1e-6)
    visible = 16 if name == "PointMass-memory" else 11
    np.testing.assert_allclose(obs.policy[:visible], full[:visible], rtol=1e-6)
    np.testing.assert_allclose(obs.policy[visible:, :2], full[visible:, :2], rtol=1e-6)
    assert (obs.policy[visible:, 2:] == (0 if name == "PointMass-memory" else -1)).all()


@pytest.mark.parametrize("name", ["PointMass-memory", "Doors-memory"])
def test_the_clock_truncates_and_does_not_terminate(name):
    env = envs.make(name, max_steps_in_episode=3)

    @jax.jit
    def walk(key):
        step = lambda state, key: (lambda x: (x[1], x[3:5]))(env.step(key, state, jnp.ones(1)))
        return lax.scan(step, env.reset(key)[1], jr.split(key, 7))[1]

    terminated, truncated = walk(jr.key(0))
    assert not terminated.any()
    assert truncated.tolist() == [False, False, True] * 2 + [False]
    assert envs.make(name).params.max_steps_in_episode == 400
    with pytest.raises(ValueError, match="max_steps_in_episode is 0; it has to be"):
        envs.make(name, max_steps_in_episode=0)
