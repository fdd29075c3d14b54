"""The decoding error of the leaky filter, Zhao et al. (2026), section 6.1, figure and table.

    python scripts/filters.py --out runs/filters

Two states swap with probability 1 - ε and are seen through 10 % noise. Leaky filters guess the
state by their largest entry, for several decays: δ = λ / log(1/ε) with λ below ξ, and √ε, which the
theory admits; ε², 0 and 1, which it does not. The belief, which is optimal, guesses too. A second
world has two actions, stay and swap, drawn uniformly; each has the other's effect with probability
ε. The script takes seconds to minutes and cannot be resumed.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from spg.filters import decoding
from spg.filters.belief import ForwardFilter, LinearFilter, exact_filter, forward_filter
from spg.limits import Count, Range, Seed, check, fits
from spg.training import cli, records, tables
from spg.worlds.hmm import deterministic_part, hmm
from spg.worlds.markov import swap_hmm

DECAYS = ("λ/log(1/ε)", "√ε", "ε²", "0", "1")
FILTERS = (*(f"δ = {decay}" for decay in DECAYS), "belief")
SHOWN = (30, 50, 100, 150, 200, 250)  # values of 1/ε in the printed table


@dataclass(frozen=True)
class Config:
    """Decoding errors of the leaky filter and of the belief, against ε."""

    trajectories: Count = 20_000
    """of each ε"""
    steps: Count = 1000
    """of each trajectory; the long-run error is the mean of the last seven tenths of them"""
    points: Count = 23
    """values of 1/ε, evenly spaced from 30 to 250"""
    scale: Annotated[float, Range(0, 3.4, open="both")] = 0.7
    """λ; the theory holds below ξ = .7206, and δ is below 1 up to log 30"""
    seed: Seed = 0
    """of the random numbers"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""


class Row(NamedTuple):
    world: str
    inverse_epsilon: float
    filter: str
    decay: float
    final_error: float  # at the last step
    long_run_error: float
    standard_error: float  # of the long-run error
    ratio: float  # of the long-run error to ε log(1/ε)


class World(NamedTuple):
    """The model of one ε with its filters, that of the decays with an axis for them."""

    belief: ForwardFilter
    leaky: LinearFilter


def decays(config: Config, epsilon: float) -> list[float]:
    return [config.scale / np.log(1 / epsilon), epsilon**0.5, epsilon**2, 0.0, 1.0]


def world(config: Config, epsilon: float, *, controlled: bool) -> World:
    model = hmm(swap_hmm(epsilon, controlled=controlled).pomdp)
    exact = exact_filter(deterministic_part(model))
    leak = lambda d: LinearFilter(exact.source, d * exact.evidence, 1 - d, jnp.zeros(2), False)
    leaky = jax.vmap(leak)(jnp.array(decays(config, epsilon)))
    return World(forward_filter(model), leaky)


def errors(
    world: World, key: PRNGKeyArray, *, trajectories: int, steps: int
) -> tuple[Float[Array, " F"], Float[Array, " F"], Float[Array, " F"]]:
    """By filter: the final error, the long-run error, and the standard error of this one."""
    bayes, leaky = world
    burn_in = 3 * steps // 10
    no = jnp.array(False)
    num_actions = len(bayes.transition)

    def step(state, z, b, u):
        action = (num_actions * u[0]).astype(int)
        state = (u[1] >= bayes.transition[action, 0, state]).astype(int)
        obs = (u[2] >= bayes.emission[0, state]).astype(int)
        z = jax.vmap(lambda leaky, z: leaky(z, obs, action, no))(leaky, z)
        b = bayes(b, obs, action, no)
        wrong = jnp.append(jnp.argmax(z, -1), jnp.argmax(b)) != state
        return state, z, b, wrong

    def all_steps(carry, k):
        state, z, b, _, count = carry
        u = jr.uniform(jr.fold_in(key, k), (3, trajectories))
        state, z, b, wrong = jax.vmap(step, (0, 0, 0, 1))(state, z, b, u)
        return (state, z, b, wrong, count + wrong * (k >= burn_in)), None

    repeat = lambda x: jnp.broadcast_to(x, (trajectories, *x.shape))
    count = jnp.zeros((trajectories, len(leaky.keep) + 1))
    start = jnp.zeros(trajectories, int), repeat(leaky.init), repeat(bayes.init), count > 0, count
    (*_, wrong, count), _ = lax.scan(all_steps, start, jnp.arange(steps))
    each = count / (steps - burn_in)
    return wrong.mean(0), each.mean(0), each.std(0) / jnp.sqrt(trajectories)


