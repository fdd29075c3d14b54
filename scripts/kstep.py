"""k-step policy gradients on small worlds: the gap to the best deterministic policy, against k.

DeWeese & Qu (2026). All k and all runs are vmapped into one program, which takes seconds to
minutes and cannot be resumed. Mirror and projected ascent move a distribution over deterministic
policies by the step sizes of the theorem. Product and mixture are softmax policies whose actions
are held; Adam trains them.

    python scripts/kstep.py                      # 40 random aggregated worlds
    python scripts/kstep.py --problem chain --method product --gradient sampled
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import csv
import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from spg.estimators import gpomdp
from spg.estimators import held as sampled
from spg.exact import ascent, kstep
from spg.kernels.held import certain_logits, held_kernel
from spg.limits import Count, Needs, NonNegative, Positive, Range, Seed, check, fits
from spg.rollout import reset, rollout
from spg.training import cli, options, records, tables
from spg.types import Env
from spg.worlds.models import POMDP, Problem, SparsePOMDP, dense

SOFTMAX = ("product", "mixture")  # methods of policies that Adam trains


@dataclass(frozen=True)
class Config:
    problem: Literal["aggregated", "twostate", "chain", "matching", "cartpole"] = "aggregated"
    """random worlds whose states are seen in groups, or one of the traps of memoryless policies"""
    problem_params: dict[str, Annotated[float, Range()]] = field(default_factory=dict)
    """arguments of the problem, e.g. --problem-params n 5 reward 0.5"""
    method: Literal["mirror", "projected", "product", "mixture"] = "mirror"
    """ascent over distributions of deterministic policies; or Adam on softmax policies, one or
    several"""
    gradient: Literal["exact", "sampled"] = "exact"
    """from the model, or from recorded trajectories"""
    k: tuple[Count, ...] = (1, 2, 4, 8, 16, 32)
    """steps for which randomness is held"""
    num_runs: Count = 40
    """other random worlds (aggregated), or other seeds of the start and the samples"""
    num_updates: Count = 300
    """steps of each ascent"""
    gamma: Annotated[float, Range(0, 1, open="high")] = 0.0
    """discount; 0: that of the problem"""
    num_components: Annotated[Count, Needs(method="mixture")] = 4
    """product policies in a mixture"""
    start_std: Annotated[NonNegative, Needs(method=SOFTMAX)] = 0.5
    """of the logits (product, mixture)"""
    learning_rate: Annotated[Positive, Needs(method=SOFTMAX)] = 0.05
    """of Adam (product, mixture)"""
    num_episodes: Annotated[int, Range(2, 2**31 - 1, whole=True), Needs(gradient="sampled")] = 128
    """trajectories of a sampled gradient, shared out to the policies by mirror and projected"""
    num_steps: Annotated[Count, Needs(gradient="sampled")] = 100
    """of a trajectory; what lies beyond is missing from sampled gradients"""
    seed: Seed = 0
    """of all runs, of which each has a part of it; random worlds take it and the next integers"""
    out: str | None = None
    """directory of the run; by default a new one under runs/"""


class World(NamedTuple):
    """What the runs share, and `pomdp` and `env_params`, of which each run may have its own."""

    pomdp: POMDP
    env_params: PyTree
    env: Any
    policies: Any  # Int[np.ndarray, "N L"], or None: too many to be listed
    joint: Any  # Int[np.ndarray, "N O"], their actions at each observation, or None
    slots: Int[np.ndarray, "O I"]
    num_actions: int  # of one agent
    gamma: float


class Softmax(NamedTuple):
    """A mixture of product policies, and Adam."""

    logits: Float[Array, "C L A"]
    mixture: Float[Array, " C"]


def open_world(config: Config) -> World:
    """Raises ValueError for what cannot be opened, and for more than 5,000 policies where they
    have to be listed."""
    from spg.envs import Tabular, tabular_params  # here: gymnax starts JAX's backend
    from spg.worlds import traps  # here: gymnax starts JAX's backend

    make = traps.TRAPS[config.problem]
    known = [name for name in inspect.signature(make).parameters if name != "seed"]
    for name in config.problem_params:
        if name not in known:
            choices = ", ".join(known)
            raise ValueError(f"{config.problem} has no parameter {name!r}; choose from {choices}")
    keywords: dict[str, Any] = options.arguments(config.problem_params)
    own = config.problem == "aggregated"
    build = lambda i: make(**keywords | {"seed": config.seed + i} if own else keywords)
    problem = build(0)
    slots = np.arange(problem.pomdp.num_obs)[:, None] if problem.slots is None else problem.slots
    num_actions = round(problem.pomdp.num_actions ** (1 / slots.shape[1]))
    num_slots = int(slots.max()) + 1
    listed = num_actions**num_slots <= 5_000
    if not listed and (config.method not in SOFTMAX or config.gradient == "exact"):
        raise ValueError(
            f"{problem.name} has {num_actions}^{num_slots} deterministic policies; 5,000 can be "
            "listed, so fewer observations would do, or a product or mixture by sampled gradients"
        )
    check_memory(config, problem, num_actions**num_slots if listed else 0)
    problems: list[Problem] = [problem, *map(build, range(1, config.num_runs if own else 1))]
    policies = kstep.all_policies(num_slots, num_actions) if listed else None
    joint = None if policies is None else kstep.joint_policies(policies, slots, num_actions)
    solved = [dense(p.pomdp) if len(p.states) <= 500 else p.pomdp for p in problems]
    env_params = [tabular_params(p.pomdp) for p in problems]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x) if own else x[0], *trees)
    return World(
        stack(solved), stack(env_params), Tabular(problem.pomdp), policies, joint, slots,
        num_actions, config.gamma or problem.discount,
    )  # fmt: skip


def check_memory(config: Config, problem: Problem, num_policies: int) -> None:
    """Raise ValueError unless the equations of every run, and sampled trajectories, fit."""
    pomdp, num_states = problem.pomdp, len(problem.states)
    choices = num_states * pomdp.num_actions * num_policies
    dense = num_states * pomdp.num_actions * num_states + num_states**2
    batch = config.num_runs * (len(config.k) if num_states <= 500 else 1)
    size = 8 if config.gradient == "exact" else 4
    numbers = batch * (2 * choices + (dense if num_states <= 500 else 0))
    what = f"{config.num_runs:,} runs with {num_policies:,} policies in {num_states:,} states"
    fits(size * numbers, what, on_device=True)
    if config.gradient == "sampled":
        steps = config.num_runs * config.num_episodes * config.num_steps
        fits(8 * 4 * steps, f"{steps:,} sampled steps for each k", on_device=True)


def weights_of(config: Config, world: World, params: PyTree) -> Float[Array, " N"]:
    """The distribution over deterministic policies that the parameters stand for."""
    if isinstance(params, Softmax):
        return kstep.product_weights(jnp.asarray(world.policies), *params)
    return jnp.exp(params) if config.method == "mirror" else params


def optimiser(config: Config) -> optax.GradientTransformation:
    return optax.adam(lambda count: config.learning_rate * (1 - count / config.num_updates))


def init(config: Config, world: World, key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
    """Parameters, and the state of Adam."""
    if config.method in SOFTMAX:
        num = config.num_components if config.method == "mixture" else 1
        shape = (num, int(world.slots.max()) + 1, world.num_actions)
        params = Softmax(config.start_std * jr.normal(key, shape), jnp.zeros(num))
        return params, optimiser(config).init(params)
    num = len(world.joint)
    return jnp.full(num, -jnp.log(num) if config.method == "mirror" else 1 / num), ()


def sampled_gradient(
    config: Config, world: World, k: Array | int, log_w: Float[Array, " N"], key: PRNGKeyArray
) -> Float[Array, " N"]:
    """∂J/∂w, by holding each policy."""
    env = Env(world.env, world.env_params)
    certain = certain_logits(world.policies, world.num_actions)
    kernel = held_kernel(certain, log_w, k=k, slots=world.slots)

    def one(component, key):
        hold_key, start_key, key = jr.split(key, 3)
        forced, window, life = sampled.hold(kernel, component, gamma=world.gamma, key=hold_key)
        carry = reset(forced, env, key=start_key)
        traj = rollout(forced, env, carry, num_steps=config.num_steps, key=key)[1]
        return sampled.direct_estimate(traj, window, life, k=k, gamma=world.gamma)

    each = max(config.num_episodes // len(log_w), 1)
    keys = jr.split(key, (len(log_w), each))
    every = jax.vmap(jax.vmap(one, (None, 0)))(jnp.arange(len(log_w)), keys)
    return every.mean(1)


def sampled_softmax(
    config: Config, world: World, k: Array | int, params: Softmax, key: PRNGKeyArray
) -> tuple[Softmax, Float[Array, ""]]:
    """∂J by the responsibilities of first visits, and the mean return; no policy is listed."""
    kernel = held_kernel(*params, k=k, slots=world.slots)

    def run(start_key, key):
        env = Env(world.env, world.env_params)
        carry = reset(kernel, env, key=start_key)
        return rollout(kernel, env, carry, num_steps=config.num_steps, key=key)[1]

    trajs = jax.vmap(run)(*(jr.split(x, config.num_episodes) for x in jr.split(key)))
    returns = jax.vmap(partial(sampled.discounted_returns, gamma=world.gamma))(trajs)
    weight = returns - (returns.sum(0) - returns) / (len(returns) - 1)  # of the other episodes
    memory = jnp.zeros((config.num_episodes, len(params.mixture)))
    mean = gpomdp.gradient(sampled.responsibilities, kernel, memory, trajs, weight)
    drawn: Any = jax.tree.map(lambda g: config.num_steps * g, mean).cell.distribution
    return Softmax(drawn.logits, drawn.mixture), returns[:, 0].mean()


def evaluate(
    config: Config, world: World, k: Array | int, params: PyTree, key: PRNGKeyArray
) -> tuple[PyTree, Float[Array, ""]]:
    """∂J in the parameters, or in the weights for mirror and projected ascent; and J.

    J is exact, except where the policies are too many to be listed.
    """
    if world.policies is None:
        return sampled_softmax(config, world, k, params, key)
    weights, pull = jax.vjp(partial(weights_of, config, world), params)
    solution = kstep.kstep_values(world.pomdp, world.joint, weights, k=k, gamma=world.gamma)
    gradient: Any = solution.gradient
    if config.gradient == "exact":
        gradient = pull(gradient)[0] if config.method in SOFTMAX else gradient
    elif config.method in SOFTMAX:
        gradient, _ = sampled_softmax(config, world, k, params, key)
    else:
        gradient = sampled_gradient(config, world, k, jnp.log(weights), key)
    return gradient, solution.expected_return


def update(
    config: Config, world: World, k: Array, state: tuple[Any, Any], key: PRNGKeyArray
) -> tuple[tuple[Any, Any], Float[Array, ""]]:
    """One step of the ascent, and J before it."""
    params, opt_state = state
    gradient, expected_return = evaluate(config, world, k, params, key)
    width = ascent.range_of_rewards(world.pomdp)
    size = ascent.step_size(k, world.gamma, reward_range=width)
    if config.method == "mirror":
        return (ascent.mirror_step(params, gradient, size), ()), expected_return
    if config.method == "projected":
        moved = ascent.projected_step(params, gradient, size / len(params))
        return (moved, ()), expected_return
    descent = jax.tree.map(jnp.negative, gradient)
    updates, opt_state = optimiser(config).update(descent, opt_state)
    return (optax.apply_updates(params, updates), opt_state), expected_return


def ascend(config: Config, world: World, key: PRNGKeyArray, k: Array) -> Float[Array, " T"]:
    """max_D J^D - J after 0, 1, …, `num_updates` updates.

    Where the policies are too many to be listed, the best is that of full sight.
    """
    start_key, key = jr.split(key)
    step = partial(update, config, world, k)
    keys = jr.split(key, config.num_updates + 1)
    returns = lax.scan(step, init(config, world, start_key), keys)[1]
    if world.joint is None:
        return kstep.sighted_return(world.pomdp, gamma=world.gamma) - returns
    return kstep.policy_returns(world.pomdp, world.joint, gamma=world.gamma).max() - returns


def program(config: Config, world: World) -> Callable[[Array, Array], Float[Array, "K R T"]]:
    """Gaps of every k and run, from the keys of the runs and the list of k, vmapped over both."""

    def one(pomdp, env_params, key, k):
        return ascend(config, world._replace(pomdp=pomdp, env_params=env_params), key, k)

    axis = 0 if config.problem == "aggregated" else None  # worlds of their own
    over_runs = jax.vmap(one, (axis, axis, 0, None))
    of_keys = partial(over_runs, world.pomdp, world.env_params)
    if isinstance(world.pomdp, SparsePOMDP):  # large: a loop over k does not wait for the largest
        return jax.jit(lambda keys, ks: lax.map(partial(of_keys, keys), ks))
    return jax.jit(jax.vmap(of_keys, (None, 0)))


def bounds(config: Config, world: World) -> Float[np.ndarray, "K T"]:
    """The theorem's, after 1 … T updates of mirror or projected ascent; c_k for the others."""
    width = ascent.range_of_rewards
    width = jax.vmap(width) if config.problem == "aggregated" else width
    shared: Any = {"gamma": world.gamma, "reward_range": float(width(world.pomdp).max())}
    steps = jnp.arange(1, config.num_updates + 1)
    if world.policies is None or config.method in SOFTMAX:
        return np.array([0 * steps + ascent.gap_bound(k, **shared) for k in config.k])
    rate = partial(ascent.rate_bound, steps, len(world.policies), method=config.method, **shared)
    return np.array([rate(k=k) for k in config.k])


