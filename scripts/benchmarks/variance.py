"""Variance of the score estimate as episodes get longer: S2PG against BPTT.

    python scripts/benchmarks/variance.py --out runs/variance

Al-Hafez et al. (2024), theorems 3.4 and 3.5, measured on a policy for which every constant of the
bounds is known: affine Gaussian maps in one dimension,

    z' = Z z + w o + b,    a ~ N(K z' + c, σ_a²),    θ = (w, b, c),

with z' computed (BPTT), or drawn with standard deviation σ_z (S2PG). Observations are uniform on
[-1, 1] and the reward (1 + sin a) / 2 is bounded by 1, so no environment is needed. Each estimate
is J(τ) Σ_t ∇ log π over one whole episode.
"""

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from spg.distributions import Normal
from spg.estimators.bounds import Constants, bptt_variance_bound, s2pg_variance_bound
from spg.estimators.score import score_estimate
from spg.kernels.cells import Computed, Drawn, Location, NormalAround
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Normalizer
from spg.limits import Count, Fraction, NonNegative, Positive, Range, Seed, check
from spg.training import cli, options, records, tables
from spg.types import Transition


@dataclass(frozen=True)
class Config:
    seed: Seed = 0
    """of the first measurement; the others take the next integers"""
    num_seeds: Count = 4
    """independent measurements of every point"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""
    decays: tuple[NonNegative, ...] = (0.5, 0.9, 1.1)
    """Z = |dz'/dz|, a panel each"""
    lengths: tuple[Count, ...] = (2, 4, 8, 16, 32, 64)
    """T, steps of an episode"""
    num_trajectories: Annotated[int, Range(2, 2**31 - 1, whole=True)] = 4096
    """for each variance"""
    gain: NonNegative = 1.0
    """K = |da/dz'|"""
    state_std: Positive = 0.5
    """noise on z' in S2PG"""
    action_std: Positive = 0.5
    """σ_a"""
    gamma: Fraction = 1.0
    """discount"""


class Affine(Location):
    """z' = Z z + w o + b."""

    decay: Float[Array, ""]
    weight: Float[Array, " 1"]
    bias: Float[Array, " 1"]

    def __call__(self, obs: Float[Array, " 1"], z: Float[Array, " 1"]) -> Float[Array, " 1"]:
        return self.decay * z + self.weight * obs + self.bias


class AffineHead(eqx.Module):
    """a ~ N(K z' + c, σ_a²)."""

    gain: float = eqx.field(static=True)
    std: float = eqx.field(static=True)
    bias: Float[Array, " 1"]

    def __call__(self, obs: Float[Array, " 1"], z_next: Float[Array, " 1"]) -> Normal:
        return Normal(self.gain * z_next + self.bias, jnp.full(1, self.std))


class Row(NamedTuple):
    method: str
    decay: float
    num_steps: int
    seed: int
    variance: float  # trace of the covariance of one trajectory's estimate
    bound: float


def make_kernel(config: Config, method: str, decay: Float[Array, ""]) -> Kernel:
    location = Affine(decay, jnp.ones(1), jnp.zeros(1))
    log_std = jnp.full(1, jnp.log(config.state_std))
    cell = Drawn(NormalAround(location, log_std)) if method == "S2PG" else Computed(location)
    head = AffineHead(config.gain, config.action_std, jnp.zeros(1))
    return Kernel(cell, head, Normalizer(1), jnp.zeros(1))


def estimate(
    config: Config, method: str, num_steps: int, decay: Float[Array, ""], key: PRNGKeyArray
) -> Float[Array, " 3"]:
    """The gradient with respect to (w, b, c) that one trajectory gives."""
    kernel = make_kernel(config, method, decay)
    obs_key, key = jr.split(key)
    obs = jr.uniform(obs_key, (num_steps, 1), minval=-1, maxval=1)

    def step(z, inputs):
        action, z_next = kernel.sample(inputs[0], z, key=inputs[1])
        return z_next, (z, action, z_next)

    z, action, z_next = lax.scan(step, kernel.z0, (obs, jr.split(key, num_steps)))[1]
    reward = (1 + jnp.sin(action[:, 0])) / 2
    first, last = (jnp.zeros(num_steps, bool).at[t].set(True) for t in (0, -1))
    traj = Transition(obs, z, action, z_next, reward, first, last, jnp.zeros_like(last), obs)
    weight = jnp.full(num_steps, reward @ config.gamma ** jnp.arange(num_steps))
    segment_length = 1 if method == "S2PG" else num_steps
    g = score_estimate(kernel, traj, weight, segment_length=segment_length)
    cell: Any = g.cell.distribution if isinstance(g.cell, Drawn) else g.cell
    head: Any = g.head
    return jnp.concatenate([cell.location.weight, cell.location.bias, head.bias])


