"""What a checkpoint holds, and the search for one from which a run can go on."""

import sys
from collections.abc import Sequence
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
    stores: Sequence[Checkpoints], tables: Sequence[Table], like: Snapshot
) -> tuple[int, list[Any], dict[str, float]]:
    """The updates done, the seeds of each run and the clock, of the last checkpoint to go on from.

    That is one that all of these runs have, whose files are whole, and whose rows of `metrics.csv`
    are as they were written.
    """
    worse = []
    for store in stores:
        store.clean()
    for update in sorted(set.intersection(*(set(x.updates()) for x in stores)), reverse=True):
        if not all(store.is_whole(update) for store in stores):
            worse.append(f"checkpoint {update} is damaged")
            continue
        saved = [store.restore(update, like) for store in stores]
        if not all(table.holds(x.mark) for table, x in zip(tables, saved, strict=True)):
            worse.append(f"metrics.csv is damaged before update {update}")
            continue
        if worse:
            print(f"{', '.join(worse)}; going on from update {update}", file=sys.stderr)
        for store, table, x in zip(stores, tables, saved, strict=True):
            for later in [x for x in store.updates() if x > update]:
                store.discard(later)
            table.cut(x.mark)
        clock = {k: float(v) for k, v in saved[0].clock.items()}
        return update, [x.seeds for x in saved], clock
    if worse:
        raise RunError(f"--resume: {', '.join(worse)}; another --out starts afresh")
    print("there is no checkpoint yet; starting from update 0", file=sys.stderr)
    for store, table in zip(stores, tables, strict=True):
        for early in store.updates():  # of some runs only
            store.discard(early)
        table.start()
    return 0, [None] * len(stores), {k: float(v) for k, v in like.clock.items()}
