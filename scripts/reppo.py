"""REPPO for stateful policies: an on-policy critic Q(o, a, z'), and its slope in action and memory.

After Voelcker et al. (2025), for continuous actions: critics regress on the λ-returns of a fresh
rollout, the policy climbs their slope in a and z', and a KL divergence keeps it near the policy
that acted. There is no buffer, so no z' is stale. With critics that see no state (by default),
memory and values are learned together.

    python scripts/reppo.py                # S2PG on Pendulum without velocities
    python scripts/reppo.py --privileged   # with critics that see the state
    python scripts/reppo.py --memory bptt
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

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import ppo
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray
from tyro.conf import Suppress

from spg.estimators.actor_critic import choose
from spg.estimators.returns import gae
from spg.estimators.statistics import observe, start_statistics
from spg.estimators.trust_region import factor_kl
from spg.kernels.critics import QCritic
from spg.kernels.factory import make_kernel
from spg.kernels.kernel import Kernel
from spg.limits import Constant, Fraction, Needs, NonNegative, Range, Size, Total
from spg.scans import join_segments, split_segments
from spg.training import cli, loop, on_policy, options
from spg.training.loop import Report, State
from spg.training.on_policy import Agent, OnPolicyConfig
from spg.types import Env, Spec, Transition, critic_view


@dataclass(frozen=True)
class Config(OnPolicyConfig):
    """The training, e.g. --total-steps 1e6 --kl-coef 0.5 --critics 2"""

    env: str = "Pendulum-v1"
    total_steps: Total = 1_000_000
    """environment steps of each seed, after a first rollout for the statistics of observations"""
    gamma: Fraction = 0.95
    """discount"""
    gae_lambda: Fraction = 0.95
    """λ of the returns that the critics regress on"""
    memory: Literal["s2pg", "bptt", "window", "none", "oracle"] = "s2pg"
    """how z' follows from (o, z): drawn, computed, or a window; none and oracle have no memory, the
    oracle sees the state"""
    memory_gradient: Annotated[Literal["mixed"], Suppress] = "mixed"  # no score is followed
    k: Annotated[int, Suppress] = 8  # of memories without a path from Q
    filter: Annotated[str, Suppress] = "belief"
    leak: Annotated[float, Suppress, Constant] = 0.1
    hidden: tuple[Size, ...] = (64,)
    """widths of the hidden layers of the policy's head"""
    kl_coef: Annotated[NonNegative, Range(0, 1000, usual="0.1 to 1 is usual")] = 0.2
    """weight of the KL divergence from the policy that acted, of z' and of a, where returns have a
    standard deviation of 1"""
    critics: Annotated[int, Range(1, 100, whole=True)] = 1
    """of which the smallest counts"""
    critic_hidden: tuple[Size, ...] = (64, 64)
    """widths of the hidden layers of critics, which are normalised"""
    noise_fall: Annotated[float, Range(1, 1000, usual="1 to 10 is usual"), Needs(memory="s2pg")] = (
        5.0
    )
    """factor by which the noise on z' falls over the training, as in ppo.py (s2pg)"""


class Learned(NamedTuple):
    kernel: Kernel
    critic: QCritic  # of returns / scale
    mean_square: Float[Array, ""]  # of the returns of all updates so far: the scale's
    count: Float[Array, ""]  # of updates
    opt_state: optax.OptState


def init(
    config: Config, env: Env, key: PRNGKeyArray, *, policy: Callable[..., Kernel] = make_kernel
) -> State:
    """`on_policy.begin` with critics of (o, a, z')."""
    state = on_policy.begin(
        config, env, key, policy=policy, critic=make_critic, adam=lambda agent: agent
    )
    kernel, critic, opt_state = state.learned
    return state._replace(learned=Learned(kernel, critic, jnp.ones(()), jnp.zeros(()), opt_state))


def make_critic(config: Config, spec: Spec, kernel: Kernel, key: PRNGKeyArray) -> QCritic:
    size = kernel.feature(kernel.z0).size
    return QCritic(
        spec.critic_size, spec.num_actions, size, [*config.critic_hidden],
        num_critics=config.critics, feature=kernel.feature, key=key,
    )  # fmt: skip


def step(config: Config, env: Env, state: State) -> tuple[State, Report]:
    """One update: a rollout of every environment, then epochs of minibatches on it."""
    return on_policy.update(learn, config, env, state)


