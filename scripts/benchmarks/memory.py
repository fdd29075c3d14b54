"""What memory costs: environment step, rollout and PPO update of each memory, in one process.

    python scripts/benchmarks/memory.py          # GRU and linear cell
    python scripts/benchmarks/memory.py --cells gru --z-size 16 64 128

Everything is compiled first; then every repeat times each program once, and a ratio is the median,
with quartiles, of the ratios within the repeats: noise that lasts longer than one repeat cancels.
"""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Float, PRNGKeyArray
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[2]))

import ppo

from scripts.benchmarks import timing
from scripts.benchmarks.timing import spread, with_quartiles
from spg.kernels.linear import Linear
from spg.kernels.networks import trainable
from spg.limits import Count, Seed, Size, check
from spg.rollout import rollout
from spg.training import cli, on_policy, options, records, tables
from spg.types import Env


@dataclass(frozen=True)
class Config(options.EnvConfig):
    """The measurement, e.g. --cells gru --z-size 64 --repeats 50 --clock cpu"""

    seed: Seed = 0
    """of the random numbers"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""
    repeats: Count = 20
    """of each timing"""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu counts the seconds of all threads: steadier where others use the machine"""
    cells: tuple[Literal["gru", "linear", "hybrid"], ...] = ("gru", "linear")
    """of S2PG and BPTT"""
    windows: tuple[Size, ...] = (5, 32)
    """observations in the windows"""
    lengths: tuple[Count, ...] = (5, 32)
    """segment lengths of BPTT, besides the whole rollout"""
    z_size: tuple[Size, ...] = (16,)
    """of the internal state: every cell with each"""
    hidden: tuple[Size, ...] = (64,)
    """widths of the hidden layers of policy head and critic"""
    num_envs: Count = 64
    """environments side by side"""
    num_steps: Count = 160
    """T, steps of each environment between updates"""
    num_epochs: Count = 4
    """passes over the data of an update"""
    num_minibatches: Count = 32
    """gradients of a pass"""


class Method(NamedTuple):
    name: str
    cell: str  # for a memoryless policy, the cell whose S2PG it is to be compared with
    z_size: int  # likewise
    config: ppo.Config
    associative: bool = False


class Timings(NamedTuple):
    """Seconds of each repeat, and of compiling the training update."""

    compile: float
    rollout: Float[np.ndarray, " repeats"]
    training: Float[np.ndarray, " repeats"]


def methods(config: Config) -> list[Method]:
    """What is compared. `none-wide` and `none-deep` have no memory and do as many multiply-adds
    as S2PG, in one hidden layer or in one more than S2PG's head, as its cell is one more."""
    make = partial(
        ppo.Config,
        **{k: v for k, v in vars(config).items() if k in options.EnvConfig.__dataclass_fields__},
        total_steps=1000 * config.num_envs * config.num_steps,
        num_envs=config.num_envs, num_steps=config.num_steps, num_epochs=config.num_epochs,
        num_minibatches=config.num_minibatches,
    )  # fmt: skip
    small = partial(make, hidden=config.hidden)
    first = config.cells[0], config.z_size[0]
    found = [Method("none", *first, small(memory="none"))]
    found += [
        Method(f"window-{n}", *first, small(memory="window", window=n)) for n in config.windows
    ]
    for of in itertools.product(config.cells, config.z_size):
        cell, z_size = of
        s2pg = small(memory="s2pg", cell=cell, z_size=z_size)
        count = multiply_adds(s2pg)
        wide = lambda n: make(memory="none", hidden=(n,))
        deep = lambda n: make(memory="none", hidden=(n, *config.hidden))
        found += [Method("none-wide", *of, match(wide, count))]
        found += [Method("none-deep", *of, match(deep, count))]
        found += [Method("S2PG", *of, s2pg)]
        found += [Method("S2PG score", *of, replace(s2pg, memory_gradient="score"))]
        for length in (*config.lengths, 0):
            bptt = replace(s2pg, memory="bptt", segment_length=length)
            name = f"BPTT-{length or 'T'}"
            found += [Method(name, *of, bptt)]
            if cell == "linear":
                found += [Method(f"{name} associative", *of, bptt, associative=True)]
    return found


