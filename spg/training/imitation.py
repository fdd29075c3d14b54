"""What the scripts share that imitate: their demonstrations, and returns as the expert's share."""

import sys
from dataclasses import dataclass
from typing import Any

from spg.limits import Count, check, fits
from spg.training import demonstrations, options
from spg.training.demonstrations import Demonstrations
from spg.training.loop import Algorithm
from spg.training.metrics import FRACTION


@dataclass(frozen=True)
class ImitationConfig:
    """The demonstrations, e.g. --demonstrations runs/mine/demonstrations.npz --num-episodes 5"""

    demonstrations: str = "runs/expert/demonstrations.npz"
    """what scripts/demonstrate.py recorded"""
    num_episodes: Count | None = None
    """how many of its episodes to imitate; by default all"""


def open_demonstrations(config: Any, *, least: int) -> Demonstrations:
    """Those that `config` names; a warning, if their expert is weak: see `weakness`.

    Raises ValueError for options out of their ranges, for demonstrations of another environment or
    of fewer than `least` steps, and if they do not fit into memory, where each seed has them.
    """
    check(config)
    path, oracle = config.demonstrations, config.memory == "oracle"
    found = demonstrations.load(path, episodes=config.num_episodes)
    demonstrations.check_world(path, found.made, "the training", vars(config), oracle=oracle)
    spec = options.make_env(config, oracle=oracle).spec
    words = {"oracle": oracle, "privileged": config.privileged, "least": least}
    demonstrations.check_sizes(path, found, spec, **words)
    size = found.action.nbytes + found.obs.nbytes + 2 * found.critic.nbytes
    fits(config.num_seeds * size, f"{path} for each of {config.num_seeds} seeds")
    if line := demonstrations.weakness(found):
        print(f"warning: {line}", file=sys.stderr)
    return found


def measured(algorithm: Algorithm, expert: Demonstrations) -> Algorithm:
    """The algorithm, judged by `Demonstrations.fraction`; plain returns are among the metrics.

    Devices share its seeds alone: the demonstrations are whole on each.
    """

    def step(floats, state):
        state, report = algorithm.step(floats, state)
        returns = report.of_episodes | {"return": report.score}
        return state, report._replace(score=expert.fraction(report.score), of_episodes=returns)

    def evaluate(state, key):
        found = algorithm.evaluate(state, key)
        return type(found)(*map(expert.fraction, found))

    return algorithm._replace(step=step, evaluate=evaluate, measure=FRACTION, num_envs=1)
