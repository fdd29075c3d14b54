"""PPO for stateful policies, after PPO-RS of Al-Hafez et al. (2024), algorithm 3; its baselines.

An update is a rollout of every environment, then epochs of minibatches on it.

    python scripts/ppo.py                  # S2PG on CartPole without velocities
    python scripts/ppo.py --memory bptt    # by backpropagation through time
    python scripts/ppo.py --env brax/ant --observe positions --total-steps 2e6
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from spg.estimators.statistics import observe, observe_critic
from spg.kernels.cells import Drawn, NormalAround
from spg.kernels.factory import make_kernel
from spg.kernels.kernel import Kernel
from spg.limits import Needs, Range
from spg.training import cli, loop, on_policy
from spg.training.loop import Report, State
from spg.training.on_policy import Agent, Learned, OnPolicyConfig
from spg.types import Env, Transition


@dataclass(frozen=True)
class Config(OnPolicyConfig):
    """The training, e.g. --total-steps 1e6 --num-envs 32 --learning-rate 3e-4 --clip 0.1"""

    clip: Annotated[float, Range(0, 10, open="low", usual="0.1 to 0.3 is usual")] = 0.2
    """ε: the ratios of new to old probabilities count within 1 - ε and 1 + ε"""
    kl_coef: Annotated[
        float,
        Range(0, 1000, usual="0.01 to 1 is usual"),
        Needs(memory="s2pg", memory_gradient="mixed"),
    ] = 0.1
    """weight of the KL divergence of z' from what drew it, which brings z' back where the ratio has
    left the clip (memory-gradient mixed)"""
    noise_fall: Annotated[float, Range(1, 1000, usual="1 to 10 is usual"), Needs(memory="s2pg")] = (
        5.0
    )
    """factor by which the noise on z' falls over the training, evenly in log σ, beside what it
    learns (s2pg)"""


def init(
    config: Config, env: Env, key: PRNGKeyArray, *, policy: Callable[..., Kernel] = make_kernel
) -> State:
    """`on_policy.begin`; Adam moves policy and critic."""
    return on_policy.begin(config, env, key, policy=policy, adam=lambda agent: agent)


def step(config: Config, env: Env, state: State) -> tuple[State, Report]:
    """One update: a rollout of every environment, then epochs of minibatches on it."""
    return on_policy.update(learn, config, env, state)


def learn(
    config: Config, learned: Learned, traj: Transition, key: PRNGKeyArray
) -> tuple[Learned, dict[str, Array]]:
    """Epochs of minibatches on what the kernel recorded, and means of their metrics."""
    kernel, critic, opt_state = learned
    batch, explained = on_policy.weigh(config, kernel, critic, traj)
    segments, _, _, targets = batch
    critic = critic.rescale(targets)
    agent, opt_state, metrics = on_policy.descend(
        config, partial(loss, config), Agent(kernel, critic), opt_state, batch, key
    )
    kernel = quieter(config, observe(agent.kernel, kernel, segments))
    critic = observe_critic(agent.critic, critic, segments)
    return Learned(kernel, critic, opt_state), metrics | {"explained_variance": explained}


def loss(config: Config, agent: Agent, batch: Any) -> tuple[Array, dict[str, Array]]:
    """Of policy and critic on one minibatch of segments."""
    segments, old, advantage, target = batch
    limits = {"clip": config.clip, "kl_coef": config.kl_coef}
    surrogate, new = on_policy.surrogate(config, agent.kernel, segments, old, advantage, **limits)
    value_loss = on_policy.value_loss(agent.critic, segments, target)
    policy_loss = -jnp.mean(surrogate.objective)
    entropy = jnp.mean(new.entropy)
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    metrics |= {k: jnp.mean(v) for k, v in surrogate._asdict().items() if k != "objective"}
    return policy_loss + value_loss - config.entropy_coef * entropy, metrics


def quieter(config: Any, kernel: Kernel) -> Kernel:
    """After an update: log σ of a z' that is drawn around a location, less by a share of the fall.

    Noise is what the score of z' needs, and what blurs memory: it is wide while z' has to be found,
    and the policy that is left is nearly the noise-free one (theorem 2.3 of Al-Hafez et al., 2024).
    """
    if not (isinstance(kernel.cell, Drawn) and isinstance(kernel.cell.distribution, NormalAround)):
        return kernel
    share = jnp.log(config.noise_fall) / config.num_updates
    where = lambda kernel: kernel.cell.distribution.log_std
    return eqx.tree_at(where, kernel, replace_fn=lambda log_std: log_std - share)


def make(config: Config, *, policy: Callable[..., Kernel] = make_kernel) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    start = partial(init, policy=policy)
    return on_policy.algorithm(config, "ppo", init=start, step=step, policy=policy)


if __name__ == "__main__":
    cli.main(Config, make)
