"""Questions that readers of the S2PG paper ask, each answered by one figure and one table.

    python scripts/benchmarks/questions.py --question variance

| question | |
| --- | --- |
| variance | of the gradient estimate against T and the noise on z', measured and bounded |
| limit | the gradient as the noise on z' goes to 0, against that of the noise-free policy |
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.benchmarks import questions_limit, questions_variance
from spg.limits import Count, Seed, check
from spg.training import cli, options, records, tables

Question = Literal["variance", "limit"]


@dataclass(frozen=True)
class Config:
    question: Question = "variance"
    """which"""
    num_seeds: Count = 20
    """independent measurements, or worlds"""
    seed: Seed = 0
    """the first; the others take the next integers"""
    out: str | None = None
    """by default runs/questions-<question>"""


def main(config: Config) -> None:
    check(config)
    out = Path(config.out or f"runs/questions-{config.question}")
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(config.seed, config.seed + config.num_seeds)
    if config.question == "variance":
        rows = questions_variance.measure(seeds)
        questions_variance.draw(rows, out / "variance.png")
        shown = [row._asdict() for row in rows]
    else:
        rows = questions_limit.measure(seeds)
        questions_limit.draw(rows, out / "limit.png")
        shown = means(rows, "state_std", ["error", "variance", "gradient"])
    write(rows, out / f"{config.question}.csv")
    print(tables.table(shown))
    print(f"written to {out}")


def write(rows: list[Any], path: Path) -> None:
    """A line for each named tuple; numbers of 6 digits, nothing for nan."""
    number = lambda x: "" if np.isnan(x) else f"{x:.6g}"
    show = lambda x: number(x) if isinstance(x, float) else x
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([rows[0]._fields, *(map(show, row) for row in rows)])


def means(rows: list[Any], name: str, columns: list[str]) -> list[dict[str, float]]:
    """The mean of some columns for each value of the column `name`."""
    values = sorted({getattr(row, name) for row in rows})
    at = {x: [row for row in rows if getattr(row, name) == x] for x in values}
    mean = lambda some, column: float(np.mean([getattr(row, column) for row in some]))
    return [{name: x} | {c: mean(some, c) for c in columns} for x, some in at.items()]


if __name__ == "__main__":
    try:
        main(options.parse(Config))
    except (ValueError, OSError, records.RunError) as error:
        cli.fail(error)
