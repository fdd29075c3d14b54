"""IState-GPOMDP and Exp-GPOMDP: the average reward of finite-state controllers from simulation.

Aberdeen & Baxter (2002). An update is one gradient from endless trajectories that go on where the
last ones stopped, with empty traces. A baseline of values also stands in for the rewards after a
segment, and the last action of each is left out.

    python scripts/gpomdp.py                   # Exp-GPOMDP on Load/Unload
    python scripts/gpomdp.py --problem heavenhell --num-z 20 --estimator istate
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from spg.estimators import gpomdp
from spg.estimators.returns import gae
from spg.exact import conjugate
from spg.kernels.finite import expected_kernel
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.limits import Count, Fraction, Needs, NonNegative, Positive, Range, Total, check, fits
from spg.rollout import Carry, Evaluation, evaluation, reset, rollout
from spg.training import cli, controllers, loop, options
from spg.training.devices import reduce_envs, vmap_envs
from spg.training.loop import Report, State
from spg.types import Env, Transition, critic_view
from spg.worlds.models import Problem


@dataclass(frozen=True)
class Config(options.ProblemConfig, options.RunConfig):
    """The training, e.g. --estimator istate --total-steps 2e6 --beta 0.9 --baseline reward"""

    estimator: Literal["istate", "exp", "exp-observations"] = "exp"
    """IState-GPOMDP; Exp-GPOMDP with the actions filtered; the same by observations alone, which is
    the gradient of another policy, and that one acts"""
    total_steps: Total = 10_000_000
    """environment steps of each seed"""
    num_envs: Count = 100
    """endless trajectories, side by side"""
    num_steps: Count = 200
    """steps of each in a segment, whose traces start empty"""
    num_segments: Count = 1
    """segments in a gradient, one after the other; memory is taken for one"""
    beta: Annotated[float, Range(0, 1, open="high")] = 0.95
    """discount of the eligibility trace"""
    baseline: Literal["none", "reward", "value", "state"] = "state"
    """subtract from the rewards their running mean; then also a running value of the I-state and
    the observation, or of the I-state and the hidden state, which the simulator knows"""
    gae_lambda: Fraction = 1.0
    """below 1, an action is credited by later values too: generalised advantage, of the baseline"""
    optimiser: Literal["adam", "conjugate"] = "adam"
    """Adam, or CONJPOMDP with GSEARCH"""
    learning_rate: Annotated[Positive, Needs(optimiser="adam")] = 0.02
    """of Adam; falls linearly to 0"""
    adam_eps: Annotated[NonNegative, Needs(optimiser="adam")] = 1e-8
    """added to the root mean square of a gradient's entry; where it dominates Adam is SGD, which
    leaves alone what has no gradient, as most of a large controller at a flat start"""
    first_step: Annotated[Positive, Needs(optimiser="conjugate")] = 1.0
    """of GSEARCH: the multiple of the direction at which each search begins to double or halve"""
    tolerance: Annotated[NonNegative, Needs(optimiser="conjugate")] = 1e-6
    """of GSEARCH: inner products of gradients below it are noise"""
    bound: Annotated[float, Range(0, 300, open="low", usual="5 to 20 is usual")] = 12.0
    """logits are kept in [-bound, bound], away from saturation"""
    eval_steps: Count = 2_000
    """length of the episodes of an evaluation"""

    @property
    def gradient_steps(self) -> int:
        """T, the environment steps of an estimate."""
        return self.num_envs * self.num_steps * self.num_segments

    @property
    def num_updates(self) -> int:
        return self.total_steps // self.gradient_steps


class Baseline(NamedTuple):
    """Running means over the past updates, none of which saw the present one's data."""

    reward: Float[Array, ""]
    values: gpomdp.ValueTable


class Learned(NamedTuple):
    kernel: Kernel
    optimiser: PyTree  # an Ascent, or the state of Adam


class World(NamedTuple):
    carry: Carry  # of each environment
    baseline: Baseline