def variance(
    config: Config, method: str, num_steps: int, decay: Float[Array, ""], key: PRNGKeyArray
) -> Float[Array, ""]:
    """Trace of the covariance over trajectories."""
    keys = jr.split(key, config.num_trajectories)
    g = jax.vmap(partial(estimate, config, method, num_steps, decay))(keys)
    return g.var(0, ddof=1).sum()


def bound(config: Config, method: str, decay: float, num_steps: int) -> float:
    """Theorem 3.4 or 3.5 with the constants of this policy; |o| ≤ 1 gives H = ‖(o, 1)‖ ≤ √2.

    The theorems let a depend on z, here it depends on z'. With z' drawn the action's score is
    that of c alone. With z' computed the map is a = K (Z z + w o + b) + c.
    """
    drawn, h = method == "S2PG", 2**0.5
    constants = Constants(
        reward=1.0,
        action_by_params=1.0 if drawn else (1 + (config.gain * h) ** 2) ** 0.5,
        z_by_params=h,
        action_by_z=config.gain * decay,
        z_by_z=decay,
        action_precision=config.action_std**-2,
        z_precision=config.state_std**-2,
    )
    theorem = s2pg_variance_bound if drawn else bptt_variance_bound
    return theorem(constants, gamma=config.gamma, num_steps=num_steps)


def measure(config: Config) -> list[Row]:
    decays = jnp.asarray(config.decays)
    seeds = range(config.seed, config.seed + config.num_seeds)
    keys = jax.vmap(jr.key)(jnp.asarray(seeds))
    rows = []
    for method in ("S2PG", "BPTT"):
        for num_steps in config.lengths:
            point = partial(variance, config, method, num_steps)
            over_seeds = jax.vmap(point, (None, 0))
            measured = np.asarray(jax.jit(jax.vmap(over_seeds, (0, None)))(decays, keys))
            for (i, j), value in np.ndenumerate(measured):
                decay = config.decays[i]
                limit = bound(config, method, decay, num_steps)
                rows.append(Row(method, decay, num_steps, seeds[j], float(value), limit))
    return rows


def draw(rows: list[Row], path: Path) -> None:
    decays = sorted({row.decay for row in rows})
    figure, axes = plt.subplots(
        1, len(decays), figsize=(3.4 * len(decays), 3.9), sharey=True, squeeze=False
    )
    for decay, ax in zip(decays, axes[0], strict=True):
        for method, colour in (("S2PG", "C0"), ("BPTT", "C1")):
            points = [row for row in rows if (row.method, row.decay) == (method, decay)]
            lengths = sorted({row.num_steps for row in points})
            at = [[row for row in points if row.num_steps == n] for n in lengths]
            mean = [np.mean([row.variance for row in some]) for some in at]
            limits = [some[0].bound for some in at]
            ax.loglog(lengths, mean, "o-", color=colour, markersize=4, label=f"{method}, measured")
            ax.loglog(lengths, limits, "--", color=colour, label=f"{method}, bound")
        ax.set_title(f"|∂z'/∂z| = {decay:g}")
        ax.set_xlabel("episode length T")
        ax.set_xticks(lengths, [str(n) for n in lengths])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("variance of one trajectory's estimate")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(config: Config) -> None:
    check(config)
    out = records.open_run(config, "variance", resumable=False)
    rows = measure(config)
    with (out / "variance.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([Row._fields, *rows])
    draw(rows, out / "variance.png")
    table = []
    for decay in config.decays:
        for num_steps in config.lengths:
            cells: dict[str, float] = {"T": num_steps, "Z": decay}
            for method in ("S2PG", "BPTT"):
                key = (method, decay, num_steps)
                some = [row for row in rows if row[:3] == key]
                cells[method] = float(np.mean([row.variance for row in some]))
                cells[f"bound of {method}"] = some[0].bound
            table.append(cells)
    print(tables.table(table))
    print(f"written to {out}")


if __name__ == "__main__":
    try:
        main(options.parse(Config))
    except (ValueError, OSError, records.RunError) as error:
        cli.fail(error)
