"""Variance of sampled gradients of the average reward: IState-GPOMDP, Exp-GPOMDP, baselines.

    python scripts/benchmarks/gpomdp_variance.py --out runs/gpomdp-variance

One estimate is made of one trajectory from the first state, with an empty trace. For controllers
with random logits in a known world: the sum of the variances of its components over ‖∇η‖², and the
cosine of the mean estimate with the exact ∇η, by GAMP. Exp-GPOMDP by observations is shown on the
acts of its own policy; η of the policy that acts is beside it. Baselines: the exact η subtracted
from the rewards, and then also a table of values by I-state and observation, or by I-state and
hidden state, from as many trajectories apart.
"""

import csv
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PRNGKeyArray

from spg.estimators import gpomdp
from spg.exact.gamp import gamp_gradient
from spg.kernels.finite import expected_kernel
from spg.kernels.kernel import Kernel
from spg.limits import Count, NonNegative, Range, Seed, check
from spg.rollout import reset, rollout
from spg.training import cli, controllers, options, records, tables
from spg.types import Env, Transition, critic_view, policy_view
from spg.worlds.models import Problem

ESTIMATORS = ("istate", "exp", "exp-observations")
BASELINES = ("none", "reward", "value", "state")


@dataclass(frozen=True)
class Config(options.ProblemConfig):
    """The measurement, e.g. --num-runs 100 --num-steps 200 --betas 0.9"""

    out_degree: Count = 4
    seed: Seed = 0
    """of the random numbers"""
    num_controllers: Count = 8
    """drawn with these logits, for each line of the table"""
    num_runs: Annotated[int, Range(2, 2**31 - 1, whole=True)] = 400
    """estimates of each"""
    num_steps: Annotated[int, Range(2, 2**31 - 1, whole=True)] = 400
    """T of each"""
    stds: tuple[NonNegative, ...] = (0.5, 2.0)
    """standard deviations of the logits"""
    betas: tuple[Annotated[float, Range(0, 1, open="high")], ...] = (0.9, 0.97)
    """discounts of the trace"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""


class Row(NamedTuple):
    std: float
    beta: float
    estimator: str
    baseline: str
    variance: float  # over ‖∇η‖², median over the controllers
    least: float
    most: float
    cosine: float  # of the mean estimate and ∇η, median
    average_reward: float  # of the policy that acts, mean over runs, median


def record(config: Config, problem: Problem, acting: Kernel, key: PRNGKeyArray) -> Transition:
    """`num_runs` trajectories of the policy that acts."""
    from spg.envs import Tabular

    env = Tabular(problem.pomdp, privileged=True)
    env = Env(env, env.default_params)

    def one(key):
        reset_key, key = jr.split(key)
        start = reset(acting, env, key=reset_key)
        return rollout(acting, env, start, num_steps=config.num_steps, key=key)[1]

    return jax.vmap(one)(jr.split(key, config.num_runs))


def estimates(
    config: Config, problem: Problem, kernel: Kernel, beta: float, key: PRNGKeyArray
) -> tuple[dict[tuple[str, str], tuple[Array, Array, Array]], Array]:
    """(variance ratio, cosine, η) by estimator and baseline."""
    num_obs = problem.pomdp.num_obs
    gradient, solution = gamp_gradient(kernel, problem.pomdp)
    flat = lambda tree: ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))[0]
    truth = flat(gradient)
    results = {}
    for name in ESTIMATORS:
        acting = expected_kernel(kernel) if name == "exp-observations" else kernel
        both = [record(config, problem, acting, k) for k in jr.split(key)]
        average = both[0].reward.mean()
        if name == "istate":
            likelihood: Callable = gpomdp.istate
            memory = jnp.zeros((config.num_runs, 0))
            alphas = [jax.nn.one_hot(trajs.z, config.num_z) for trajs in both]
        elif name == "exp":
            likelihood = partial(gpomdp.exp_istate, num_obs=num_obs)
            memory = jax.nn.one_hot(both[0].z[:, 0], config.num_z)
            law = lambda m, traj: gpomdp.filtered(kernel, m, traj, num_obs=num_obs)
            alphas = [jax.vmap(law)(memory, trajs) for trajs in both]
        else:
            likelihood = partial(gpomdp.exp_istate_by_observations, num_obs=num_obs)
            memory, alphas = both[0].z[:, 0], [trajs.z for trajs in both]
        for baseline in BASELINES:
            shift = 0.0 if baseline == "none" else solution.average_reward
            trajs, apart = (t._replace(reward=t.reward - shift) for t in both)
            weight = jax.vmap(lambda traj: gpomdp.returns(traj, beta))(trajs)
            if baseline in ("value", "state"):
                view = critic_view if baseline == "state" else policy_view
                places = len(problem.pomdp.start) if baseline == "state" else num_obs
                returns = jax.vmap(lambda traj: gpomdp.returns(traj, beta))(apart)
                values = gpomdp.collect(alphas[1], view(apart.obs), returns, num_places=places)
                weight -= gpomdp.value_baseline(values, alphas[0], view(trajs.obs))

            def one(memory, traj, weight, likelihood=likelihood):
                single = jax.tree.map(lambda x: x[None], (memory, traj, weight))
                return flat(gpomdp.gradient(likelihood, kernel, *single))

            each = jax.vmap(one)(memory, trajs, weight)
            mean = each.mean(0)
            variance = jnp.sum(each.var(0, ddof=1)) / jnp.sum(truth**2)
            cosine = mean @ truth / (jnp.linalg.norm(mean) * jnp.linalg.norm(truth))
            results[name, baseline] = variance, cosine, average
    return results, solution.converged


def measure(config: Config, problem: Problem) -> list[Row]:
    run = jax.jit(lambda kernel, beta, key: estimates(config, problem, kernel, beta, key))
    rows = []
    for std in config.stds:
        drawn = options.ProblemConfig(config.problem, config.num_z, config.out_degree, std)
        for beta in config.betas:
            some = []
            for i in range(config.num_controllers):
                kernel_key, key = jr.split(jr.fold_in(jr.key(config.seed), i))
                kernel = controllers.make(drawn, problem, key=kernel_key)
                results, converged = run(kernel, beta, key)
                if not converged:
                    raise records.RunError(f"controller {i}, std {std}: GAMP did not converge")
                some.append(results)
            for name, baseline in itertools.product(ESTIMATORS, BASELINES):
                table = np.array([r[name, baseline] for r in some])
                variance, cosine, average = np.median(table, 0)
                least, most = table[:, 0].min(), table[:, 0].max()
                rows.append(Row(std, beta, name, baseline, variance, least, most, cosine, average))
    return rows


def draw(rows: list[Row], path: str, title: str) -> None:
    settings = sorted({(row.std, row.beta) for row in rows})
    figure, axes = plt.subplots(
        1, len(settings), figsize=(2.6 * len(settings) + 1, 3.6), sharey=True, squeeze=False
    )
    for (std, beta), ax in zip(settings, axes[0], strict=True):
        for i, baseline in enumerate(BASELINES):
            some = [r for r in rows if (r.std, r.beta, r.baseline) == (std, beta, baseline)]
            at = np.arange(len(some)) + 0.17 * (i - 1.5)
            middle = np.array([r.variance for r in some])
            limits = np.abs(np.array([[r.least, r.most] for r in some]).T - middle)
            ax.errorbar(at, middle, limits, fmt="o", color=f"C{i}", label=f"baseline: {baseline}")
        ax.set(title=f"logits N(0, {std:g}²), β = {beta:g}", yscale="log")
        ax.set_xticks(range(len(ESTIMATORS)), ["IState", "Exp", "Exp by\nobservations"])
        ax.grid(alpha=0.3, axis="y")
    axes[0, 0].set_ylabel("variance of one estimate / ‖∇η‖²\nmedian and range of controllers")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle(title)
    figure.legend(handles, labels, loc="outside lower center", ncol=4, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(config: Config) -> None:
    jax.config.update("jax_enable_x64", True)
    check(config)
    problem = options.open_problem(config)
    out = records.open_run(config, "gpomdp-variance", resumable=False)
    rows = measure(config, problem)
    with (out / "gpomdp_variance.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *rows])
    title = f"{problem.name}, {config.num_z} I-states, out-degree {config.out_degree}"
    draw(rows, str(out / "gpomdp_variance.png"), f"{title}, T = {config.num_steps}")
    print(tables.table([row._asdict() for row in rows], keep=4))
    print(f"written to {out}")


if __name__ == "__main__":
    cli.once(Config, main)
