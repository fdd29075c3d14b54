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
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from spg.distributions import Normal
from spg.estimators.mixed import mixed_surrogate, mixed_terms
from spg.estimators.returns import gae
from spg.estimators.statistics import observe, observe_critic, start_statistics
from spg.estimators.surrogate import ppo_surrogate
from spg.kernels.critics import Critic
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.limits import Count, Fraction, Needs, Range, Total, check
from spg.rollout import Carry, Episodes, reset, rollout
from spg.scans import divisors, over_steps, shuffle, split_segments
from spg.training import cli, loop, options
from spg.training.devices import take, vmap_envs
from spg.training.loop import Report, State
from spg.types import Env, Transition, critic_view, policy_view


@dataclass(frozen=True)
class Config(options.EnvConfig, PolicyConfig, options.RunConfig):
    """The training, e.g. --total-steps 1e6 --num-envs 32 --learning-rate 3e-4 --gamma 0.95"""

    total_steps: Total = 2_000_000
    """environment steps of each seed, after a first rollout for the statistics of observations"""
    num_envs: Count = 64
    """environments side by side"""
    num_steps: Count = 128
    """T, steps of each environment between updates"""
    num_epochs: Count = 4
    """passes over the data of an update"""
    num_minibatches: Count = 32
    """gradients of a pass"""
    learning_rate: Annotated[float, Range(0, open="low", usual="1e-4 to 1e-2 is usual")] = 1e-3
    """of Adam; falls linearly to 0"""
    gamma: Fraction = 0.99
    """discount"""
    gae_lambda: Fraction = 0.95
    """λ of generalised advantage estimation"""
    memory_gradient: Annotated[Literal["mixed", "score"], Needs(memory="s2pg")] = "mixed"
    """how z' learns (s2pg): mixed differentiates action and critic through z' for one step, and
    takes the score for later reward; score takes it for all, which is PPO-RS of the paper"""
    clip: Annotated[float, Range(0, 10, open="low", usual="0.1 to 0.3 is usual")] = 0.2
    """ε: the ratios of new to old probabilities count within 1 - ε and 1 + ε"""
    entropy_coef: Annotated[float, Range(0, 1000, usual="0 to 0.05 is usual")] = 0.0
    """weight of the entropy of actions in the objective"""
    max_grad_norm: Annotated[float, Range(0, open="low", usual="0.5 to 10 is usual")] = 10.0
    """norm to which longer gradients are cut"""

    @property
    def mixed(self) -> bool:
        return self.memory == "s2pg" and self.memory_gradient == "mixed"

    @property
    def num_updates(self) -> int:
        return self.total_steps // (self.num_envs * self.num_steps)


class Agent(NamedTuple):
    kernel: Kernel
    critic: Critic


class Learned(NamedTuple):
    kernel: Kernel
    critic: Critic
    opt_state: optax.OptState


def optimiser(config: Config) -> optax.GradientTransformation:
    num_gradients = config.num_updates * config.num_epochs * config.num_minibatches
    schedule = lambda count: config.learning_rate * (1 - count / num_gradients)
    rule = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adam(schedule, eps=1e-5)
    )
    return optax.flatten(rule)  # one long vector takes less time than many short ones


def init(
    config: Config, env: Env, key: PRNGKeyArray, *, policy: Callable[..., Kernel] = make_kernel
) -> State:
    """Fresh networks, with the statistics of one rollout from where the training starts.

    The kernel is `policy(config, env.spec, key=key)`.
    """
    kernel_key, critic_key, env_key, rollout_key, key = jr.split(key, 5)
    kernel = policy(config, env.spec, key=kernel_key)
    sizes = env.spec.critic_size, kernel.feature(kernel.z0).size, [*config.hidden]
    critic = Critic(*sizes, feature=kernel.feature, key=critic_key)
    env_keys = jr.split(env_key, config.num_envs)
    carry = jax.vmap(lambda k: reset(kernel, env, key=k))(env_keys)
    obs = collect(config, env, kernel, carry, rollout_key)[1].obs
    agent = Agent(
        start_statistics(kernel, policy_view(obs)), start_statistics(critic, critic_view(obs))
    )
    opt_state = optimiser(config).init(eqx.filter(agent, trainable(agent)))
    return State(Learned(*agent, opt_state), carry, key)


