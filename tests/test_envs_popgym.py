"""POPGym's tasks beside the original package, which is made to draw what ours drew."""

import random
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from gymnax.environments.environment import Environment
from jax import lax

from spg import envs
from spg.envs.popgym import TASKS
from spg.envs.popgym.boards import Battleship, Concentration, MineSweeper, place_ship
from spg.envs.popgym.control import PositionOnlyCartPole
from spg.envs.popgym.labyrinths import (
    FREE,
    GOAL,
    MOVES,
    WALL,
    LabyrinthEscape,
    LabyrinthExplore,
    doors,
    maze,
)
from spg.envs.popgym.task import draw

pytestmark = pytest.mark.usefixtures("float64")  # the original's physics are in double precision

NUM_STEPS = 1000
LABYRINTHS = LabyrinthExplore, LabyrinthEscape
CARTPOLE = ("x", "x_dot", "theta", "theta_dot")
LABYRINTH_STEPS = 2500  # the clock of a labyrinth has 1023
NEVER = {  # ends that a task does not have; walks through the easy ones meet all others
    "terminated": ("MultiarmedBandit", "PositionOnlyPendulum", "NoisyPositionOnlyPendulum"),
    "truncated": ("RepeatFirst", "RepeatPrevious", "Autoencode", "CountRecall", "HigherLower"),
}


