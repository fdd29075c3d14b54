"""POPGym's mazes, of which only the 3 × 3 squares around are seen."""

import abc
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from spg.envs.popgym.task import Task, draw
from spg.limits import Range

FREE, WALL, START, GOAL, HIDDEN = range(5)  # no square that is seen is HIDDEN
MOVES = (0, -1), (0, 1), (-1, 0), (1, 0)  # left, right, up, down
NONE = len(MOVES)  # the action before the first
EPISODE_LENGTH = 1024


class LabyrinthState(NamedTuple):
    grid: Int[Array, "S S"]
    position: Int[Array, "2"]
    explored: Bool[Array, "S S"]
    action: Int[Array, ""]  # the last
    time: Int[Array, ""]


class _Labyrinth(Task):
    """A maze of S × S squares, S = `size` + 1, entered from its border (popgym/core/maze.py).

    Its cells are at odd places. Observed are the kinds of 3 × 3 squares, 5 entries each, and the
    last action, 5 entries, the last for none. The window is centred on the agent except in the top
    row and the leftmost column, where it shows two rows or columns and then walls, as beyond the
    other borders. Walls stop the agent. Of the 1024 steps that the original announces it truncates
    after 1023, and so does this one. Easy, Medium, Hard: size = 10, 14, 18.
    """

    def __init__(self, size: int = 10):
        Range(6, 100, whole=True).check("size", size)
        if size % 2:
            raise ValueError(f"size is {size}; it has to be even")
        self.size = size
        super().__init__(parts=[5] * 10, num_actions=NONE, horizon=EPISODE_LENGTH - 1)

    @abc.abstractmethod
    def mark(self, grid: Int[Array, "S S"], end: Int[Array, "2"]) -> Int[Array, "S S"]:
        """The maze with its end, if it has one."""

    @abc.abstractmethod
    def pay(self, before: LabyrinthState, after: LabyrinthState) -> Float[Array, ""]: ...

    def start(self, key: PRNGKeyArray) -> LabyrinthState:
        maze_key, door_key = jr.split(key)
        position, end = doors(door_key, self.size // 2)
        grid = maze(maze_key, self.size // 2).at[tuple(position)].set(START)
        explored = jnp.zeros(grid.shape, bool).at[tuple(position)].set(True)
        none, time = jnp.array(NONE, jnp.int32), jnp.array(0, jnp.int32)
        return LabyrinthState(self.mark(grid, end), position, explored, none, time)

    def play(
        self, key: PRNGKeyArray, state: LabyrinthState, action: Array
    ) -> tuple[LabyrinthState, Float[Array, ""]]:
        to = jnp.clip(state.position + jnp.array(MOVES, jnp.int32)[action], 0, self.size)
        position = jnp.where(state.grid[tuple(to)] == WALL, state.position, to)
        explored = state.explored.at[tuple(position)].set(True)
        action, time = action.astype(jnp.int32), state.time + 1
        after = LabyrinthState(state.grid, position, explored, action, time)
        return after, self.pay(state, after)

    def show(self, state: LabyrinthState) -> Int[Array, "10"]:
        rows, columns = jnp.maximum(state.position - 1, 0)[:, None] + jnp.arange(3)
        window = state.grid.at[rows[:, None], columns].get(mode="fill", fill_value=WALL)
        row, column = state.position
        near = (rows <= row + 1)[:, None] & (columns <= column + 1)
        return jnp.append(jnp.where(near, window, WALL), state.action)


class LabyrinthExplore(_Labyrinth):
    """Visit every square (popgym/envs/labyrinth_explore.py).

    A new square pays 1/F, of F free squares besides the first; any other step -1/1024. All visited
    terminates.
    """

    def mark(self, grid: Int[Array, "S S"], end: Int[Array, "2"]) -> Int[Array, "S S"]:
        return grid

    def pay(self, before: LabyrinthState, after: LabyrinthState) -> Float[Array, ""]:
        new = (before.explored != after.explored).any()
        return jnp.where(new, 1 / (after.grid == FREE).sum(), -1 / EPISODE_LENGTH)

    def over(self, state: LabyrinthState) -> Bool[Array, ""]:
        return (state.explored == (state.grid != WALL)).all()


class LabyrinthEscape(_Labyrinth):
    """Find the way out, on the opposite border (popgym/envs/labyrinth_escape.py).

    A step pays -1/1024, and 1 more where it reaches the exit, which terminates.
    """

    def mark(self, grid: Int[Array, "S S"], end: Int[Array, "2"]) -> Int[Array, "S S"]:
        return grid.at[tuple(end)].set(GOAL)

    def pay(self, before: LabyrinthState, after: LabyrinthState) -> Float[Array, ""]:
        return self.over(after) - 1 / EPISODE_LENGTH

    def over(self, state: LabyrinthState) -> Bool[Array, ""]:
        return state.grid[tuple(state.position)] == GOAL


def doors(key: PRNGKeyArray, num_cells: int) -> tuple[Int[Array, "2"], Int[Array, "2"]]:
    """Start and end in opposite borders, each next to a random cell."""
    side_key, place_key = jr.split(key)
    start, end = 2 * jr.randint(place_key, (2,), 0, num_cells, jnp.int32) + 1
    side = jr.randint(side_key, (), 0, 4, jnp.int32)
    border = 2 * num_cells * jnp.array([side % 2, 1 - side % 2], jnp.int32)
    across = jnp.stack([jnp.stack([border[0], start]), jnp.stack([border[1], end])])
    found = jnp.where(side < 2, across, across[:, ::-1])
    return found[0], found[1]


def maze(key: PRNGKeyArray, num_cells: int) -> Int[Array, "S S"]:
    """A maze by hunt and kill, as mazelib draws it: walls are 1, S = 2 `num_cells` + 1.

    A random walk carves its way through new cells until there are none around it; another starts at
    a random old cell that has a new one beside it. (mazelib tries random cells and gives up after
    S² of them, but each of 1200 of its mazes was complete, as these are.)
    """
    n = num_cells

    def carve(carry, key):
        grid, cell = carry
        jump_key, walk_key = jr.split(key)
        new = jnp.pad(grid[1::2, 1::2] == WALL, 1)
        around = jnp.stack([new[1 + y : 1 + y + n, 1 + x : 1 + x + n] for y, x in MOVES])
        around = (around & ~new[1:-1, 1:-1]).reshape(NONE, n * n)  # new cells beside old ones
        jump = draw(jump_key, around.any(0).astype(jnp.int32))
        cell = jnp.where(around[:, cell].any(), cell, jump)
        move = jnp.array(MOVES, jnp.int32)[draw(walk_key, around[:, cell].astype(jnp.int32))]
        place = 2 * jnp.stack(jnp.divmod(cell, n)) + 1
        grid = grid.at[tuple(place + move)].set(FREE).at[tuple(place + 2 * move)].set(FREE)
        row, column = jnp.stack(jnp.divmod(cell, n)) + move
        return (grid, row * n + column), None

    first_key, key = jr.split(key)
    first = jr.randint(first_key, (), 0, n * n, jnp.int32)
    grid = jnp.full((2 * n + 1, 2 * n + 1), WALL, jnp.int32)
    grid = grid.at[tuple(2 * jnp.stack(jnp.divmod(first, n)) + 1)].set(FREE)
    return lax.scan(carve, (grid, first), jr.split(key, n * n - 1))[0][0]
