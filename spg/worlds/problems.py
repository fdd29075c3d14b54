"""The finite worlds of Aberdeen & Baxter (2002), a stand-in for their factory, and random ones."""

from collections.abc import Callable

import numpy as np

from spg.limits import Range, fits
from spg.worlds.models import Problem, sparse_pomdp


def tiger() -> Problem:
    """Tiger, Cassandra's page: behind one of two doors is a tiger, and listening costs 1.

    There, an observation depends on the action. Here the state also tells the last action: having
    listened ('heard') it emits the tiger's side with .85; having opened a door ('reset') the side
    is drawn anew and what it emits is uniform. Starts in 'reset'.
    """
    states = ("reset, tiger left", "reset, tiger right", "heard, tiger left", "heard, tiger right")
    transition = np.zeros((4, 3, 4))
    transition[range(4), 0, [2, 3, 2, 3]] = 1
    transition[:, 1:, :2] = 0.5
    reward = np.array([[-1, -100, 10], [-1, 10, -100]] * 2)[..., None]
    observation = np.array([[0.5, 0.5], [0.5, 0.5], [0.85, 0.15], [0.15, 0.85]])
    actions, observations = ("listen", "open-left", "open-right"), ("tiger-left", "tiger-right")
    start = np.array([0.5, 0.5, 0, 0])
    return _dense_problem(
        "tiger", (transition, reward, observation, start), states, actions, observations, 0.95
    )


def load_unload() -> Problem:
    """Load/Unload, Aberdeen (2001): carry parts along five segments, seeing only where it ends.

    State 2·segment + {0: loaded, 1: unloaded}. Reward 1 for arriving unloaded in segment 0, where
    parts lie, and for arriving loaded in segment 4; the load changes with the next action.
    """
    successor = np.array([[0, 0, 0, 1, 2, 3, 4, 5, 7, 7], [2, 2, 4, 5, 6, 7, 8, 9, 9, 9]]).T
    transition = np.eye(10)[successor]
    reward = np.isin(np.arange(10), [1, 8])
    observation = np.eye(3)[[0, 0, 1, 1, 1, 1, 1, 1, 2, 2]]
    states = tuple(f"{x} {load}" for x in range(5) for load in ("loaded", "unloaded"))
    names = states, ("left", "right"), ("loading", "travel", "unloading")
    world = transition, reward, observation, np.full(10, 0.1)
    return _dense_problem("loadunload", world, *names, 0.95)


def heaven_hell() -> Problem:
    """Heaven/Hell, Thrun; Geffner & Bonet (1998): ask the priest which way heaven is.

    4 3 2 5 6       Cells 0..9 where heaven (reward 1 on arrival) is 4 and hell (-1) is 6,
        1           10..19 the same with heaven on the right. The priest in 9 and 19 says which;
        0           all else looks alike in both. Any action in heaven or hell leads back to
        7 8 9       0 or 10, ½ each. The discount is ours.
    """
    moves = {0: "N1 S7", 1: "N2 S0", 2: "S1 E5 W3", 3: "E2 W4", 5: "E6 W2"}
    moves |= {7: "N0 E8", 8: "W7 E9", 9: "W8"}
    transition = np.tile(np.eye(20)[:, None], (1, 4, 1))  # all other moves stay
    for cell, exits in moves.items():
        for direction, to in exits.split():
            for world in (0, 10):
                transition[world + cell, "NSEW".index(direction)] = np.eye(20)[world + int(to)]
    start = np.eye(20)[[0, 10]].mean(0)
    transition[[4, 6, 14, 16]] = start
    reward = np.zeros(20)
    reward[[4, 6, 14, 16]] = 1, -1, -1, 1
    observation = np.eye(11)[[*range(10), *range(9), 10]]
    states = tuple(f"{cell}, heaven {side}" for side in ("left", "right") for cell in range(10))
    observations = (*(f"s{cell}" for cell in range(9)), "left", "right")
    world = transition, reward, observation, start
    return _dense_problem("heavenhell", world, states, ("N", "S", "E", "W"), observations, 0.99)


