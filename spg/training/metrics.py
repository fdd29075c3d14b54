"""`metrics.csv`, a row per update and seed: its columns, its writing, its repair, its reading."""

import csv
import io
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from spg.training.records import writing

Column = Float[np.ndarray, "seeds updates"]


class Measure(NamedTuple):
    """What a run is judged by, in the words of its files."""

    name: str  # the column of `Report.score`
    weight: str | None  # the column of `Report.weight`; None where every update weighs the same

    @property
    def evaluated(self) -> tuple[str, str]:
        """The columns of an `Evaluation`: sampled, noise-free."""
        return f"eval_{self.name}", f"eval_{self.name}_noise_free"

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")


RETURN = Measure("return", "episodes")
AVERAGE_REWARD = Measure("average_reward", None)
FRACTION = Measure("fraction_of_expert", "episodes")  # of an imitator, whose returns stand beside


class Mark(NamedTuple):
    """How much of the file a checkpoint stands for."""

    size: np.int64  # in bytes
    crc: np.int64  # CRC-32 of these bytes

    def then(self, data: bytes) -> "Mark":
        """With these bytes after them."""
        crc = zlib.crc32(data, int(self.crc))
        return Mark(np.int64(self.size + len(data)), np.int64(crc))


EMPTY = Mark(np.int64(0), np.int64(0))


class Table:
    """The writer of `metrics.csv`: nan is an empty cell, an evaluation is in its update's row."""

    def __init__(
        self,
        path: Path,
        *,
        seeds: np.ndarray,
        first_steps: int = 0,
        steps_per_update: int,
        metrics: list[str],
        measure: Measure,
    ):
        self._path, self._seeds, self._steps = path, seeds, (first_steps, steps_per_update)
        self._metrics = metrics
        self.columns = ["update", "seed", "env_steps", *metrics, *measure.evaluated]
        self.mark = EMPTY

    def start(self) -> None:
        """Write the first line, over whatever there is."""
        self._write("wb", ",".join(self.columns) + "\n")

    def holds(self, mark: Mark) -> bool:
        """Whether the file begins with the bytes that it had at a checkpoint."""
        try:
            with self._path.open("rb") as file:
                kept = file.read(int(mark.size))
        except FileNotFoundError:
            return False
        return EMPTY.then(kept) == mark

    def cut(self, mark: Mark) -> None:
        """Drop the rows after a checkpoint, the last of which a kill may have torn."""
        os.truncate(self._path, int(mark.size))
        self.mark = mark

    def append(
        self,
        update: int,
        metrics: dict[str, Column],
        scores: tuple[Float[np.ndarray, " seeds"], ...] = (),
    ) -> None:
        """Add the rows of the updates up to `update`; `scores` are those of `update` itself."""
        count = metrics[self._metrics[0]].shape[1]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for i in range(count):
            number = update - count + 1 + i
            for j, seed in enumerate(self._seeds):
                values = [metrics[k][j, i] for k in self._metrics]
                values += [x[j] for x in scores] if scores and i == count - 1 else [np.nan] * 2
                cells = ["" if np.isnan(v) else f"{v:.8g}" for v in values]
                steps = self._steps[0] + number * self._steps[1]
                writer.writerow([number, seed, steps, *cells])
        self._write("ab", text.getvalue())

    def _write(self, mode: str, text: str) -> None:
        data = text.encode()
        with writing(self._path), self._path.open(mode) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint may follow, and relies on it
        self.mark = (self.mark if mode == "ab" else EMPTY).then(data)


def read_metrics(out: Path) -> dict[str, Column]:
    """The columns of a run's `metrics.csv`; empty cells are nan."""
    with (out / "metrics.csv").open(newline="") as file:
        columns, *rows = csv.reader(file)
    data = np.array([[float(x) if x else np.nan for x in row] for row in rows])
    num_seeds = len(np.unique(data[:, columns.index("seed")])) if rows else 1
    return {k: data[:, i].reshape(-1, num_seeds).T for i, k in enumerate(columns)}


def measure_of(data: dict[str, Column]) -> Measure:
    """What the run was judged by that left these columns."""
    return next(m for m in (FRACTION, RETURN, AVERAGE_REWARD) if m.name in data)


def mean_score(data: dict[str, Column], updates: slice) -> Float[np.ndarray, " seeds"]:
    """Mean score in these updates: over the episodes that ended, or over the updates.

    nan for a seed in which none did.
    """
    measure = measure_of(data)
    score = data[measure.name][:, updates]
    weight = np.ones_like(score) if measure.weight is None else data[measure.weight][:, updates]
    weight = np.where(np.isnan(score), 0.0, weight)
    with np.errstate(invalid="ignore"):
        return (np.nan_to_num(score) * weight).sum(1) / weight.sum(1)
