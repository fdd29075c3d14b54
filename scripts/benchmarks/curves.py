"""The README's learning results: every kind of memory on one task, one picture and one table.

    python scripts/benchmarks/curves.py --task cartpole

Each training is a run of its own under --out, as `scripts/ppo.py` would leave it; one that is
complete is not run again, one that was cut short is resumed.
"""

import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import ppo

from spg.limits import Count, Seed, check
from spg.training import cli, options, plots, summaries, tables

Task = Literal[
    "cartpole", "acrobot", "pendulum", "memorychain", "tmaze10", "tmaze50", "tmaze200",
    "recall10", "recall50", "cards", "ringworld", "halfcheetah", "ant", "hopper", "walker2d",
    "units-cartpole", "units-memorychain", "units-tmaze10",
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    task: Task = "cartpole"
    """the environment, or a comparison of units in one"""
    num_seeds: Count = 8
    """of each training"""
    seed: Seed = 0
    """of the first training; the others take the next integers"""
    out: str | None = None
    """by default runs/curves-<task>"""
    methods: tuple[str, ...] = ()
    """which of the task's methods; by default all"""


METHODS: dict[str, dict[str, Any]] = {
    "S2PG": {"memory": "s2pg"},
    "S2PG score": {"memory": "s2pg", "memory_gradient": "score"},
    "BPTT": {"memory": "bptt"},
    "S2PG GRU": {"memory": "s2pg", "cell": "gru"},
    "BPTT GRU": {"memory": "bptt", "cell": "gru"},
    "window-5": {"memory": "window", "window": 5},
    "none": {"memory": "none"},
    "oracle": {"memory": "oracle"},
}
FILTERS: dict[str, dict[str, Any]] = {
    name: {"memory": "filter", "filter": name}
    for name in ("belief", "lof", "lof-softmax", "alf", "alf-softmax", "alf-belief")
}
UNITS: dict[str, dict[str, Any]] = {
    "GRU-64": {"memory": "bptt", "cell": "gru", "z_size": 64},
    "linear-64": {"memory": "bptt", "cell": "linear", "z_size": 64},
    "gated-64": {"memory": "bptt", "cell": "gated", "z_size": 64},
    "LRU-32": {"memory": "bptt", "cell": "lru", "z_size": 64},
}
RINGWORLD: dict[str, dict[str, Any]] = {
    **FILTERS,
    "deep ALF-12": {"memory": "bptt", "cell": "leaky", "z_size": 24},
    "LRU-12": {"memory": "bptt", "cell": "lru", "z_size": 24},
    "LRU-64": {"memory": "bptt", "cell": "lru", "z_size": 128},
    **{name: UNITS[name] for name in ("linear-64", "gated-64", "GRU-64")},
    **{name: METHODS[name] for name in METHODS if name not in ("window-5", "oracle")},
}


MEMORY: dict[str, Any] = {"observe": "all", "entropy_coef": 0.03}
LONG: dict[str, Any] = {"gamma": 1.0, "total_steps": 3_000_000}
TMAZE: dict[str, Any] = MEMORY | {"env": "TMaze-memory"}
BRAX: dict[str, Any] = {
    "previous_action": True, "num_steps": 32, "hidden": (64, 64), "learning_rate": 3e-4,
    "checkpoints": 10, "eval_episodes": 8,
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {},
    "acrobot": {"env": "Acrobot-v1"},
    "pendulum": {"env": "Pendulum-v1", "gamma": 0.95, "total_steps": 3_000_000},
    "memorychain": MEMORY | {"env": "MemoryChain-bsuite", "total_steps": 500_000},
    "tmaze10": TMAZE | {"env_params": {"length": 10.0}},
    "tmaze50": TMAZE | LONG | {"env_params": {"length": 50.0}},
    "tmaze200": TMAZE | LONG | {"env_params": {"length": 200.0}, "total_steps": 5_000_000},
    "recall10": MEMORY | {"env": "RepeatFirst-memory", "env_params": {"delay": 10.0}},
    "recall50": MEMORY | LONG | {"env": "RepeatFirst-memory", "env_params": {"delay": 50.0}},
    "cards": MEMORY | {"env": "RecallCards-memory", "total_steps": 3_000_000},
    "ringworld": {
        "env": "ringworld-pomdp", "observe": "all", "previous_action": True,
        "total_steps": 5_000_000,
    },
    **{n: BRAX | {"env": f"brax/{n}"} for n in ("halfcheetah", "ant", "hopper", "walker2d")},
}  # fmt: skip


def task(name: Task) -> tuple[ppo.Config, dict[str, dict[str, Any]]]:
    """The configuration that all methods share, and the methods to compare.

    Cell, noise, size of z and what is not in `TASKS` are the defaults, the same in every task.
    """
    methods = RINGWORLD if name == "ringworld" else METHODS
    if name.startswith("units-"):
        name, methods = name.removeprefix("units-"), UNITS  # type: ignore[assignment]
    return replace(ppo.Config(), **TASKS[name]), methods


def main(config: Config) -> None:
    check(config)
    shared, methods = task(config.task)
    unknown = [m for m in config.methods if m not in methods]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; choose from {', '.join(methods)}")
    out = Path(config.out or f"runs/curves-{config.task}")
    shared = replace(shared, num_seeds=config.num_seeds, seed=config.seed)
    rows, curves = [], []
    for name in config.methods or methods:
        directory = out / name.replace(" ", "-")
        summary = cli.train(ppo.make, replace(shared, **methods[name]), directory)
        curves.append(summaries.read_curve(directory, name))
        low, high = summary["final_return_ci95"]
        rows.append(
            {
                "method": name,
                "seeds": config.num_seeds,
                "env_steps": summary["env_steps"],
                "return": f"{summary['final_return_mean']:.4g}",
                "iqm": f"{summary['final_return_iqm']:.4g}",
                "ci95": f"{low:.4g} to {high:.4g}",
                "noise_free": f"{summary['final_return_noise_free_mean']:.4g}",
                "steps_per_s": f"{summary['steps_per_second']:.0f}",
            }
        )
    dialled = "".join(f", {k} {v:g}" for k, v in shared.env_params.items())
    title = options.describe(shared) + dialled
    plots.learning_curve(out / "curves.png", curves, title=title)
    with (out / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("", tables.table(rows), sep="\n")


if __name__ == "__main__":
    cli.once(Config, main, seeds=lambda config: config.num_seeds)
