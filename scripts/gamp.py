"""GAMP: exact policy gradients of the average reward for finite-state controllers.

Aberdeen & Baxter (2002), with their optimiser CONJPOMDP, or with Adam. An update is one gradient.

    python scripts/gamp.py --problem heavenhell --num-z 20
    python scripts/gamp.py --problem model.POMDP --num-z 8 --out-degree 2
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from spg.exact import conjugate, natural
from spg.exact.gamp import direct_gradient, gamp_gradient, long_run
from spg.exact.solvers import bicgstab, gmres, krylov_bias, krylov_stationary, power, richardson
from spg.kernels.finite import noise_free
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.limits import Constant, Count, Needs, NonNegative, Positive, Range, check
from spg.rollout import Evaluation
from spg.training import cli, controllers, loop, metrics, options
from spg.training.loop import Report, State
from spg.worlds.models import POMDP, Problem, SparsePOMDP, dense


@dataclass(frozen=True)
class Config(options.ProblemConfig, options.RunConfig):
    """The training, e.g. --num-updates 200 --optimiser adam --learning-rate 0.1"""

    num_updates: Count = 600
    """gradients of each seed"""
    eval_episodes: Annotated[Count, Needs()] = 16
    """none: evaluations are exact"""
    optimiser: Literal["conjugate", "natural", "adam"] = "conjugate"
    """CONJPOMDP with GSEARCH; natural gradients within a trust region; or Adam"""
    costs: tuple[NonNegative, ...] = (1.0,)
    """a continuation: negative rewards are multiplied by these, one after the other, each for an
    equal share of the gradients; what ends in 1 ends with the problem itself"""
    learning_rate: Annotated[Positive, Needs(optimiser="adam")] = 0.05
    """of Adam; falls linearly to 0"""
    bound: Annotated[float, Range(0, 300, open="low", usual="5 to 20 is usual")] = 12.0
    """logits are kept in [-bound, bound], away from saturation"""
    solver: Literal["arnoldi", "gmres", "bicgstab", "damped", "direct"] = "arnoldi"
    """of the stationary distribution and of the Poisson equation (with arnoldi, by bicgstab and
    gmres); direct is one LU factorisation, the quickest up to a few thousand joint states"""
    beta: Annotated[float, Range(0, 1), Constant, Needs(solver="direct")] = 1.0
    """below 1: follow not ∇η but the exact mean of the estimates of `gpomdp.py` with this β"""
    precision: Literal["double", "single"] = "double"
    """of the arithmetic; gradients at a zero start may be as small as 1e-7"""


class Learned(NamedTuple):
    kernel: Kernel  # the controller so far
    optimiser: PyTree  # an Ascent of `conjugate` or `natural`, or the state of Adam


SOLVERS = {
    "arnoldi": {},
    "gmres": {
        "stationary": partial(krylov_stationary, solver=gmres),
        "bias": partial(krylov_bias, solver=gmres),
    },
    "bicgstab": {
        "stationary": partial(krylov_stationary, solver=bicgstab),
        "bias": partial(krylov_bias, solver=bicgstab),
    },
    "damped": {"stationary": power, "bias": richardson},
}


def adam(config: Config) -> optax.GradientTransformation:
    total = config.num_updates
    return optax.adam(lambda count: config.learning_rate * (1 - count / total))


def begin(config: Config, params: PyTree) -> PyTree:
    """The optimiser at these parameters."""
    starts = {"conjugate": conjugate.init, "natural": natural.init, "adam": adam(config).init}
    return starts[config.optimiser](params)


def init(config: Config, problem: Problem, key: PRNGKeyArray) -> State:
    kernel = controllers.make(config, problem, key=key)
    params = eqx.filter(kernel, trainable(kernel))
    return State(Learned(kernel, begin(config, params)), jnp.zeros((), jnp.int32), key)


def at_stage(config: Config, pomdp: SparsePOMDP, turn: Array) -> tuple[SparsePOMDP, Array]:
    """The world of gradient number `turn`, and whether a stage opens with it."""
    stage = lambda turn: jnp.floor((turn + 0.5) * len(config.costs) / config.num_updates)
    scale = jnp.asarray(config.costs, pomdp.reward.dtype)[stage(turn).astype(int)]
    reward = jnp.where(pomdp.reward < 0, scale, 1) * pomdp.reward
    opens = stage(turn) != stage(turn - 1)  # the first gradient opens nothing that `init` had not
    return eqx.tree_at(lambda pomdp: pomdp.reward, pomdp, reward), opens


def step(config: Config, problem: Problem, state: State) -> tuple[State, Report]:
    """One gradient, at a trial point of the line search or where Adam stands."""
    kernel, ascent = state.learned
    params, static = eqx.partition(kernel, trainable(kernel))
    settings = conjugate.Settings(bound=config.bound)
    pomdp, opens = at_stage(config, problem.pomdp, state.world)
    if config.optimiser != "adam":  # a value of another stage is none to compare with
        new = begin(config, params)
        ascent = jax.tree.map(lambda new, old: jnp.where(opens, new, old), new, ascent)
    if config.optimiser == "conjugate":
        params = conjugate.ask(ascent, settings)
    elif config.optimiser == "natural":
        params = natural.ask(ascent, bound=config.bound)
    kernel = eqx.combine(params, static)
    if config.solver == "direct":
        gradient, solution = direct_gradient(kernel, dense(pomdp), beta=config.beta)
    else:
        gradient, solution = gamp_gradient(kernel, pomdp, **SOLVERS[config.solver])
    gradient, value = eqx.filter(gradient, trainable(kernel)), solution.average_reward
    if config.optimiser == "conjugate":
        ascent = conjugate.tell(ascent, settings, value, gradient)
        params, value = ascent.params, ascent.value
    elif config.optimiser == "natural":
        direction = natural.natural_gradient(kernel, gradient, pomdp, solution.stationary)
        ascent = natural.tell(ascent, params, value, gradient, direction)
        params, value = ascent.params, ascent.value
    else:
        descent = jax.tree.map(jnp.negative, gradient)
        updates, ascent = adam(config).update(descent, ascent, params)
        moved = optax.apply_updates(params, updates)
        params = jax.tree.map(lambda x: jnp.clip(x, -config.bound, config.bound), moved)
    watched = {
        "gradient_norm": optax.tree.norm(gradient),
        "stationary_error": solution.stationary_error,
        "bias_error": solution.bias_error,
        "products": solution.products.sum(),
        "converged": solution.converged * 1.0,
    }
    learned = Learned(eqx.combine(params, static), ascent)
    return State(learned, state.world + 1, state.key), Report(value, jnp.ones(()), watched)


def evaluate(problem: Problem, state: State, key: PRNGKeyArray) -> Evaluation:
    """η of the controller, and of the one that always does what is most probable.

    The latter may have several recurrent classes, or leave one slowly.
    """
    kernel = state.learned.kernel
    hard = noise_free(kernel, problem.pomdp.num_obs)
    return Evaluation(*(average_reward(x, problem.pomdp) for x in (kernel, hard)))


def average_reward(kernel: Kernel, pomdp: POMDP) -> Array:
    """η from the start, and nan where the stationary distribution may be off by 1e-3 or more."""
    no_bias = lambda pull, gain, stationary, tol: (jnp.zeros_like(gain), jnp.zeros((), int))
    solution = long_run(kernel, pomdp, bias=no_bias)
    return jnp.where(solution.stationary_error < 1e-3, solution.average_reward, jnp.nan)


def export(problem: Problem, learned: Learned, out: Path) -> None:
    """Save and draw the best controller, and say so where a gradient is not to be trusted."""
    from spg.training import graphs  # here: matplotlib takes a second to load

    graphs.save_best(learned.kernel, problem, out)
    converged = metrics.read_metrics(out)["converged"]
    if failed := int((converged == 0).sum()):
        print(
            f"{failed} of {converged.size} gradients did not converge, see the errors in "
            "metrics.csv: several recurrent classes, or nearly; a smaller --bound or another "
            "--solver would be the first thing to try",
            file=sys.stderr,
        )


def make(config: Config) -> loop.Algorithm:
    """What `loop.run` takes, in JAX's present precision. Raises ValueError for what cannot run."""
    check(config)
    problem = options.open_problem(config)
    direct = config.solver == "direct"
    size = len(problem.pomdp.start) * config.num_z
    options.check_controller(config, problem, basis=20 + 3 * size * direct)
    if not 1 <= len(config.costs) <= config.num_updates:
        raise ValueError(
            f"costs has {len(config.costs)} numbers; {config.num_updates} gradients are shared by "
            f"1 to {config.num_updates}, and `--costs 1` is the problem itself"
        )
    return cli.of_controllers(
        problem,
        f"GAMP, {config.num_z} I-states, out-degree {config.out_degree}",
        name="gamp",
        init=cli.with_floats(init, config, problem),
        step=cli.with_floats(step, config, problem),
        floats=cli.floats(config, config.num_updates, 0),
        evaluate=partial(evaluate, problem),
        export=partial(export, problem),
        num_updates=config.num_updates,
        steps_per_update=0,
        sharded=False,
    )


def make_precise(config: Config) -> loop.Algorithm:
    """`make`, after setting the precision of this process."""
    jax.config.update("jax_enable_x64", config.precision == "double")
    return make(config)


if __name__ == "__main__":
    cli.main(Config, make_precise, cores=False)  # of lineax 0.1.1 GMRES does not run when sharded
