"""What SAC and TD3 cost with each memory on Brax: tables 1 and 2 of Al-Hafez et al. (2024) anew.

    python scripts/benchmarks/offpolicy_times.py    # five tasks, SAC and TD3
    python scripts/benchmarks/offpolicy_times.py --tasks ant --algorithms sac

Positions are seen, on the spring backend, and the critics see the state. Two settings are timed:
environments side by side, as the scripts train by default, and the paper's ratio, a single one with
a gradient step for each of its steps. Gradient steps are taken on a buffer of random steps, and
steps of the environment with a memoryless policy, once a task. Every repeat times each program of a
task and an algorithm, and factors are medians, with quartiles, of those within the repeats. With
the same --out, commands for different parts fill one table; a part is written when it is measured.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[2]))

import sac
import td3

from scripts.benchmarks import timing
from scripts.benchmarks.offpolicy_programs import NUM_GRADIENTS, NUM_STEPS, actors, learners
from scripts.benchmarks.timing import spread, with_quartiles
from spg.kernels.factory import Unit
from spg.limits import Count, Size, check
from spg.training import cli, options, tables

METHODS: dict[str, dict[str, Any]] = {
    "none": {"memory": "none"},
    "oracle": {"memory": "oracle"},
    "window-5": {"memory": "window", "window": 5},
    "window-32": {"memory": "window", "window": 32},
    "bptt-5": {"memory": "bptt", "segment_length": 5},
    "bptt-5-last": {"memory": "bptt", "segment_length": 5, "loss_steps": "last"},
    "bptt-32": {"memory": "bptt", "segment_length": 32},
    "bptt-32-last": {"memory": "bptt", "segment_length": 32, "loss_steps": "last"},
    "s2pg": {"memory": "s2pg"},
}
"""`last` is the paper's: as many sequences as the batch is large, with losses at their ends."""
PUBLISHED = """
method          oracle window-5 window-32 bptt-5-last bptt-32-last s2pg
sac-ant         0.89   1.730    3.822     2.804       10.935       2.241
sac-halfcheetah 1.04   1.614    2.213     3.022       11.859       2.610
sac-hopper      0.96   1.497    1.956     2.935        9.599       2.531
sac-humanoid    0.97   1.887    4.106     2.936        9.580       2.290
sac-walker2d    0.96   1.578    1.948     2.878        9.597       2.526
td3-ant         1.00   1.546    2.620     2.024        4.535       2.056
td3-halfcheetah 0.92   1.555    1.864     2.069        4.606       2.120
td3-hopper      1.00   1.489    1.643     2.012        3.476       2.146
td3-humanoid    1.00   1.512    2.896     2.037        4.555       2.024
td3-walker2d    1.00   1.527    1.724     1.913        4.024       2.245
"""
"""Hours to those of the memoryless policy: table 2, and for the oracle from table 1."""
IDENTITY = "task", "algorithm", "method", "hidden", "cell", "z_size"  # of a row


@dataclass(frozen=True)
class Config:
    """The measurement, e.g. --tasks ant --algorithms sac --methods none s2pg --hidden 64 64"""

    tasks: tuple[str, ...] = ("ant", "halfcheetah", "hopper", "humanoid", "walker2d")
    """environments of Brax"""
    algorithms: tuple[Literal["sac", "td3"], ...] = ("sac", "td3")
    """scripts"""
    methods: tuple[
        Literal[
            "none", "oracle", "window-5", "window-32", "bptt-5", "bptt-5-last", "bptt-32",
            "bptt-32-last", "s2pg",
        ], ...,
    ] = tuple(METHODS)  # type: ignore[assignment]  # fmt: skip
    """what none, which is always there, is compared with"""
    hidden: tuple[Size, ...] = (256, 256)
    """widths of the hidden layers of policy head and critics"""
    cell: Unit = "gated"
    """of s2pg and bptt"""
    z_size: Size = 32
    """of the internal state"""
    num_envs: Count = 64
    """environments side by side"""
    batch_size: Count = 256
    """steps whose losses make a gradient, with environments side by side"""
    single_batch_size: Count = 256
    """the same with a single environment"""
    buffer_size: Count = 32_768
    """random steps in the buffer"""
    repeats: Count = 10
    """of each timing"""
    out: str = "runs/offpolicy-times"
    """directory of the results"""


def training(config: Config, algorithm: str, task: str, method: str, batch_size: int) -> Any:
    """The configuration of `sac` or `td3`. A BPTT with losses everywhere takes whole segments."""
    given = METHODS[method]
    length = 1 if "loss_steps" in given else given.get("segment_length", 1)
    return {"sac": sac, "td3": td3}[algorithm].Config(
        **given, env=f"brax/{task}", observe="positions", hidden=config.hidden,
        cell=config.cell, z_size=config.z_size, num_envs=config.num_envs, num_seeds=1,
        batch_size=batch_size // length * length,
        buffer_size=config.buffer_size, learning_starts=config.buffer_size,
    )  # fmt: skip