PENTAGON_MAP = """
    .  12 48 47 46 39 42 41 40 32 .
    .  15 .  .  .  44 .  .  .  35 .
    .  14 .  .  .  45 .  .  .  34 .
    .  13 .  .  49 43 10  9 .  33 .
    .  11 17 18 16 .  36 38 37  8  7
    .  19 .  .  50  2 51 .  .  31 .
    .  20 .  .  .   3 .  .  .  30 .
    .  21 .  .  .   1  0 .  .  29 .
    5  6 22 23 24  4 26 27 28 25 .
"""


def pentagon(*, restart: bool = True) -> Problem:
    """Pentagon, Cassandra's robot navigation: find the goal room, cell 9, and declare it.

    State 4·cell + heading (up, right, down, left). Neighbours on the map are connected, but for
    0-26 and 9-38. Right, front and left are seen as wall, open or doorway (between a room, 0 5 7 9,
    and the corridor), each with noise of its own; the last of 28 observations never occurs.
    Declaring earns 1 in the goal room and leads to 211 'done', elsewhere -1. From 'done' any
    action leads back to the start, state 21; without `restart` it is absorbing, as in the file.
    208 to 210 are unreachable and stay where they are.
    """
    ahead, sight = _pentagon_neighbours()
    size, done = 212, 211
    transition = np.tile(np.eye(size)[:, None], (1, 4, 1))
    transition[: 4 * 52] = 0
    for cell, heading in np.ndindex(52, 4):
        s = 4 * cell + heading
        one = ahead[cell, heading]
        two = ahead[one, heading]
        for to, p in ((cell, 0.11), (one, 0.88), (two, 0.01)):
            transition[s, 0, 4 * to + heading] += p
        for action, turn in ((1, -1), (2, 1)):
            for times, p in ((0, 0.05), (1, 0.9), (2, 0.05)):
                transition[s, action, 4 * cell + (heading + times * turn) % 4] += p
        transition[s, 3, done if cell == 9 else s] = 1
    if restart:
        transition[done] = np.eye(size)[21]
    reward = np.zeros((size, 4, 1))
    reward[: 4 * 52, 3] = -1
    reward[4 * 9 : 4 * 10, 3] = 1
    noise = np.array([[0.9, 0.05, 0.05], [0.03, 0.9, 0.07], [0.15, 0.15, 0.7]])
    seen = np.zeros((size, 3), int)  # right, front, left; the four extra states see walls
    seen[: 4 * 52] = np.stack([np.roll(sight, -turn, 1) for turn in (1, 0, -1)], -1).reshape(-1, 3)
    observation = np.zeros((size, 28))
    views = noise[seen].transpose(1, 0, 2)
    observation[:, :27] = np.einsum("sr,sf,sl->srfl", *views).reshape(size, 27)
    states = [
        f"{cell} {heading}" for cell in range(52) for heading in ("up", "right", "down", "left")
    ]
    kinds = ("wall", "open", "doorway")
    observations = [
        f"{right}, {front}, {left}" for right in kinds for front in kinds for left in kinds
    ]
    return _dense_problem(
        "pentagon",
        (transition, reward, observation, np.eye(size)[21]),
        (*states, "208", "209", "210", "done"),
        ("forward", "left", "right", "declare"),
        (*observations, "unused"),
        0.99,
        unemitted=True,
    )


