"""POPGym's table (Morad et al., 2023): PPO with each kind of memory on task after task.

    python scripts/benchmarks/popgym.py
    python scripts/benchmarks/popgym.py --tasks CountRecallEasy AutoencodeMedium --methods S2PG none

A training is scored as in the paper, by its maximum mean episodic return (MMER): the mean return of
the episodes that end within an epoch of 65,536 steps, and of these means the highest of a training.
The observation goes with the previous action. Nothing is tuned for a task. Updates are of 256
environments: with 64, four times as many updates undo a part of what S2PG has learned. Each
training is a run of its own under --out; one that is complete is not run again, one that was cut
short is resumed. The table in --out keeps the rows of earlier commands, so that commands with other
tasks may run beside each other, and a table that was made elsewhere goes on when it is laid there.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[2]))

import ppo

from scripts.benchmarks import timing
from scripts.benchmarks.curves import METHODS
from spg.limits import Count, Seed, Total, check
from spg.training import cli, metrics, records, tables

EPOCH = 65_536  # steps of a batch of the paper's
NUM_ENVS = 256
EASY = (
    "RepeatFirst", "RepeatPrevious", "CountRecall", "Autoencode", "Concentration", "HigherLower",
    "Battleship", "MineSweeper", "MultiarmedBandit", "PositionOnlyCartPole",
    "NoisyPositionOnlyCartPole", "PositionOnlyPendulum", "NoisyPositionOnlyPendulum",
)  # fmt: skip
MEDIUM = "RepeatPrevious", "CountRecall", "Autoencode", "PositionOnlyCartPole"
# MMER of the paper's GRU, its best memory, and the MMER of that: table 3, in appendix B, as far as
# github.com/bryjudy/fly-critic has it in flycritic/popgym/results.py
PUBLISHED = {
    "RepeatFirstEasy": (1.000, "GRU", 1.000), "RepeatPreviousEasy": (1.000, "GRU", 1.000),
    "CountRecallEasy": (0.177, "LSTM", 0.509), "AutoencodeEasy": (-0.283, "GRU", -0.283),
    "HigherLowerEasy": (0.529, "GRU", 0.529), "MultiarmedBanditEasy": (0.619, "Elman", 0.631),
    "PositionOnlyCartPoleEasy": (1.000, "GRU", 1.000),
    "NoisyPositionOnlyCartPoleEasy": (0.995, "GRU", 0.995),
    "RepeatFirstMedium": (1.000, "GRU", 1.000), "RepeatPreviousMedium": (-0.315, "LMU", 0.789),
    "CountRecallMedium": (-0.528, "PosMLP", -0.519), "AutoencodeMedium": (-0.425, "IndRNN", -0.420),
    "HigherLowerMedium": (0.511, "IndRNN", 0.513), "MultiarmedBanditMedium": (0.538, "TCN", 0.598),
    "PositionOnlyCartPoleMedium": (1.000, "GRU", 1.000),
    "NoisyPositionOnlyCartPoleMedium": (0.642, "IndRNN", 0.659),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The comparison, e.g. --tasks HigherLowerHard --num-seeds 8"""

    tasks: tuple[str, ...] = (*(f"{n}Easy" for n in EASY), *(f"{n}Medium" for n in MEDIUM))
    """by name and size"""
    methods: tuple[str, ...] = ("S2PG", "BPTT linear", "none")
    """kinds of memory; BPTT GRU and more of curves.py are there, too"""
    num_seeds: Count = 3
    """of each training"""
    seed: Seed = 0
    """of the first training; the others take the next integers"""
    total_steps: Total = 15_000_000
    """environment steps of each seed"""
    out: str = "runs/popgym"
    """directory of the runs and of the table"""


def training(config: Config, task: str, method: str) -> ppo.Config:
    """What is not said here is PPO's default, the same in every task."""
    return replace(
        ppo.Config(),
        env=f"popgym/{task}", observe="all", previous_action=True, entropy_coef=0.01,
        num_envs=NUM_ENVS, total_steps=config.total_steps, num_seeds=config.num_seeds,
        seed=config.seed, **METHODS[method],
    )  # fmt: skip


def mmer(directory: Path) -> Float[np.ndarray, " seeds"]:
    """The maximum mean episodic return of each seed of a run; nan if no episode ended."""
    data = metrics.read_metrics(directory)
    epoch = (data["env_steps"][0] - 1).astype(int) // EPOCH
    means = [
        metrics.mean_score(data, slice(*np.searchsorted(epoch, [number, number + 1])))
        for number in np.unique(epoch)
    ]
    return np.fmax.reduce(means)


def picture(path: Path, rows: list[dict[str, Any]]) -> None:
    """Each task's MMER, means over seeds and their range, beside that of the paper's GRU."""
    tasks, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("task", "method"))
    figure = Figure(figsize=(7.2, 1.4 + 0.4 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    for i, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        place = np.array([-tasks.index(row["task"]) for row in own], float)
        place += 0.12 * ((len(methods) - 1) / 2 - i)
        mean, low, high = (np.array([row[k] for row in own]) for k in ("mmer", "least", "most"))
        axes.errorbar(
            mean, place, xerr=np.maximum([mean - low, high - mean], 0), fmt="o", markersize=4,
            color=f"C{i}", label=method,
        )  # fmt: skip
    known = [(PUBLISHED[task][0], -i) for i, task in enumerate(tasks) if task in PUBLISHED]
    if known:
        axes.plot(*zip(*known, strict=True), "k|", markersize=14, label="paper's GRU")
    axes.set_yticks([-i for i in range(len(tasks))], tasks)
    axes.set(
        xlabel="maximum mean episodic return; bars are the range of the seeds",
        ylim=(0.5 - len(tasks), 0.5),
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    from spg.envs.popgym import TASKS  # here: Gymnax computes when it is imported, on all devices

    check(config)
    tasks, methods = [name.removeprefix("popgym/") for name in TASKS], list(METHODS)
    for kind, words, known in (
        ("task", config.tasks, tasks),
        ("method", config.methods, [name for name in methods if name != "oracle"]),
    ):
        if unknown := [word for word in words if word not in known]:
            raise ValueError(f"unknown {kind} {unknown[0]!r}; choose from {', '.join(known)}")
    out, rows = Path(config.out), []
    for task in config.tasks:
        for method in config.methods:
            directory = out / task / method.replace(" ", "-")
            summary = cli.train(ppo.make, training(config, task, method), directory)
            best = mmer(directory)
            row = {
                "task": task, "method": method, "seeds": len(best), "mmer": float(best.mean()),
                "std": float(best.std()), "least": float(best.min()), "most": float(best.max()),
                "final": summary["final_return_mean"],
                "noise_free": summary["final_return_noise_free_mean"],
                "env_steps": summary["env_steps"], "steps_per_s": summary["steps_per_second"],
            }  # fmt: skip
            rows.append(row)
    with records.writing(out):
        rows = timing.merge(out / "popgym.csv", rows, columns=("task", "method"))
        rows.sort(key=lambda row: (tasks.index(row["task"]), methods.index(row["method"])))
        timing.write(out / "popgym.csv", rows)
        picture(out / "popgym.png", rows)
    shown = "task", "method", "seeds", "mmer", "std", "final", "noise_free"
    print("", tables.table([{k: row[k] for k in shown} for row in rows], keep=2), sep="\n")
    return rows


if __name__ == "__main__":
    cli.once(Config, main, seeds=lambda config: config.num_seeds)
