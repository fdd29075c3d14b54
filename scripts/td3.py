"""TD3 for stateful policies, TD3-RS of Al-Hafez et al. (2024), algorithm 1; its baselines.

An update is a rollout of every environment into the buffer, then gradient steps on samples of it.
With --critics 1 --target-noise 0 --policy-delay 1 it is DDPG, by their theorem 2.3.

    python scripts/td3.py                  # S2PG on the memory point mass
    python scripts/td3.py --memory bptt    # by backpropagation through time
    python scripts/td3.py --env brax/ant --observe positions --total-steps 1e6
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
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from spg.estimators.actor_critic import Smoothing, choose, polyak, q_target, smoothed_choice
from spg.kernels.critics import QCritic
from spg.kernels.factory import make_kernel
from spg.kernels.kernel import Kernel
from spg.limits import Count, NonNegative, Range
from spg.scans import join_segments
from spg.training import cli, loop, replay
from spg.training.descent import adam, improve, regress
from spg.training.loop import Report, State
from spg.training.off_policy import (
    OffPolicyConfig,
    algorithm,
    begin,
    staleness,
    update,
)
from spg.types import Env


@dataclass(frozen=True)
class Config(OffPolicyConfig):
    """The training, e.g. --total-steps 1e6 --batch-size 256 --policy-delay 2"""

    actions: Literal["deterministic"] = "deterministic"
    action_std: Annotated[float, Range(1e-6, 5)] = 0.1
    """of the noise on actions, which explores; it is constant"""
    policy_delay: Count = 2
    """gradient steps of the critics for one of the policy"""
    target_noise: NonNegative = 0.2
    """standard deviation of the noise on actions in targets; on z' it is 2.5 times as much, in
    units of the noise with which z' is drawn"""
    target_clip: NonNegative = 0.5
    """where that noise is cut, likewise"""

    @property
    def smoothing(self) -> Smoothing:
        noise = self.target_noise, self.target_clip
        return Smoothing(*noise, *(2.5 * x for x in noise))


class Learned(NamedTuple):
    kernel: Kernel
    critic: QCritic
    slow: tuple[Kernel, QCritic]  # the target networks
    opt_states: tuple[optax.OptState, optax.OptState]


def init(
    config: Config, env: Env, key: PRNGKeyArray, *, policy: Callable[..., Kernel] = make_kernel
) -> State:
    """Fresh networks and a buffer with the first steps."""
    begin_key, key = jr.split(key)
    kernel, critic, world = begin(config, env, begin_key, policy=policy)
    learned = Learned(kernel, critic, (kernel, critic), (adam(kernel), adam(critic)))
    return State(learned, world, key)


def step(config: Config, env: Env, state: State) -> tuple[State, Report]:
    """One update: a rollout of every environment, then gradient steps."""
    rounds = config.num_gradients // config.policy_delay
    return update(config, env, partial(policy_step, config), rounds, state)


def critic_step(
    config: Config, state: tuple[Learned, replay.Ring], key: PRNGKeyArray
) -> tuple[tuple[Learned, replay.Ring], dict[str, Array]]:
    """The critics on one sample of the buffer, whose z' is drawn anew."""
    place_key, state_key, target_key = jr.split(key, 3)
    (kernel, critic, slow, opt_states), ring = state
    place = replay.places(ring, **config.sample, key=place_key)
    segments = replay.take(ring, place)
    keys = jr.split(state_key, len(segments.reward))
    z_next = jax.vmap(lambda segment, key: kernel.roll(segment, key=key).z_next)(segments, keys)
    fresh = staleness(z_next, segments.z_next)
    if config.last:
        segments, place, z_next = jax.tree.map(lambda x: x[:, -1:], (segments, place, z_next))
    if config.refreshes:
        ring = replay.refresh(ring, place, z_next)
    steps, z_next = join_segments((segments, z_next))
    slow_kernel, slow_critic = slow

    def regress_on(step, z_next, key):
        choice = smoothed_choice(slow_kernel, step.final_obs, z_next, config.smoothing, key=key)
        q_next = slow_critic(step.final_obs, *choice)
        return q_target(step.reward, step.terminated, q_next, gamma=config.gamma)

    goal = jax.vmap(regress_on)(steps, z_next, jr.split(target_key, len(steps.reward)))

    critic, critic_state, metrics = regress(
        config.learning_rate, critic, opt_states[1], steps, z_next, goal
    )
    slow = polyak(slow, (kernel, critic), config.target_rate)
    learned = Learned(kernel, critic, slow, (opt_states[0], critic_state))
    return (learned, ring), metrics | {"staleness": fresh}


def policy_step(
    config: Config, state: tuple[Learned, replay.Ring], key: PRNGKeyArray
) -> tuple[tuple[Learned, replay.Ring], dict[str, Array]]:
    """`policy_delay` steps of the critics, then one of the policy, on a sample of its own."""
    place_key, *keys = jr.split(key, 1 + config.policy_delay)
    (learned, ring), metrics = lax.scan(partial(critic_step, config), state, jnp.stack(keys))
    place = replay.places(ring, **config.sample, key=place_key)
    segments = replay.take(ring, place)

    def loss(kernel):
        one = lambda x: choose(kernel, learned.critic, x, last=config.last, key=None).q_value
        return -jnp.mean(jax.vmap(one)(segments)), None

    rates = config.actor_learning_rate, config.state_learning_rate
    kernel, kernel_state, actor_loss, _ = improve(
        *rates, loss, learned.kernel, learned.opt_states[0]
    )
    opt_states = kernel_state, learned.opt_states[1]
    learned = learned._replace(kernel=kernel, opt_states=opt_states)
    return (learned, ring), jax.tree.map(jnp.mean, metrics) | {"actor_loss": actor_loss}


def make(config: Config, *, policy: Callable[..., Kernel] = make_kernel) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    if config.num_gradients % config.policy_delay:
        raise ValueError(
            f"policy_delay {config.policy_delay} does not divide the {config.num_gradients} "
            "gradient steps of an update (updates_per_step x num_steps)"
        )
    return algorithm(config, "td3", init=partial(init, policy=policy), step=step)


if __name__ == "__main__":
    cli.main(Config, make)
