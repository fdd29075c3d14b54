"""GAMP: which solver, how it scales, and what it costs next to a direct and to SciPy's solver.

    python scripts/benchmarks/gamp_scale.py --parts solvers
    python scripts/benchmarks/gamp_scale.py --parts scale compare

Aberdeen & Baxter (2002) damp the power and Richardson iterations and leave open whether Krylov
methods would do better. Controllers are random. What is compared is interleaved in one process.
"""

import csv
import itertools
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from matplotlib.figure import Figure
from scipy import sparse
from scipy.sparse import linalg

from spg.exact import chain
from spg.exact.enumeration import joint_chain
from spg.exact.gamp import gamp_gradient, long_run
from spg.exact.solvers import (
    arnoldi,
    bicgstab,
    gmres,
    krylov_bias,
    krylov_stationary,
    power,
    richardson,
)
from spg.kernels.finite import random_controller, tables
from spg.kernels.kernel import Kernel
from spg.limits import Count, NonNegative, Positive, Range, Seed, check
from spg.training import cli, records
from spg.training.tables import table
from spg.worlds import problems
from spg.worlds.models import SparsePOMDP, dense, sparse_pomdp

Row = dict[str, Any]
TARGET = 1e-6  # relative error of a gradient that is good enough
METHODS = {
    "damped": (power, richardson),
    "arnoldi": (arnoldi, partial(krylov_bias, solver=gmres)),
    "gmres": (partial(krylov_stationary, solver=gmres), partial(krylov_bias, solver=gmres)),
    "bicgstab": (
        partial(krylov_stationary, solver=bicgstab),
        partial(krylov_bias, solver=bicgstab),
    ),
}


States = Annotated[int, Range(0, 10**8, whole=True)]