def learn(
    config: Config, learned: Learned, traj: Transition, key: PRNGKeyArray
) -> tuple[Learned, dict[str, Array]]:
    """Epochs of minibatches on what the kernel recorded, and means of their metrics.

    The noise with which the policy chooses again is drawn once for all epochs.
    """
    kernel, critic, mean_square, count, opt_state = learned
    next_key, path_key, key = jr.split(key, 3)
    returns = lambda_returns(config, learned, traj, next_key)
    mean_square += (jnp.mean(returns**2) - mean_square) / (count + 1)
    scale = jnp.sqrt(mean_square + 1e-8)

    length = config.length(config.num_steps)
    split = jax.vmap(partial(split_segments, segment_length=length))
    segments, target = join_segments(split((traj._replace(final_obs=None), returns / scale)))
    old = jax.vmap(kernel.distributions)(segments)
    keys = jr.key_data(jr.split(path_key, len(target)))
    agent, opt_state, metrics = on_policy.descend(
        config, partial(loss, config, target.std() + 1e-8), Agent(kernel, critic), opt_state,
        (segments, old, target, keys), key,
    )  # fmt: skip
    explained = 1 - metrics["critic_loss"] / (jnp.var(target) + 1e-8)
    kernel = ppo.quieter(config, observe(agent.kernel, kernel, segments))
    critic = start_statistics(agent.critic, critic_view(traj.obs))
    learned = Learned(kernel, critic, mean_square, count + 1, opt_state)
    return learned, metrics | {"explained_variance": explained}


def lambda_returns(
    config: Config, learned: Learned, traj: Transition, key: PRNGKeyArray
) -> Float[Array, "N T"]:
    """G_t = r_t + γ [(1 - λ) Q(o', a', z'') + λ G_{t+1}], (a', z'') drawn anew behind each step.

    Where an episode is cut, and at the end of the rollout, Q alone; 0 where it terminated.
    """
    rows = join_segments(traj)

    def next_value(step, key):
        choice = learned.kernel.sample_and_log_prob(step.final_obs, step.z_next, key=key)
        return evaluate(learned.critic, step.final_obs, *choice[:2]).min()

    keys = jr.split(key, len(rows.reward))
    following = jax.vmap(next_value)(rows, keys).reshape(traj.reward.shape)
    following *= jnp.sqrt(learned.mean_square)
    # with V(o_t) := what was said of it one step before, A + V is this G (A of `gae`)
    value = jnp.roll(following, 1, axis=1)
    one = partial(gae, gamma=config.gamma, gae_lambda=config.gae_lambda)
    return value + jax.vmap(one)(traj.reward, value, following, traj.terminated, traj.truncated)


def evaluate(
    critic: QCritic, obs: Any, action: Float[Array, " a"], z_next: Any
) -> Float[Array, " n"]:
    """Q / scale of an action as the environment takes it, within [-1, 1]."""
    return critic(obs, jnp.clip(action, -1.0, 1.0), z_next)


def loss(config: Config, spread: Array, agent: Agent, batch: Any) -> tuple[Array, dict[str, Array]]:
    """Of critics and policy on one minibatch of segments."""
    segments, old, target, keys = batch
    kernel, critic = agent
    fixed = jax.tree.map(lax.stop_gradient, critic)  # to the policy

    def one(segment, old, key):
        choice = choose(kernel, partial(evaluate, fixed), segment, key=jr.wrap_key_data(key))
        new = kernel.distributions(segment)
        entropy = jax.vmap(lambda x: x.entropy())(new[1])
        return choice.q_value.min(-1), factor_kl(old, new), entropy

    value, kl, entropy = jax.vmap(one)(segments, old, keys)
    steps, aim = join_segments((segments, target))
    found = jax.vmap(partial(evaluate, critic))(steps.obs, steps.action, steps.z_next)
    critic_loss = jnp.mean((found - aim[:, None]) ** 2)
    policy_loss = jnp.mean(config.kl_coef * kl.kl - config.entropy_coef * entropy)
    policy_loss -= jnp.mean(value) / spread
    metrics = {
        "critic_loss": critic_loss,
        "policy_loss": policy_loss,
        "entropy": entropy.mean(),
        "q_value": value.mean(),
        **{k: jnp.mean(x) for k, x in kl._asdict().items()},
    }
    return policy_loss + 0.5 * critic_loss, metrics


def make(config: Config, *, policy: Callable[..., Kernel] = make_kernel) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    start = partial(init, policy=policy)
    algorithm = on_policy.algorithm(config, "reppo", init=start, step=step, policy=policy)
    if options.make_env(config).spec.discrete:
        raise ValueError(
            f"reppo is for continuous actions, and those of {config.env} are discrete: "
            "scripts/ppo.py takes both"
        )
    return algorithm


if __name__ == "__main__":
    cli.main(Config, make)
