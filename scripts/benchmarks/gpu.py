"""What a GPU does: training by the number of environments, scans, exact gradients, in 8 minutes.

    python scripts/benchmarks/gpu.py
    python scripts/benchmarks/gpu.py --parts scans gamp --minutes 3

It needs JAX, equinox, optax, gymnax, brax (for `ant` alone), lineax, tyro, tqdm and six. Each part
has a process of its own and a share of the time; what it does not use goes to the parts after it.
A row stands in the part's csv file as soon as it is measured; what fails, as for lack of memory, or
finds no time is a row that says so. `gpu.md` has all tables. In every row, `compile_s` is apart
from the times of running, which are medians, and `peak_mb` is the most memory that the device had
given to the part until then.
"""

import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[2]))

import jax
import jax.random as jr
import numpy as np
import ppo

from scripts.benchmarks import gamp_scale, many_envs, scans, timing
from spg.exact.gamp import gamp_gradient
from spg.limits import Count, NonNegative, Positive, Size, check
from spg.rollout import evaluation
from spg.training import cli, loop, options, records

Row = dict[str, Any]
Case = tuple[Row, Callable[[], list[Row]]]  # what is measured, and rows of what came out
Part = Literal["cartpole", "scans", "gamp", "recall10", "ant"]


@dataclass(frozen=True)
class Config:
    parts: tuple[Part, ...] = ("cartpole", "scans", "gamp", "recall10", "ant")
    """what to measure, in this order: trainings, recurrences, exact gradients"""
    minutes: Positive = 8.0
    """of wall clock for all"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""
    repeats: Count = 5
    """of each timing, at least"""
    num_envs: tuple[Count, ...] = (64, 4096, 16384, 1024)
    """environments side by side, in this order; recall10 and ant take the first of thousands"""
    methods: tuple[Literal["s2pg", "bptt", "none"], ...] = ("s2pg", "none", "bptt")
    """the memories of the trainings"""
    learn_seconds: NonNegative = 10.0
    """for which a training goes on, unless it has learned before"""
    episodes: Count = 64
    """fresh ones, which tell whether a training has learned; not on its clock"""
    lengths: tuple[Count, ...] = (128, 1024, 8192)
    """T, steps of a recurrence"""
    numbers: Count = 1 << 24
    """in x of a recurrence, or as many as come near: the batch follows"""
    width: Size = 64
    """numbers in x at a step"""
    states: tuple[Count, ...] = (125_000, 1_250_000)
    """of the random worlds of `gamp`; a joint state is one of these with one of 8 I-states"""


# --- training


class Program(NamedTuple):
    """A training, compiled."""

    config: Any
    start: Callable[..., Any]
    step: Callable[..., Any]
    seconds: float  # of compiling


def trainings(config: Config, task: str) -> Iterator[Case]:
    """Steps a second, and the time to learn: rows by the number of environments and the memory.

    All are compiled before the first runs, side by side: `compile_s` is of busy cores.
    """
    thousands = [n for n in config.num_envs if n >= 1000] or [*config.num_envs]
    sizes = config.num_envs if task == "cartpole" else thousands[:1]
    cases = [{"task": task, "num_envs": n, "method": m} for n in sizes for m in config.methods]

    @cache
    def programs() -> list[Future[Program]]:
        with ThreadPoolExecutor() as pool:
            return [pool.submit(build, **case) for case in cases]

    for i, case in enumerate(cases):
        yield case, lambda i=i: train(config, task, programs()[i].result())


def build(task: str, num_envs: int, method: str) -> Program:
    config = many_envs.setting(task, num_envs, memory=method, num_seeds=1)
    algorithm = ppo.make(config)
    began = time.perf_counter()
    # starting runs once, and is compiled as the scripts do
    start = jax.jit(algorithm.init, compiler_options=loop.ONCE)
    start = start.lower(algorithm.floats, jr.key(0)).compile()
    like = jax.eval_shape(algorithm.init, algorithm.floats, jr.key(0))
    step = jax.jit(algorithm.step, donate_argnums=1).lower(algorithm.floats, like).compile()
    return Program(config, start, step, time.perf_counter() - began)


def train(config: Config, task: str, program: Program) -> list[Row]:
    """One training, update by update, until it has learned or `learn_seconds` are over."""
    shape, start, step, compiling = program
    goal = many_envs.GOALS.get(task, np.inf)
    algorithm, env = ppo.make(shape), options.make_env(shape)
    judge = jax.jit(partial(evaluation, env=env, num_episodes=config.episodes))
    state = start(algorithm.floats, jr.key(0))

    rollout = shape.num_envs * shape.num_steps
    seconds, asked, learned, score = [], 0.0, np.nan, np.nan
    while len(seconds) < algorithm.num_updates and np.isnan(learned):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(algorithm.floats, state))
        seconds.append(time.perf_counter() - began)
        spent = sum(seconds)
        over = spent >= config.learn_seconds or len(seconds) == algorithm.num_updates
        if over or spent - asked >= config.learn_seconds / 20:
            asked = spent
            score = float(judge(kernel=state.learned.kernel, key=jr.key(1)).sampled)
            learned = spent if score >= goal else np.nan
        if over and len(seconds) > config.repeats:
            break
    per_second = rollout / np.array(seconds[1:] or seconds)  # the first warms up
    return [
        {"num_steps": shape.num_steps, "minibatches": shape.num_minibatches}
        | timing.spread("steps_per_s", per_second)
        | {
            "learned_s": learned, "steps": rollout * len(seconds), "return": score,
            "compile_s": compiling, "program_mb": many_envs.megabytes(step),
        }
    ]  # fmt: skip


# --- scans


def recurrences(config: Config) -> Iterator[Case]:
    """Every form of a recurrence, forward and with its backward pass, against copying an array."""
    copy = None
    for num_steps in config.lengths:
        batch = max(1, config.numbers // (num_steps * config.width))
        size = scans.Size("float32", num_steps, config.width, batch)

        def measure(size=size):
            nonlocal copy
            copy = copy or scans.bandwidth()
            own = scans.Config(repeats=config.repeats)
            rows = scans.measured(own, size, copy)
            return [forms(group, copy) for group in scans.groups(rows)]

        yield size._asdict(), measure


def forms(group: dict[str, Row], copy: float) -> Row:
    """One row of those of a size and pass: microseconds of each form, and what `auto` comes to."""
    auto = group["auto"]
    return (
        {"pass": auto["pass"]}
        | {f"{name}_us": row["microseconds"] for name, row in group.items()}
        | {"auto_to_best": auto["ratio"], "auto_of_copy": auto["of_copy"], "copy_gb_s": copy / 1e9}
        | {"compile_s": sum(row["compile_s"] for row in group.values())}
    )


# --- exact gradients


def gradients(config: Config) -> Iterator[Case]:
    for size, world in itertools.product(config.states, gamp_scale.WORLDS):
        case = {"world": world, "states": size, "joint_states": size * gamp_scale.Config.num_z}
        yield case, partial(gradient, config, world, size)


def gradient(config: Config, world: str, size: int) -> list[Row]:
    """GAMP in single precision, with 8 I-states."""
    pomdp = gamp_scale.WORLDS[world](size)
    kernel = gamp_scale.controller(pomdp, gamp_scale.Config.num_z)
    program, compiling = gamp_scale.timed(gamp_scale.compiled, gamp_gradient, kernel, pomdp)
    runs = [gamp_scale.timed(program, kernel, pomdp) for _ in range(config.repeats + 1)]
    solution = runs[0][0][1]
    products = int(solution.products.sum())
    spent = timing.spread("gradient_s", np.array([seconds for _, seconds in runs[1:]]))
    return [
        spent
        | {"products": products, "ms_per_product": 1e3 * spent["gradient_s"] / products}
        | {"converged": str(solution.converged), "compile_s": compiling}
        | {"program_mb": many_envs.megabytes(program.compiled)}
    ]


PARTS: dict[str, tuple[float, Callable[[Config], Iterator[Case]]]] = {  # share of the time
    "cartpole": (3.2, partial(trainings, task="cartpole")),
    "scans": (1.3, recurrences),
    "gamp": (1.5, gradients),
    "recall10": (1.0, partial(trainings, task="recall10")),
    "ant": (1.0, partial(trainings, task="ant")),
}


# --- processes and the clock


def work(config: Config, part: str, deadline: float, send: Callable[[list[Row]], Any]) -> None:
    """Measure the cases of a part in turn, while there is time for one as long as the last."""
    device, last = jax.local_devices()[0], 0.0
    for case, measure in PARTS[part][1](config):
        began = time.time()
        if began + last > deadline:
            send([case | {"note": "skipped: no time"}])
            continue
        try:
            rows = [case | row for row in measure()]
        except Exception as error:
            words = f"{type(error).__name__}: {error}".splitlines()
            rows = [case | {"note": words[0][:200]}]
        last = time.time() - began
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", np.nan) / 1e6
        send([row | {"peak_mb": peak, "device": device.device_kind} for row in rows])


def _child(config: Config, part: str, deadline: float, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells
    work(config, part, deadline, connection.send)


def supervise(
    config: Config, part: str, deadline: float, end: float, take: Callable[[list[Row]], Any]
) -> None:
    """`work` in a process of its own, and a row for what is missing.

    It begins nothing after `deadline`, and what it is at then has half of the time to `end`.
    """
    last = (deadline + end) / 2
    ours, theirs = get_context("spawn").Pipe(duplex=False)
    arguments = config, part, deadline, theirs
    process = get_context("spawn").Process(target=_child, args=arguments, daemon=True)
    process.start()
    theirs.close()
    count, note = 0, "skipped: the time was up"
    try:
        while ours.poll(max(0.0, last - time.time())):
            take(ours.recv())
            count += 1
    except EOFError:
        process.join()
        note = f"the process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    for case, _ in itertools.islice(PARTS[part][1](config), count, None):
        take([case | {"note": note}])


def main(config: Config) -> dict[str, list[Row]]:
    check(config)
    out = records.open_run(config, "gpu-benchmark", resumable=False)
    end = time.time() + 60 * config.minutes
    found: dict[str, list[Row]] = {}
    for i, part in enumerate(config.parts):
        ahead = [PARTS[p][0] for p in config.parts[i:]]
        rows: list[Row] = found.setdefault(part, [])

        def take(new: list[Row], part=part, rows=rows) -> None:
            rows.extend(new)
            gamp_scale.publish(out / f"{part}.csv", rows)
            for row in new:
                print(f"{part}: {', '.join(f'{k} {shown(v)}' for k, v in row.items())}", flush=True)

        share = (end - time.time()) * ahead[0] / sum(ahead)
        supervise(config, part, time.time() + share, end, take)
        text = "\n\n".join(markdown(rows) for rows in found.values())
        (out / "gpu.md").write_text(text + "\n")
    print(f"\n{text}\n\ntables: {out}")
    return found


def markdown(rows: list[Row]) -> str:
    """A table for a page."""
    columns = [k for k in dict.fromkeys(k for row in rows for k in row) if "_q" not in k]
    lines = [columns, ["---"] * len(columns)]
    lines += [[shown(row.get(k, "")) for k in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    cli.once(Config, main)
