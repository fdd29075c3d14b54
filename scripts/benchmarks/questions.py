"""Questions that readers of the S2PG paper ask, each answered by one figure and one table.

    python scripts/benchmarks/questions.py --question variance

    variance     of the gradient estimate against T and noise, and its bounds
    limit        of the gradient as the noise goes to 0: the noise-free one
    only-memory  learning ω alone, with μ frozen, and the reverse
    start        z0 learned or zero
    laws         z' Normal, bounded, Laplace, Bernoulli, Categorical
    why          what z tells of the cue, and where credit comes, over time
    length       success against delay: S2PG, BPTT, a window
    seeds        a task of the main table by curves.py

From the third on PPO is trained; a training that is complete is not run again.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.benchmarks import curves, questions_limit, questions_trained, questions_variance
from scripts.benchmarks import questions_why as why
from spg.limits import Count, Needs, Seed, Total, check
from spg.training import cli, tables

TRAINED = ("only-memory", "start", "laws", "why", "length")
Question = Literal[
    "variance", "limit", "only-memory", "start", "laws", "why", "length", "seeds"
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    question: Question = "variance"
    """which"""
    num_seeds: Count = 20
    """independent measurements, worlds, or trainings, which are vmapped into one program"""
    seed: Seed = 0
    """the first; the others take the next integers"""
    out: str | None = None
    """by default runs/questions-<question>, for seeds with -<task>"""
    total_steps: Annotated[Total | None, Needs(question=TRAINED)] = None
    """environment steps of each training; by default the question's own"""
    task: Annotated[curves.Task, Needs(question="seeds")] = "cartpole"
    """of the main table"""


def main(config: Config) -> None:
    check(config)
    if config.question == "seeds":
        out = config.out or f"runs/questions-seeds-{config.task}"
        return curves.main(curves.Config(config.task, config.num_seeds, config.seed, out))
    out = Path(config.out or f"runs/questions-{config.question}")
    out.mkdir(parents=True, exist_ok=True)
    rows, shown = answer(config, out, out / f"{config.question}.png")
    write(rows, out / f"{config.question}.csv")
    print(tables.table(shown))
    print(f"written to {out}")


def answer(config: Config, out: Path, picture: Path) -> tuple[list[Any], list[dict[str, Any]]]:
    """The rows of the CSV file, and those of the terminal; draws the picture."""
    seeds = range(config.seed, config.seed + config.num_seeds)
    if config.question == "variance":
        rows = questions_variance.measure(seeds)
        questions_variance.draw(rows, picture)
        return rows, [row._asdict() for row in rows]
    if config.question == "limit":
        rows = questions_limit.measure(seeds)
        questions_limit.draw(rows, picture)
        return rows, means(rows, "state_std", ["error", "variance", "gradient"])
    changes: dict[str, Any] = {"seed": config.seed, "num_seeds": config.num_seeds}
    if config.total_steps is not None:
        changes["total_steps"] = config.total_steps
    if config.question == "why":
        rows = why.measure(out, changes)
        why.draw(rows, picture)
        return rows, why.table(rows)
    trainings = questions_trained.TRAININGS[config.question]()
    rows = questions_trained.run(trainings, out, changes)
    if config.question == "length":
        questions_trained.draw_length(rows, picture)
    else:
        questions_trained.draw(trainings, out, picture)
    return rows, questions_trained.table(rows)


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
    exact = ("variance", "limit")
    cli.once(Config, main, seeds=lambda c: 1 if c.question in exact else c.num_seeds)
