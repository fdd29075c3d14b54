"""How many steps a sampled gradient needs: signal, bias and variance against the exact gradient.

    python scripts/benchmarks/gpomdp_signal.py --out runs/gpomdp-signal

For controllers at several starts, and along GAMP's way from the last of them: the exact ‖∇η‖; the
cosine of ∇η with the exact mean of the estimates, ∇_β, which is the bias of β alone; and of
IState-GPOMDP and Exp-GPOMDP the steps T at which the variance of an estimate, summed over its
components, equals ‖∇η‖². The baseline is that of `scripts/gpomdp.py`: a table of values by I-state
and hidden state, from as many trajectories apart.
"""

import csv
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray

from scripts.benchmarks.gpomdp_variance import record
from spg.estimators import gpomdp
from spg.estimators.returns import gae
from spg.exact import natural
from spg.exact.gamp import direct_gradient
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.limits import Count, Fraction, NonNegative, Range, Seed, check
from spg.training import cli, controllers, options, records, tables
from spg.types import critic_view
from spg.worlds.models import Problem, dense


@dataclass(frozen=True)
class Config(options.ProblemConfig):
    """The measurement, e.g. --betas 0.9 0.99 --num-runs 1000"""

    problem: str = "heavenhell"
    num_z: Count = 20
    seed: Seed = 0
    """of the random numbers"""
    num_controllers: Count = 4
    """for each line of the table"""
    num_runs: Annotated[int, Range(2, 2**31 - 1, whole=True)] = 400
    """estimates of each"""
    num_steps: Annotated[int, Range(2, 2**31 - 1, whole=True)] = 500
    """T of each"""
    starts: tuple[tuple[NonNegative, NonNegative], ...] = ((0, 0), (2, 0), (0, 2), (0, 4))
    """--start-std and --start-hold of each start"""
    along: tuple[Fraction, ...] = (0.01, 0.1, 0.5, 0.9)
    """fractions of the final η at which a training by exact natural gradients is looked at"""
    betas: tuple[Annotated[float, Range(0, 1, open="high")], ...] = (0.9, 0.97)
    """discounts of the trace"""
    gae_lambda: Fraction = 0.9
    """of the estimates with a baseline"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""


class Row(NamedTuple):
    controllers: str
    average_reward: float  # medians over the controllers, of η and of all that follows
    gradient: float  # ‖∇η‖
    beta: float
    cosine: float  # of ∇_β and ∇η
    istate: float  # steps for a variance of ‖∇η‖²
    exp: float
    istate_baseline: float
    exp_baseline: float


def flat(tree) -> Array:
    return ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))[0]


def steps_needed(
    config: Config, problem: Problem, kernel: Kernel, beta: float, key: PRNGKeyArray
) -> tuple[Array, ...]:
    """The last seven numbers of a `Row`, less β."""
    pomdp = dense(problem.pomdp)
    (gradient, solution), discounted = (
        direct_gradient(kernel, pomdp),
        direct_gradient(kernel, pomdp, beta=beta)[0],
    )
    truth, followed = flat(gradient), flat(discounted)
    norm = jnp.linalg.norm(truth)
    trajs, apart = (record(config, problem, kernel, k) for k in jr.split(key))  # pyright: ignore
    returns = partial(gpomdp.returns, beta=beta)
    places = len(problem.pomdp.start)
    one_hot = partial(jax.nn.one_hot, num_classes=config.num_z)
    seen = jax.vmap(returns)(apart)
    values = gpomdp.collect(one_hot(apart.z), critic_view(apart.obs), seen, num_places=places)
    memory = one_hot(trajs.z[:, 0])
    exp = partial(gpomdp.exp_istate, num_obs=problem.pomdp.num_obs)
    law = partial(gpomdp.filtered, kernel, num_obs=problem.pomdp.num_obs)
    methods = {
        "istate": (gpomdp.istate, memory[:, :0], one_hot(trajs.z)),
        "exp": (exp, memory, jax.vmap(law)(memory, trajs)),
    }
    advantage = lambda *x: gae(*x, gamma=beta, gae_lambda=config.gae_lambda)
    one_run = lambda tree: jax.tree.map(lambda x: x[None], tree)
    found = []
    for baseline in (False, True):
        for likelihood, state, alpha in methods.values():
            weight = jax.vmap(returns)(trajs)
            if baseline:
                value = gpomdp.value_baseline(values, alpha, critic_view(trajs.obs))
                facts = trajs.reward, value, value[:, 1:], trajs.terminated, trajs.truncated
                last = config.num_steps - 1
                weight = jax.vmap(advantage)(*(x[:, :last] for x in facts))
                weight = jnp.pad(weight, ((0, 0), (0, 1)))

            def one(state, traj, weight, likelihood=likelihood):
                return flat(gpomdp.gradient(likelihood, kernel, *one_run((state, traj, weight))))

            each = jax.lax.map(lambda x: one(*x), (state, trajs, weight), batch_size=100)
            found.append(each.var(0, ddof=1).sum() * config.num_steps / norm**2)
    cosine = truth @ followed / norm / jnp.linalg.norm(followed)
    return solution.average_reward, norm, cosine, *found


def along(config: Config, problem: Problem, kernel: Kernel) -> list[Kernel]:
    """Controllers of a training by exact natural gradients, where η passes the fractions."""
    _, states = natural.ascend(kernel, dense(problem.pomdp), num_steps=200)
    values, static = states.value, eqx.filter(kernel, trainable(kernel), inverse=True)
    passed = [jnp.argmax(values >= fraction * values[-1]) for fraction in config.along]
    at = lambda i: eqx.combine(jax.tree.map(lambda x: x[i], states.params), static)
    return [at(i) for i in passed]


def measure(config: Config, problem: Problem) -> list[Row]:
    groups: dict[str, list[Kernel]] = {}
    way = eqx.filter_jit(lambda kernel: along(config, problem, kernel))
    for i, (std, hold) in enumerate(config.starts):
        asked = replace(config, start_std=std, start_hold=hold)
        keys = jr.split(jr.key(config.seed), config.num_controllers)
        drawn = [controllers.make(asked, problem, key=key) for key in keys]
        groups[f"N(0, {std:g}²), hold {hold:g}"] = drawn
        if i == len(config.starts) - 1 and config.along:
            ways = zip(*map(way, drawn), strict=True)
            groups |= {f"GAMP at {f:.0%}": list(x) for f, x in zip(config.along, ways, strict=True)}
    run = eqx.filter_jit(lambda kernel, beta, key: steps_needed(config, problem, kernel, beta, key))
    rows = []
    for name, kernels in groups.items():
        for beta in config.betas:
            keys = jr.split(jr.key(config.seed + 1), len(kernels))
            each = [run(k, jnp.asarray(beta), key) for k, key in zip(kernels, keys, strict=True)]
            eta, norm, *others = np.median(np.array(each), 0).tolist()
            rows.append(Row._make([name, eta, norm, beta, *others]))
    return rows


def main(config: Config) -> None:
    jax.config.update("jax_enable_x64", True)
    check(config)
    problem = options.open_problem(config)
    options.check_controller(config, problem)
    out = records.open_run(config, "gpomdp-signal", resumable=False)
    rows = measure(config, problem)
    with (out / "gpomdp_signal.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows([f"{x:.4g}" if isinstance(x, float) else x for x in r] for r in rows)
    print(tables.table([row._asdict() for row in rows], keep=4))
    print(f"written to {out}")


if __name__ == "__main__":
    cli.once(Config, main)
