"""Memories in matrices beside vectors: what z holds after training, and what a gradient costs.

    python scripts/benchmarks/curves.py --task matrices-cards --num-seeds 2 --total-steps 500_000
    python scripts/benchmarks/matrices.py --runs runs/curves-matrices-cards

`holds` reads the suits of RecallCards, place by place, off the z that follows the last card, by the
ridge regression of `questions.py --question why`: mean share of suits found; chance is 1/4. Also
return, and the steps after which the return of training stays above .9. `cost` needs no runs: CPU
time of the gradient of a minibatch of BPTT, 4 segments of 128 steps, in one process.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[2]))

import equinox as eqx
import jax
import jax.random as jr
import numpy as np

from scripts.benchmarks import timing
from scripts.benchmarks.questions_why import decoding
from spg.kernels.factory import PolicyConfig, Unit, make_kernel
from spg.kernels.networks import Flat, trainable
from spg.limits import Count, Size, check
from spg.rollout import reset, rollout
from spg.training import cli, options, policies, records, summaries, tables
from spg.training.metrics import read_metrics


@dataclass(frozen=True)
class Config:
    parts: tuple[Literal["holds", "cost"], ...] = ("holds", "cost")
    """which"""
    runs: str = "runs/curves-matrices-cards"
    """directory of curves.py, of runs in RecallCards (holds)"""
    episodes: Count = 512
    """of each seed (holds)"""
    cells: tuple[Unit, ...] = ("attention", "delta", "lru", "gated", "gru")
    """whose gradient is timed (cost)"""
    z_size: Size = 64
    """of these"""
    repeats: Count = 30
    """of each timing (cost)"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""


def holds(config: Config, directory: Path) -> dict[str, Any]:
    """A row of a run."""
    run = policies.load(directory)
    num_suits, num_cards = run.env.spec.num_actions, int(run.env.params.num_cards)

    def play(kernel, key):
        start_key, key = jr.split(key)
        carry = reset(kernel, run.env, key=start_key)
        traj = rollout(kernel, run.env, carry, num_steps=num_cards, key=key)[1]
        return traj.obs[:, :num_suits], Flat()(jax.tree.map(lambda z: z[-1], traj.z_next))

    def found(kernel, key):
        suits, z = jax.vmap(partial(play, kernel))(jr.split(key, config.episodes))
        return jax.vmap(decoding, (None, 1))(z, suits)

    share = jax.jit(jax.vmap(found))(run.kernels, jr.split(jr.key(0), len(run.seeds)))
    data, summary = read_metrics(directory), summaries.read_summary(directory)
    steps, score = data["env_steps"][0], data["return"].mean(0)
    below = np.flatnonzero(score <= 0.9)
    learned = len(below) and below[-1] + 1 < len(steps)
    return {
        "method": directory.name.replace("-", " "),
        "return": summary["final_return_mean"],
        "noise_free": summary["final_return_noise_free_mean"],
        "above_0.9_after": int(steps[below[-1] + 1]) if learned else "",
        "suits_found": float(share.mean()),
        "of_the_first_card": float(share[:, 0].mean()),
        "of_the_last_card": float(share[:, -1].mean()),
    }


def cost(config: Config) -> list[dict[str, Any]]:
    """CPU milliseconds of a gradient of each cell, and its ratio to that of the last."""
    env = options.make_env(options.EnvConfig(env="RecallCards-memory", observe="all"))
    calls = []
    for cell in config.cells:
        policy = PolicyConfig(memory="bptt", cell=cell, z_size=config.z_size)
        kernel = make_kernel(policy, env.spec, key=jr.key(0))

        def record(key, kernel=kernel):
            carry = reset(kernel, env, key=key)
            return rollout(kernel, env, carry, num_steps=128, key=key)[1]

        @eqx.filter_jit
        def gradient(kernel, segments):
            learned, fixed = eqx.partition(kernel, trainable(kernel))

            def loss(learned):
                kernel = eqx.combine(learned, fixed)
                return jax.vmap(kernel.log_prob)(segments).action.sum()

            return eqx.filter_grad(loss)(learned)

        segments = jax.jit(jax.vmap(record))(jr.split(jr.key(1), 4))
        calls.append(partial(gradient, kernel, segments))
    seconds = timing.interleave(calls, repeats=config.repeats, clock=time.process_time)
    return [
        {"cell": cell}
        | timing.spread("milliseconds", 1e3 * own)
        | timing.spread("to_last", own / seconds[-1])
        for cell, own in zip(config.cells, seconds, strict=True)
    ]


def main(config: Config) -> None:
    check(config)
    done = [path.parent for path in sorted(Path(config.runs).glob("*/summary.json"))]
    if "holds" in config.parts and not done:
        raise ValueError(f"{config.runs} holds no complete run; curves.py leaves some there")
    out = records.open_run(config, "matrices", resumable=False)
    for part in config.parts:
        rows = [holds(config, run) for run in done] if part == "holds" else cost(config)
        timing.write(out / f"{part}.csv", rows)
        print(f"\n{part}", tables.table(rows, keep=1), sep="\n")
    print(f"{timing.machine()}; tables in {out}")


if __name__ == "__main__":
    cli.once(Config, main)