def factory() -> Problem:
    """Our stand-in for the multi-agent factory of Aberdeen's thesis, ch. 4, with the same counts.

    Layout, rewards and noise of the original are not published. Two agents walk on 13 cells:

        0 1 2 3 4       The first takes parts from the pile, P, to the machine, M; the second from
        P   M   R       there to the store, R. Both load and unload when they leave these cells.
        5 6 7 8 9       The machine holds one part, and another is lost. Reward 1 per part stored.

    An agent turns left, turns right, moves ahead (unless a wall or the other agent blocks it) or
    waits; with probability .1 it waits instead. The first moves before the second. An agent sees
    whether its front, right, back and left are blocked, and whether it is in the top row.

    Row-major: state (loaded, cell, heading N E S W of agent 1; of agent 2; part at the machine),
    action (of agent 1, of agent 2), observation (five bits of agent 1, of agent 2). The 1,664
    states with both agents in one cell are unreachable. The discount is ours.
    """
    cells = [(x, y) for y in (2, 0) for x in range(5)] + [(0, 1), (2, 1), (4, 1)]
    pile, machine, store = 10, 11, 12
    index = {cell: i for i, cell in enumerate(cells)}
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    ahead = np.array([[index.get((x + dx, y + dy), -1) for dx, dy in steps] for x, y in cells])
    shape = (2, 13, 4, 2, 13, 4, 2)
    digits = np.indices(shape).reshape(7, 1, 1, -1)
    loaded1, cell1, heading1, loaded2, cell2, heading2, part = digits
    act1, act2 = np.arange(4)[:, None, None], np.arange(4)[:, None]
    turn = np.array([-1, 1, 0, 0])
    size = part.size

    def move(cell, heading, act, other):
        to = ahead[cell, heading]
        moved = (act == 2) & (to >= 0) & (to != other)
        return np.where(moved, to, cell), (heading + turn[act]) % 4, moved

    def sees(cell, heading, other):
        near = [ahead[cell, (heading + k) % 4] for k in range(4)]
        blocked = [(to < 0) | (to == other) for to in near]
        return [x.ravel() for x in (*blocked, cell < 5)]

    to1, turned1, left1 = move(cell1, heading1, act1, cell2)
    to2, turned2, left2 = move(cell2, heading2, act2, to1)
    drops = left1 & (cell1 == machine) & (loaded1 == 1)
    filled = np.where(drops, 1, part)
    takes = left2 & (cell2 == machine) & (loaded2 == 0) & (filled == 1)
    stores = left2 & (cell2 == store) & (loaded2 == 1)
    carries1 = np.where(drops, 0, np.where(left1 & (cell1 == pile), 1, loaded1))
    carries2 = np.where(takes, 1, np.where(stores, 0, loaded2))
    after = (carries1, to1, turned1, carries2, to2, turned2, np.where(takes, 0, filled))
    successor = np.ravel_multi_index(np.broadcast_arrays(*after), shape).reshape(16, size)
    reward = np.broadcast_to(stores, (4, 4, size)).reshape(16, size).astype(float)

    slip = 0.9 * np.eye(4) + 0.1 * np.eye(4)[3]
    slips = np.kron(slip, slip)  # P(what both do | what both chose)
    chosen, act = np.nonzero(slips)
    s = np.tile(np.arange(size), len(act))
    a, p = (np.repeat(x, size) for x in (chosen, slips[chosen, act]))
    transitions = s, a, successor[act].ravel(), p, reward[act].ravel()
    bits = sees(cell1, heading1, cell2) + sees(cell2, heading2, cell1)
    emissions = np.arange(size), np.ravel_multi_index(bits, (2,) * 10), np.ones(size)
    start = np.zeros(shape)
    start[0, index[0, 2], 1, 0, index[4, 2], 3, 0] = 1

    places = [f"{x}{y}{heading}" for x, y in cells for heading in "NESW"]
    agents = [f"{load} {place}" for load in ("empty", "loaded") for place in places]
    acts = ("left", "right", "ahead", "wait")
    return _problem(
        "factory-stand-in",
        (transitions, emissions, start.ravel()),
        tuple(f"{x}, {y}, {z}" for x in agents for y in agents for z in ("no part", "part")),
        tuple(f"{x}, {y}" for x in acts for y in acts),
        tuple(f"{x:05b}, {y:05b}" for x in range(32) for y in range(32)),
        0.99,
        unemitted=True,
    )