def adam(config: Config) -> optax.GradientTransformation:
    total = config.num_updates
    return optax.adam(lambda i: config.learning_rate * (1 - i / total), eps=config.adam_eps)


def acting(config: Config, kernel: Kernel) -> Kernel:
    return expected_kernel(kernel) if config.estimator == "exp-observations" else kernel


def line_search(config: Config) -> conjugate.Settings:
    """CONJPOMDP as published: it never ends, and never looks at an average reward."""
    return conjugate.Settings(
        config.first_step, config.tolerance, stop=0.0, bound=config.bound, safeguard=False
    )


def num_places(config: Config, problem: Problem) -> int:
    """The size of what a baseline looks at."""
    return len(problem.pomdp.start) if config.baseline == "state" else problem.pomdp.num_obs


def init(config: Config, problem: Problem, env: Env, key: PRNGKeyArray) -> State:
    kernel_key, reset_key, key = jr.split(key, 3)
    kernel = controllers.make(config, problem, key=kernel_key)
    params = eqx.filter(kernel, trainable(kernel))
    start = conjugate.init if config.optimiser == "conjugate" else adam(config).init
    table = jnp.zeros((config.num_z, num_places(config, problem)))
    carry = jax.vmap(lambda key: reset(acting(config, kernel), env, key=key))(
        jr.split(reset_key, config.num_envs)
    )
    baseline = Baseline(jnp.zeros(()), gpomdp.ValueTable(table, table))
    return State(Learned(kernel, start(params)), World(carry, baseline), key)


def estimate(
    config: Config, problem: Problem, kernel: Kernel, baseline: Baseline, trajs: Transition
) -> tuple[Kernel, Baseline]:
    """The gradient, and the baseline with these trajectories taken in."""
    num_obs = problem.pomdp.num_obs
    one_hot = lambda z: jax.nn.one_hot(z, config.num_z)
    if config.estimator == "istate":
        likelihood, memory = gpomdp.istate, jnp.zeros((config.num_envs, 0))
        alpha = one_hot(trajs.z)
    elif config.estimator == "exp":
        likelihood = partial(gpomdp.exp_istate, num_obs=num_obs)
        memory = one_hot(trajs.z[:, 0])
        filtered = partial(gpomdp.filtered, kernel, num_obs=num_obs)
        alpha = jax.vmap(lambda memory, traj: filtered(memory, traj))(memory, trajs)
    else:
        likelihood = partial(gpomdp.exp_istate_by_observations, num_obs=num_obs)
        memory, alpha = trajs.z[:, 0], trajs.z
    drawn = trajs.z if config.estimator == "exp-observations" else one_hot(trajs.z)
    mean = trajs.reward.mean()
    rewards = trajs.reward - (0 if config.baseline == "none" else baseline.reward)
    trajs = trajs._replace(reward=rewards)
    returns = jax.vmap(lambda traj: gpomdp.returns(traj, config.beta))(trajs)
    weight = returns
    if config.baseline in ("value", "state"):
        place = critic_view(trajs.obs)
        value = gpomdp.value_baseline(baseline.values, alpha, place)
        advantage = partial(gae, gamma=config.beta, gae_lambda=config.gae_lambda)
        facts = trajs.reward, value, value[:, 1:], trajs.terminated, trajs.truncated
        weight = jax.vmap(lambda *x: advantage(*x))(*(x[:, : config.num_steps - 1] for x in facts))
        weight = jnp.pad(weight, ((0, 0), (0, 1)))  # nothing follows the last action
        collect = partial(gpomdp.collect, num_places=num_places(config, problem))
        new = reduce_envs(lax.psum, collect, (0, 0, 0))(drawn, place, returns)
        values = jax.tree.map(lambda old, new: 0.9 * old + new, baseline.values, new)
        baseline = baseline._replace(values=values)
    ascent = reduce_envs(lax.pmean, partial(gpomdp.gradient, likelihood), (None, 0, 0, 0))
    gradient = ascent(kernel, memory, trajs, weight)
    return gradient, baseline._replace(reward=0.9 * baseline.reward + 0.1 * mean)


