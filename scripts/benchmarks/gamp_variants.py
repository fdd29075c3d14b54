"""Three ways to make GAMP's solvers quicker: warm starts, preconditioning, mixed precision.

    python scripts/benchmarks/gamp_variants.py

Each is measured on the equations of one controller, in one process, interleaved: products with K,
seconds, and the residual that is left. Warm starts begin at the solution of a controller from which
one step along the gradient leads here.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax import lax
from jaxtyping import Array

from scripts.benchmarks.gamp_scale import (
    CASES,
    WORLDS,
    Case,
    compiled,
    controller,
    interleave,
    publish,
)
from spg.exact import chain
from spg.exact.gamp import LongRun, gamp_gradient, long_run
from spg.exact.solvers import Apply, Vector, arnoldi, bicgstab, krylov_bias, span
from spg.kernels.finite import tables
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.limits import Count, Positive, Seed, check
from spg.training import cli, records
from spg.training.tables import table
from spg.worlds.models import SparsePOMDP

Row = dict[str, Any]
WORLD = {"local": Case(partial(WORLDS["local"], 30_000), 8, 3)} | {
    name: CASES[name] for name in ("heavenhell", "pentagon", "factory")
}


@dataclass(frozen=True)
class Config:
    cases: tuple[Literal["heavenhell", "pentagon", "factory", "local"], ...] = (
        "heavenhell", "pentagon", "factory", "local",
    )  # fmt: skip
    """worlds, with the controllers of gamp_scale.py; `local` has 30,000 states and 8 I-states"""
    seed: Seed = 0
    """of the random controllers"""
    repeats: Count = 5
    """of each timing"""
    steps: tuple[Positive, ...] = (0.01, 0.1, 1.0)
    """of warm starts: the largest change of a logit"""
    tol: Positive = 1e-10
    """of the residuals"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""


def warm(law: Vector, guess: Vector) -> tuple[Callable, Callable]:
    """Both solvers, from the solution of other equations and a little of the start."""
    begin = lambda start: law + 1e-6 * (start - law)  # so that every class has some mass
    again = lambda push, start, tol: arnoldi(push, begin(start), tol)
    return again, partial(krylov_bias, solver=partial(bicgstab, max_steps=1_000), guess=guess)


def plain(pull: Apply, gain: Vector, law: Vector, tol: Array) -> tuple[Vector, Array]:
    return krylov_bias(pull, gain, law, tol, solver=partial(bicgstab, max_steps=1_000))


def scaled(pull: Apply, gain: Vector, law: Vector, tol: Array) -> tuple[Vector, Array]:
    """√d x instead of x: in its norm K expands nothing."""
    root = jnp.sqrt(law)
    over = lambda y: jnp.where(law > 0, y / jnp.where(law > 0, root, 1), 0)
    closed = lambda y: y - root * pull(over(y)) + root * jnp.vdot(root, y)
    y, products = solved(closed, root * gain, tol)
    return over(y), products


def jacobi(
    stay: Vector, pull: Apply, gain: Vector, law: Vector, tol: Array
) -> tuple[Vector, Array]:
    """Each row divided by 1 - K_ii, the probability to leave (s, g)."""
    closed = lambda x: (x - pull(x) + jnp.vdot(law, x)) / (1 - stay)
    return solved(closed, gain / (1 - stay), tol)


def solved(closed: Apply, rhs: Vector, tol: Array) -> tuple[Vector, Array]:
    scale = jnp.max(jnp.abs(rhs))
    operator = lx.FunctionLinearOperator(closed, jax.eval_shape(lambda: rhs))
    solver = bicgstab(tol, max_steps=1_000)
    found = lx.linear_solve(operator, rhs / scale, solver, throw=False)
    return scale * found.value, 1 + 2 * jnp.asarray(found.stats["num_steps"])


def refined(
    kernel: Kernel, pomdp: SparsePOMDP, pull: Apply, gain: Vector, law: Vector, tol: Array
) -> tuple[Vector, Array]:
    """x in single precision, corrected by what its residual in double precision leaves to do."""
    inexact = lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x
    single = lambda tree: jax.tree.map(inexact, tree)
    rows, world, own = single((tables(kernel, jnp.arange(pomdp.num_obs)), pomdp, law))
    reward = chain.evaluate(rows, world, jnp.zeros_like(own))
    rough = lambda x: jnp.where(own > 0, chain.evaluate(rows, world, x) - reward, 0)

    def correct(state):
        x, left, n, rounds = state
        more, m = plain(rough, single(left), own, jnp.asarray(1e-4, jnp.float32))
        x = x + more.astype(x.dtype)
        return x, gain - x + pull(x), n + m + 1, rounds + 1

    going = lambda state: (span(state[1]) > tol * span(gain)) & (state[3] < 20)
    x, _, n, _ = lax.while_loop(going, correct, (jnp.zeros_like(gain), gain, jnp.asarray(0), 0))
    return x, n


