"""How many steps a second POPGym's tasks take, here and in the original package.

    python scripts/benchmarks/popgym_speed.py            # all tasks, Easy
    python scripts/benchmarks/popgym_speed.py --tasks CountRecall --sizes Easy Hard

Needs `pip install 'popgym[navigation]'`. Actions are random, and new episodes open where others
end. The original runs one environment in one process, with actions that were drawn before; ours
runs `num_envs` side by side in one program, which draws the actions and makes the flat observations
too. All are timed in turn, in random order, and a ratio is the median of the ratios within repeats.
"""

import importlib
import itertools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Float

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.benchmarks import timing
from spg.envs.popgym import TASKS
from spg.limits import Count, check
from spg.training import cli, records, tables

NAMES = tuple(name.removeprefix("popgym/").removesuffix("Easy") for name in TASKS if "Easy" in name)


@dataclass(frozen=True)
class Config:
    out: str | None = None
    """directory of the results; by default a new one under runs/"""
    tasks: tuple[str, ...] = NAMES
    """by their names without the size"""
    sizes: tuple[Literal["Easy", "Medium", "Hard"], ...] = ("Easy",)
    """of the tasks"""
    num_envs: tuple[Count, ...] = (1, 64, 1024)
    """environments side by side"""
    num_steps: Count = 1024
    """of each environment in a timing"""
    original_steps: Count = 2048
    """of the original in a timing"""
    repeats: Count = 10
    """of each timing"""


def ours(name: str, num_envs: int, num_steps: int) -> Callable[[], Any]:
    """A call that runs a compiled program, which goes on where the last call stopped."""
    env = TASKS[f"popgym/{name}"]()
    params = env.default_params

    def step(state, key):
        action_key, key = jr.split(key)
        action = env.action_space(params).sample(action_key)
        obs, state, reward, terminated, truncated, _ = env.step(key, state, action, params)
        return state, obs.sum() + reward + terminated + truncated  # so that all is computed

    def walk(state, key):
        state, sums = lax.scan(step, state, jr.split(key, num_steps))
        return state, sums.sum()

    @jax.jit
    def run(states, key):
        key, next_key = jr.split(key)
        states, sums = jax.vmap(walk)(states, jr.split(key, num_envs))
        return states, next_key, sums

    start_key, key = jr.split(jr.key(0))
    reset = jax.jit(jax.vmap(lambda key: env.reset(key, params)[1]))
    held = [reset(jr.split(start_key, num_envs)), key]

    def call():
        *held[:], sums = run(*held)
        return sums

    return call


def theirs(name: str, num_steps: int) -> Callable[[], None]:
    with warnings.catch_warnings():  # that mazes need no memory
        warnings.simplefilter("ignore")
        env = getattr(importlib.import_module("popgym.envs"), name)()
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(num_steps)]
    env.reset(seed=0)

    def call() -> None:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    return call


def measure(config: Config, name: str) -> list[dict[str, Any]]:
    """Steps a second of each, a row for each number of environments."""
    calls = [theirs(name, config.original_steps)]
    calls += [ours(name, num_envs, config.num_steps) for num_envs in config.num_envs]
    steps = [config.original_steps, *(n * config.num_steps for n in config.num_envs)]
    return rates(config, name, timing.interleave(calls, repeats=config.repeats), steps)


def rates(
    config: Config, name: str, seconds: Float[np.ndarray, "calls repeats"], steps: list[int]
) -> list[dict[str, Any]]:
    """The original's row comes first, with 0 environments of ours; ratios are to it."""
    per_second = np.array(steps)[:, None] / seconds
    return [
        {"task": name, "num_envs": num_envs}
        | timing.spread("steps_per_second", rate)
        | timing.spread("to_original", rate / per_second[0])
        for num_envs, rate in zip([0, *config.num_envs], per_second, strict=True)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for task, group in itertools.groupby(rows, key=lambda row: row["task"]):
        original, *others = group
        line = {"task": task, "original": f"{original['steps_per_second']:,.0f}"}
        for row in others:
            rate, ratio = row["steps_per_second"], row["to_original"]
            line[f"{row['num_envs']} of ours"] = f"{rate:,.0f} ({ratio:.2g}×)"
        lines.append(line)
    return f"{tables.table(lines)}\nsteps/s, and how many times the original's; {timing.machine()}"


def main(config: Config) -> list[dict[str, Any]]:
    check(config)
    names = [f"{task}{size}" for task in config.tasks for size in config.sizes]
    for name in names:
        if f"popgym/{name}" not in TASKS:
            raise ValueError(f"unknown task {name!r}; choose from {', '.join(NAMES)}")
    try:
        importlib.import_module("popgym.core.maze")
    except ImportError as error:
        raise ValueError(f"pip install 'popgym[navigation]' for the original: {error}") from error
    out = records.open_run(config, "popgym-speed", resumable=False)
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += measure(config, name)
        timing.write(Path(out) / "popgym_speed.csv", rows)
    print(table(rows))
    print(f"table: {out}")
    return rows


if __name__ == "__main__":
    here = Path(__file__).resolve().parent  # its popgym.py would hide the original
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    cli.once(Config, main)