def collect(
    config: Config, env: Env, kernel: Kernel, carry: Carry, key: PRNGKeyArray
) -> tuple[Carry, Transition, Episodes]:
    """A rollout of every environment, `[N, T, ...]`, and the sums over the episodes that ended."""

    def run(kernel, carry, key):
        return rollout(kernel, env, carry, num_steps=config.num_steps, key=key)

    keys = jr.split(key, config.num_envs)
    carry, traj, episodes = vmap_envs(run, (None, 0, 0))(kernel, carry, keys)
    return carry, traj, jax.tree.map(jnp.sum, episodes)


def step(config: Config, env: Env, state: State) -> tuple[State, Report]:
    """One update: a rollout of every environment, then epochs of minibatches on it."""
    key, rollout_key, epoch_key = jr.split(state.key, 3)
    carry, traj, episodes = collect(config, env, state.learned.kernel, state.world, rollout_key)
    learned, metrics = learn(config, state.learned, traj, epoch_key)
    return State(learned, carry, key), report(episodes, metrics)


def report(episodes: Episodes, metrics: dict[str, Array]) -> Report:
    """Of an update with these episodes."""
    return Report(
        score=episodes.return_sum / episodes.count,
        weight=episodes.count,
        metrics=metrics,
        of_episodes={"episode_length": episodes.length_sum / episodes.count},
    )


def learn(
    config: Config, learned: Learned, traj: Transition, key: PRNGKeyArray
) -> tuple[Learned, dict[str, Array]]:
    """Epochs of minibatches on what the kernel recorded, and means of their metrics."""
    kernel, critic, opt_state = learned
    batch, explained = weigh(config, kernel, critic, traj)
    segments, _, _, targets = batch
    num_segments = len(targets)
    critic = critic.rescale(targets)
    update = partial(gradient_step, config)

    def epoch(state, key):
        order = shuffle(num_segments, key=key).reshape(config.num_minibatches, -1)
        return lax.scan(lambda s, i: update(s, take(batch, i)), state, order)

    epoch_keys = jr.split(key, config.num_epochs)
    (agent, opt_state), metrics = lax.scan(epoch, (Agent(kernel, critic), opt_state), epoch_keys)
    kernel = observe(agent.kernel, kernel, segments)
    critic = observe_critic(agent.critic, critic, segments)
    metrics = jax.tree.map(jnp.mean, metrics) | {"explained_variance": explained}
    return Learned(kernel, critic, opt_state), metrics


def weigh(
    config: Config, kernel: Kernel, critic: Critic, traj: Transition
) -> tuple[tuple[Transition, Any, Array, Array], Array]:
    """(segments, what drew them, advantages, targets), and the explained variance of targets."""
    ends = traj.terminated, traj.truncated
    value = jax.vmap(jax.vmap(critic))(traj.obs, traj.z)
    next_value = jax.vmap(jax.vmap(critic))(traj.final_obs, traj.z_next)

    def advantages(gae_lambda):
        one = partial(gae, gamma=config.gamma, gae_lambda=gae_lambda)
        return jax.vmap(one)(traj.reward, value, next_value, *ends)

    advantage = advantages(config.gae_lambda)
    target, scale = value + advantage, advantage.std() + 1e-8
    normal = lambda x: (x - x.mean()) / scale
    explained = 1 - jnp.var(target - value) / (jnp.var(target) + 1e-8)
    parts = ()
    if config.mixed:
        delta = advantages(0.0)
        parts = normal(delta), normal(advantage - delta)

    length = config.length(config.num_steps)
    split = jax.vmap(partial(split_segments, segment_length=length))
    num_segments = config.num_envs * config.num_steps // length
    segments, advantage, target, parts = jax.tree.map(
        lambda x: x.reshape(num_segments, *x.shape[2:]),
        split((traj, normal(advantage), target, parts)),
    )
    old: Any
    if config.mixed:
        scaled = lambda obs, z: critic(obs, z) / scale
        old = jax.vmap(partial(mixed_terms, kernel, scaled, gamma=config.gamma))(segments, *parts)
    else:
        old = jax.vmap(kernel.log_prob)(segments)
    return (segments, old, advantage, target), explained