def stay(kernel: Kernel, pomdp: SparsePOMDP) -> Vector:
    """K_ii, the probability that a step ends where it began."""
    rows = tables(kernel, jnp.arange(pomdp.num_obs))
    own = pomdp.successor == jnp.arange(len(pomdp.start))[:, None, None]
    here = jnp.where(own, pomdp.probability, 0).sum(-1)  # [S, A]
    obs, emission = pomdp.emissions()
    same = rows.successors == jnp.arange(rows.successors.shape[1])[:, None]
    keep = jnp.where(same, rows.omega, 0)  # [O, G, K]
    mu = jnp.take_along_axis(rows.mu[:, None], rows.successors[..., None], 2)  # [O, G, K, A]
    act = jnp.einsum("ogk,ogka->oga", keep, mu)[obs]
    return jnp.einsum("sm,smga,sa->sg", emission, act, here)


VARIANTS = {
    "plain": lambda kernel, pomdp: plain,
    "jacobi": lambda kernel, pomdp: partial(jacobi, stay(kernel, pomdp)),
    "scaled": lambda kernel, pomdp: scaled,
    "refined": lambda kernel, pomdp: partial(refined, kernel, pomdp),
}


def values(
    variant: str, tol: float, kernel: Kernel, pomdp: SparsePOMDP, law: Vector
) -> tuple[Vector, Array]:
    """x and its products, d being known."""
    known = lambda push, start, tol: (law, jnp.zeros((), int))
    found = long_run(
        kernel, pomdp, stationary=known, bias=VARIANTS[variant](kernel, pomdp), tol=tol
    )
    return found.bias, found.products[1]


def both(tol: float, kernel: Kernel, pomdp: SparsePOMDP, before: LongRun | None):
    """d, x and their products, from nothing or from a solution of before."""
    law, bias = (arnoldi, plain) if before is None else warm(before.stationary, before.bias)
    found = long_run(kernel, pomdp, stationary=law, bias=bias, tol=tol)
    return found.stationary, found.bias, found.products


@eqx.filter_jit
def residuals(kernel: Kernel, pomdp: SparsePOMDP, law: Vector, x: Vector) -> tuple[Array, Array]:
    """‖dK - d‖₁, and the span of r - η + Kx - x over that of r - η, where d is not 0."""
    rows, seen = tables(kernel, jnp.arange(pomdp.num_obs)), law > 0
    reward = chain.evaluate(rows, pomdp, jnp.zeros_like(law))
    gain = jnp.where(seen, reward - jnp.vdot(law, reward), 0)
    left = jnp.where(seen, gain + chain.evaluate(rows, pomdp, x) - reward - x, 0)
    return jnp.abs(chain.push(rows, pomdp, law) - law).sum(), span(left) / span(gain)


def measure(config: Config, name: str) -> Iterable[Row]:
    case = WORLD[name]
    pomdp = case.world()
    kernel = controller(pomdp, case.num_z, case.out_degree, std=case.std, seed=config.seed)
    gradient, solution = eqx.filter_jit(partial(gamp_gradient, tol=1e-12))(kernel, pomdp)
    law = solution.stationary
    programs = {
        variant: partial(
            compiled(partial(values, variant, config.tol), kernel, pomdp, law), kernel, pomdp, law
        )
        for variant in VARIANTS
    }
    found, seconds = interleave(programs, config.repeats)
    for variant, (x, products) in found.items():
        yield {
            "problem": name, "n": law.size, "equations": "x", "variant": variant, "step": "",
            "products": int(products), "seconds": np.median(seconds[variant]),
            "residual": float(residuals(kernel, pomdp, law, x)[1]),
        }  # fmt: skip
    params, static = eqx.partition(kernel, trainable(kernel))
    direction = eqx.filter(gradient, trainable(kernel))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(direction))
    cold = compiled(partial(both, config.tol), kernel, pomdp, None)
    hot = compiled(partial(both, config.tol), kernel, pomdp, solution)
    for step in config.steps:
        scale = step / largest
        moved = jax.tree.map(lambda x, g, scale=scale: x + scale * g, params, direction)
        after = eqx.combine(moved, static)
        programs = {
            "cold": partial(cold, after, pomdp, None),
            "warm": partial(hot, after, pomdp, solution),
        }
        found, seconds = interleave(programs, config.repeats)
        for variant, (d, x, products) in found.items():
            yield {
                "problem": name, "n": law.size, "equations": "d and x", "variant": variant,
                "step": step, "products": int(products.sum()),
                "seconds": np.median(seconds[variant]),
                "residual": float(max(residuals(after, pomdp, d, x))),
            }  # fmt: skip


def main(config: Config) -> None:
    check(config)
    out = records.open_run(config, "gamp-variants", resumable=False)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, jax {jax.__version__}\n")
    rows = []
    with jax.enable_x64(True):
        for name in config.cases:
            found = list(measure(config, name))
            print(table(found, keep=4), end="\n\n")
            rows += found
    publish(out / "gamp_variants.csv", rows)
    print(f"written to {out}")


if __name__ == "__main__":
    cli.once(Config, main)
