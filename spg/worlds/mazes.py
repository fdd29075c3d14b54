"""Mazes of rooms that look alike: where the agent is, only how it came there tells."""

import numpy as np

from spg.limits import Range, fits
from spg.worlds.models import Problem, sparse_pomdp


def rooms(width: int = 5, height: int = 3, *, slip: float = 0.1, cost: float = 0.2) -> Problem:
    """Find the middle of a grid of rooms, of which one sees the walls without a door, and dig.

    State `width` y + x, or outside, the last, which alone looks like itself. From there any action
    leads into a room, each as likely. N, E, S and W lead through a door with probability 1 - `slip`
    and else nowhere. Digging earns 1 in the room (width // 2, height // 2), elsewhere -`cost`, and
    leads outside, where the world starts.

    Full sight earns γD / (1 - γ²D) from the start, with D the mean over rooms of γ'^distance and
    γ' = (1 - slip) γ / (1 - slip γ). Without slips and with one row of 2m + 1 >= 5 rooms, where
    guessing does not pay, the best policy earns as much with

        D = [2γ^m + Σ_{x=1}^{2m-2} γ^{m+x} + γ^{3m-3}] / (2m + 1)

    by going west until the wall is seen, or has to be behind the next room, and counting from it.
    Raises ValueError for fewer than 2 rooms and for numbers out of range.
    """
    Range(1, 10**4, whole=True).check("width", width)
    Range(1, 10**4, whole=True).check("height", height)
    Range(0, 1, open="high").check("slip", slip)
    Range(0).check("cost", cost)
    size = width * height
    Range(2, 2**31 - 1, whole=True, usual="width times height").check("the number of rooms", size)
    fits(100 * size**2, f"a maze of {size:,} rooms")
    room = np.arange(size)
    x, y = room % width, room // width
    doors = np.stack([y > 0, x < width - 1, y < height - 1, x > 0])  # of north, east, south, west
    to = np.where(doors, room + np.array([[-width], [1], [width], [-1]]), room)
    looks, walls = np.unique(~doors.T, axis=0, return_inverse=True)
    goal = room == height // 2 * width + width // 2
    moving, staying = np.full((4, size), 1 - slip), np.full((4, size), slip)
    every = np.tile(room, 4)
    act = np.repeat(np.arange(4), size)
    lists = [  # (s, a, s', P, r)
        (every, act, to.ravel(), moving.ravel(), 0 * every),
        (every, act, every, staying.ravel(), 0 * every),
        (room, 0 * room + 4, 0 * room + size, 0 * room + 1, np.where(goal, 1, -cost)),
        (np.full(5 * size, size), np.repeat(np.arange(5), size), np.tile(room, 5),
         np.full(5 * size, 1 / size), np.zeros(5 * size)),
    ]  # fmt: skip
    names = ["".join(np.array(list("NESW"))[look]) or "no" for look in looks]
    states = (*(f"{i} {j}" for i, j in zip(x, y, strict=True)), "outside")
    actions = "N", "E", "S", "W", "dig"
    observations = (*(f"{name} wall" for name in names), "outside")
    state = np.arange(size + 1)
    s, a, t, p, r = (np.concatenate(part) for part in zip(*lists, strict=True))
    pomdp = sparse_pomdp(
        (s, a, t, p, r),
        (state, np.append(walls.ravel(), len(looks)), np.ones(size + 1)),
        state == size,
        num_actions=5,
        num_obs=len(observations),
        states=states,
        actions=actions,
        observations=observations,
    )
    return Problem(f"rooms-{width}x{height}", pomdp, states, actions, observations, 0.95)
