"""Behaviour cloning for stateful policies: the likelihood of an expert's actions, and no rollout.

Where z' is computed the likelihood is exact, and its gradient runs through time (BPTT). Where z' is
drawn (S2PG) a lower bound of the likelihood is raised, the mean of the log-likelihood over z', and
its gradient is that of single steps: see `spg.estimators.clone_surrogate`. The environment serves
to measure returns.

    python scripts/clone.py                 # S2PG on Pendulum from positions; an expert first
    python scripts/clone.py --memory none   # without memory
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import demonstrate
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, Bool, PRNGKeyArray

from spg.estimators.imitation import clone_surrogate
from spg.estimators.statistics import start_statistics
from spg.kernels.factory import DRAWN, PolicyConfig, make_kernel
from spg.kernels.kernel import Kernel
from spg.limits import Count, Fraction, Needs, NonNegative, Positive, Range
from spg.rollout import evaluate
from spg.training import cli, loop, options
from spg.training.demonstrations import Demonstrations
from spg.training.descent import adam, improve
from spg.training.imitation import ImitationConfig, measured, open_demonstrations
from spg.training.loop import Report, State
from spg.types import Env, Transition, policy_view


@dataclass(frozen=True)
class Config(ImitationConfig, options.EnvConfig, PolicyConfig, options.RunConfig):
    """The training, e.g. --num-updates 500 --learning-rate 3e-4 --num-draws 16"""

    env: str = "Pendulum-v1"
    privileged: Annotated[bool, Needs()] = False
    """show the critic the full state; there is none here"""
    memory: Literal["s2pg", "bptt", "window", "none", "oracle"] = "s2pg"
    state_std: Annotated[float, Range(1e-6, 5), Needs(memory="s2pg")] = 0.05
    """standard deviation of the noise on z' at the start, relative to the weight with which a unit
    takes up what is new (s2pg); it is learned"""
    segment_length: Annotated[int, Needs()] = 0
    """steps through which gradients run; here whole episodes"""
    num_updates: Count = 200
    """each of which ends with episodes that measure the return, and are not learned from"""
    num_gradients: Count = 20
    """of an update"""
    batch_episodes: Count = 5
    """whole episodes of the expert in a gradient"""
    num_draws: Annotated[Count, Needs(memory="s2pg")] = 4
    """draws of z' along each of these episodes (s2pg)"""
    learning_rate: Positive = 3e-3
    """of Adam, for the head of the policy"""
    state_learning_rate: Annotated[NonNegative, Needs(memory=DRAWN)] = 1e-4
    """of Adam, for the cell that places z', and its noise (s2pg, bptt)"""
    gamma: Annotated[Fraction, Needs(memory="s2pg")] = 0.9
    """discount of later actions' likelihood in the score of z' (s2pg); 1 is without bias"""
    score_episodes: Count = 16
    """that measure the return of the sampled policy after an update"""


class Learned(NamedTuple):
    kernel: Kernel
    opt_state: optax.OptState


class World(NamedTuple):
    episodes: Transition  # [E, T] the demonstrations; short episodes repeat their last step
    own: Bool[Array, "E T"]  # which steps are no repetitions


def init(
    config: Config, env: Env, key: PRNGKeyArray,
    *, expert: Demonstrations, policy: Callable[..., Kernel] = make_kernel,
) -> State:  # fmt: skip
    """A fresh policy with the statistics of the demonstrations."""
    kernel_key, key = jr.split(key)
    kernel = policy(config, env.spec, key=kernel_key)
    steps = expert.steps(kernel, oracle=config.memory == "oracle", privileged=False)
    kernel = start_statistics(kernel, policy_view(steps.obs))
    rows, own = map(jnp.asarray, expert.episodes)
    episodes = jax.tree.map(lambda x: x[rows], steps)
    return State(Learned(kernel, adam(kernel)), World(episodes, own), key)


def step(config: Config, env: Env, state: State) -> tuple[State, Report]:
    """Gradients of the likelihood, then episodes that measure the return."""
    key, learn_key, score_key = jr.split(state.key, 3)
    learn = partial(gradient_step, config, state.world)
    learned, metrics = lax.scan(learn, state.learned, jr.split(learn_key, config.num_gradients))
    play = partial(
        evaluate, learned.kernel, env, noise=jnp.array(True),
        max_steps=env.params.max_steps_in_episode,
    )  # fmt: skip
    returns = jax.vmap(lambda key: play(key=key))(jr.split(score_key, config.score_episodes))
    weight = jnp.float32(config.score_episodes)
    metrics = jax.tree.map(jnp.mean, metrics)
    return State(learned, state.world, key), Report(returns.mean(), weight, metrics)


def gradient_step(
    config: Config, world: World, learned: Learned, key: PRNGKeyArray
) -> tuple[Learned, dict[str, Array]]:
    """Adam on the likelihood of some episodes."""
    batch_key, key = jr.split(key)
    chosen = jr.permutation(batch_key, len(world.own))[: config.batch_episodes]
    episodes, own = jax.tree.map(lambda x: x[chosen], world)
    drawn = config.memory == "s2pg"
    one = partial(clone_surrogate, num_draws=config.num_draws if drawn else 1, gamma=config.gamma)

    def loss(kernel: Kernel) -> tuple[Array, Any]:
        surrogate, log_prob = jax.vmap(lambda x, key: one(kernel, x, key=key))(
            episodes, jr.split(key, len(own))
        )
        mean = lambda x: jnp.sum(x * own) / own.sum()
        return -mean(surrogate), mean(log_prob)

    rates = config.learning_rate, config.state_learning_rate
    kernel, opt_state, _, log_prob = improve(*rates, loss, *learned)
    return Learned(kernel, opt_state), {"log_likelihood": log_prob}


def make(config: Config, *, policy: Callable[..., Kernel] = make_kernel) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    demonstrate.ensure(config)
    expert = open_demonstrations(config, least=1)
    if config.batch_episodes > (count := len(expert.returns)):
        raise ValueError(
            f"batch_episodes {config.batch_episodes} are more than the {count} of "
            f"{config.demonstrations}"
        )
    options.check_updates(config, config.num_updates, "an update")
    env = options.make_env(config, oracle=config.memory == "oracle")
    start = partial(init, expert=expert, policy=policy)
    algorithm = cli.in_episodes(
        config, env, "Cloning", name="clone", init=start, step=step,
        num_updates=config.num_updates, steps_per_update=0,
    )  # fmt: skip
    return measured(algorithm, expert)


if __name__ == "__main__":
    cli.main(Config, make)