def measure(config: Config) -> list[Row]:
    """All worlds, by a program for those with actions and one for those without."""
    rows = []
    inverse = np.linspace(30, 250, config.points)
    run = partial(errors, trajectories=config.trajectories, steps=config.steps)
    keys = jr.split(jr.key(config.seed), (2, config.points))
    for name, key in zip(("swap", "actions"), keys, strict=True):
        each = [world(config, 1 / x, controlled=name == "actions") for x in inverse]
        worlds = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        program = jax.jit(lambda *args: lax.map(lambda one: run(*one), args))
        results = np.stack(program(worlds, key), -1).tolist()
        for x, result in zip(inverse.tolist(), results, strict=True):
            decay = [*decays(config, 1 / x), np.nan]
            for rule, d, (final, mean, se) in zip(FILTERS, decay, result, strict=True):
                rows.append(Row(name, x, rule, d, final, mean, se, mean * x / np.log(x)))
    return rows


def table(rows: list[Row], measure: str) -> str:
    """Filters by 1/ε, at the points nearest to `SHOWN`, and in brackets the ratio to ε log(1/ε)."""
    points = np.unique([row.inverse_epsilon for row in rows])
    shown = np.unique([points[np.abs(points - x).argmin()] for x in SHOWN])
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if row.inverse_epsilon in shown:
            ratio = f" ({row.ratio:.2f})" if measure == "long_run_error" else ""
            cells = groups.setdefault(
                (row.world, row.filter), {"1/ε": f"{row.world}, {row.filter}"}
            )
            cells[f"{row.inverse_epsilon:.4g}"] = f"{getattr(row, measure):.4f}{ratio}"
    return tables.table(list(groups.values()))


def draw(rows: list[Row], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt  # here: it takes a second to load

    worlds = list(dict.fromkeys(row.world for row in rows))
    figure, axes = plt.subplots(1, len(worlds), figsize=(9, 4), sharey=True)
    for name, ax in zip(worlds, axes, strict=True):
        for i, rule in enumerate(FILTERS):
            some = [row for row in rows if (row.world, row.filter) == (name, rule)]
            fields = ("inverse_epsilon", "final_error", "long_run_error", "standard_error")
            x, final, error, se = (np.array([getattr(row, f) for row in some]) for f in fields)
            ax.plot(x, error, color=f"C{i}", label=rule)
            ax.fill_between(x, error - 2 * se, error + 2 * se, color=f"C{i}", alpha=0.2, lw=0)
            ax.plot(x, final, "o", color=f"C{i}", markersize=3)
        order = np.log(x) / x
        ax.plot(x, order * error[-1] / order[-1], "--", color="black", label="∝ ε log(1/ε)")
        ax.set(xlabel="1/ε", title=name, yscale="log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("P(wrong state): last step (dots),\nlong run ± 2 standard errors (lines)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.suptitle(title)
    figure.legend(handles, labels, loc="outside lower center", ncol=7, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(config: Config) -> None:
    check(config)
    size = 4 * config.trajectories * (8 * len(FILTERS) + 3)
    fits(size, f"{config.trajectories:,} trajectories side by side", on_device=True)
    constants = decoding.constants(hmm(swap_hmm(0.01).pomdp))
    out = records.open_run(config, "filters", resumable=False)
    rows = measure(config)
    with (out / "filters.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *rows])
    title = f"Two states, {config.trajectories:,} trajectories, λ = {config.scale:g}"
    draw(rows, out / "filters.png", title)
    print(f"ξ = {constants.xi:.4f}, KL = {constants.kl:.4f}, a > {constants.least_a:.4f}")
    print(f"\nP(wrong state) after {config.steps} steps\n\n{table(rows, 'final_error')}")
    print(f"\nlong run, and its ratio to ε log(1/ε)\n\n{table(rows, 'long_run_error')}")
    largest = max(row.standard_error for row in rows)
    print(f"\nlargest standard error {largest:.2g}; written to {out}")


if __name__ == "__main__":
    cli.once(Config, main)