@dataclass(frozen=True)
class Config:
    parts: tuple[Literal["solvers", "scale", "compare"], ...] = ("solvers", "scale", "compare")
    """which solver; how the costs grow; the costs of others"""
    seed: Seed = 0
    """of the random controllers"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""
    repeats: Count = 5
    """of each timing"""
    patience: NonNegative = 10.0
    """seconds, of all its repeats, after which a program of `solvers` or `scale` is not repeated"""
    cases: tuple[str, ...] = ("heavenhell", "heavenhell, std 0.3", "pentagon", "factory")
    """controllers and worlds of `solvers`"""
    tolerances: tuple[Positive, ...] = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-13)
    """of `solvers`"""
    sizes: tuple[Count, ...] = (10_000, 31_623, 100_000, 316_228, 1_000_000)
    """states of the random worlds of `scale`"""
    worlds: tuple[Literal["random", "local"], ...] = ("random", "local")
    """of `scale`: successors anywhere, or near with one jump"""
    devices: tuple[Count, ...] = (1,)
    """that share the states in `scale`; a CPU is divided into so many"""
    num_z: Count = 8
    """I-states in `scale` and `compare`; the factory has 4"""
    direct: tuple[States, ...] = (0, 250, 750)
    """states of random worlds to solve directly as well; 0 is Pentagon"""
    iterative: tuple[States, ...] = (0, 100_000)
    """states of random worlds to solve by SciPy as well; 0 is the factory"""
    tol: Positive = 1e-10
    """of both residuals, in `compare`"""


class Case(NamedTuple):
    world: Callable[[], SparsePOMDP]
    num_z: int
    out_degree: int
    std: float = 1.0
    num_seeds: int = 3
    damped: float = 0.0  # the smallest tolerance for which the damped iterations are waited for


def pentagon() -> SparsePOMDP:
    """With its three unreachable states led to its end: absorbing, they leave no solution x."""
    pomdp = problems.pentagon().pomdp
    return eqx.tree_at(lambda w: w.successor, pomdp, pomdp.successor.at[208:211].set(211))


def local(num_states: int) -> SparsePOMDP:
    """As `random_pomdp`, but 2 of 3 successors are within 16 states, and 1 is any 64th state."""
    rng = np.random.default_rng(0)
    shape, state = (num_states, 4, 3), np.arange(num_states)
    s, a, _ = np.broadcast_arrays(*np.ogrid[:num_states, :4, :3])
    successor = (s + rng.integers(-16, 17, shape)) % num_states
    successor[..., 2] = 64 * rng.integers(0, 1 + (num_states - 1) // 64, shape[:2])
    probability = rng.dirichlet(np.ones(3), shape[:2]).ravel()
    reward = np.repeat(rng.normal(size=shape[:2]), 3)
    obs = np.stack([state % 8, (state + rng.integers(1, 8, num_states)) % 8], -1).ravel()
    return sparse_pomdp(
        (s.ravel(), a.ravel(), successor.ravel(), probability, reward),
        (np.repeat(state, 2), obs, rng.dirichlet(np.ones(2), num_states).ravel()),
        np.full(num_states, 1 / num_states), num_actions=4, num_obs=8,
    )  # fmt: skip


CASES = {
    "heavenhell": Case(lambda: problems.heaven_hell().pomdp, 20, 3),
    "heavenhell, std 0.3": Case(lambda: problems.heaven_hell().pomdp, 20, 3, std=0.3),
    "pentagon": Case(pentagon, 4, 3),
    "factory": Case(lambda: problems.factory().pomdp, 4, 2, num_seeds=1, damped=1e-10),
}
WORLDS = {"random": lambda size: problems.random_pomdp(size).pomdp, "local": local}


def controller(
    pomdp: SparsePOMDP, num_z: int, out_degree: int = 3, *, std: float = 1.0, seed: int = 0
) -> Kernel:
    sizes = num_z, pomdp.num_obs, pomdp.num_actions
    return random_controller(*sizes, out_degree=out_degree, std=std, key=jr.key(seed))


def direct(kernel: Kernel, pomdp: SparsePOMDP):
    """The gradient with K formed, and d and x from one LU of I - K + 1v, v uniform."""
    joint = joint_chain(kernel, dense(pomdp))
    shape, n = joint.shape[:2], joint.shape[0] * joint.shape[1]
    lu = jax.scipy.linalg.lu_factor(jnp.eye(n) - joint.reshape(n, n) + 1 / n)
    back = lambda b, trans: jax.scipy.linalg.lu_solve(lu, b.reshape(-1), trans).reshape(shape)
    law = lambda push, start, tol: (back(jnp.full(n, 1 / n), 1), jnp.zeros((), int))
    bias = lambda pull, gain, law, tol: (back(gain, 0), jnp.zeros((), int))
    return gamp_gradient(kernel, pomdp, stationary=law, bias=bias)


def iterated(method: str, kernel: Kernel, pomdp: SparsePOMDP, tol):
    """The gradient at a tolerance that need not be known before compiling."""
    law = lambda push, start, _: METHODS[method][0](push, start, tol)
    bias = lambda pull, gain, law, _: METHODS[method][1](pull, gain, law, tol)
    return gamp_gradient(kernel, pomdp, stationary=law, bias=bias)


def error(gradient: Kernel, reference: Kernel) -> float:
    """Relative, in the Euclidean norm."""
    leaves = lambda g: jax.tree.leaves(eqx.filter(g, eqx.is_inexact_array))
    x, y = (np.concatenate([np.ravel(leaf) for leaf in leaves(g)]) for g in (gradient, reference))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def compiled(function: Callable, *inputs: Any) -> Callable:
    return eqx.filter_jit(function).lower(*inputs).compile()


def timed(program: Callable, *inputs: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return jax.block_until_ready(program(*inputs)), time.perf_counter() - began


def interleave(programs: dict[Any, Callable], repeats: int, patience: float = np.inf):
    """The last result of each program and its seconds, in an order drawn anew for each repeat."""
    results, seconds, rng = {}, {key: [] for key in programs}, np.random.default_rng(0)
    for _ in range(repeats + 1):  # the first warms up
        for i in rng.permutation(len(programs)):
            key = list(programs)[i]
            if sum(seconds[key]) < patience:
                results[key], spent = timed(programs[key])
                seconds[key].append(spent)
    return results, {key: np.array(x[1:] or x) for key, x in seconds.items()}


# --- solvers


def solvers(config: Config) -> list[Row]:
    """Products, seconds and error of the gradient by method and tolerance, in float64."""
    rows = []
    for name in config.cases:
        case = CASES[name]
        pomdp = case.world()
        size = len(pomdp.start) * case.num_z
        make = partial(controller, pomdp, case.num_z, case.out_degree, std=case.std)
        one = jnp.ones(())
        methods = {m: compiled(partial(iterated, m), make(), pomdp, one) for m in METHODS}
        truth = direct if size <= 4000 else partial(iterated, "gmres", tol=jnp.asarray(1e-14))
        for seed in range(config.seed, config.seed + case.num_seeds):
            kernel = make(seed=seed)
            programs = {
                (method, tol): partial(program, kernel, pomdp, jnp.asarray(tol))
                for method, program in methods.items()
                for tol in sorted(config.tolerances, reverse=True)
                if method != "damped" or tol >= case.damped
            }
            reference = eqx.filter_jit(truth)(kernel, pomdp)[0]
            found, seconds = interleave(programs, config.repeats, config.patience)
            for method, tol in programs:
                gradient, solution = found[method, tol]
                rows.append({
                    "problem": name, "n": size, "method": method, "seed": seed, "tol": tol,
                    "products": int(solution.products.sum()),
                    "seconds": np.median(seconds[method, tol]),
                    "error": error(gradient, reference),
                })  # fmt: skip
    return rows


def ladders(rows: list[Row], problem: str, method: str) -> list[list[Row]]:
    """The points of each seed, from the loosest tolerance to the tightest."""
    of = [row for row in rows if (row["problem"], row["method"]) == (problem, method)]
    return [[r for r in of if r["seed"] == seed] for seed in dict.fromkeys(r["seed"] for r in of)]


def cost(points: list[Row], unit: str) -> float:
    """Of an error of TARGET: `unit` is taken to be linear in log error between two points."""
    log = np.log10([row["error"] for row in points]) - np.log10(TARGET)
    enough = np.flatnonzero(log <= 0)
    if not len(enough):
        return np.nan
    i = enough[0]
    near, far = points[i][unit], points[max(i - 1, 0)][unit]
    return near if i == 0 else far + (near - far) * log[i - 1] / (log[i - 1] - log[i])


def summary(rows: list[Row]) -> Iterable[Row]:
    """What an error of TARGET costs, and the error that the tightest tolerance leaves at worst."""
    for problem, n in dict.fromkeys((row["problem"], row["n"]) for row in rows):
        for method in METHODS:
            own, damped = (ladders(rows, problem, m) for m in (method, "damped"))
            line = {"problem": problem, "n": n, "method": method}
            for unit in ("products", "seconds"):
                ours, theirs = (np.array([cost(x, unit) for x in y]) for y in (own, damped))
                line |= {unit: np.median(ours), f"{unit}_to_damped": np.median(ours / theirs)}
            yield line | {"worst_error": max(points[-1]["error"] for points in own)}


def picture(path: Path, rows: list[Row]) -> None:
    """Error against products, above, and seconds, below; a column each problem, a line a seed."""
    columns = list(dict.fromkeys((row["problem"], row["n"]) for row in rows))
    figure = Figure(figsize=(1 + 2.9 * len(columns), 6.2), layout="constrained")
    axes = figure.subplots(2, len(columns), sharey=True, squeeze=False)
    looks = ("damped (paper)", "C3o"), ("Arnoldi + GMRES", "C0s"), ("GMRES twice", "C2^")
    looks = dict(zip(METHODS, (*looks, ("BiCGStab twice", "C1D")), strict=False))
    for (i, j), ax in np.ndenumerate(axes):
        (problem, n), unit = columns[j], ("products", "seconds")[i]
        for method, (name, look) in looks.items():
            for k, points in enumerate(ladders(rows, problem, method)):
                y = [row["error"] if row["error"] < 100 else np.nan for row in points]
                x, label = [row[unit] for row in points], "_" * (k > 0) + name
                ax.loglog(x, y, look + "-", ms=3.5, lw=1, alpha=0.8, label=label)
        ax.axhline(TARGET, color="0.3", lw=0.8, ls=":")
        ax.set_xlabel(("matrix-vector products", "seconds")[i])
        ax.grid(alpha=0.3)
        axes[0, j].set_title(f"{problem}, n = {n:,}", fontsize=10)
    figure.supylabel("relative error of the gradient", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)


# --- scale


def scale_point(config: Config, world: str, size: int, count: int) -> Row:
    """One gradient in float32, in a process of its own; memory is above that of the imports.

    The non-zeros are those that a product applies: of P(s' | s, a), ω and μ at the observations of
    each state, and for each I-state. What each device holds, its share of the world and of the
    rest, is what XLA has planned.
    """
    jax.config.update("jax_num_cpu_devices", count)
    jnp.zeros(1).block_until_ready()
    imports = peak()
    pomdp, shared = WORLDS[world](size), {}
    if count > 1:
        shared = {"devices": jax.devices()[:count]}
        pomdp = chain.share_states(pomdp, shared["devices"])
    built = peak() - imports
    kernel = controller(pomdp, config.num_z, seed=config.seed)
    program, compiling = timed(compiled, partial(gamp_gradient, **shared), kernel, pomdp)
    gradients, began = [], time.process_time()
    while len(gradients) < 3 and sum(spent for _, spent in gradients) < config.patience:
        gradients.append(timed(program, kernel, pomdp))
    processor = (time.process_time() - began) / len(gradients)
    solution, seconds = gradients[0][0][1], np.median([spent for _, spent in gradients])
    high, held = peak() - imports, program.compiled.memory_analysis()

    policy, law = tables(kernel, jnp.arange(pomdp.num_obs)), solution.stationary
    runs = {}
    for name, apply in (("push", chain.push), ("pull", chain.evaluate)):
        one = compiled(partial(apply, **shared), policy, pomdp, law)
        runs[name] = partial(one, policy, pomdp, law)
    spent = interleave(runs, config.repeats, config.patience)[1]
    push, pull = (np.median(spent[name]) for name in runs)
    products = np.array(solution.products)
    in_products = products @ (push, pull)
    successors, emissions = pomdp.probability[0].size, pomdp.emission.shape[1]
    nonzeros = size * config.num_z * (successors + emissions * (3 + pomdp.num_actions))
    return {
        "part": "scale", "problem": world, "states": size, "n": size * config.num_z,
        "devices": count,
        "nonzeros": nonzeros, "compile_s": compiling, "gradient_s": seconds,
        "processor_s": processor,
        "products": int(products.sum()), "push_ms": 1e3 * push, "pull_ms": 1e3 * pull,
        "product_ms": 1e3 * in_products / products.sum(),
        "ns_per_nonzero": 1e9 * in_products / products.sum() / nonzeros,
        "products_share": in_products / seconds, "world_MB": built, "peak_MB": high,
        "device_MB": (held.argument_size_in_bytes + held.temp_size_in_bytes) / 2**20,
        "converged": str(solution.converged),
    }  # fmt: skip


def peak() -> float:
    """MB this process has had at most (Linux); `ru_maxrss` would begin at what its parent had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def scale(config: Config) -> Iterable[Row]:
    for world, size, count in itertools.product(config.worlds, config.sizes, config.devices):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool.submit(scale_point, config, world, size, count).result()


def slopes(rows: list[Row]) -> Iterable[Row]:
    """Exponents of the seconds in the non-zeros, by least squares, on one device."""
    rows = [row for row in rows if row["devices"] == 1]
    for world in dict.fromkeys(row["problem"] for row in rows):
        log = lambda key, world=world: np.log([r[key] for r in rows if r["problem"] == world])
        keys = "product_ms", "push_ms", "pull_ms", "gradient_s"
        yield {"slope": world} | {k: np.polyfit(log("nonzeros"), log(k), 1)[0] for k in keys}


# --- compare


def compare_direct(config: Config) -> Iterable[Row]:
    """One gradient in float64, over the same by a dense LU."""
    for size in config.direct:
        name, pomdp = _world(size, "pentagon")
        kernel = controller(pomdp, config.num_z, seed=config.seed)
        both = {"gamp": gamp_gradient, "direct": direct}
        programs = {k: partial(compiled(f, kernel, pomdp), kernel, pomdp) for k, f in both.items()}
        found, seconds = interleave(programs, config.repeats)
        row = {"part": "direct", "problem": name, "n": len(pomdp.start) * config.num_z}
        difference = error(found["gamp"][0], found["direct"][0])
        yield row | ratio(seconds, "direct") | {"difference": difference}


def compare_scipy(config: Config) -> Iterable[Row]:
    """x in float64, over SciPy's GMRES with K as one CSR matrix, or as the product of two."""
    for size in config.iterative:
        name, pomdp = _world(size, "factory")
        num_z, out_degree = (config.num_z, 3) if size else CASES["factory"][1:3]
        kernel = controller(pomdp, num_z, out_degree, seed=config.seed)
        law = eqx.filter_jit(long_run)(kernel, pomdp).stationary
        act, move = factors(kernel, pomdp)
        seen = np.ravel(law) != 0  # the rest takes no part: `long_run` leaves x at 0 there
        act, d = act[seen], np.ravel(law)[seen]
        gain = act @ np.repeat(np.ravel(pomdp.mean_reward()), num_z)
        move = sparse.csc_array(move)[:, seen].tocsr()
        joint = sparse.csr_array(act @ move)
        gain -= d @ gain
        theirs = partial(scipy_gmres, gain, d, config.tol)
        programs = {
            "gamp": partial(
                compiled(partial(bias, config.tol), kernel, pomdp, law), kernel, pomdp, law
            ),
            "csr": partial(theirs, [joint]),
            "factors": partial(theirs, [move, act]),
        }
        found, seconds = interleave(programs, config.repeats)
        shared = {"part": "scipy", "problem": name, "n": len(d)}
        size_of = lambda x, gain=gain: float(np.linalg.norm(x) / np.linalg.norm(gain))
        for rival in ("csr", "factors"):
            row = shared | ratio(seconds, rival)
            for whose, key in (("ours", "gamp"), ("rival", rival)):
                x = np.ravel(found[key][0])
                x = x[seen] if whose == "ours" else x
                row[f"{whose}_products"] = int(found[key][1])
                row[f"{whose}_residual"] = size_of(gain - x + joint @ x - d @ x)
            yield row


def bias(tol: float, kernel: Kernel, pomdp: SparsePOMDP, law):
    """x and its products, d being known; residuals are not computed, as nothing needs them."""
    known = lambda push, start, tol: (law, jnp.zeros((), int))
    solution = long_run(kernel, pomdp, stationary=known, tol=tol)
    return solution.bias, solution.products[1]


def scipy_gmres(gain: np.ndarray, d: np.ndarray, tol: float, chain: list[sparse.csr_array]):
    """x and the products it took; K is the product of the matrices, the first applied first."""
    calls = []

    def closed(x):
        calls.append(1)
        return x - reduce(lambda y, matrix: matrix @ y, chain, x) + d @ x

    system = linalg.LinearOperator((len(d), len(d)), closed)  # pyright: ignore
    x = linalg.gmres(system, gain, rtol=tol, restart=20, maxiter=500)[0]
    return x, len(calls)


def factors(kernel: Kernel, pomdp: SparsePOMDP) -> tuple[sparse.csr_array, sparse.csr_array]:
    """K as the product of Pr(a, h | s, g) and P(s' | s, a)."""
    arrays = pomdp.observation, pomdp.emission, pomdp.successor, pomdp.probability
    obs, emission, successor, probability = map(np.asarray, arrays)
    omega, follow, mu = map(np.asarray, tables(kernel, jnp.arange(pomdp.num_obs)))
    (_, num_z, degree), (size, num_actions, num_successors) = omega.shape, successor.shape
    follow, omega = follow[obs][..., None], omega[obs][..., None]  # [S, M, G, K, 1]
    s, _, g, _, a = np.ogrid[:size, : obs.shape[1], :num_z, :degree, :num_actions]
    chosen = emission[:, :, None, None, None] * omega * mu[obs[:, :, None, None, None], follow, a]
    act = _matrix(chosen, s * num_z + g, (s * num_actions + a) * num_z + follow)
    s, a, _, g = np.ogrid[:size, :num_actions, :num_successors, :num_z]
    moved = np.repeat(probability[..., None], num_z, -1)
    move = _matrix(moved, (s * num_actions + a) * num_z + g, successor[..., None] * num_z + g)
    return act, move


def _matrix(value, row, column) -> sparse.csr_array:
    row, column = (np.broadcast_to(x, value.shape).ravel() for x in (row, column))
    return sparse.csr_array((value.ravel(), (row, column)))


def _world(size: int, case: str) -> tuple[str, SparsePOMDP]:
    return (f"random {size}", WORLDS["random"](size)) if size else (case, CASES[case].world())


def ratio(seconds: dict[str, np.ndarray], rival: str) -> Row:
    ours, theirs = seconds["gamp"], seconds[rival]
    low, middle, high = np.quantile(ours / theirs, [0.25, 0.5, 0.75])
    medians = {"ours_s": np.median(ours), "rival_s": np.median(theirs)}
    return {"rival": rival} | medians | {"ratio": middle, "q25": low, "q75": high}


# --- output


def publish(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def show(rows: Iterable[Row], without: tuple[str, ...] = ("part",)) -> None:
    shown = [{k: v for k, v in row.items() if k not in without} for row in rows]
    print(table(shown, keep=2), end="\n\n")


def main(config: Config) -> None:
    check(config)
    if unknown := [name for name in config.cases if name not in CASES]:
        raise ValueError(f"unknown case {unknown[0]!r}; choose from {', '.join(CASES)}")
    out = records.open_run(config, "gamp-scale", resumable=False)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, jax {jax.__version__}\n")
    if "solvers" in config.parts:
        with jax.enable_x64(True):
            rows = solvers(config)
        publish(out / "gamp_solvers.csv", rows)
        picture(out / "gamp_solvers.png", rows)
        show(summary(rows))
    rows = []
    if "scale" in config.parts:
        rows += scale(config)
        show(rows, without=("part", "n", "push_ms", "pull_ms"))
        if len(config.sizes) > 1 and 1 in config.devices:
            show(slopes(rows))
    if "compare" in config.parts:
        with jax.enable_x64(True):
            for part in (compare_direct, compare_scipy):
                if found := list(part(config)):
                    show(found)
                rows += found
    if rows:
        publish(out / "gamp_scale.csv", rows)
    print(f"written to {out}")


if __name__ == "__main__":
    cli.once(Config, main)
