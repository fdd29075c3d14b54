"""CONJPOMDP with GSEARCH in Heaven/Hell, on large estimates and on their exact mean.

    python scripts/benchmarks/conjpomdp.py

As Aberdeen & Baxter (2002) have it, |G| = 20, k = 3 and T = 10^7 steps an estimate, or 10^6 of
Exp-GPOMDP, whose estimates vary as little at the start; but I-states hold what they were told. The
exact trainings follow ∇_β, the mean of the estimates of both methods, from the same starts.

Each sampled training is a run of its own under --out, as `scripts/gpomdp.py` would leave it; one
that is complete is not run again, one that was cut short is resumed.
"""

import csv
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array

import spg
from scripts.benchmarks.controllers import OPTIMA, gamp, gpomdp, train
from spg.exact import conjugate
from spg.exact.gamp import direct_gradient
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.limits import Range, Seed, check
from spg.training import cli, metrics, options, tables
from spg.worlds.models import dense


@dataclass(frozen=True)
class Config:
    """The comparison, e.g. --methods istate-0.9 exact-0.9 --num-seeds 2"""

    methods: tuple[str, ...] = ()
    """by default all"""
    num_seeds: Annotated[int, Range(0, 2**31 - 1, whole=True)] = 0
    """0: as many as in the docs"""
    seed: Seed = 0
    """of the first training; the others take the next integers"""
    out: str = "runs/conjpomdp"


class Row(NamedTuple):
    method: str
    beta: float
    steps_of_gradient: float  # T; infinite where the gradient is exact
    gradients: int
    steps: float  # of each seed
    seeds: int
    above_half: int  # seeds that end above half of the optimum
    at_end: str  # exact η where the last line searches ended, by seeds
    best_met: str  # the largest η on the line searches
    first_above: str  # gradients until a line search met half of the optimum
    seconds: float  # of each seed


class Trained(NamedTuple):
    met: np.ndarray  # [seeds, gradients] η at each trial of the line searches, as sampled or exact
    kernels: list[Kernel]  # where the last searches ended
    seconds: float


SHARED: dict[str, Any] = {
    "problem": "heavenhell", "num_z": 20, "start_hold": 4.0, "optimiser": "conjugate", "beta": 0.9,
    "first_step": 1e3, "tolerance": 0.0, "num_envs": 1000, "num_steps": 500,
}  # fmt: skip


def methods() -> dict[str, gpomdp.Config]:
    """The trainings by name; those called exact take of theirs the start and the searches."""
    exp = gpomdp.Config(**SHARED, baseline="none", num_segments=2)
    istate = replace(exp, estimator="istate", num_segments=20)
    trainings = {
        "exact-0.9": (exp, 10, 80),
        "exact-0.97": (replace(exp, beta=0.97), 10, 80),
        "exp-0.9": (exp, 10, 80),
        "istate-0.9": (istate, 6, 80),
    }
    return {
        name: replace(config, num_seeds=seeds, total_steps=gradients * config.gradient_steps)
        for name, (config, seeds, gradients) in trainings.items()
    }


def by_the_mean(config: gpomdp.Config) -> Trained:
    """CONJPOMDP by exact ∇_β, from where `gpomdp.py` starts."""
    algorithm, settings = gpomdp.make(config), gpomdp.line_search(config)
    seeds = range(config.seed, config.seed + config.num_seeds)
    states = [algorithm.init(algorithm.floats, jr.split(jr.key(seed))[0]) for seed in seeds]

    @jax.jit
    def ascend(kernel: Kernel) -> tuple[Kernel, Array]:
        pomdp = dense(options.open_problem(config).pomdp)
        params, static = eqx.partition(kernel, trainable(kernel))

        def turn(ascent, _):
            trial = eqx.combine(conjugate.ask(ascent, settings), static)
            gradient, found = direct_gradient(trial, pomdp, beta=config.beta)
            gradient, value = eqx.filter(gradient, trainable(gradient)), found.average_reward
            return conjugate.tell(ascent, settings, value, gradient), value

        ascent, values = lax.scan(turn, conjugate.init(params), length=config.num_updates)
        return eqx.combine(ascent.params, static), values

    began = time.perf_counter()
    with jax.enable_x64(True):
        each = [ascend(double(state.learned.kernel)) for state in states]
    kernels, values = zip(*each, strict=True)
    return Trained(np.stack(values), list(kernels), time.perf_counter() - began)


def by_samples(config: gpomdp.Config, out: Path) -> Trained:
    summary, run = train(config, out), spg.load(out)
    kernels = [run.kernel(i) for i in range(config.num_seeds)]
    return Trained(metrics.read_metrics(out)["average_reward"], kernels, summary["train_seconds"])


def double(tree: Any) -> Any:
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: jnp.asarray(x, float) if floating(x) else x, tree)


def row(name: str, config: gpomdp.Config, trained: Trained) -> Row:
    half = OPTIMA["heavenhell"] / 2
    with jax.enable_x64(True):
        pomdp = options.open_problem(config).pomdp
        at_end = [float(gamp.average_reward(double(k), pomdp)) for k in trained.kernels]
    above = trained.met > half
    first = np.sort(np.argmax(above, 1)[above.any(1)]) + 1
    exact = name.startswith("exact")
    return Row(
        method=name.split("-")[0],
        beta=config.beta,
        steps_of_gradient=np.inf if exact else config.gradient_steps,
        gradients=config.num_updates,
        steps=np.inf if exact else config.total_steps,
        seeds=config.num_seeds,
        above_half=sum(x > half for x in at_end),
        at_end=" ".join(f"{x:.4f}" for x in at_end),
        best_met=" ".join(f"{x:.4f}" for x in np.nanmax(trained.met, 1)),
        first_above=" ".join(map(str, first)),
        seconds=trained.seconds / config.num_seeds,
    )


def main(config: Config) -> None:
    check(config)
    known, out = methods(), Path(config.out)
    if unknown := [name for name in config.methods if name not in known]:
        raise ValueError(f"unknown methods {unknown}; choose from {', '.join(known)}")
    rows = []
    for name in config.methods or known:
        exact = name.startswith("exact")
        num_seeds = config.num_seeds or known[name].num_seeds
        chosen = replace(known[name], num_seeds=num_seeds, seed=config.seed)
        trained = by_the_mean(chosen) if exact else by_samples(chosen, out / name)
        rows.append(row(name, chosen, trained))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "conjpomdp.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows([f"{x:.4g}" if isinstance(x, float) else x for x in r] for r in rows)
    print(tables.table([row._asdict() for row in rows], keep=2))


if __name__ == "__main__":
    cli.once(Config, main)
