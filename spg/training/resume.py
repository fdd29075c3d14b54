"""What a checkpoint holds, and the search for one from which a run can go on."""

import sys
from typing import Any, NamedTuple

import numpy as np

from spg.training.checkpoints import Checkpoints
from spg.training.metrics import Mark, Table
from spg.training.records import RunError


class Snapshot(NamedTuple):
    """What a checkpoint holds."""

    seeds: Any  # the trainings of all seeds
    clock: dict[str, np.float64]  # seconds
    mark: Mark  # of `metrics.csv`

    @staticmethod
    def of(seeds: Any, clock: dict[str, float], mark: Mark) -> "Snapshot":
        return Snapshot(seeds, {k: np.float64(v) for k, v in clock.items()}, mark)


def resume(
    checkpoints: Checkpoints, table: Table, like: Snapshot
) -> tuple[int, Any, dict[str, float]]:
    """The updates done, the seeds and the clock, of the last checkpoint that can be gone on from.

    That is one whose files are whole, and whose rows of `metrics.csv` are as they were written.
    """
    checkpoints.clean()
    worse = []
    for update in checkpoints.updates():
        if not checkpoints.is_whole(update):
            worse.append(f"checkpoint {update} is damaged")
            continue
        saved = checkpoints.restore(update, like)
        if not table.holds(saved.mark):
            worse.append(f"metrics.csv is damaged before update {update}")
            continue
        if worse:
            print(f"{', '.join(worse)}; going on from update {update}", file=sys.stderr)
        for later in [x for x in checkpoints.updates() if x > update]:
            checkpoints.discard(later)
        table.cut(saved.mark)
        return update, saved.seeds, {k: float(v) for k, v in saved.clock.items()}
    if worse:
        raise RunError(f"--resume: {', '.join(worse)}; another --out starts afresh")
    print("there is no checkpoint yet; starting from update 0", file=sys.stderr)
    table.start()
    return 0, None, {k: float(v) for k, v in like.clock.items()}
