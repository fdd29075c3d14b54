"""How old the memories in the buffer are: staleness and return against the reach of a refresh.

    python scripts/benchmarks/staleness.py

S2PG by SAC on the memory point mass. A gradient step draws the z' of its sample anew and writes
them into the buffer: not at all (none), those of single steps (rows), or those of segments of L
steps that are run again from the first (rolled). Staleness is the mean of |z' drawn - z' stored|
over entries and samples; the noise of both draws is in it, and `untrained`, whose cell never
changes, shows how much that is. Each training is a run of its own under --out; one that is complete
is not run again, one that was cut short is resumed.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[2]))

import sac

from scripts.benchmarks import timing
from spg.limits import Count, Positive, Seed, Total, check
from spg.training import cli, metrics, tables

REFRESHES: dict[str, dict[str, Any]] = {
    "none": {"refresh": False},
    "rows": {},
    "rolled-8": {"segment_length": 8},
    "rolled-32": {"segment_length": 32},
}
UNTRAINED = "untrained", 0.0, {"state_learning_rate": 0.0}


@dataclass(frozen=True)
class Config:
    """The comparison, e.g. --state-learning-rates 3e-5 --num-seeds 8"""

    state_learning_rates: tuple[Positive, ...] = (3e-5, 1e-3)
    """of the cell; the head's is 1e-3"""
    num_seeds: Count = 4
    """of each training"""
    seed: Seed = 0
    """of the first training; the others take the next integers"""
    total_steps: Total = 300_000
    """environment steps of each seed"""
    out: str = "runs/staleness"
    """directory of the results"""


def arms(config: Config) -> list[tuple[str, float, dict[str, Any]]]:
    """Name of the refresh, rate of the cell, and the options that they are."""
    return [UNTRAINED] + [
        (name, rate, refresh | {"state_learning_rate": rate})
        for rate in config.state_learning_rates
        for name, refresh in REFRESHES.items()
    ]


def picture(
    path: Path, steps: Float[np.ndarray, " updates"], stale: dict[tuple[str, float], np.ndarray],
    final: dict[tuple[str, float], np.ndarray],
) -> None:  # fmt: skip
    """Staleness over training, means over seeds, and the final returns of the seeds."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rates = sorted({rate for _, rate in stale})
    for place, ((name, rate), values) in enumerate(stale.items()):
        style = {"color": f"C{[UNTRAINED[0], *REFRESHES].index(name)}"}
        bins = np.array_split(np.arange(len(steps)), min(100, len(steps)))
        x, y = ([part[..., b].mean() for b in bins] for part in (steps, values))
        line = ("-", "--", ":", "-.")[max(0, rates.index(rate) - 1) % 4]
        label = name if name == UNTRAINED[0] else f"{name}, {rate:g}"
        left.plot(x, y, line, label=label, **style)
        returns = final[name, rate]
        right.plot(returns, [place] * len(returns), "o", alpha=0.5, **style)
        right.plot([returns.mean()], [place], "|", markersize=18, **style)
    left.set(xlabel="environment steps", ylabel="mean |z' drawn - z' stored|", yscale="log")
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    left.grid(alpha=0.3)
    figure.legend(title="refresh, rate of the cell", loc="outside lower center", ncols=5)
    names = [f"{n}, {r:g}" if r else n for n, r in stale]
    right.set_yticks(range(len(names)), names)
    right.set_xlabel("return at the end (seeds, mean)")
    right.grid(axis="x", alpha=0.3)
    right.invert_yaxis()
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    check(config)
    out = Path(config.out)
    shared = replace(
        sac.Config(), num_seeds=config.num_seeds, seed=config.seed, checkpoints=1,
        total_steps=config.total_steps,
    )  # fmt: skip
    rows, stale, final, steps = [], {}, {}, np.zeros(0)
    for name, rate, words in arms(config):
        directory = out / f"{name}-{rate:g}"
        summary = cli.train(sac.make, replace(shared, **words), directory)
        data = metrics.read_metrics(directory)
        steps, stale[name, rate] = data["env_steps"][0], data["staleness"]
        final[name, rate] = np.array(summary["final_return"])
        last = stale[name, rate][:, -max(1, len(steps) // 10) :].mean(1)
        low, high = final[name, rate].min(), final[name, rate].max()
        rows.append(
            {
                "refresh": name,
                "state_learning_rate": rate,
                "seeds": config.num_seeds,
                "env_steps": summary["env_steps"],
                "staleness": f"{last.mean():.4f}",
                "return": f"{final[name, rate].mean():.4g}",
                "seeds_from_to": f"{low:.4g} to {high:.4g}",
                "steps_per_s": f"{summary['steps_per_second']:.0f}",
            }
        )
    picture(out / "staleness.png", steps, stale, final)
    timing.write(out / "staleness.csv", rows)
    print("", tables.table(rows), sep="\n")
    return rows


if __name__ == "__main__":
    cli.once(Config, main, seeds=lambda config: config.num_seeds)
