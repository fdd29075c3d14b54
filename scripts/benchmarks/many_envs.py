"""Training with thousands of environments: settings that keep learning sound, and their memory.

    python scripts/benchmarks/many_envs.py             # memory, of compiled programs: nothing runs
    python scripts/benchmarks/many_envs.py --train --tasks cartpole --num-envs 4096

A training is a run of its own under --out, as `ppo.py` or `sac.py` leaves it; one that is complete
is not run again, one that was cut short is resumed. `gpu.py` trains with the same settings.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[2]))

import jax
import jax.random as jr
import numpy as np

from scripts.benchmarks import curves, timing
from spg.limits import Count, Seed, check
from spg.training import cli, loop, tables
from spg.training.metrics import read_metrics

Task = Literal["cartpole", "pendulum", "recall10", "ant", "pointmass"]
SAC = ("pointmass",)
BATCH = 1 << 15  # steps of an update of PPO
PLACE = ("task", "num_envs")
GOALS = {"cartpole": 475.0, "pendulum": -250.0, "recall10": 0.95}  # returns of what has learned


@dataclass(frozen=True)
class Config:
    tasks: tuple[Task, ...] = ("cartpole", "pendulum", "recall10", "ant", "pointmass")
    """environments; that of SAC is pointmass"""
    num_envs: tuple[Count, ...] = (64, 1024, 4096, 16384)
    """environments side by side"""
    train: bool = False
    """run the trainings too"""
    num_seeds: Count = 1
    """of each training"""
    seed: Seed = 0
    """of the first training; the others take the next integers"""
    out: str = "runs/many-envs"
    """directory of the trainings and of the table"""


def algorithm_of(task: str) -> str:
    return "sac" if task in SAC else "ppo"


def setting(task: str, num_envs: int, **changes: Any) -> Any:
    """The configuration of `ppo.py`, or of `sac.py` for the point mass, with so many environments.

    From the task's own, with 64, by the rules of docs/runs.md:

        PPO  rollouts of at most BATCH steps in all, but of at least 8 in each environment; as many
             minibatches, which are larger
        SAC  rollouts of at most 256 steps in all, or 1 of each environment; as many samples a step,
             in batches up to 16 times as large; a buffer of at least 64 rollouts

    with learning rates as much larger as the minibatches, but at most three times, and at least 64
    updates.
    """
    base = curves.task(task, algorithm_of(task))[0]
    if task in SAC:
        num_steps = max(1, min(base.num_steps, 256 // num_envs))
        more = num_envs * num_steps / base.rollout_size  # samples of an update
        batch = min(16.0, more)
        changed: dict[str, Any] = {
            "batch_size": int(base.batch_size * batch),
            "updates_per_step": base.num_gradients * more / batch / num_steps,
            "buffer_size": max(base.buffer_size, 64 * num_envs * num_steps),
            "learning_starts": max(base.learning_starts, 2 * num_envs),
        }
        rates = "learning_rate", "actor_learning_rate", "state_learning_rate"
    else:
        num_steps = max(8, min(base.num_steps, BATCH // num_envs))
        batch, changed, rates = num_envs * num_steps / (64 * base.num_steps), {}, ("learning_rate",)
    changed |= {name: getattr(base, name) * min(3.0, max(1.0, batch)) for name in rates}
    total_steps = max(base.total_steps, 64 * num_envs * num_steps)
    return replace(
        base, num_envs=num_envs, num_steps=num_steps, total_steps=total_steps, **changed | changes
    )


def megabytes(compiled: Any) -> float:
    """What a compiled program needs: what it takes and returns, and for the time it runs."""
    m = compiled.memory_analysis()
    if m is None:
        return np.nan
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return (held + m.temp_size_in_bytes) / 1e6


def memory(task: str, num_envs: int) -> dict[str, Any]:
    """Kilobytes for each environment: what an update takes up, and all it needs while it runs."""
    config = setting(task, num_envs, num_seeds=1)
    algorithm = curves.SCRIPTS[algorithm_of(task)].make(config)
    start = jax.eval_shape(algorithm.init, algorithm.floats, jr.key(0))
    step = jax.jit(algorithm.step, donate_argnums=1, compiler_options=loop.ONCE)
    compiled = step.lower(algorithm.floats, start).compile()
    if task in SAC:
        gradients, rows = config.num_gradients, config.batch_size
    else:
        gradients = config.num_epochs * config.num_minibatches
        rows = num_envs * config.num_steps // config.num_minibatches
    return {
        "task": task, "num_envs": num_envs, "num_steps": config.num_steps,
        "rows": rows, "rate": config.learning_rate, "updates": algorithm.num_updates,
        "sequential": algorithm.num_updates * (config.num_steps + gradients),
        "carried_kb": size(start.world) / num_envs / 1e3,
        "update_kb": 1e3 * megabytes(compiled) / num_envs,
    }  # fmt: skip


def size(tree: Any) -> int:
    """Bytes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def main(config: Config) -> list[dict[str, Any]]:
    check(config)
    rows = []
    for task in config.tasks:
        for num_envs in config.num_envs:
            row = memory(task, num_envs)
            if config.train:
                row |= trained(config, task, num_envs)
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            rows.append(row)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = timing.merge(out / f"many_envs{'_trained' * config.train}.csv", rows, columns=PLACE)
    print("", tables.table(rows, keep=2), sep="\n")
    return rows


def trained(config: Config, task: str, num_envs: int) -> dict[str, Any]:
    """What a training comes to: the returns of its last evaluation, and seconds."""
    whole = setting(task, num_envs, num_seeds=config.num_seeds, seed=config.seed, eval_episodes=64)
    out = Path(config.out) / f"{task}-{num_envs}"
    summary = cli.train(curves.SCRIPTS[algorithm_of(task)].make, whole, out)
    scores = read_metrics(out)
    return {
        "env_steps": summary["env_steps"],
        "sampled": float(scores["eval_return"][:, -1].mean()),
        "noise_free": float(scores["eval_return_noise_free"][:, -1].mean()),
        "train_s": summary["train_seconds"],
    }


if __name__ == "__main__":
    cli.once(Config, main, seeds=lambda config: config.num_seeds)