def walk(env, num_steps):
    """Starts of `num_steps` + 1 episodes, and `num_steps` steps, a new episode after each end.

    Actions are random, but in the first half often those of one who sees everything; in the second
    half of a walk through labyrinths all are 0, since whoever moves gets everywhere in time.
    """
    params = env.default_params
    space = env.action_space(params)

    def act(key, state, share):
        coin_key, tie_key, key = jr.split(key, 3)
        at_random = space.sample(key)
        if (worth := wisdom(env, state)) is None:
            return at_random
        if isinstance(env, LABYRINTHS):
            at_random = jnp.where(share > 0, at_random, 0)
        wise = jnp.argmax(worth + jr.uniform(tie_key, worth.shape))
        return jnp.where(jr.bernoulli(coin_key, share), wise, at_random).astype(at_random.dtype)

    def step(carry, x):
        obs, state = carry
        start, share, key, action_key = x
        action = act(action_key, state, share)
        obs, after, reward, terminated, _ = env.step_env(key, state, action, params)
        truncated = env.is_truncated(after, params)
        out = action, obs, after, reward, terminated, truncated, drawn(key)
        done = terminated | truncated
        return jax.tree.map(lambda x, y: jnp.where(done, x, y), start, (obs, after)), out

    @jax.jit
    def run(key):
        start_key, *keys = jr.split(key, 3)
        start_keys = jr.split(start_key, num_steps + 1)
        starts = jax.vmap(lambda key: env.reset_env(key, params))(start_keys)
        first, later = (jax.tree.map(lambda x, i=i: x[i], starts) for i in (0, slice(1, None)))
        share = jnp.where(jnp.arange(num_steps) < num_steps // 2, 0.9, 0.0)
        steps = later, share, *(jr.split(key, num_steps) for key in keys)
        return (*starts, jax.vmap(drawn)(start_keys)), lax.scan(step, first, steps)[1]

    return jax.device_get(run(jr.key(0)))


def drawn(key):
    """What bandits and noise draw with the key of a step."""
    play_key, obs_key = jr.split(key)
    return jr.uniform(play_key, (), jnp.float32), jr.normal(obs_key, (2,), jnp.float64)


def wisdom(env, state):
    """The worth of each action to who sees everything, in steps of 1; None if at random will do."""
    if isinstance(env, Battleship):
        return (state.ships & ~state.shots).ravel() * 1.0
    if isinstance(env, MineSweeper):
        return ~(state.mines | state.viewed).ravel() * 1.0
    if isinstance(env, Concentration):
        n = env.num_cards
        same = (state.cards == state.cards[state.first]) & (jnp.arange(n) != state.first)
        pair = (state.first < n) & (state.cards < env.num_kinds) & same
        return jnp.where(state.up, -1.0, pair)
    if isinstance(env, PositionOnlyCartPole):
        lean = state.theta + 0.5 * state.theta_dot
        return jnp.stack([-lean, lean]) * 1e3
    if isinstance(env, LABYRINTHS):
        places = jnp.clip(state.position + jnp.array(MOVES), 0, env.size)
        open_ = state.grid[tuple(places.T)] != WALL
        return open_ + 1.0 * (open_ & ~state.explored[tuple(places.T)])
    return None


class Script:
    """Stands for the random generator of the original and gives what it was told."""

    def __init__(self, shuffles=(), mines=None, uniforms=(), normals=()):
        self.mines = mines
        self.shuffles, self.uniforms, self.normals = map(iter, (shuffles, uniforms, normals))

    def shuffle(self, order):
        order[:] = next(self.shuffles)

    def choice(self, squares, size, replace):
        assert len(self.mines) == size
        return self.mines

    def random(self, size=None, dtype=None):
        return next(self.uniforms)

    def uniform(self, low, high, size=None):
        return next(self.uniforms)

    def normal(self, mean, std):
        return mean + std * next(self.normals)


def deck(kinds_of_cards, kinds, *, rest=-1):
    """A deck in which card i has kind `kinds[i]`; any card that is left where that is `rest`."""
    left = [list(np.flatnonzero(kinds_of_cards == kind)) for kind in range(13)]
    cards = [left[kind].pop() if kind != rest else None for kind in kinds]
    others = [card for same in left for card in same]
    filled = [others.pop() if card is None else card for card in cards]
    return np.array([*filled, *others])


def prepare(theirs, name, episode, monkeypatch):
    """Have the original draw what `episode` drew."""
    start, after = episode.start, episode.after
    script = Script()
    if name.startswith(("Repeat", "HigherLower", "CountRecall")):
        kinds = np.concatenate([start.card[None], after.card])  # [T + 1, D]
        if name.startswith("CountRecall"):
            decks = [(theirs.deck_idx_type, kinds[:, i]) for i in (0, 1)]
        else:
            ranked = name.startswith("HigherLower")
            decks = [(theirs.deck.ranks_idx if ranked else theirs.deck.suits_idx, kinds[:, 0])]
        script = Script([deck(*pair)[::-1] for pair in decks])  # theirs deals from the end
    elif name.startswith("Autoencode"):
        known = after.cards[-1][: after.time[-1] + 1]
        script = Script([deck(theirs.deck.suits_idx, known)[::-1]])
    elif name.startswith("Concentration"):
        unknown = theirs.facedown_card
        script = Script([deck(theirs.deck_idx_type, after.cards[-1], rest=unknown)])
    elif name.startswith("Battleship"):
        theirs.place_ship = lambda board, size: start.ships.astype(np.int8)
    elif name.startswith("MineSweeper"):
        script = Script(mines=np.flatnonzero(start.mines))
    elif name.startswith("MultiarmedBandit"):
        script = Script(uniforms=[start.chances, *episode.uniforms[1:]])
    elif "Position" in name:
        names = CARTPOLE[2:] if "Pendulum" in name else CARTPOLE
        hidden = np.array([getattr(start, field) for field in names])
        script = Script(uniforms=[hidden], normals=episode.normals)
    else:
        from popgym.core.maze import Maze

        grid = start.grid.copy()
        end = np.argwhere(grid == GOAL)[0] if GOAL in grid else (0, 0)
        grid[grid > WALL] = WALL

        def enter(self, start_outer):
            self.start, self.end = tuple(start.position.tolist()), tuple(end)

        monkeypatch.setattr(Maze, "generate", lambda self: setattr(self, "grid", grid.copy()))
        monkeypatch.setattr(Maze, "generate_entrances", enter)
    theirs.np_random = script


def episodes(walked):
    """The episodes of a walk; the last one may not have ended."""
    (start_obs, start, start_drawn), (*steps, step_drawn) = walked
    action, obs, after, reward, terminated, truncated = steps
    ends = np.flatnonzero(terminated | truncated) + 1
    for i, j in zip([0, *ends], [*ends, len(reward)], strict=True):
        if i == j:
            continue
        uniforms, normals = (
            np.concatenate([x[i][None], y[i:j]])
            for x, y in zip(start_drawn, step_drawn, strict=True)
        )
        yield SimpleNamespace(
            start=jax.tree.map(lambda x, i=i: x[i], start),
            after=jax.tree.map(lambda x, i=i, j=j: x[i:j], after),
            obs=np.concatenate([start_obs[i][None], obs[i:j]]),
            action=action[i:j], reward=reward[i:j], terminated=terminated[i:j],
            truncated=truncated[i:j], uniforms=uniforms, normals=normals,
        )  # fmt: skip


def compare(ours, theirs, name, monkeypatch):
    """Step both through a walk: the same is seen, paid and ended. Returns the ends."""
    from gymnasium.spaces import MultiDiscrete
    from gymnasium.spaces.utils import flatten

    walked = walk(ours, LABYRINTH_STEPS if name.startswith("Labyrinth") else NUM_STEPS)
    for episode in episodes(walked):
        prepare(theirs, name, episode, monkeypatch)
        obs, _ = theirs.reset()
        seen, rewards, terminated, truncated = [obs], [], [], []
        for t, action in enumerate(episode.action):
            if t and t % 100 == 0 and "CartPole" in name:  # rounding grows by e^.08 in a step
                theirs.state = np.array([getattr(episode.after, x)[t - 1] for x in CARTPOLE])
            if isinstance(theirs.action_space, MultiDiscrete):
                action = np.unravel_index(action, theirs.action_space.nvec)
            elif not action.shape:
                action = int(action)
            obs, reward, *ends, _ = theirs.step(action)
            seen.append(obs)
            rewards.append(reward)
            terminated.append(ends[0])
            truncated.append(ends[1])
        seen = np.stack([flatten(theirs.observation_space, x) for x in seen])
        np.testing.assert_allclose(episode.obs, seen, atol=1e-6)
        np.testing.assert_allclose(episode.reward, rewards, rtol=1e-5, atol=1e-9)
        np.testing.assert_array_equal(episode.terminated, terminated)
        np.testing.assert_array_equal(episode.truncated, truncated)
    *_, terminated, truncated, _ = walked[1]
    return {"terminated": terminated.any(), "truncated": truncated.any()}


def sizes():
    for name in ["LabyrinthExploreSmall", *(name.removeprefix("popgym/") for name in TASKS)]:
        quick = name.endswith(("Small", "Easy")) and name != "LabyrinthExploreEasy"
        yield pytest.param(name, marks=pytest.mark.slow if quick else pytest.mark.long)


@pytest.mark.parametrize("name", sizes())
def test_a_task_is_the_original(name, monkeypatch):
    popgym = pytest.importorskip("popgym")
    if name == "LabyrinthExploreSmall":  # in which a walk visits every square in time
        ours, theirs = LabyrinthExplore(6), popgym.envs.LabyrinthExplore(maze_dims=(6, 6))
    else:
        ours, theirs = TASKS[f"popgym/{name}"](), getattr(popgym.envs, name)()
    met = compare(ours, theirs, name, monkeypatch)
    task = name.removesuffix("Small").removesuffix("Easy")
    if task != name and name != "LabyrinthExploreEasy":
        assert met == {end: task not in tasks for end, tasks in NEVER.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LabyrinthEscape", {"size": 6}),
        pytest.param("Battleship", {}, marks=pytest.mark.slow),
    ],
)
def test_rare_resets_are_those_of_gymnax(name, words):
    env, params = envs.make(f"popgym/{name}Easy", max_steps_in_episode=9, **words)
    assert env.inner.resets_rarely
    action = env.action_space(params).sample

    @jax.jit
    def run(keys):
        def step(state, key):
            after = env.step(key, state, action(key), params)
            gymnax_after = Environment.step(env, key, state, action(key), params)
            return after[1], (after, gymnax_after)

        state = jax.vmap(lambda key: env.reset(key, params)[1])(keys)
        time = jnp.array([0, 4, 7], jnp.int32)  # so that they end apart
        state = state._replace(env=state.env._replace(time=time))
        steps = jax.vmap(lambda key: jr.split(key, 30))(keys)
        return jax.vmap(lambda state, keys: lax.scan(step, state, keys)[1])(state, steps)

    ours, gymnax = run(jr.split(jr.key(0), 3))
    assert ours[4].sum() > 6  # truncations
    jax.tree.map(np.testing.assert_array_equal, ours, gymnax)


