"""k-step policy gradients: who escapes the chain trap, and what exact gradients cost.

    python scripts/benchmarks/kstep.py                 # all parts
    python scripts/benchmarks/kstep.py --parts trap    # PPO and REINFORCE

Trainings are runs of their own under --out, as the scripts leave them; complete ones are not run
again. Times are of the CPU, medians of interleaved repeats, with SciPy's loop over policies and
steps beside; `taskset -c 0` in front keeps both to one core.
"""

import csv
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import ppo
import reinforce
from scipy import sparse

from scripts.benchmarks import timing
from spg.exact import kstep
from spg.limits import Count, Range, Total, check
from spg.training import cli, plots, summaries, tables
from spg.worlds.models import SparsePOMDP, dense

Part = Literal["trap", "many", "large"]


@dataclass(frozen=True)
class Config:
    parts: tuple[Part, ...] = ("trap", "many", "large")
    """trainings in a trap; gradients of many small worlds; gradients of a large one"""
    num_seeds: Count = 10
    """of every training"""
    total_steps: Total = 500_000
    """of every seed"""
    num_worlds: Count = 1000
    """random aggregated worlds (many)"""
    bins: Annotated[int, Range(2, 100, whole=True)] = 10
    """of the discretised CartPole, bins⁴ + 1 states (large)"""
    repeats: Count = 5
    """of each timing"""
    out: str = "runs/kstep-benchmark"
    """directory of the results"""


SHARED: dict[str, Any] = {
    "env": "chain-pomdp",
    "observe": "all",
    "env_params": {"max_steps_in_episode": 64.0},
    "gamma": 0.9,
    "num_envs": 32,
    "z_size": 16,
}
MEMORIES: dict[str, dict[str, Any]] = {
    "memoryless": {"memory": "none"},
    "seed, k = 1": {"memory": "kstep", "k": 1},
    "seed, k = 8": {"memory": "kstep", "k": 8},
}


def trap(config: Config, out: Path) -> list[dict[str, Any]]:
    """Training on the chain with n = 4 and reward .3: all steps advancing return 60, none 19.2."""
    shared: Any = SHARED | {"num_seeds": config.num_seeds, "total_steps": config.total_steps}
    algorithms: dict[str, tuple[Any, Any]] = {
        "PPO": (ppo, ppo.Config(num_steps=64, num_minibatches=8, **shared)),
        "REINFORCE": (reinforce, reinforce.Config(learning_rate=3e-2, **shared | {"z_size": 32})),
    }
    rows, curves = [], []
    for algorithm, (script, base) in algorithms.items():
        for name, memory in MEMORIES.items():
            directory = out / f"{algorithm}-{name}".replace(" ", "").replace(",", "-")
            summary = cli.train(script.make, replace(base, **memory), directory)
            final = np.array(summary["final_return"])
            curves.append(summaries.read_curve(directory, f"{algorithm}, {name}"))
            rows.append(
                {
                    "algorithm": algorithm,
                    "policy": name,
                    "escaped": f"{(final > 40).sum()} of {config.num_seeds}",
                    "return": f"{final.mean():.4g}",
                    "least": f"{final.min():.4g}",
                    "noise_free": f"{summary['final_return_noise_free_mean']:.4g}",
                }
            )
    plots.learning_curve(out / "trap.png", curves, title="chain, n = 4, reward .3")
    return rows


def many(config: Config, out: Path) -> list[dict[str, Any]]:
    """Gradients of many random worlds, eight policies each, in one call and by a loop in NumPy."""
    from spg.worlds.traps import random_aggregated

    worlds = [dense(random_aggregated(seed=seed).pomdp) for seed in range(config.num_worlds)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *worlds)
    policies, weights = kstep.all_policies(3, 2), jnp.full(8, 1 / 8)
    rows = []
    for k in (1, 8, 64):
        solve = lambda world: kstep.kstep_values(world, policies, weights, k=k, gamma=0.9)  # noqa: B023
        one_call = jax.jit(jax.vmap(solve))
        arrays = [jax.tree.map(np.asarray, world) for world in worlds]
        loop = lambda: np.array([_dense_loop(w, policies, weights, k) for w in arrays])  # noqa: B023
        rows.append(_compare(config, k, lambda: one_call(stacked).gradient, loop))  # noqa: B023
    return rows