def tabulate(
    config: Config, algorithm: str, task: str, seconds: dict[str, Float[np.ndarray, "4 repeats"]]
) -> list[dict[str, Any]]:
    """A row for each method, from seconds of a rollout, of a step of a single environment, and of
    the gradient step that belongs to each."""
    made = training(config, algorithm, task, "none", config.batch_size)
    total = lambda s: (s[0] + made.num_gradients * s[2], s[1] + s[3])
    reference = seconds["none"]
    rows = []
    for method, s in seconds.items():
        both, single = (np.median(x) for x in total(s))
        of = lambda size, m=method: training(config, algorithm, task, m, size).batch_size
        row: dict[str, Any] = {"task": task, "algorithm": algorithm, "method": method}
        row |= {"hidden": "-".join(map(str, config.hidden))}
        row |= {"cell": config.cell, "z_size": config.z_size}
        row |= {"steps_per_second": made.rollout_size / both}
        row |= {"samples_per_second": made.num_gradients * of(config.batch_size) / both}
        row |= {"single_steps_per_second": 1 / single}
        row |= {"single_samples_per_second": of(config.single_batch_size) / single}
        names = "rollout_ms", "single_step_ms", "gradient_ms", "single_gradient_ms"
        for name, values in zip(names, s, strict=True):
            row |= spread(name, 1e3 * values)
        factors = [a / b for a, b in zip(total(s), total(reference), strict=True)]
        row |= spread("to_none", factors[0]) | spread("single_to_none", factors[1])
        row |= spread("gradient_to_none", s[2] / reference[2])
        row |= spread("single_gradient_to_none", s[3] / reference[3])
        rows.append(row | {"published_to_none": published(algorithm, task, method)})
    return rows


def published(algorithm: str, task: str, method: str) -> float:
    """The paper's factor, or nan where it has none."""
    names, *lines = (line.split() for line in PUBLISHED.strip().splitlines())
    factors: dict[str, dict[str, float]] = {
        line[0]: dict(zip(names[1:], map(float, line[1:]), strict=True)) for line in lines
    }
    return 1.0 if method == "none" else factors.get(f"{algorithm}-{task}", {}).get(method, np.nan)


def table(rows: list[dict[str, Any]]) -> str:
    names = ("task", "algorithm", "method", "hidden", "cell")
    numbers = ("rollout_ms", "gradient_ms", "steps_per_second", "samples_per_second")
    single = ("single_step_ms", "single_gradient_ms", "single_steps_per_second")
    factors = ("to_none", "single_to_none", "single_gradient_to_none")
    shown = []
    for row in rows:
        line = {name: row[name] for name in (*names, *numbers, *single)}
        line |= {name: with_quartiles(row, name) for name in factors}
        shown.append(line | {"published": row["published_to_none"]})
    return tables.table(shown, keep=3)


def picture(path: Path, rows: list[dict[str, Any]]) -> None:
    """Factors to the memoryless policy in the paper's ratio, with quartiles; the paper's beside."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        title = f"{row['algorithm'].upper()}, {row['task']}\n"
        title += f"{row['hidden']}, {row['cell']} {row['z_size']}"
        panels.setdefault(title, []).append(row)
    columns = min(5, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3 + 2.2 * columns, 0.8 + 3.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axes, (title, some) in zip(grid.flat, panels.items(), strict=False):
        place = np.array([methods.index(row["method"]) for row in some])
        low, middle, high, theirs = (
            np.array([row[name] for row in some])
            for name in ("single_to_none_q25", "single_to_none", "single_to_none_q75",
                         "published_to_none")
        )  # fmt: skip
        error = [middle - low, high - middle]
        axes.barh(place - 0.2, middle, 0.4, xerr=error, color="C0", label="spg")
        axes.barh(place + 0.2, theirs, 0.4, color="C1", label="Al-Hafez et al.")
        for y, x in [
            *zip(place - 0.2, middle, strict=True),
            *zip(place + 0.2, theirs, strict=True),
        ]:
            if np.isfinite(x):
                axes.text(x, y, f"  {x:.2f}", va="center", fontsize="x-small")
        axes.set_title(title, fontsize="small")
        axes.set_yticks(range(len(methods)), methods)
        axes.grid(axis="x", alpha=0.3)
    grid[0, 0].invert_yaxis()
    grid[0, 0].margins(x=0.15)
    figure.supxlabel("time of training to that of none (median, quartiles)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    check(config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    methods = ["none", *(m for m in config.methods if m != "none")]
    rows = []
    for task in config.tasks:
        acting, spec = [], None
        for algorithm in config.algorithms:
            made = training(config, algorithm, task, "none", config.batch_size)
            if spec is None:
                env = options.make_env(made)
                spec, acting = env.spec, actors(made, env)
            calls = list(acting)
            for method in tqdm(methods, desc=f"{algorithm} {task}, compile"):
                sizes = config.batch_size, config.single_batch_size
                made = [training(config, algorithm, task, method, size) for size in sizes]
                calls += learners(made, spec)
            acts, steps, *gradients = timing.interleave(calls, repeats=config.repeats)
            pairs = zip(methods, gradients[::2], gradients[1::2], strict=True)
            scale = np.array([1, NUM_STEPS, NUM_GRADIENTS, NUM_GRADIENTS])[:, None]
            seconds = {m: np.stack([acts, steps, a, b]) / scale for m, a, b in pairs}
            rows = tabulate(config, algorithm, task, seconds)
            rows = timing.merge(out / "offpolicy_times.csv", rows, columns=IDENTITY)
            picture(out / "offpolicy_times.png", rows)
    print(table(rows))
    print(timing.machine())
    print(f"table and picture: {out}")
    return rows


if __name__ == "__main__":
    cli.once(Config, main)