def multiply_adds(config: ppo.Config) -> int:
    """Of one step forward through policy and critic: the entries of their matrices."""
    algorithm = ppo.make(config)
    kernel, critic, _ = jax.eval_shape(algorithm.init, algorithm.floats, jr.key(0)).learned
    parts = jax.tree.leaves((kernel, critic))
    return sum(x.size for x in parts if x.ndim == 2)


def match(make: Callable[[int], ppo.Config], count: int) -> ppo.Config:
    """`make(width)` with the width, to which multiply-adds are linear, that comes nearest."""
    one, two = multiply_adds(make(1)), multiply_adds(make(2))
    return make(max(1, round(1 + (count - one) / (two - one))))


def init(method: Method, env: Env, key: PRNGKeyArray) -> ppo.State:
    state = ppo.init(method.config, env, key)
    if not method.associative:
        return state
    cell = Linear(state.world.obs.shape[-1], method.config.z_size, method="associative", key=key)
    kernel = eqx.tree_at(lambda kernel: kernel.cell.location, state.learned.kernel, cell)
    agent = ppo.Agent(kernel, state.learned.critic)
    opt_state = on_policy.optimiser(method.config).init(eqx.filter(agent, trainable(agent)))
    return state._replace(learned=ppo.Learned(*agent, opt_state))


def act(config: ppo.Config, env: Env, state: ppo.State) -> Any:
    """The rollout of one update."""
    run = partial(rollout, state.learned.kernel, env, num_steps=config.num_steps)
    keys = jr.split(state.key, config.num_envs)
    return jax.vmap(lambda c, k: run(c, key=k))(state.world, keys)


def act_randomly(config: ppo.Config, env: Env, state: ppo.State) -> Any:
    """As many steps of the environments alone, with random actions."""

    environment: Any = env.environment
    space = environment.action_space(env.params)

    def step(env_state, key):
        action_key, env_key = jr.split(key)
        action = space.sample(action_key)
        obs, env_state, *rest = env.step(env_key, env_state, action)
        return env_state, (obs, *rest)

    keys = jr.split(state.key, (config.num_envs, config.num_steps))
    return jax.vmap(partial(lax.scan, step))(state.world.env_state, keys)


def measure(config: Config, compared: list[Method]) -> tuple[np.ndarray, list[Timings]]:
    """Seconds of the environment steps alone, and of each method, repeat by repeat."""
    key = jr.key(config.seed)
    env = options.make_env(config)
    programs, arguments, compile_seconds = [], [], []
    rollouts: dict[tuple, int] = {}  # BPTT of any length acts alike: timed once

    def add(function, state):
        began = time.perf_counter()
        programs.append(jax.jit(function).lower(state).compile())
        arguments.append(state)
        compile_seconds.append(time.perf_counter() - began)
        return len(programs) - 1

    places = []
    for method in tqdm(compared, desc="compile"):
        state = jax.jit(partial(init, method, env))(key)
        if not programs:
            add(partial(act_randomly, method.config, env), state)
        c = method.config
        actor = (c.memory, method.cell, method.z_size, c.window, c.hidden)
        if actor not in rollouts:
            rollouts[actor] = add(partial(act, method.config, env), state)
        places.append((rollouts[actor], add(partial(ppo.step, method.config, env), state)))

    clock = time.perf_counter if config.clock == "wall" else time.process_time
    calls = [partial(*pair) for pair in zip(programs, arguments, strict=True)]
    seconds = timing.interleave(calls, repeats=config.repeats, seed=config.seed, clock=clock)
    timings = [Timings(compile_seconds[t], seconds[r], seconds[t]) for r, t in places]
    return seconds[0], timings