def random_pomdp(
    num_states: int,
    *,
    num_actions: int = 4,
    num_obs: int = 8,
    num_successors: int = 3,
    seed: int = 0,
) -> Problem:
    """A random sparse world: irreducible and aperiodic under every policy.

    Each (s, a) has `num_successors` successors, s + 1 (modulo S) always among them, and 0 among
    those of 0; each s emits two observations (if there are), and each is emitted. Probabilities
    are uniform on the simplex, rewards on (s, a) standard normal, the start is uniform. Raises
    ValueError for sizes with which this cannot be.
    """
    for name, value, low, high in (
        ("num_states", num_states, 2, 2**31 - 1),
        ("num_actions", num_actions, 1, 2**31 - 1),
        ("num_obs", num_obs, 1, num_states),
        ("num_successors", num_successors, 2, num_states),
    ):
        Range(low, high, whole=True).check(name, value)
    size = num_states * num_actions * num_successors
    fits(150 * size, f"a random world of {size:,} transitions")
    rng = np.random.default_rng(seed)
    state = np.arange(num_states)
    shape = num_states, num_actions, num_successors
    # Distinct offsets in 1..S-1: sorted draws with room to be spread by 0, 1, 2, ...
    draws = rng.integers(1, num_states - num_successors + 2, (*shape[:2], num_successors - 1))
    offset = np.sort(draws) + np.arange(num_successors - 1)
    offset[0, :, -1] = num_states - 1
    offset = np.concatenate([np.zeros((*shape[:2], 1), int), offset], -1)
    s, a = (np.broadcast_to(x, shape) for x in np.ogrid[:num_states, :num_actions, :1][:2])
    reward = np.broadcast_to(rng.normal(size=shape[:2])[..., None], shape)
    transitions = s, a, (s + 1 + offset) % num_states, _simplex(rng, shape), reward
    first = rng.permutation(num_states) % num_obs
    num_emissions = min(2, num_obs)
    second = (first + rng.integers(1, max(num_obs, 2), num_states)) % num_obs
    emitted = np.stack([first, second][:num_emissions], -1)
    emission = _simplex(rng, (num_states, num_emissions))
    emissions = np.repeat(state, num_emissions), emitted.ravel(), emission.ravel()
    return _problem(
        f"random-{num_states}",
        (tuple(x.ravel() for x in transitions), emissions, np.full(num_states, 1 / num_states)),
        tuple(map(str, range(num_states))),
        tuple(map(str, range(num_actions))),
        tuple(map(str, range(num_obs))),
        0.95,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "tiger": tiger,
    "loadunload": load_unload,
    "heavenhell": heaven_hell,
    "pentagon": pentagon,
    "factory": factory,
}


def _pentagon_neighbours() -> tuple[np.ndarray, np.ndarray]:
    """Of each cell and heading, `[52, 4]`: the cell ahead or itself; wall 0, open 1, door 2."""
    grid = [row.split() for row in PENTAGON_MAP.strip().splitlines()]
    cells = {(x, y): int(c) for y, row in enumerate(grid) for x, c in enumerate(row) if c != "."}
    rooms, walls = {0, 5, 7, 9}, ({0, 26}, {9, 38})
    ahead, sight = np.zeros((2, 52, 4), int)
    for (x, y), cell in cells.items():
        for heading, (dx, dy) in enumerate(((0, -1), (1, 0), (0, 1), (-1, 0))):
            to = cells.get((x + dx, y + dy), cell)
            to = cell if {cell, to} in walls else to
            ahead[cell, heading] = to
            sight[cell, heading] = 0 if to == cell else 1 + ((cell in rooms) != (to in rooms))
    return ahead, sight


def _simplex(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform on the simplex of the last axis."""
    x = rng.exponential(size=shape)
    return x / x.sum(-1, keepdims=True)


def _dense_problem(name, world, *names_and_discount, unemitted=False) -> Problem:
    """From arrays P(s' | s, a), a reward that broadcasts to (s, a, s'), O(o | s) and the start."""
    transition, reward, observation, start = world
    s, a, t = np.nonzero(transition)
    u, o = np.nonzero(observation)
    reward = np.broadcast_to(reward, transition.shape).astype(float)
    lists = (s, a, t, transition[s, a, t], reward[s, a, t]), (u, o, observation[u, o]), start
    return _problem(name, lists, *names_and_discount, unemitted=unemitted)


def _problem(name, lists, states, actions, observations, discount, *, unemitted=False) -> Problem:
    pomdp = sparse_pomdp(
        *lists,
        num_actions=len(actions),
        num_obs=len(observations),
        states=states,
        actions=actions,
        observations=observations,
        unemitted=unemitted,
    )
    return Problem(name, pomdp, states, actions, observations, discount)
