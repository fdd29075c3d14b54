"""REINFORCE and GPOMDP for stateful policies, with variance-optimal baselines.

REINFORCE-RS and GPOMDP-RS of Al-Hafez et al. (2024): the score of the joint distribution of actions
and internal states, so that nothing is propagated back through time.

    python scripts/reinforce.py                # S2PG-REINFORCE on RepeatFirst
    python scripts/reinforce.py --estimator gpomdp --memory bptt
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
from jaxtyping import PRNGKeyArray

from spg.estimators.score import episodic_gpomdp, reinforce, score_estimate
from spg.estimators.statistics import observe, start_statistics
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.limits import Fraction, Needs, Range, Total, check
from spg.rollout import reset, rollout
from spg.training import cli, loop, options
from spg.training.devices import vmap_envs
from spg.training.loop import Report, State
from spg.types import Env, Transition, policy_view


@dataclass(frozen=True)
class Config(options.EnvConfig, PolicyConfig, options.RunConfig):
    """The training, e.g. --estimator gpomdp --total-steps 5e5 --num-envs 128 --gamma 0.99"""

    env: str = "RepeatFirst-memory"
    observe: Literal["all", "positions", "velocities", "state", "nothing"] = "all"
    privileged: Annotated[bool, Needs()] = False
    """show the critic the full state; there is none here"""
    estimator: Literal["reinforce", "gpomdp"] = "reinforce"
    """each action is credited with the whole return, or with what follows it"""
    total_steps: Total = 1_000_000
    """environment steps of each seed, after first episodes for the statistics of observations"""
    num_envs: Annotated[int, Range(2, 2**31 - 1, whole=True, usual="baselines need two")] = 64
    """episodes of one gradient"""
    num_steps: Annotated[int, Range(0, 2**31 - 1, whole=True)] = 0
    """T, the horizon, at which episodes are cut; 0: the longest episode of the environment"""
    learning_rate: Annotated[float, Range(0, open="low", usual="1e-3 to 1e-1 is usual")] = 1e-2
    """of Adam; falls linearly to 0"""
    gamma: Fraction = 1.0
    """discount"""


class Learned(NamedTuple):
    kernel: Kernel
    opt_state: optax.OptState


def horizon(config: Config, env: Env) -> int:
    return config.num_steps or options.longest_episode(env)


def num_updates(config: Config, env: Env) -> int:
    return config.total_steps // (config.num_envs * horizon(config, env))


def optimiser(config: Config, env: Env) -> optax.GradientTransformation:
    total = num_updates(config, env)
    return optax.adam(lambda count: config.learning_rate * (1 - count / total))


def init(config: Config, env: Env, key: PRNGKeyArray) -> State:
    """A fresh kernel, with the statistics of as many episodes as an update has."""
    kernel_key, episode_key, key = jr.split(key, 3)
    kernel = make_kernel(config, env.spec, key=kernel_key)
    kernel = start_statistics(kernel, policy_view(episodes(config, env, kernel, episode_key).obs))
    opt_state = optimiser(config, env).init(eqx.filter(kernel, trainable(kernel)))
    return State(Learned(kernel, opt_state), (), key)


def episodes(config: Config, env: Env, kernel: Kernel, key: PRNGKeyArray) -> Transition:
    """`num_envs` rollouts over the horizon, from fresh starts."""
    start_keys, keys = (jr.split(key, config.num_envs) for key in jr.split(key))

    def run(kernel, start, key):
        return rollout(kernel, env, start, num_steps=horizon(config, env), key=key)[1]

    start = vmap_envs(lambda kernel, key: reset(kernel, env, key=key), (None, 0))
    return vmap_envs(run, (None, 0, 0))(kernel, start(kernel, start_keys), keys)


def step(config: Config, env: Env, state: State) -> tuple[State, Report]:
    """One update: fresh episodes, one gradient."""
    key, episode_key = jr.split(state.key)
    kernel, opt_state = state.learned
    num_steps = horizon(config, env)
    trajs = episodes(config, env, kernel, episode_key)

    ended = jnp.cumsum(trajs.terminated | trajs.truncated, 1)
    alive = jnp.pad(ended[:, :-1], ((0, 0), (1, 0))) == 0  # up to the first end, included
    reward = trajs.reward * alive
    discounted = reward * config.gamma ** jnp.arange(num_steps)
    length = config.length(num_steps)
    if config.estimator == "reinforce":
        score = jax.vmap(partial(score_estimate, kernel, segment_length=length))(trajs, alive * 1.0)
        ascent = reinforce(score, discounted.sum(1))
    else:
        ascent = episodic_gpomdp(kernel, trajs, discounted, alive * 1.0, segment_length=length)

    params = eqx.filter(kernel, trainable(kernel))
    descent = jax.tree.map(jnp.negative, eqx.filter(ascent, trainable(kernel)))
    updates, opt_state = optimiser(config, env).update(descent, opt_state, params)
    kernel = observe(eqx.apply_updates(kernel, updates), kernel, trajs)
    report = Report(
        score=reward.sum(1).mean(),
        weight=jnp.float32(config.num_envs),
        metrics={"gradient_norm": optax.global_norm(descent)},
        of_episodes={"episode_length": alive.sum(1).mean()},
    )
    return State(Learned(kernel, opt_state), (), key), report


def make(config: Config) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    check(config)
    env = options.make_env(config, oracle=config.memory == "oracle")
    config.num_segments(horizon(config, env))
    each = f"{config.num_envs} episodes of {horizon(config, env)} steps"
    options.check_updates(config, num_updates(config, env), each)
    steps = config.num_envs * horizon(config, env)
    return cli.in_episodes(
        config, env, config.estimator, name="reinforce", init=init, step=step,
        num_updates=num_updates(config, env), steps_per_update=steps, first_steps=steps,
        num_envs=config.num_envs,
    )  # fmt: skip


if __name__ == "__main__":
    cli.main(Config, make)
