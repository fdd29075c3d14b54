"""SAC for stateful policies, SAC-RS of Al-Hafez et al. (2024), algorithm 2; its baselines.

An update is a rollout of every environment into the buffer, then gradient steps on samples of it.

    python scripts/sac.py                  # S2PG on the memory point mass
    python scripts/sac.py --memory bptt    # by backpropagation through time
    python scripts/sac.py --env brax/ant --observe positions --total-steps 1e6
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from spg.estimators.actor_critic import (
    Choice,
    choose,
    polyak,
    q_target,
    soft_loss,
    temperature_loss,
)
from spg.kernels.critics import QCritic
from spg.kernels.factory import make_kernel
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Flat
from spg.limits import Needs, Positive, Range
from spg.scans import join_segments
from spg.training import cli, loop, replay
from spg.training.descent import adam, descend, improve, regress
from spg.training.loop import Report, State
from spg.training.off_policy import (
    OffPolicyConfig,
    algorithm,
    begin,
    staleness,
    update,
)
from spg.types import Env, Transition


@dataclass(frozen=True)
class Config(OffPolicyConfig):
    """The training, e.g. --total-steps 1e6 --batch-size 256 --state-temperature 0.1"""

    actions: Literal["tanh-normal"] = "tanh-normal"
    action_std: Annotated[float, Range(1e-6, 5)] = 1.0
    """of the normal under the tanh, at the start"""
    temperature: Positive = 0.01
    """τ_a, the weight of the entropy of actions, at the start"""
    learn_temperature: bool = True
    """keep the entropy of actions at --target-entropy"""
    target_entropy: Annotated[float, Range(-100, 0.69), Needs(learn_temperature="True")] = -0.3
    """nats for each dimension of an action; 0.69 is that of uniform ones, -1 usual for robots"""
    state_temperature: Annotated[Positive, Needs(memory="s2pg")] = 1e-6
    """τ_z, the weight of the entropy of z', at the start (s2pg); 0.01 in the paper, for rewards of
    about 1 a step"""
    learn_state_temperature: Annotated[bool, Needs(memory="s2pg")] = False
    """keep the entropy of z' at --state-target-entropy (s2pg)"""
    state_target_entropy: Annotated[
        float, Range(-100, 100), Needs(memory="s2pg", learn_state_temperature="True")
    ] = -1.0
    """nats for each entry of z' (s2pg)"""


class Learned(NamedTuple):
    kernel: Kernel
    critic: QCritic
    slow: QCritic  # the target networks
    log_temperature: Float[Array, "2"]  # of actions, of z'
    opt_states: tuple[optax.OptState, optax.OptState, optax.OptState]
    expert: replay.Ring | None = None  # the demonstrations, of an imitator: lsiq.py

    @property
    def temperatures(self) -> Float[Array, "2"]:
        """τ_a and τ_z."""
        return jnp.exp(self.log_temperature)


def init(
    config: Config, env: Env, key: PRNGKeyArray, *, policy: Callable[..., Kernel] = make_kernel
) -> State:
    """Fresh networks and a buffer with the first steps."""
    begin_key, key = jr.split(key)
    kernel, critic, world = begin(config, env, begin_key, policy=policy)
    log_temperature = jnp.log(jnp.array([config.temperature, config.state_temperature]))
    opt_states = adam(kernel), adam(critic), adam(log_temperature)
    return State(Learned(kernel, critic, critic, log_temperature, opt_states), world, key)


def step(config: Config, env: Env, state: State) -> tuple[State, Report]:
    """One update: a rollout of every environment, then gradient steps."""
    return update(config, env, partial(gradient_step, config), config.num_gradients, state)


