"""What a training leaves in a run's directory, written by one process."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree

# matplotlib, Orbax and TensorBoard take seconds to load, so `loop` imports this when it trains
from spg.training import policies, summaries
from spg.training.checkpoints import Checkpoints
from spg.training.events import Events
from spg.training.metrics import Table
from spg.training.records import writing
from spg.training.resume import Snapshot

if TYPE_CHECKING:
    from spg.training.loop import Algorithm, Seeds


class Directory:
    """Rows of metrics, events, checkpoints and kernels of its seeds; in the end a summary."""

    def __init__(self, out: Path, algorithm: "Algorithm", seeds: np.ndarray, metrics: list[str]):
        """`seeds` are numbers, `metrics` the names of an update's cells."""
        self.out, self._algorithm, self._seeds = out, algorithm, seeds
        self.table = Table(
            out / "metrics.csv", seeds=seeds, first_steps=algorithm.first_steps,
            steps_per_update=algorithm.steps_per_update, metrics=metrics, measure=algorithm.measure,
        )  # fmt: skip
        self.store = Checkpoints(out / "checkpoints")
        self._events: Events | None = None

    def open_events(self, first: int, say: Callable[[str], None]) -> None:
        """Write events from the update `first` on."""
        self._events = Events(self.out, first=first, say=say)

    def append(
        self, update: int, metrics: dict[str, np.ndarray], scores: tuple[np.ndarray, ...]
    ) -> None:
        """Add the updates up to `update`; `scores` are an evaluation at that one, or nothing."""
        self.table.append(update, metrics, scores)
        evaluated = dict(zip(self._algorithm.measure.evaluated, scores, strict=False))
        assert self._events is not None
        self._events.add(update, means(metrics | evaluated))

    def save(self, update: int, seeds: "Seeds", clock: dict[str, float]) -> None:
        """Write a checkpoint, and the kernels as they are."""
        self.store.save(update, Snapshot.of(seeds, clock, self.table.mark))
        self.save_kernels(seeds)

    def save_kernels(self, seeds: "Seeds") -> None:
        """Write the kernels as they are."""
        with writing(self.out / "kernels.npz"):
            policies.save(self.out, jax.vmap(self._algorithm.kernel)(seeds.state))

    def summarise(
        self,
        learned: PyTree,
        diverged: np.ndarray,
        clock: dict[str, float],
        facts: dict[str, Any],
    ) -> dict[str, Any] | None:
        """Export what was learned, and the summary; None, and nothing, if every seed diverged."""
        algorithm, finished = self._algorithm, np.flatnonzero(diverged == 0)
        if not len(finished):
            return None
        steps = algorithm.num_updates * algorithm.steps_per_update
        with writing(self.out):
            algorithm.export(jax.tree.map(lambda x: x[finished], learned), self.out)
            return summaries.summarise(
                self.out,
                title=algorithm.title,
                seeds=self._seeds[finished].tolist(),
                diverged={int(self._seeds[j]): int(x) for j, x in enumerate(diverged) if x},
                clock=clock,
                env_steps=algorithm.first_steps + steps,
                first_steps=algorithm.first_steps,
                facts=facts,
            )

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def means(columns: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over seeds and updates, of the columns that have any."""
    return {k: float(np.nanmean(x)) for k, x in columns.items() if not np.isnan(x).all()}
