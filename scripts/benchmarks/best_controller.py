"""What the best controller of each size earns in Pentagon: gradients, exchanges, and bounds.

    python scripts/benchmarks/best_controller.py --sizes 4

For each number of I-states, from each of some starts:

    gradients   natural gradients on a random graph, costs in stages
    exchanged   exchanges from what is most probable there
    random      exchanges from a random controller, costs in the same stages
    both        natural gradients from the better of the two, then exchanges

and from the best of all starts exchanges again, with some rows drawn anew each time (`kicked`).
In `both` every I-state may follow. `--bounds` finds what no policy exceeds, and what one of beliefs
earns.
"""

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array
from scipy.optimize import root_scalar

from scripts.benchmarks.outdegree import ANNEALED
from spg.exact import natural, pbvi
from spg.exact.exchange import Rows, average_reward, exchange, kernel_of, rows_of
from spg.kernels.finite import random_controller
from spg.kernels.kernel import Kernel
from spg.limits import Count, Range, Seed, check
from spg.training import cli, records
from spg.worlds import dense, pentagon
from spg.worlds.models import DensePOMDP

DONE = 211  # the state between two episodes


@dataclass(frozen=True)
class Config:
    """The search, e.g. --sizes 4 --num-seeds 10"""

    sizes: tuple[Count, ...] = (1, 2, 3, 4, 6, 8)
    """numbers of I-states"""
    num_seeds: Count = 10
    """starts of each size"""
    num_random: Annotated[int, Range(0, 10**6, whole=True)] = 3
    """how many of the seeds also search from a random controller"""
    num_updates: Count = 105
    """gradients of each training, shared by the stages"""
    num_kicks: Annotated[int, Range(0, 10**6, whole=True)] = 10
    """searches from the best with some of its rows drawn anew"""
    redrawn: Count = 6
    """how many rows, in the mean"""
    most: Count = 6
    """exchanges of each observation that a sweep looks at first, those of the largest slopes"""
    seed: Seed = 0
    """of the graphs, of the random controllers and of the runs of QMDP"""
    bounds: bool = False
    """only find the bounds for all policies"""
    num_runs: Count = 100
    """of QMDP, with the bounds"""
    num_steps: Count = 2000
    """of each"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""


class Row(NamedTuple):
    num_z: int
    method: str
    seed: int
    average_reward: float  # η
    seconds: float


def graph(num_z: int, world: DensePOMDP, key: jax.Array) -> Kernel:
    """Zero logits on 2 or 3 successors; two I-states have normal logits, to tell them apart."""
    std = 1.0 if num_z == 2 else 0.0
    degree = min(3, max(num_z - 1, 1)) if num_z != 2 else 2
    sizes = num_z, world.num_obs, world.num_actions
    return random_controller(*sizes, out_degree=degree, std=std, key=key)


def with_cost(world: DensePOMDP, cost: float) -> DensePOMDP:
    return world._replace(reward=jnp.where(world.reward < 0, cost, 1) * world.reward)


@eqx.filter_jit
def ascend(kernel: Kernel, world: DensePOMDP, num_steps: int) -> Kernel:
    return natural.ascend(kernel, world, num_steps=num_steps)[0]


def certain(rows: Rows) -> Rows:
    """What is most probable in each row."""
    return Rows(*(jnp.eye(x.shape[-1])[x.argmax(-1)] for x in rows))


def drawn(rng: np.random.Generator, like: Rows, share: float = 1.0) -> Rows:
    """Each row with this probability a random certainty."""
    draw = lambda x: jnp.eye(x.shape[-1])[rng.integers(0, x.shape[-1], x.shape[:-1])]
    new = lambda x: jnp.where(rng.random(x.shape[:-1])[..., None] < share, draw(x), x)
    return Rows(*map(new, like))


def trained(config: Config, world: DensePOMDP, num_z: int, seed: int) -> Rows:
    kernel = graph(num_z, world, jr.split(jr.key(config.seed), config.num_seeds)[seed])
    for cost in ANNEALED:
        length = config.num_updates // len(ANNEALED)
        kernel = ascend(kernel, with_cost(world, cost), length)
    return rows_of(kernel, world)


def searched(config: Config, world: DensePOMDP, num_z: int, seed: int) -> Rows:
    shape = world.num_obs, num_z
    like = Rows(jnp.zeros((*shape, num_z)), jnp.zeros((*shape, world.num_actions)))
    rows = drawn(np.random.default_rng([config.seed, seed]), like)
    for cost in ANNEALED:
        rows = exchange(rows, with_cost(world, cost), most=config.most)[0]
    return rows


def polished(config: Config, world: DensePOMDP, rows: Rows) -> tuple[Rows, Rows]:
    """Natural gradients from there with a little of every successor, and exchanges from these."""
    soft = rows_of(ascend(kernel_of(rows, floor=1e-3), world, 60), world)
    return soft, exchange(certain(soft), world, most=config.most)[0]


def search(config: Config, world: DensePOMDP, num_z: int, note: Callable[..., None]) -> Rows:
    """The best controller found; `note` is told the method, the seed and the controller."""
    eta = lambda rows: float(average_reward(rows, world))
    settle = lambda rows: exchange(rows, world, most=config.most)[0]
    found, soft = [], []
    for seed in range(config.num_seeds):
        soft.append(trained(config, world, num_z, seed))
        note("gradients", seed, soft[-1])
        found.append(settle(certain(soft[-1])))
        note("exchanged", seed, found[-1])
        starts = found[-1:]
        if seed < config.num_random:
            starts.append(searched(config, world, num_z, seed))
            note("random", seed, starts[-1])
        found += starts[1:]
        both = polished(config, world, max(starts, key=eta))
        note("both", seed, max(both, key=eta))
        soft.append(both[0])
        found.append(both[1])
    best = max(found, key=eta)
    rng = np.random.default_rng(config.seed)
    for kick in range(config.num_kicks):
        other = settle(drawn(rng, best, config.redrawn / (2 * num_z * world.num_obs)))
        note("kicked", kick, other)
        best = max(best, other, key=eta)
    best = max(*soft, *polished(config, world, best), best, key=eta)
    note("best", 0, best)
    return best


def noted(path: Path, world: DensePOMDP, began: float, num_z: int, *told) -> None:
    """Add a row to the file; `told` are the method, the seed and the controller."""
    method, seed, rows = told
    value, seconds = float(average_reward(rows, world)), time.perf_counter() - began
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(Row._fields)
        writer.writerow(Row(num_z, method, seed, round(value, 6), round(seconds, 1)))
    print(num_z, method, seed, f"{value:.5f} {seconds:.0f} s", flush=True)


# --- all policies


def episode(world: DensePOMDP, price: float) -> DensePOMDP:
    """One episode, each step of which costs `price`; its end is seen.

    No policy earns more than `price` in the long run where none earns more than 0 here.
    """
    ends = world.transition[:, :, DONE]
    seen = jnp.eye(world.num_obs)[-1]  # else the last observation never occurs
    return world._replace(
        reward=(world.reward - price * (1 + ends)).at[DONE].set(0),
        transition=world.transition.at[DONE].set(jnp.eye(len(world.start))[DONE]),
        observation=world.observation.at[DONE].set(seen),
    )


@jax.jit
def sighted(world: DensePOMDP) -> Array:
    """Q(s, a) of full sight, without a discount."""
    after = lambda q: world.reward + jnp.einsum("sat,t->sa", world.transition, q.max(1))
    best = jnp.where(jnp.arange(len(world.start)) == DONE, 0.0, 1.0)[:, None]
    return lax.fori_loop(0, 400, lambda _, q: after(q), jnp.broadcast_to(best, world.reward.shape))


@jax.jit
def informed(world: DensePOMDP) -> Array:
    """Q(s, a) of the fast informed bound, without a discount."""

    def step(_, q):
        ahead = jnp.einsum(
            "sat,tob->saob", world.transition, world.observation[..., None] * q[:, None]
        )
        return jnp.minimum(q, world.reward + ahead.max(-1).sum(-1))

    return lax.fori_loop(0, 400, step, sighted(world))


def breakeven(world: DensePOMDP, bound: Callable[[DensePOMDP], Array]) -> float:
    """The price of a step at which the bound is 0."""

    def at(price: float) -> float:
        priced = episode(world, price)
        return float((pbvi.opening(priced) @ bound(priced)).max(-1).sum())

    return root_scalar(at, bracket=(0.03, 0.06), xtol=1e-9).root


def followed(config: Config, world: DensePOMDP, q: Array) -> np.ndarray:
    """Average rewards of runs of the policy argmax_a Σ_s b(s) Q(s, a), which sees ends."""
    rng = np.random.default_rng(config.seed)
    transition, _, reward, first = map(np.asarray, world)
    seen = np.asarray(episode(world, 0.0).observation)
    pick = lambda p: (rng.random((len(p), 1)) > p.cumsum(-1)[:, :-1]).sum(-1)
    belief = np.tile(first, (config.num_runs, 1))
    state, total = pick(belief), np.zeros(config.num_runs)
    for _ in range(config.num_steps):
        belief = belief * seen[:, pick(seen[state])].T
        belief /= belief.sum(1, keepdims=True)
        action = (belief @ np.asarray(q)).argmax(1)
        total += reward[state, action]
        state = pick(transition[state, action])
        belief = np.einsum("ns,snt->nt", belief, transition[:, action])
    return total / config.num_steps


def bounds(config: Config, world: DensePOMDP) -> dict[str, float]:
    """What no policy exceeds; and QMDP, sampled, at the price that it earns itself."""
    rewards = followed(config, world, sighted(episode(world, 0.0454)))
    return {
        "full sight": breakeven(world, sighted),
        "fast informed bound": breakeven(world, informed),
        "QMDP": rewards.mean(),
        "its standard error": rewards.std() / config.num_runs**0.5,
    }


def main(config: Config) -> None:
    jax.config.update("jax_enable_x64", True)
    check(config)
    out = records.open_run(config, "best-controller", resumable=False)
    world = dense(pentagon().pomdp)
    if config.bounds:
        for name, value in bounds(config, world).items():
            print(f"{name}: {value:.5f}", flush=True)
        return
    for num_z in config.sizes:
        note = partial(noted, out / "best_controller.csv", world, time.perf_counter(), num_z)
        best = search(config, world, num_z, note)
        np.savez(out / f"best{num_z}.npz", omega=best.omega, mu=best.mu)
    print(f"written to {out}")


if __name__ == "__main__":
    cli.once(Config, main)
