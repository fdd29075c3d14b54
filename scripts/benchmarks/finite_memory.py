"""What a finite memory loses in a maze of rooms that look alike, against what the belief earns.

    python scripts/benchmarks/finite_memory.py

Every method is judged by one number, the discounted return J from outside the maze: 1/(1-γ) times
the average reward where one is led out with probability 1 - γ a step (`spg.worlds.interrupted`).
Methods train in that world. Controllers and the graph of point-based value iteration are evaluated
exactly, other policies by episodes of --eval-steps steps, with a standard error. With --resume,
what is in the table in --out is not run again.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[2]))

import gamp
import gpomdp
import ppo

from scripts.benchmarks import timing
from spg.exact.kstep import sighted_return
from spg.exact.pbvi import graph_kernel, point_based_bounds
from spg.kernels.finite import finite_kernel
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.limits import Count, NonNegative, Range, Seed, Total, check
from spg.rollout import episode_returns
from spg.training import cli, records, tables
from spg.training.loop import State
from spg.types import Env
from spg.worlds import interrupted, rooms
from spg.worlds.models import Problem, dense

EPISODES, LIMIT = 64, 200  # in an evaluation; steps of an episode of PPO
POLICIES: dict[str, dict[str, Any]] = {
    "last action": {"memory": "none"},  # which all of these see beside the observation
    "S2PG": {"cell": "linear", "z_size": 32, "noise_fall": 1.0, "kl_coef": 0.0},
    "belief": {"memory": "filter"},
}
COLUMNS = "method", "num_z", "seed"


@dataclass(frozen=True)
class Config:
    """The maze, and what is spent on each method."""

    width: Count = 5
    """rooms in a row"""
    height: Count = 3
    """rows"""
    slip: float = 0.1
    """probability that a move leads nowhere"""
    cost: NonNegative = 0.2
    """of digging in the wrong room"""
    sizes: tuple[Count, ...] = (1, 2, 3, 4, 6, 8)
    """numbers of I-states"""
    num_seeds: Count = 40
    """of controllers with exact gradients, each with a start of its own"""
    sampled_seeds: Count = 3
    """of methods that sample"""
    seed: Seed = 0
    """of the first training; the others take the next integers"""
    num_updates: Count = 200
    """exact gradients of a controller"""
    controller_steps: Total = 2_000_000
    """of IState-GPOMDP"""
    policy_steps: Total = 1_000_000
    """of PPO"""
    eval_steps: Count = 2_000
    """of each of 64 episodes that a policy of PPO is judged by"""
    num_beliefs: Count = 256
    """of point-based value iteration"""
    out: str | None = None
    """directory of table and picture; by default a new one under runs/"""
    resume: bool = False
    """go on with the table in --out"""


def controllers(config: Config, world: Problem, num_z: int, key: jax.Array) -> Kernel:
    """One with logits N(0, 1), in tables as large as those of the largest: one program for all.

    Any I-state may follow any, some of them by several entries; those beyond `num_z` never do.
    """
    most, pomdp = max(config.sizes), world.pomdp
    successors = jnp.broadcast_to(jnp.arange(most) % num_z, (most, pomdp.num_obs, most))
    cell_key, head_key = jr.split(key)
    head = jr.normal(head_key, (most, pomdp.num_obs, pomdp.num_actions))
    return finite_kernel(jr.normal(cell_key, successors.shape), head, successors)


def exact(config: Config, world: Problem) -> Callable[[Kernel, jax.Array], Kernel]:
    """GAMP with CONJPOMDP."""
    most = max(config.sizes)
    told = gamp.Config(num_z=most, out_degree=most, num_updates=config.num_updates)
    update = lambda state, _: (gamp.step(told, world, state)[0], None)

    def train(kernel: Kernel, key: jax.Array) -> Kernel:
        ascent = gamp.begin(told, eqx.filter(kernel, trainable(kernel)))
        state = gamp.init(told, world, key)._replace(learned=gamp.Learned(kernel, ascent))
        return lax.scan(update, state, length=config.num_updates)[0].learned.kernel

    return train


def sampled(config: Config, world: Problem) -> Callable[[Kernel, jax.Array], Kernel]:
    """IState-GPOMDP with a baseline of the hidden state."""
    from spg.envs import Tabular  # here: importing gymnax starts JAX's backend

    most = max(config.sizes)
    told = gpomdp.Config(
        estimator="istate", num_z=most, out_degree=most, total_steps=config.controller_steps,
        num_envs=50, num_steps=100, beta=world.discount, learning_rate=0.05,
    )  # fmt: skip
    tabular = Tabular(world.pomdp, privileged=True)
    env = Env(tabular, tabular.default_params)
    update = lambda state, _: (gpomdp.step(told, world, env, state)[0], None)

    def train(kernel: Kernel, key: jax.Array) -> Kernel:
        state = gpomdp.init(told, world, env, key)
        state = state._replace(learned=state.learned._replace(kernel=kernel))
        return lax.scan(update, state, length=told.num_updates)[0].learned.kernel

    return train


def of_controllers(
    config: Config, world: Problem, method: str, make: Callable[..., Any], num_seeds: int
) -> Callable[[int], list[dict[str, Any]]]:
    """Rows for a number of I-states; both values are exact."""
    train = make(config, world)

    @jax.jit
    def run(kernels, keys):
        def one(args):
            kernel = train(*args)
            state = State(gamp.Learned(kernel, ()), (), args[1])
            return gamp.evaluate(world, state, args[1])

        return lax.map(one, (kernels, keys))

    def rows(num_z: int) -> list[dict[str, Any]]:
        keys = jax.vmap(jr.key)(config.seed + jnp.arange(num_seeds))
        start = jax.vmap(partial(controllers, config, world, num_z))(keys)
        found = [np.asarray(x) / (1 - world.discount) for x in run(start, keys)]
        return [
            {"method": method, "num_z": num_z, "seed": config.seed + i, "value": float(x),
             "noise_free": float(y)}
            for i, (x, y) in enumerate(zip(*found, strict=True))
        ]  # fmt: skip

    return rows


def of_policy(config: Config, world: Problem, method: str) -> list[dict[str, Any]]:
    """PPO in episodes, judged by long ones; `error` is the standard error over these."""
    from spg import envs  # here: importing gymnax starts JAX's backend

    told = ppo.Config(total_steps=config.policy_steps, entropy_coef=0.01, **POLICIES[method])
    opened = lambda limit: envs.make(
        envs.Tabular(world.pomdp, max_steps_in_episode=limit), previous_action=True
    )
    env, long = opened(LIMIT), opened(config.eval_steps)
    update = lambda state, _: (ppo.step(told, env, state)[0], None)

    def one(key):
        state = lax.scan(update, ppo.init(told, env, key), length=told.num_updates)[0]
        return episode_returns(state.learned.kernel, long, num_episodes=EPISODES, key=key)

    keys = jax.vmap(jr.key)(config.seed + jnp.arange(config.sampled_seeds))
    found = jax.jit(lambda keys: lax.map(one, keys))(keys)
    found = [np.asarray(x) / (config.eval_steps * (1 - world.discount)) for x in found]
    return [
        {"method": method, "num_z": "", "seed": config.seed + i, "value": float(x.mean()),
         "noise_free": float(y.mean()), "error": float(x.std() / np.sqrt(EPISODES - 1))}
        for i, (x, y) in enumerate(zip(*found, strict=True))
    ]  # fmt: skip


def bounds(config: Config, maze: Problem, world: Problem) -> list[dict[str, Any]]:
    """Of the best policy, and the value of the graph in the world that the others live in."""
    solved = point_based_bounds(
        maze.pomdp, gamma=maze.discount, num_beliefs=config.num_beliefs, key=jr.key(config.seed)
    )
    kernel = graph_kernel(dense(maze.pomdp), solved.graph)
    value = jax.jit(gamp.average_reward)(kernel, world.pomdp) / (1 - maze.discount)
    num_z = len(kernel.cell.distribution.logits)  # type: ignore
    sight = sighted_return(maze.pomdp, gamma=maze.discount)
    rows = ("PBVI, lower", num_z, solved.lower), ("PBVI, its graph", num_z, value)
    rows = *rows, ("PBVI, upper", "", solved.upper), ("full sight", "", sight)
    return [
        {"method": name, "num_z": n, "seed": config.seed, "value": float(x), "noise_free": ""}
        for name, n, x in rows
    ]


def jobs(config: Config) -> Iterator[tuple[str, Any, bool, Callable[[], list[dict[str, Any]]]]]:
    """(method, I-states, in double precision, what measures it)."""
    maze = lambda: rooms(config.width, config.height, slip=config.slip, cost=config.cost)

    def world():
        plain = maze()
        return plain._replace(pomdp=interrupted(plain.pomdp, plain.discount))

    yield "PBVI, lower", None, True, lambda: bounds(config, maze(), world())
    for method, make, num_seeds, precise in (
        ("GAMP", exact, config.num_seeds, True),
        ("IState-GPOMDP", sampled, config.sampled_seeds, False),
    ):
        rows: list[Any] = []  # one program for all sizes

        def measure(n, rows=rows, method=method, make=make, num_seeds=num_seeds):
            rows += [] if rows else [of_controllers(config, world(), method, make, num_seeds)]
            return rows[0](n)

        for num_z in config.sizes:
            yield method, num_z, precise, partial(measure, num_z)
    for method in POLICIES:
        yield method, None, False, lambda method=method: of_policy(config, world(), method)


def picture(config: Config, rows: list[dict[str, Any]], path: Path) -> None:
    """J against |G|: each training a point, the best of each size a line; the rest as levels."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    of = lambda method: [row for row in rows if row["method"] == method]
    for i, method in enumerate(("GAMP", "IState-GPOMDP")):
        some = [row for row in of(method) if np.isfinite(row["value"])]
        axes.plot([row["num_z"] for row in some], [row["value"] for row in some], f"C{i}.", ms=4)
        sizes = sorted({row["num_z"] for row in some})
        at = [[row["value"] for row in some if row["num_z"] == n] for n in sizes]
        seeds = max(map(len, at), default=0)
        axes.plot(sizes, list(map(max, at)), f"C{i}", label=f"{method}, best of {seeds} seeds")
        axes.plot(sizes, list(map(np.median, at)), f"C{i}--", label=f"{method}, median")
    for i, method in enumerate(POLICIES):
        if some := [row["value"] for row in of(method)]:
            axes.axhspan(min(some), max(some), color=f"C{i + 2}", alpha=0.25)
            axes.axhline(float(np.mean(some)), color=f"C{i + 2}", label=f"PPO, {method}")
    if of("PBVI, lower"):
        lower, upper = of("PBVI, lower")[0], of("PBVI, upper")[0]
        axes.axhspan(lower["value"], upper["value"], color="k", alpha=0.3)
        label = f"the best policy, between PBVI's bounds ({lower['num_z']} nodes)"
        axes.axhline(lower["value"], color="k", linestyle=":", label=label)
    axes.set(
        xlabel="|G|, I-states", ylabel="discounted return from outside", xscale="log",
        title=f"{config.width} x {config.height} rooms, slip {config.slip:g}",
    )  # fmt: skip
    axes.set_xticks(config.sizes, [str(n) for n in config.sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main(config: Config) -> list[dict[str, Any]]:
    check(config)
    Range(0, 1, open="high").check("slip", config.slip)
    out = records.open_run(config, "finite-memory")
    table, rows = out / "finite_memory.csv", []
    if table.exists():
        rows = timing.merge(table, [], columns=COLUMNS)
    for method, num_z, precise, measure in jobs(config):
        if any(row["method"] == method and num_z in (None, row["num_z"]) for row in rows):
            continue
        began = time.perf_counter(), time.process_time()
        with jax.enable_x64(precise):
            new = measure()
        spent = time.perf_counter() - began[0], time.process_time() - began[1]
        took = {"error": 0.0, "seconds": round(spent[0], 1), "cpu_seconds": round(spent[1], 1)}
        new = [{**row, **{k: row.get(k, x) for k, x in took.items()}} for row in new]
        rows = timing.merge(table, new, columns=COLUMNS)
        print(f"{method} {num_z or ''}: {[round(row['value'], 4) for row in new]}", file=sys.stderr)
    picture(config, rows, out / "finite_memory.png")
    print(tables.table([{k: row[k] for k in (*COLUMNS, "value", "noise_free")} for row in rows]))
    return rows


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cli.once(Config, main)
