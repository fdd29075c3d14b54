"""Questions that are answered by training: which policies, on which tasks, and their pictures.

Every training is a run of its own, <task>/<arm> under the output directory, as `scripts/ppo.py`
would leave it; one that is complete is not run again, one that was cut short is resumed.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

from scripts.benchmarks import questions_kernels as kernels
from scripts.benchmarks.curves import ppo, task
from spg.kernels.factory import make_kernel
from spg.training import cli, plots, summaries

DELAYS, LENGTH_STEPS = (2, 5, 10, 20, 50, 100, 200, 500), 1_000_000
STEPS = {"memorychain": 300_000, "tmaze10": 1_000_000, "recall10": 1_000_000}
TITLES = {"memorychain": "MemoryChain", "tmaze10": "T-maze 10", "recall10": "RepeatFirst 10"}


class Training(NamedTuple):
    task: str
    arm: str  # what is compared
    config: ppo.Config
    policy: Callable[..., Any] = make_kernel

    @property
    def directory(self) -> Path:
        return Path(self.task.replace(" ", "-"), self.arm.replace(" ", "-"))


class Row(NamedTuple):
    task: str
    arm: str
    seed: int
    env_steps: int
    final_return: float  # of the sampled policy over the last tenth of training
    noise_free: float  # of the noise-free policy at the end


def on(name: str, arms: dict[str, Callable[..., Any]], **changes: Any) -> list[Training]:
    """S2PG on one task, once with each of the policies; with linear units, which are fast."""
    own = {"memory": "s2pg", "cell": "linear", "z_size": 32, "total_steps": STEPS[name]}
    config = replace(task(name)[0], **own | changes)  # type: ignore[arg-type]
    return [Training(TITLES[name], arm, config, policy) for arm, policy in arms.items()]


def _only_memory() -> list[Training]:
    parts = {"both": "nothing", "memory alone": "head", "actions alone": "cell"}
    arms = {arm: partial(kernels.frozen, part) for arm, part in parts.items()}
    paths = {"kl_coef": 0.0}  # nothing but the gradients that are asked about
    return on("memorychain", arms, **paths) + on("recall10", arms, **paths)


def _start() -> list[Training]:
    arms = {"z0 zero": make_kernel, "z0 learned": kernels.learned_start}
    score = {"memory_gradient": "score"}  # which alone reaches z0
    return on("memorychain", arms, **score) + on("tmaze10", arms, **score)


def _laws() -> list[Training]:
    arms = {name: partial(kernels.with_law, name) for name in kernels.LAWS}
    score = {"memory_gradient": "score"}  # which every distribution has
    return on("memorychain", arms, **score) + on("recall10", arms, **score)


def _length() -> list[Training]:
    """RepeatFirst, at the settings of `recall10` but for γ = 1; the default cell is among these."""
    shared = replace(task("recall10")[0], gamma=1.0, total_steps=LENGTH_STEPS)
    arms = {
        f"{memory.upper()} {cell}": {"memory": memory, "cell": cell}
        for memory in ("s2pg", "bptt")
        for cell in dict.fromkeys((ppo.Config().cell, "gru", "linear"))
    } | {"window-5": {"memory": "window", "window": 5}}
    return [
        Training(f"delay {delay}", arm, replace(shared, env_params={"delay": delay}, **method))
        for delay in DELAYS
        for arm, method in arms.items()
    ]


TRAININGS: dict[str, Callable[[], list[Training]]] = {
    "only-memory": _only_memory,
    "start": _start,
    "laws": _laws,
    "length": _length,
}


def run(trainings: list[Training], out: Path, changes: dict[str, Any]) -> list[Row]:
    """Train what is not trained yet, with these changes to every configuration."""
    rows = []
    for training in trainings:
        config = replace(training.config, **changes)
        make = partial(ppo.make, policy=training.policy)
        summary = cli.train(make, config, out / training.directory)
        finals = (summary[f"final_return{which}"] for which in ("", "_noise_free"))
        rows += [
            Row(training.task, training.arm, seed, summary["env_steps"], sampled, free)
            for seed, sampled, free in zip(summary["seeds"], *finals, strict=True)
        ]
    return rows


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """For each training the mean over seeds, and the interval of the interquartile mean."""
    shown = []
    for key in dict.fromkeys((row.task, row.arm) for row in rows):
        some = [row for row in rows if row[:2] == key]
        final = np.array([row.final_return for row in some])
        low, high = plots.interval(final)
        shown.append(
            {
                "task": key[0],
                "arm": key[1],
                "seeds": len(some),
                "return": float(final.mean()),
                "ci95": f"{low:.4g} to {high:.4g}",
                "noise-free": float(np.mean([row.noise_free for row in some])),
            }
        )
    return shown


def success(final_return: float, *, num_symbols: int = 4) -> float:
    """Share of right answers in RepeatFirst, where a wrong one pays -1 / (num_symbols - 1)."""
    wrong = 1 / (num_symbols - 1)
    return (final_return + wrong) / (1 + wrong)


def draw_length(rows: list[Row], path: Path) -> None:
    """Success at the end of training against the delay, a colour for each arm."""
    figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for i, arm in enumerate(dict.fromkeys(row.arm for row in rows)):
        delays = [row.task for row in rows if row.arm == arm]
        delays = list(dict.fromkeys(delays))
        at = [
            np.array([success(r.final_return) for r in rows if (r.task, r.arm) == (d, arm)])
            for d in delays
        ]
        x = [int(d.removeprefix("delay ")) for d in delays]
        low, high = zip(*(plots.interval(values) for values in at), strict=True)
        middle = [float(plots.iqm(values)) for values in at]
        ax.semilogx(x, middle, "o-", color=f"C{i}", markersize=4, label=arm)
        ax.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
    ax.set_xticks(x, [str(d) for d in x])
    ax.minorticks_off()
    ax.axhline(success(0.0), color="gray", linestyle=":", linewidth=1)
    ax.set(xlabel="delay", ylabel="share of right answers", ylim=(0, 1.03))
    ax.grid(alpha=0.3)
    seeds = len({row.seed for row in rows})
    ax.set_title(f"RepeatFirst; IQM and 95 % interval of {seeds} seeds", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(trainings: list[Training], out: Path, path: Path) -> None:
    """Learning curves: a panel for each task, a colour for each arm."""
    names = list(dict.fromkeys(training.task for training in trainings))
    size = (4.4 * len(names), 4.0)
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        arms = [training for training in trainings if training.task == name]
        for i, training in enumerate(arms):
            curve = summaries.read_curve(out / training.directory, training.arm, bins=50)
            how: dict[str, Any] = {"color": f"C{i}", "markersize": 3}
            dot = "o" if len(curve.steps) == 1 else ""  # a line of one point would not be seen
            ax.plot(curve.steps, plots.iqm(curve.returns), f"{dot}-", label=curve.label, **how)
            ax.fill_between(
                curve.steps, *plots.interval(curve.returns), color=f"C{i}", alpha=0.2, linewidth=0
            )
        ax.set(title=name, xlabel="environment steps per seed", ylabel="return")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.grid(alpha=0.3)
    seeds = len(curve.returns)
    figure.suptitle(f"IQM and 95 % interval of {seeds} seeds", fontsize="medium")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)