def step(config: Config, problem: Problem, env: Env, state: State) -> tuple[State, Report]:
    """One gradient, at a trial point of the line search or where Adam stands."""
    key, rollout_key = jr.split(state.key)
    kernel, ascent = state.learned
    params, static = eqx.partition(kernel, trainable(kernel))
    settings = line_search(config)
    if config.optimiser == "conjugate":
        params = conjugate.ask(ascent, settings)
    kernel = eqx.combine(params, static)

    def run(kernel, carry, key):
        return rollout(kernel, env, carry, num_steps=config.num_steps, key=key)[:2]

    def segment(world, keys):
        envs = vmap_envs(run, (None, 0, 0))
        carry, trajs = envs(acting(config, kernel), world.carry, keys)
        gradient, baseline = estimate(config, problem, kernel, world.baseline, trajs)
        found = eqx.filter(gradient, trainable(gradient)), trajs.reward.mean()
        return World(carry, baseline), found

    keys = jr.split(rollout_key, (config.num_segments, config.num_envs))
    world, found = lax.scan(segment, state.world, keys)
    gradient, value = jax.tree.map(lambda x: x.mean(0), found)
    watched = {"gradient_norm": optax.tree.norm(gradient)}
    if config.optimiser == "conjugate":
        ascent = conjugate.tell(ascent, settings, value, gradient)
        params = ascent.params
        watched["searches"] = ascent.searches * 1.0
    else:
        descent = jax.tree.map(jnp.negative, gradient)
        updates, ascent = adam(config).update(descent, ascent, params)
        moved = optax.apply_updates(params, updates)
        params = jax.tree.map(lambda x: jnp.clip(x, -config.bound, config.bound), moved)
    learned = Learned(eqx.combine(params, static), ascent)
    return State(learned, world, key), Report(value, jnp.ones(()), watched)


def evaluate(config: Config, env: Env, state: State, key: PRNGKeyArray) -> Evaluation:
    """Average reward of fresh episodes of the policy that acts."""
    kernel, num = acting(config, state.learned.kernel), config.eval_episodes
    returns = evaluation(kernel, env, num_episodes=num, max_steps=config.eval_steps, key=key)
    return Evaluation(*(x / config.eval_steps for x in returns))


def make(config: Config) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    from spg.envs import Tabular  # here: importing gymnax starts JAX's backend

    check(config)
    valued = config.baseline in ("value", "state")
    if config.gae_lambda < 1 and not valued:
        raise ValueError(f"gae_lambda {config.gae_lambda} needs --baseline value or state")
    if config.num_steps < 2 and valued:
        raise ValueError(f"num_steps is {config.num_steps}; this baseline needs at least 2")
    each = f"{config.num_envs} x {config.num_steps} steps"
    options.check_updates(config, config.num_updates, f"{config.gradient_steps:,} steps")
    problem = options.open_problem(config)
    options.check_controller(config, problem)
    size = 4 * config.num_seeds * config.num_envs * config.num_steps * (8 + config.num_z)
    fits(size, f"{config.num_seeds} seeds x {each}", on_device=True)
    env = Tabular(problem.pomdp, privileged=config.baseline == "state")
    env = Env(env, env.default_params)
    return cli.of_controllers(
        problem,
        f"{config.estimator}, {config.num_z} I-states",
        name="gpomdp",
        init=cli.with_floats(init, config, problem, env),
        step=cli.with_floats(step, config, problem, env),
        floats=cli.floats(config, config.num_updates, config.gradient_steps),
        kernel=lambda state: acting(config, state.learned.kernel),
        evaluate=partial(evaluate, config, env),
        num_updates=config.num_updates,
        steps_per_update=config.gradient_steps,
        num_envs=config.num_envs,
    )


if __name__ == "__main__":
    cli.main(Config, make)
