"""The out-degree of a controller's random graph: what exact natural gradients reach with each k.

    python scripts/benchmarks/outdegree.py --out runs/outdegree

For each problem and k, trainings from zero logits on graphs of their own: final η, gradients until
η is within 1 % of its end, ‖∇η‖ where training starts and where it ends. In Pentagon the cost of a
wrong declaration grows to its value in stages.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax

from spg.exact import natural
from spg.kernels.finite import random_controller
from spg.limits import Count, Seed, check
from spg.training import cli, records, tables
from spg.worlds import WORLDS
from spg.worlds.models import dense

ANNEALED = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


class Study(NamedTuple):
    num_z: int
    out_degrees: tuple[int, ...]
    costs: tuple[float, ...]  # by which negative rewards are multiplied, one after the other
    ceiling: float  # the optimum; in Pentagon what full sight earns


STUDIES = {
    "loadunload": Study(4, (1, 2, 3, 4), (1.0,), 1 / 4),
    "heavenhell": Study(8, (1, 2, 3, 4, 8), (1.0,), 1 / 11),
    "pentagon": Study(4, (1, 2, 3, 4), ANNEALED, 0.050343),
}


@dataclass(frozen=True)
class Config:
    """The measurement, e.g. --problems pentagon --num-seeds 4"""

    problems: tuple[str, ...] = tuple(STUDIES)
    """of loadunload, heavenhell and pentagon"""
    num_seeds: Count = 10
    """trainings of each, every one on a graph of its own"""
    num_updates: Count = 105
    """gradients of each"""
    seed: Seed = 0
    """of the graphs"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""


class Row(NamedTuple):
    problem: str
    num_z: int
    out_degree: int
    seed: int
    average_reward: float  # η at the end
    gradients: int  # until η, under the costs of the end, is within 1 % of it
    first_norm: float  # ‖∇η‖ at the start
    last_norm: float  # and at the end


def train(config: Config, problem: str, out_degree: int) -> list[Row]:
    study = STUDIES[problem]
    pomdp = dense(WORLDS[problem]().pomdp)
    length = config.num_updates // len(study.costs)

    def stage(kernel, cost):
        reward = jnp.where(pomdp.reward < 0, cost, 1) * pomdp.reward
        kernel, states = natural.ascend(kernel, pomdp._replace(reward=reward), num_steps=length)
        return kernel, (states.value, jax.vmap(optax.tree.norm)(states.gradient))

    def one(key):
        kernel = random_controller(
            study.num_z, pomdp.num_obs, pomdp.num_actions, out_degree=out_degree, key=key
        )
        return jax.tree.map(jnp.concatenate, jax.lax.scan(stage, kernel, jnp.array(study.costs))[1])

    keys = jr.split(jr.key(config.seed), config.num_seeds)
    values, norms = map(np.asarray, eqx.filter_jit(lambda keys: jax.lax.map(one, keys))(keys))
    last = values[:, -length:]
    reached = config.num_updates - length + np.argmax(last >= last[:, -1:] * 0.99, 1)
    return [
        Row(problem, study.num_z, out_degree, i, float(v[-1]), int(n) + 1, *map(float, g[[0, -1]]))
        for i, (v, n, g) in enumerate(zip(values, reached, norms, strict=True))
    ]


def write(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows([f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in rows)


def draw(rows: list[Row], path: str) -> None:
    problems = list(dict.fromkeys(row.problem for row in rows))
    figure, axes = plt.subplots(3, len(problems), figsize=(3.2 * len(problems), 7), squeeze=False)
    labels = {
        "average_reward": "final η",
        "gradients": "gradients until 1 % of it",
        "last_norm": "‖∇η‖: start ○, end ●",
    }
    for column, problem in zip(axes.T, problems, strict=True):
        some = [row for row in rows if row.problem == problem]
        degrees = sorted({row.out_degree for row in some})
        for ax, (field, label) in zip(column, labels.items(), strict=True):
            for row in some:
                at = row.out_degree + 0.03 * (row.seed - 4.5)
                ax.plot(at, getattr(row, field), ".", color="C0", alpha=0.6)
                if field == "last_norm":
                    ax.plot(at, row.first_norm, "o", mfc="none", color="C1", ms=4)
            median = [
                np.median([getattr(row, field) for row in some if row.out_degree == k])
                for k in degrees
            ]
            ax.plot(degrees, median, "_", ms=22, mew=2, color="C0")
            ax.set(xticks=degrees, yscale="log" if field == "last_norm" else "linear")
            ax.grid(alpha=0.3)
            if problem == problems[0]:
                ax.set_ylabel(label)
        column[0].axhline(STUDIES[problem].ceiling, ls=":", color="gray")
        column[0].set_title(f"{problem}, |G| = {some[0].num_z}")
        column[-1].set_xlabel("out-degree k")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(config: Config) -> None:
    jax.config.update("jax_enable_x64", True)
    check(config)
    if unknown := set(config.problems) - set(STUDIES):
        raise ValueError(f"unknown problems {sorted(unknown)}; choose from {', '.join(STUDIES)}")
    out = records.open_run(config, "outdegree", resumable=False)
    rows = []
    for problem in config.problems:
        for k in STUDIES[problem].out_degrees:
            rows += train(config, problem, k)
            some = rows[-config.num_seeds :]
            print(problem, k, *(f"{row.average_reward:.4f}" for row in some), flush=True)
            write(rows, out / "outdegree.csv")
    draw(rows, str(out / "outdegree.png"))
    summary = []
    for problem, k in dict.fromkeys((row.problem, row.out_degree) for row in rows):
        some = [row for row in rows if (row.problem, row.out_degree) == (problem, k)]
        middle = np.median(np.array([row[4:] for row in some], float), 0)
        best = max(row.average_reward for row in some)
        names = "problem", "k", *Row._fields[4:], "best"
        summary.append(dict(zip(names, (problem, k, *middle, best), strict=True)))
    print(tables.table(summary, keep=2))
    print(f"written to {out}")


if __name__ == "__main__":
    cli.once(Config, main)