def test_draws_are_as_likely_as_their_weights():
    weights = jnp.array([3, 0, 1, 2], jnp.int32)
    drawn = jax.jit(jax.vmap(lambda key: draw(key, weights)))(jr.split(jr.key(0), 6000))
    share = np.bincount(drawn, minlength=4) / 6000
    assert share[1] == 0
    np.testing.assert_allclose(share, weights / 6, atol=4 * (0.25 / 6000) ** 0.5)


def test_every_free_place_of_a_ship_is_equally_likely():
    board = np.zeros((5, 5), bool)
    board[1, 1:4] = True
    free = []
    for row in range(5):
        for column in range(5):
            for ship in (np.s_[row, column : column + 3], np.s_[row : row + 3, column]):
                place = np.zeros_like(board)
                place[ship] = True
                if place.sum() == 3 and not (place & board).any():
                    free.append(tuple(np.flatnonzero(place)))
    place = jax.jit(jax.vmap(lambda key: place_ship(key, jnp.array(board), 3)))
    placed = np.asarray(place(jr.split(jr.key(1), 4000))) & ~board
    counts = dict.fromkeys(free, 0)
    for ship in placed:
        counts[tuple(np.flatnonzero(ship))] += 1
    share = np.array(list(counts.values())) / 4000
    np.testing.assert_allclose(share, 1 / len(free), atol=4 * (1 / len(free) / 4000) ** 0.5)


