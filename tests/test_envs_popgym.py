"""POPGym's tasks beside the original package, which is made to draw what ours drew."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

from spg import envs
from spg.envs.popgym import TASKS
from spg.envs.popgym.boards import Battleship, Concentration, MineSweeper, place_ship
from spg.envs.popgym.labyrinths import FREE, GOAL, WALL, LabyrinthEscape, LabyrinthExplore, maze
from spg.envs.popgym.task import draw

pytestmark = pytest.mark.usefixtures("float64")  # the original's physics are in double precision

NUM_STEPS = 1000


def walk(env, num_steps=NUM_STEPS):
    """Starts of `num_steps` + 1 episodes, and `num_steps` steps, a new episode after each end."""
    params = env.default_params
    space = env.action_space(params)

    def act(key, state):
        """At random, but three times in four as well as who sees everything would."""
        coin_key, tie_key, key = jr.split(key, 3)
        at_random = space.sample(key)
        if (worth := wisdom(env, state)) is None:
            return at_random
        wise = jnp.argmax(worth + jr.uniform(tie_key, worth.shape))
        return jnp.where(jr.bernoulli(coin_key, 0.75), wise, at_random).astype(at_random.dtype)

    def step(carry, x):
        obs, state = carry
        start, key, action_key = x
        action = act(action_key, state)
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
        steps = later, *(jr.split(key, num_steps) for key in keys)
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
    others = sum(left, [])
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
        names = ("x", "x_dot", "theta", "theta_dot")["Pendulum" in name and 2 :]
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

    walked = walk(ours)
    for episode in episodes(walked):
        prepare(theirs, name, episode, monkeypatch)
        obs, _ = theirs.reset()
        seen, rewards, terminated, truncated = [obs], [], [], []
        for action in episode.action:
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
    return terminated.any(), truncated.any()


def sizes():
    for name in TASKS:
        marks = [] if name.endswith("Easy") else [pytest.mark.slow]
        yield pytest.param(name.removeprefix("popgym/"), marks=marks)


@pytest.mark.parametrize("name", sizes())
def test_a_task_is_the_original(name, monkeypatch):
    popgym = pytest.importorskip("popgym")
    ours = TASKS[f"popgym/{name}"]()
    compare(ours, getattr(popgym.envs, name)(), name, monkeypatch)
