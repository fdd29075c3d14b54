"""Does S2PG learn what to write? SAC on `RepeatVector-memory`, with and without z' in the critics.

    python scripts/benchmarks/repeat_vector.py

The cue is shown once, among distractors, and only the memory tells the answer. `cue_at_first` and
`cue_at_query` are the share of the cue's variance that a ridge regression reads off z' right after
the cue and at the query, in fresh episodes of the sampled policy; returns are shares of the same
variance. A memory gets better by what it writes or by less noise on z': `same_noise` is
`cue_at_query` with the noise that S2PG starts with, for all cells alike. Each training is a run of
its own under --out; one that is complete is not run again, one that was cut short is resumed.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[2]))

import sac

from scripts.benchmarks import timing
from spg.kernels.cells import Computed, Drawn, NormalAround
from spg.kernels.kernel import Kernel
from spg.limits import Count, Positive, Seed, Total, check
from spg.rollout import reset, rollout
from spg.training import cli, policies, summaries, tables

NUM_EPISODES, RIDGE = 2048, 0.1
MEMORYLESS: dict[str, dict[str, Any]] = {
    "oracle": {"memory": "oracle"},
    "none": {"memory": "none"},
    "untrained": {"state_learning_rate": 0.0},
}
TRAINED: dict[str, dict[str, Any]] = {
    "Q(s, a)": {},
    "Q(s, a, z')": {"critic_state": True},
    "Q(s, a, z') rolled-8": {"critic_state": True, "segment_length": 8},
    "BPTT-32": {"memory": "bptt", "segment_length": 32},
}


@dataclass(frozen=True)
class Config:
    """The comparison, e.g. --state-learning-rates 3e-4 --total-steps 2e5"""

    methods: tuple[str, ...] = (*MEMORYLESS, *TRAINED)
    """which to train"""
    state_learning_rates: tuple[Positive, ...] = (3e-5, 3e-4)
    """of cells that are trained; the head's is 1e-3"""
    num_seeds: Count = 3
    """of each training"""
    seed: Seed = 0
    """of the first training; the others take the next integers"""
    total_steps: Total = 60_000
    """environment steps of each seed"""
    batch_size: Count = 128
    """steps whose losses make a gradient"""
    out: str = "runs/repeat-vector"
    """directory of the results"""