def dead_ends(grids):
    """How many cells of each maze have one way out."""
    inner = grids[:, 1:-1, 1:-1] == FREE
    padded = np.pad(inner, [(0, 0), (1, 1), (1, 1)])
    ways = sum(np.roll(padded, shift, axis) for shift in (-1, 1) for axis in (1, 2))
    cells = np.s_[:, ::2, ::2]
    return ((ways[:, 1:-1, 1:-1][cells] == 1) & inner[cells]).sum((1, 2))


def test_mazes_are_trees_with_as_many_dead_ends_as_those_of_mazelib():
    num_cells = 5
    draw_mazes = jax.jit(jax.vmap(lambda key: maze(key, num_cells)))
    ours = np.asarray(draw_mazes(jr.split(jr.key(2), 600)))
    assert ((ours == FREE).sum((1, 2)) == 2 * num_cells**2 - 1).all()  # n cells, n - 1 passages
    reached = np.zeros_like(ours, bool)
    reached[:, 1, 1] = True
    for _ in range(ours[0].size):
        spread = sum(np.roll(reached, shift, axis) for shift in (-1, 1) for axis in (1, 2)) > 0
        reached |= spread & (ours == FREE)
    assert (reached == (ours == FREE)).all()  # connected, so a tree
    generate = pytest.importorskip("mazelib.generate.HuntAndKill")
    random.seed(0)
    theirs = np.stack([generate.HuntAndKill(num_cells, num_cells).generate() for _ in range(600)])
    ends = [dead_ends(x) for x in (ours, theirs)]
    error = (sum(x.var() for x in ends) / 600) ** 0.5
    assert abs(ends[0].mean() - ends[1].mean()) < 4 * error


def test_doors_are_opposite_and_beside_cells():
    keys = jr.split(jr.key(3), 4000)
    start, end = map(np.asarray, jax.jit(jax.vmap(lambda key: doors(key, 3)))(keys))
    assert ((start % 2).sum(1) == 1).all()
    assert ((end % 2).sum(1) == 1).all()
    border = np.where(start % 2 == 0)
    np.testing.assert_array_equal(start[border] + end[border], 6)
    assert set(start[border]) == {0, 6}
    places, counts = np.unique(7 * start[:, 0] + start[:, 1], return_counts=True)
    assert len(places) == 12
    np.testing.assert_allclose(counts / 4000, 1 / 12, atol=4 * (1 / 12 / 4000) ** 0.5)


def test_make_opens_a_task_with_all_that_can_be_observed():
    env, params = envs.make(
        "popgym/CountRecallEasy", observe="state", previous_action=True, max_steps_in_episode=3
    )
    assert env.action_space(params).n == 27
    obs, state = env.reset(jr.key(0), params)
    assert obs.shape == env.observation_space(params).shape
    # shown: two kinds of two; hidden: 2 × 2 left, 2 dealt, the clock; the previous action
    assert obs.shape == (4 + 4 + 2 + 1 + 27,)
    assert not obs[-27:].any()
    for t in range(6):
        obs, state, _, terminated, truncated, info = env.step(jr.key(t), state, t, params)
        assert info["final_observation"][-27:].argmax() == t
        assert not terminated
        assert truncated == (t % 3 == 2)


@pytest.mark.long
@pytest.mark.parametrize("name", TASKS)
def test_make_opens_every_task(name):
    env, params = envs.make(name, privileged=True)
    obs, state = env.reset(jr.key(0), params)
    action = env.action_space(params).sample(jr.key(1))
    after, state, reward, *_ = env.step(jr.key(2), state, action, params)
    assert after.policy.shape == obs.policy.shape == env.observation_space(params).shape
    assert after.critic.shape == obs.critic.shape == (env.critic_size(params),)
    assert reward.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        (
            "RepeatPreviousEsy",
            {},
            "unknown environment .*; did you mean 'popgym/RepeatPreviousEasy",
        ),
        ("RepeatPreviousEasy", {"k": 60}, "k is 60; it has to be from 1 to 51"),
        ("CountRecallEasy", {"num_kinds": 5}, "num_kinds is 5; it has to be 2, 4 or 13"),
        ("LabyrinthEscapeEasy", {"size": 7}, "size is 7; it has to be even"),
        ("BattleshipEasy", {"board": 7}, "unknown parameter of popgym/BattleshipEasy 'board'"),
    ],
)
def test_tasks_that_cannot_be_are_refused(name, keywords, message):
    with pytest.raises(ValueError, match=message):
        envs.make(f"popgym/{name}", **keywords)
