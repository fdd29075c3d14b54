"""The README's results with finite-state controllers: methods on one problem, a table, a picture.

    python scripts/benchmarks/controllers.py --task loadunload

Each training is a run of its own under --out, as `scripts/gamp.py` or `scripts/gpomdp.py` would
leave it; one that is complete is not run again, one that was cut short is resumed.
"""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import gamp
import gpomdp
import matplotlib.pyplot as plt
import numpy as np

from spg.limits import Range, Seed, check
from spg.training import cli, metrics, options, plots, records, summaries, tables

Task = Literal["loadunload", "heavenhell", "pentagon", "factory"]


@dataclass(frozen=True)
class Config:
    task: Task = "loadunload"
    """the problem"""
    num_seeds: Annotated[int, Range(0, 2**31 - 1, whole=True)] = 0
    """0: as many as in the docs"""
    seed: Seed = 0
    """of the first training; the others take the next integers"""
    out: str | None = None
    """by default runs/controllers-<task>"""
    methods: tuple[str, ...] = ()
    """which of the task's methods; by default all"""


OPTIMA = {"loadunload": 1 / 4, "heavenhell": 1 / 11}
EXACT, SAMPLED = gamp.Config(), gpomdp.Config()


def task(name: Task) -> tuple[int, dict[str, gamp.Config | gpomdp.Config]]:
    """The number of seeds, and the methods to compare."""
    if name == "loadunload":
        sampled = replace(SAMPLED, learning_rate=0.1, beta=0.9, total_steps=4_000_000)
        return 10, {
            "GAMP": EXACT,
            "GAMP, 8 I-states": replace(EXACT, num_z=8),
            "GAMP, dense": replace(EXACT, out_degree=4),
            "IState-GPOMDP": replace(sampled, estimator="istate"),
            "Exp-GPOMDP": replace(sampled, estimator="exp"),
            "Exp-GPOMDP by observations": replace(sampled, estimator="exp-observations"),
        }
    if name == "heavenhell":
        shared: dict[str, Any] = {"problem": "heavenhell", "num_z": 20}
        sampled = replace(
            SAMPLED, **shared, start_hold=4.0, beta=0.9, gae_lambda=0.9, num_envs=50,
            num_steps=400, learning_rate=0.05, total_steps=3_000_000, checkpoints=10,
        )  # fmt: skip
        return 10, {
            "GAMP": replace(EXACT, **shared),
            "IState-GPOMDP": replace(sampled, estimator="istate"),
            "Exp-GPOMDP": replace(sampled, estimator="exp"),
        }
    if name == "pentagon":
        exact = replace(EXACT, problem="pentagon", num_updates=300)
        sizes = [(1, 1), *((4, k) for k in (1, 2, 3, 4)), (8, 3)]
        return 1, {f"{n}, {k}": replace(exact, num_z=n, out_degree=k) for n, k in sizes}
    exact = replace(EXACT, problem="factory", precision="single", num_updates=120, checkpoints=2)
    return 1, {
        "GAMP, memoryless": replace(exact, num_z=1, out_degree=1),
        "GAMP, 4 I-states": replace(exact, num_z=4, out_degree=2),
    }


def train(config: gamp.Config | gpomdp.Config, out: Path) -> dict[str, Any]:
    """The summary of a run by the script itself, in a process of its own, unless it is there."""
    script = gamp if isinstance(config, gamp.Config) else gpomdp
    if (out / "config.json").exists():
        then = json.loads((out / "config.json").read_text())
        now = {k: v for k, v in vars(config).items() if k not in records.UNSAVED}
        now = json.loads(json.dumps(now))  # JSON has no tuples
        if differ := [k for k, v in now.items() if then.get(k) != v]:
            raise ValueError(f"{out} was run with another {', '.join(differ)}; --out elsewhere")
    resume = ["--resume"] if (out / "config.json").exists() else []
    if not (out / "summary.json").exists():
        told = [*options.words(config), "--out", str(out), *resume]
        command = [sys.executable, str(script.__file__), *told]
        print(" ".join(command), file=sys.stderr)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return summaries.read_summary(out)


def half_of_optimum(task: Task, run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps `[T]`, and `[N, T]` whether a seed earned half of it in the ten updates before."""
    data = metrics.read_metrics(run)
    smooth = np.lib.stride_tricks.sliding_window_view(data["average_reward"], 10, 1).mean(-1)
    return data["env_steps"][0, 9:], smooth > OPTIMA[task] / 2


def tell_half(name: str, steps: np.ndarray, success: np.ndarray) -> str:
    """How many seeds ever earn half of the optimum: the first, the last and the median."""
    first = steps[np.argmax(success, 1)][success.any(1)]
    told = f"{name}: {len(first)} of {len(success)} seeds earn half of the optimum"
    if not len(first):
        return told
    low, middle, high = (f"{q:,.0f}" for q in np.quantile(first, (0, 0.5, 1)))
    return f"{told}, after {low} to {high} steps, median {middle}"


def draw_success(
    task: Task, successes: dict[str, tuple[np.ndarray, np.ndarray]], path: Path
) -> None:
    """The share of seeds that earn half of the optimum, by steps."""
    figure, ax = plt.subplots(figsize=(5, 3.2))
    for name, (steps, success) in successes.items():
        ax.plot(steps, success.mean(0), label=name)
    ax.set(
        xlabel="steps of each seed", ylabel="seeds above half of the optimum", ylim=(-0.03, 1.03)
    )
    ax.set_title(f"{task}, {len(success)} seeds")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(config: Config) -> None:
    check(config)
    num_seeds, methods = task(config.task)
    unknown = [m for m in config.methods if m not in methods]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; choose from {', '.join(methods)}")
    out = Path(config.out or f"runs/controllers-{config.task}")
    num_seeds = config.num_seeds or num_seeds
    rows = []
    successes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    curves: dict[bool, list[plots.Curve]] = {True: [], False: []}
    for name in config.methods or methods:
        directory = out / name.replace(" ", "-").replace(",", "")
        chosen = replace(methods[name], num_seeds=num_seeds, seed=config.seed)
        summary = train(chosen, directory)
        curves[isinstance(chosen, gamp.Config)].append(summaries.read_curve(directory, name))
        if isinstance(chosen, gpomdp.Config) and config.task in OPTIMA:
            successes[name] = half_of_optimum(config.task, directory)
        low, high = summary["final_average_reward_ci95"]
        each = summary["final_average_reward"]
        rows.append(
            {
                "method": name,
                "I-states, k": f"{chosen.num_z}, {chosen.out_degree}",
                "mean": f"{summary['final_average_reward_mean']:.4g}",
                "IQM": f"{summary['final_average_reward_iqm']:.4g} [{low:.4g}, {high:.4g}]",
                "noise-free": f"{summary['final_average_reward_noise_free_mean']:.4g}",
                "best": f"{max(each):.4g}",
                "steps": f"{summary['env_steps']:,}" if summary["env_steps"] else "none",
                "seconds": f"{summary['train_seconds']:.0f}",
            }
        )
    for exact, some in curves.items():
        if some:
            title = f"{config.task}, {'exact' if exact else 'sampled'} gradients"
            name = "exact" if exact else "sampled"
            plots.learning_curve(out / f"{config.task}_{name}.png", some, title=title)
    if successes:
        draw_success(config.task, successes, out / f"{config.task}_success.png")
    with (out / f"{config.task}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(tables.table(rows))
    for name, success in successes.items():
        print(tell_half(name, *success))


if __name__ == "__main__":
    cli.once(Config, main)
