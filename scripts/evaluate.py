"""Evaluate the policies of a run: returns of fresh episodes, and a rollout to watch.

    python scripts/evaluate.py runs/mine --episodes 100

The directory of the run gets `evaluation.csv`, a row per seed and episode; `rollout.png`, what the
noise-free policy of the best seed sees, keeps and does; for physics and finite worlds
`rollout.gif`, for PointMass and Doors `paths.png`, and for Brax `rollout.html` too, a page that
loads its viewer from the network.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Float

import spg
from spg.limits import Count, Seed, check
from spg.training import cli, films, plots, records


@dataclass(frozen=True)
class Config:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """directory of a run"""
    episodes: Count = 100
    """of each seed, sampled and noise-free"""
    steps: Count = 2_000
    """after which an episode of a world without end is cut; there the average reward is measured"""
    seed: Seed = 0
    """of the episodes"""


def returns(config: Config, run: spg.Run) -> spg.Evaluation:
    """By seed and episode; average rewards where no episode ends."""
    endless = run.env.params.max_steps_in_episode is None

    @jax.jit
    def play(kernels: spg.Kernel, key: jax.Array) -> spg.Evaluation:
        one = lambda kernel, key: spg.episode_returns(
            kernel, run.env, num_episodes=config.episodes,
            max_steps=config.steps if endless else None, key=key,
        )  # fmt: skip
        return jax.vmap(one)(kernels, jr.split(key, len(run.seeds)))

    scale = config.steps if endless else 1
    found = play(run.kernels, jr.key(config.seed))
    return jax.device_get(jax.tree.map(lambda x: x / scale, found))


def table(run: spg.Run, found: spg.Evaluation, episodes: int) -> str:
    """Means over the episodes with their 95 % intervals; below, over the seeds."""
    cell = lambda x: f"{x.mean():>10.4g}  {span(x):<20}"
    measure = "return" if run.env.params.max_steps_in_episode is not None else "reward"
    rows = [f"{'seed':>8}  {measure:>10}  {'95 % interval':<20}  {'noise-free':>10}  95 % interval"]
    for i, seed in enumerate(run.seeds):
        rows.append(f"{seed:>8}  {cell(found.sampled[i])}  {cell(found.noise_free[i])}".rstrip())
    if len(run.seeds) > 1:
        over_seeds = "  ".join(cell(x.mean(1)) for x in found)
        rows.append(f"{'mean':>8}  {over_seeds}".rstrip())
    rows.append(
        f"{episodes} episodes of each seed; intervals by bootstrap, in the last row over seeds"
    )
    return "\n".join(rows)


def span(x: Float[np.ndarray, " N"]) -> str:
    low, high = plots.interval(x, statistic=np.mean)
    return f"[{low:.4g}, {high:.4g}]"


def main(config: Config) -> None:
    check(config)
    run, out = spg.load(config.run), Path(config.run)
    found = returns(config, run)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "episode", *found._fields])
    for seed, *rows in zip(run.seeds, *found, strict=True):
        writer.writerows((seed, i, *row) for i, row in enumerate(zip(*rows, strict=True)))
    records.write(out / "evaluation.csv", text.getvalue())
    best = int(found.noise_free.mean(1).argmax())
    title = f"{run.config.get('env') or run.config['problem']}, noise-free, seed {run.seeds[best]}"
    written = films.save(run.kernel(best), run.env, out, title=title, key=jr.key(config.seed))
    print(table(run, found, config.episodes))
    for path in [out / "evaluation.csv", *written]:
        needs = "; its viewer comes from the network" if path.suffix == ".html" else ""
        print(f"{path}{needs}")


if __name__ == "__main__":
    cli.once(Config, main)