def tabulate(
    config: Config, compared: list[Method], env_seconds: np.ndarray, timings: list[Timings]
) -> list[dict[str, Any]]:
    """A row for each method; ratios are of its seconds to another method's."""
    steps = config.num_envs * config.num_steps
    times = {m[:3]: t for m, t in zip(compared, timings, strict=True)}
    none = timings[0]
    rows = []
    for method, t in zip(compared, timings, strict=True):
        deep, s2pg = (times[name, *method[1:3]] for name in ("none-deep", "S2PG"))
        row = {
            "method": method.name,
            "cell": method.cell,
            "z_size": method.z_size,
            "multiply_adds": multiply_adds(method.config),
            "compile_seconds": t.compile,
            "env_steps_per_second": steps / np.median(env_seconds),
            "rollout_steps_per_second": steps / np.median(t.rollout),
            "training_steps_per_second": steps / np.median(t.training),
        }
        row |= spread("training_seconds", t.training)
        row |= spread("rollout_seconds", t.rollout)
        row |= spread("update_seconds", t.training - t.rollout)
        row |= spread("training_to_none", t.training / none.training)
        row |= spread("training_to_deep", t.training / deep.training)
        row |= spread("training_to_s2pg", t.training / s2pg.training)
        update = (t.training - t.rollout) / (deep.training - deep.rollout)
        rows.append(row | spread("update_to_deep", update))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal: times in ms, ratios with their quartiles."""
    shown = [
        {
            "method": row["method"],
            "cell": f"{row['cell']} {row['z_size']}",
            "multiply_adds": row["multiply_adds"],
            "compile_s": row["compile_seconds"],
            "rollout_ms": 1e3 * row["rollout_seconds"],
            "update_ms": 1e3 * row["update_seconds"],
            "steps/s": int(row["training_steps_per_second"]),
            "to none": with_quartiles(row, "training_to_none"),
            "to none-deep": with_quartiles(row, "training_to_deep"),
            "to S2PG": with_quartiles(row, "training_to_s2pg"),
            "update to none-deep": with_quartiles(row, "update_to_deep"),
        }
        for row in rows
    ]
    env_steps = rows[0]["env_steps_per_second"]
    alone = f"environment alone: {env_steps:,.0f} steps/s; {timing.machine()}"
    return f"{tables.table(shown, keep=2)}\n{alone}"


def picture(path: Path, rows: list[dict[str, Any]], *, title: str) -> None:
    """A bar for each method: its rollout, then its update, and the ratio of the sum to S2PG."""
    figure = Figure(figsize=(7.5, 1.2 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(rows))
    column = lambda name: 1e3 * np.array([row[name] for row in rows])
    total, acting = column("training_seconds"), column("rollout_seconds")
    error = np.abs([total - column("training_seconds_q25"), column("training_seconds_q75") - total])
    axes.barh(place, acting, label="rollout", color="C0")
    axes.barh(place, total - acting, left=acting, label="update", color="C1", xerr=error)
    for i, row in enumerate(rows):
        axes.text(total[i] + error[1, i], i, f"  {row['training_to_s2pg']:.2f}", va="center")
    axes.set(xlabel="ms per training update (median, quartiles; ratio to S2PG)", title=title)
    axes.set_yticks(place, [f"{row['method']} ({row['cell']} {row['z_size']})" for row in rows])
    axes.set_xlim(0, 1.1 * (total + error[1]).max())
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower right", ncols=2)
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    check(config)
    compared = methods(config)
    for method in compared:
        ppo.make(method.config)  # whatever cannot run is refused before the directory is made
    out = records.open_run(config, "memory-benchmark", resumable=False)
    rows = tabulate(config, compared, *measure(config, compared))
    timing.write(out / "memory.csv", rows)
    title = f"{config.env}, {config.num_envs} x {config.num_steps} steps, {config.clock} clock"
    picture(out / "memory.png", rows, title=title)
    print(table(rows))
    print(title)
    print(f"table and picture: {out}")
    return rows


if __name__ == "__main__":
    cli.once(Config, main)