def gradient_step(
    config: Config, state: tuple[Learned, replay.Ring], key: PRNGKeyArray
) -> tuple[tuple[Learned, replay.Ring], dict[str, Array]]:
    """Policy and temperatures, then critics, on one sample of the buffer."""
    place_key, policy_key, next_key = jr.split(key, 3)
    learned, ring = state
    place = replay.places(ring, **config.sample, key=place_key)
    segments = replay.take(ring, place)
    kernel, kernel_state, actor_loss, choice = actor_step(config, learned, segments, policy_key)
    log_temperature, temperature_state = temperature_step(config, learned, choice)
    if config.last:
        segments, place = jax.tree.map(lambda x: x[:, -1:], (segments, place))
    steps, z_next = join_segments((segments, choice.z_next))
    goal = targets(config, learned._replace(kernel=kernel), steps, z_next, next_key)
    critic, critic_state, metrics = regress(
        config.learning_rate, learned.critic, learned.opt_states[1], steps, z_next, goal
    )
    slow = polyak(learned.slow, critic, config.target_rate)
    metrics |= {
        "actor_loss": actor_loss,
        "entropy": -choice.log_prob_action.mean(),
        "entropy_z": -choice.log_prob_z.mean(),
        "temperature": learned.temperatures[0],
        "state_temperature": learned.temperatures[1],
        "staleness": staleness(choice.z_next, segments.z_next),
    }
    if config.refreshes:
        ring = replay.refresh(ring, place, choice.z_next)
    opt_states = kernel_state, critic_state, temperature_state
    return (Learned(kernel, critic, slow, log_temperature, opt_states), ring), metrics


def actor_step(
    config: Config, learned: Learned, segments: Transition, key: PRNGKeyArray
) -> tuple[Kernel, optax.OptState, Array, Choice]:
    """A step of the policy on segments `[S, L]`, its loss, and what it chose before the step."""
    keys = jr.split(key, len(segments.reward))
    temperature, state_temperature = learned.temperatures
    weights = {"temperature": temperature, "state_temperature": state_temperature}

    def loss(kernel):
        one = lambda x, key: choose(kernel, learned.critic, x, last=config.last, key=key)
        choice = jax.vmap(one)(segments, keys)
        return jnp.mean(jax.vmap(partial(soft_loss, **weights))(choice)), choice

    rates = config.actor_learning_rate, config.state_learning_rate
    return improve(*rates, loss, learned.kernel, learned.opt_states[0])


def temperature_step(
    config: Config, learned: Learned, choice: Choice
) -> tuple[Float[Array, "2"], optax.OptState]:
    """A step of those temperatures that are learned, which keep entropies at their targets."""

    def loss(log_temperature):
        sizes = choice.action.shape[-1], Flat()(learned.kernel.z0).size
        goals = config.target_entropy * sizes[0], config.state_target_entropy * sizes[1]
        learn = config.learn_temperature, config.learn_state_temperature
        log_probs = choice.log_prob_action, choice.log_prob_z
        parts = zip(learn, log_temperature, log_probs, goals, strict=True)
        losses = [yes * jnp.mean(temperature_loss(x, p, goal)) for yes, x, p, goal in parts]
        return jnp.stack(losses).sum(), None

    old, state = learned.log_temperature, learned.opt_states[2]
    log_temperature, state, _, _ = descend(config.learning_rate, loss, old, state)
    return log_temperature, state


def targets(
    config: Config, learned: Learned, steps: Transition, z_next: PyTree, key: PRNGKeyArray
) -> Float[Array, " B"]:
    """What the critics regress on at steps `[B]`, whose z' is `z_next`."""

    def one(step, z_next, key):
        choice = learned.kernel.sample_and_log_prob(step.final_obs, z_next, key=key)
        action, z_after, log_prob = choice
        q_next = learned.slow(step.final_obs, action, z_after)
        bonus = -learned.temperatures[0] * log_prob.action
        return q_target(step.reward, step.terminated, q_next, bonus, gamma=config.gamma)

    return jax.vmap(one)(steps, z_next, jr.split(key, len(steps.reward)))


def make(config: Config, *, policy: Callable[..., Kernel] = make_kernel) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    return algorithm(config, "sac", init=partial(init, policy=policy), step=step)


if __name__ == "__main__":
    cli.main(Config, make)