def arms(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """Names and options of the trainings. Raises ValueError for an unknown method."""
    if unknown := [name for name in config.methods if name not in MEMORYLESS | TRAINED]:
        raise ValueError(
            f"unknown methods {unknown}; choose from {', '.join(MEMORYLESS | TRAINED)}"
        )
    return [(name, MEMORYLESS[name]) for name in config.methods if name in MEMORYLESS] + [
        (f"{name}, {rate:g}", TRAINED[name] | {"state_learning_rate": rate})
        for name in config.methods
        if name in TRAINED
        for rate in config.state_learning_rates
    ]


def explained(x: Float[Array, "N n"], y: Float[Array, "N d"]) -> Float[Array, ""]:
    """R² of y by ridge regression on x, fitted on half of the rows and asked on the others."""
    half = len(x) // 2
    x = (x - x[:half].mean(0)) / (x[:half].std(0) + 1e-6)
    mean = y[:half].mean(0)
    gram = x[:half].T @ x[:half] + RIDGE * jnp.eye(x.shape[1])
    guess = mean + x[half:] @ jnp.linalg.solve(gram, x[:half].T @ (y[:half] - mean))
    return 1 - jnp.mean((y[half:] - guess) ** 2) / jnp.mean((y[half:] - mean) ** 2)


def with_noise(kernel: Kernel, state_std: float) -> Kernel:
    """The kernel with the noise on z' that S2PG would give its cell at the start."""
    cell: Any = kernel.cell
    location = cell.location if isinstance(cell, Computed) else cell.distribution.location
    noisy = Drawn(NormalAround(location, jnp.log(state_std * location.write)))
    return eqx.tree_at(lambda kernel: kernel.cell, kernel, noisy)


class Decoded(NamedTuple):
    """Of each seed of a run."""

    returns: Float[Array, " seeds"]  # of the sampled policy
    shares: Float[Array, "seeds T"]  # R² of the cue by z' at each step
    same_noise: Float[Array, " seeds"]  # at the query, see `with_noise`


def decode(directory: Path) -> Decoded:
    """What a run's memories know of the cue."""
    run = policies.load(directory)
    num_steps = int(run.env.params.max_steps_in_episode)

    def episode(kernel, key):
        start = reset(kernel, run.env, key=key)
        steps = rollout(kernel, run.env, start, num_steps=num_steps, key=jr.fold_in(key, 1))[1]
        return steps.reward.sum(), steps.z_next, start.env_state.env.cue

    def recall(kernel):
        keys = jr.split(jr.key(0), NUM_EPISODES)
        returns, z, cue = jax.vmap(lambda key: episode(kernel, key))(keys)
        return returns.mean(), jax.vmap(lambda z: explained(z, cue), 1)(z)

    def one(kernel):
        returns, shares = recall(kernel)
        if not kernel.z0.size:
            return Decoded(returns, jnp.zeros(num_steps), jnp.zeros(()))
        return Decoded(returns, shares, recall(with_noise(kernel, run.config["state_std"]))[1][-1])

    return jax.device_get(jax.jit(lambda kernels: jax.lax.map(one, kernels))(run.kernels))


def picture(
    path: Path,
    curves: dict[str, tuple[np.ndarray, np.ndarray]],
    shares: dict[str, Float[Array, "seeds T"]],
) -> None:
    """Returns over training, and what z' tells of the cue over an episode: means over seeds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, (steps, returns)) in enumerate(curves.items()):
        style = {"color": f"C{i}", "label": name}
        left.plot(steps, returns.mean(0), **style)
        left.fill_between(steps, returns.min(0), returns.max(0), color=f"C{i}", alpha=0.15)
        if shares[name].any():
            right.plot(shares[name].mean(0), "o-", markersize=3, **style)
    left.set(
        xlabel="environment steps", ylabel="return (mean and range of seeds)", ylim=(-0.5, 1.05)
    )
    right.set(xlabel="step of the episode", ylabel="R² of the cue by z'", ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", loc="lower right" if axes is left else "lower left")
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    check(config)
    out = Path(config.out)
    shared = replace(
        sac.Config(), env="RepeatVector-memory", num_seeds=config.num_seeds, seed=config.seed,
        batch_size=config.batch_size, checkpoints=4, eval_episodes=64,
        total_steps=config.total_steps,
    )  # fmt: skip
    rows, curves, shares = [], {}, {}
    for name, words in arms(config):
        directory = out / "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
        summary = cli.train(sac.make, replace(shared, **words), directory)
        curve = summaries.read_curve(directory, name)
        curves[name] = curve.steps, curve.returns
        returns, shares[name], same_noise = decode(directory)
        rows.append(
            {
                "method": name,
                "seeds": config.num_seeds,
                "env_steps": summary["env_steps"],
                "return": f"{returns.mean():.3f}",
                "seeds_from_to": f"{returns.min():.3f} to {returns.max():.3f}",
                "noise_free": f"{summary['final_return_noise_free_mean']:.3f}",
                "cue_at_first": f"{shares[name][:, 0].mean():.2f}",
                "cue_at_query": f"{shares[name][:, -1].mean():.2f}",
                "same_noise": f"{same_noise.mean():.2f}",
                "steps_per_s": f"{summary['steps_per_second']:.0f}",
            }
        )
        picture(out / "repeat_vector.png", curves, shares)
        timing.write(out / "repeat_vector.csv", rows)
    print("", tables.table(rows), sep="\n")
    return rows


if __name__ == "__main__":
    cli.once(Config, main, seeds=lambda config: config.num_seeds)