def main(config: Config) -> None:
    """Exact gradients are in double precision, sampled ones in single."""
    with jax.enable_x64(config.gradient == "exact"):
        run(config)


def run(config: Config) -> None:
    from spg.training import plots  # here: matplotlib takes a second to load

    began = time.perf_counter()
    check(config)
    if not config.k or len(set(config.k)) < len(config.k):
        raise ValueError(f"k is {config.k}; it lists different numbers of at least 1")
    world = open_world(config)
    out = records.open_run(config, "kstep", resumable=False)
    count = "unlisted" if world.policies is None else len(world.policies)
    print(f"{config.problem}, {count} policies; directory {out}", file=sys.stderr)
    keys = jr.split(jr.key(config.seed), config.num_runs)
    gaps = np.asarray(program(config, world)(keys, jnp.asarray(config.k)))
    limit = bounds(config, world)
    runs = f"{config.num_runs} worlds" if config.problem == "aggregated" else config.problem
    plots.gaps(
        out / "gap.png", config.k, gaps, limit,
        bound="bound" if config.method in ("mirror", "projected") else "bound of mixtures",
        title=f"{config.method}, {config.gradient} gradients: {runs}",
    )  # fmt: skip
    last = gaps[:, :, -1]
    columns = ["k", "worst gap", "median gap", "mean gap", "bound", "gap at the start"]
    start = gaps[:, :, 0].max(1)
    rows = np.stack(
        [config.k, last.max(1), np.median(last, 1), last.mean(1), limit[:, -1], start], 1
    )
    with (out / "gap.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows.tolist()])
    with (out / "ascent.csv").open("w", newline="") as file:
        table = np.concatenate([np.arange(gaps.shape[2])[None], gaps.max(1)]).T
        csv.writer(file).writerows([["update", *(f"k={k}" for k in config.k)], *table.tolist()])
    print(tables.table([dict(zip(columns, row, strict=True)) for row in rows]))
    print(f"{time.perf_counter() - began:.1f} s; gap.png, gap.csv and ascent.csv in {out}")


if __name__ == "__main__":
    cli.once(Config, main)
