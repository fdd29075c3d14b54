"""POPGym's fifteen tasks (Morad et al., 2023) in three sizes each, for accelerators.

`spg.envs.make("popgym/RepeatPreviousEasy")`. `task` says how they are shown and how they end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from gymnax.environments.environment import Environment

from spg.envs.popgym.boards import Battleship, Concentration, MineSweeper, MultiarmedBandit
from spg.envs.popgym.cards import (
    Autoencode,
    CountRecall,
    HigherLower,
    RepeatFirst,
    RepeatPrevious,
)
from spg.envs.popgym.control import PositionOnlyCartPole, PositionOnlyPendulum
from spg.envs.popgym.labyrinths import LabyrinthEscape, LabyrinthExplore

__all__ = ["TASKS"]

_NOISES = [{"noise": noise} for noise in (0.1, 0.2, 0.3)]
_MAZES = [{"size": size} for size in (10, 14, 18)]
_decks = lambda *numbers: [{"num_decks": n} for n in numbers]
_lengths = lambda *lengths: [{"episode_length": n} for n in lengths]
_SIZES: dict[str, tuple[Callable[..., Environment], list[dict[str, Any]]]] = {
    "RepeatFirst": (RepeatFirst, _decks(1, 8, 16)),
    "RepeatPrevious": (
        RepeatPrevious,
        [{"num_decks": n, "k": k} for n, k in ((1, 4), (2, 32), (3, 64))],
    ),
    "Autoencode": (Autoencode, _decks(1, 2, 3)),
    "CountRecall": (
        CountRecall,
        [{"num_decks": n, "num_kinds": k} for n, k in ((1, 2), (2, 4), (4, 13))],
    ),
    "Concentration": (
        Concentration,
        [{"num_decks": n, "num_kinds": k} for n, k in ((1, 2), (2, 2), (1, 13))],
    ),
    "HigherLower": (HigherLower, _decks(1, 2, 3)),
    "Battleship": (Battleship, [{"size": size} for size in (8, 10, 12)]),
    "MineSweeper": (
        MineSweeper,
        [{"size": size, "num_mines": m} for size, m in ((4, 2), (6, 6), (8, 10))],
    ),
    "MultiarmedBandit": (
        MultiarmedBandit,
        [{"num_bandits": 10 * i, "episode_length": 200 * i} for i in (1, 2, 3)],
    ),
    "PositionOnlyCartPole": (PositionOnlyCartPole, _lengths(200, 400, 600)),
    "NoisyPositionOnlyCartPole": (PositionOnlyCartPole, _NOISES),
    "PositionOnlyPendulum": (PositionOnlyPendulum, _lengths(200, 150, 100)),
    "NoisyPositionOnlyPendulum": (PositionOnlyPendulum, _NOISES),
    "LabyrinthExplore": (LabyrinthExplore, _MAZES),
    "LabyrinthEscape": (LabyrinthEscape, _MAZES),
}
TASKS: dict[str, Callable[..., Environment]] = {
    f"popgym/{name}{size}": partial(task, **words)
    for name, (task, rows) in _SIZES.items()
    for size, words in zip(("Easy", "Medium", "Hard"), rows, strict=True)
}
"""What opens each task, by the name that `make` takes."""