def gradient_step(
    config: Config, state: tuple[Agent, optax.OptState], batch: Any
) -> tuple[tuple[Agent, optax.OptState], dict[str, Array]]:
    """Adam on one minibatch of segments."""
    agent, opt_state = state
    params, fixed = eqx.partition(agent, trainable(agent))

    def loss(params):
        agent = eqx.combine(params, fixed)
        segments, old, advantage, target = batch
        if config.mixed:
            memory = jax.vmap(agent.kernel.state_distribution)(segments)
            new = jax.vmap(agent.kernel.log_prob)(segments, memory)
            one = partial(mixed_surrogate, clip=config.clip)
            surrogate = jax.vmap(one)(segments, new, memory, old)
        else:
            new = jax.vmap(agent.kernel.log_prob)(segments)
            surrogate = ppo_surrogate(new, old, advantage, clip=config.clip)
        value = jax.vmap(over_steps(agent.critic))(segments.obs, segments.z)
        value_loss = 0.5 * jnp.mean(((value - target) / agent.critic.scale) ** 2)
        policy_loss = -jnp.mean(surrogate.objective)
        entropy = jnp.mean(new.entropy)
        metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
        metrics |= {k: jnp.mean(v) for k, v in surrogate._asdict().items() if k != "objective"}
        return policy_loss + value_loss - config.entropy_coef * entropy, metrics

    gradient, metrics = eqx.filter_grad(loss, has_aux=True)(params)
    updates, opt_state = optimiser(config).update(gradient, opt_state, params)
    agent = eqx.apply_updates(agent, updates)
    return (agent, opt_state), metrics | {"gradient_norm": optax.global_norm(gradient)}


def make(config: Config, *, policy: Callable[..., Kernel] = make_kernel) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    return algorithm(config, "ppo", init=partial(init, policy=policy), step=step, policy=policy)


def algorithm(
    config: Config, name: str, *, init: Callable, step: Callable, policy: Callable[..., Kernel]
) -> loop.Algorithm:
    """What `loop.run` takes, of this update or one around it. Raises ValueError likewise."""
    check(config)
    count = config.num_envs * config.num_segments(config.num_steps)
    if count % config.num_minibatches:
        raise ValueError(
            f"num_minibatches {config.num_minibatches} does not divide the {count} segments of a "
            f"batch ({config.num_envs} environments x {config.num_steps} steps, in segments of "
            f"{config.length(config.num_steps)}); {divisors(count)} would"
        )
    each = f"{config.num_envs} x {config.num_steps} steps"
    options.check_updates(config, config.num_updates, each)
    env = options.make_env(config, oracle=config.memory == "oracle")
    if config.mixed:
        draw = lambda kernel: kernel.cell(jnp.zeros(env.spec.obs_size), kernel.z0)
        shown = eqx.filter_eval_shape(lambda k: draw(policy(config, env.spec, key=k)), jr.key(0))
        if not isinstance(shown, Normal):
            raise ValueError(
                "memory_gradient 'mixed' differentiates through z', and this policy's is "
                f"{type(shown).__name__}, not Normal; 'score' takes every distribution"
            )
    steps = config.num_envs * config.num_steps
    return cli.in_episodes(
        config, env, name.upper(), name=name, init=init, step=step,
        num_updates=config.num_updates, steps_per_update=steps, first_steps=steps,
        num_envs=config.num_envs,
    )  # fmt: skip


if __name__ == "__main__":
    cli.main(Config, make)