def large(config: Config, out: Path) -> list[dict[str, Any]]:
    """The gradient of a discretised CartPole, 16 policies, and by a loop over SciPy's products."""
    from spg.worlds.traps import cartpole

    problem = cartpole(config.bins)
    policies, weights = kstep.all_policies(4, 2), jnp.full(16, 1 / 16)
    rows = []
    for k in (1, 4, 16, 64):
        solve = jax.jit(
            lambda pomdp: kstep.kstep_values(pomdp, policies, weights, k=k, gamma=0.95)  # noqa: B023
        )
        chains = _chains(problem.pomdp, policies)
        loop = lambda: _sparse_loop(problem.pomdp, chains, weights, k)  # noqa: B023
        rows.append(_compare(config, k, lambda: solve(problem.pomdp).gradient, loop))  # noqa: B023
    return rows


def _compare(
    config: Config, k: int, ours: Callable[[], Any], loop: Callable[[], np.ndarray]
) -> dict[str, Any]:
    began = time.perf_counter()
    found, truth = np.asarray(ours()), loop()
    first = time.perf_counter() - began
    clocks = timing.interleave((ours, loop), repeats=config.repeats, clock=time.process_time)
    seconds, loop_seconds = np.median(clocks, 1)
    print(f"k = {k}: {first:.1f} s with compilation and one loop", file=sys.stderr)
    return {
        "k": k,
        "seconds": f"{seconds:.3g}",
        "loop_seconds": f"{loop_seconds:.3g}",
        "ratio": f"{np.median(clocks[0] / clocks[1]):.3g}",
        "difference": f"{np.abs(found - truth).max() / np.abs(truth).max():.1e}",
    }


def _dense_loop(world: Any, policies: np.ndarray, weights: Any, k: int) -> np.ndarray:
    gamma, states = 0.9, np.arange(len(world.start))
    held = []
    for policy in policies:
        action = world.observation.argmax(1)
        action = policy[action]
        step, gain = world.transition[states, action], world.reward[states, action]
        reward, moved = np.zeros(len(states)), np.eye(len(states))
        for _ in range(k):
            reward, moved = gain + gamma * step @ reward, gamma * step @ moved
        held.append((reward, moved))
    reward, moved = (
        np.einsum("n,n...->...", weights, np.stack(x)) for x in zip(*held, strict=True)
    )
    system = np.eye(len(states)) - moved
    value = np.linalg.solve(system, reward)
    law = np.linalg.solve(system.T, world.start)
    return np.array([law @ (r + m @ value) for r, m in held])


def _chains(pomdp: SparsePOMDP, policies: np.ndarray) -> list[tuple[sparse.csr_array, np.ndarray]]:
    """The transitions and rewards of each policy."""
    successor, probability, observation = (
        np.asarray(x) for x in (pomdp.successor, pomdp.probability, pomdp.observation[:, 0])
    )  # fmt: skip
    states = np.arange(len(successor))
    mean_reward = np.asarray(pomdp.mean_reward())
    chains = []
    for policy in policies:
        action = policy[observation]
        mass, to = probability[states, action], successor[states, action]
        row, slot = np.nonzero(mass)
        places = mass[row, slot], (row, to[row, slot])
        chain = sparse.csr_array(sparse.coo_array(places, (len(states), len(states))))
        chains.append((chain, mean_reward[states, action]))
    return chains


def _sparse_loop(pomdp: SparsePOMDP, chains: list, weights: Any, k: int) -> np.ndarray:
    gamma = 0.95
    weights, start = np.asarray(weights), np.asarray(pomdp.start)

    def hold(chain, gain, x):
        for _ in range(k):
            x = gain + gamma * (chain @ x)
        return x

    def solve(mix, rhs):
        x, change = rhs, np.inf
        while change > 1e-15 * np.abs(x).max():
            x, before = rhs + mix(x), x
            change = np.abs(x - before).max()
        return x

    ahead = lambda x: sum(w * hold(c, 0, x) for w, (c, _) in zip(weights, chains, strict=True))
    behind = lambda x: sum(w * hold(c.T, 0, x) for w, (c, _) in zip(weights, chains, strict=True))
    zero = np.zeros(len(start))
    reward = sum(w * hold(c, gain, zero) for w, (c, gain) in zip(weights, chains, strict=True))
    value, law = solve(ahead, reward), solve(behind, start)
    return np.array([law @ hold(c, gain, value) for c, gain in chains])


def main(config: Config) -> None:
    check(config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in config.parts:
        jax.config.update("jax_enable_x64", name != "trap")
        rows = {"trap": trap, "many": many, "large": large}[name](config, out)
        with (out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(f"\n{name}", tables.table(rows, keep=2), sep="\n")


if __name__ == "__main__":
    # seeds are sharded; but times are of one device with all cores
    cli.once(Config, main, seeds=lambda c: c.num_seeds if c.parts == ("trap",) else 1)
