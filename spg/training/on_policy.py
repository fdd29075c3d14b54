"""What the scripts share that learn from fresh rollouts: options, advantages, critics by Adam."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from spg.estimators.mixed import follows, mixed_surrogate, mixed_terms
from spg.estimators.returns import gae
from spg.estimators.statistics import start_statistics
from spg.estimators.surrogate import Surrogate, ppo_surrogate
from spg.kernels.critics import Critic
from spg.kernels.factory import PolicyConfig
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.limits import Count, Fraction, Needs, Range, Total, check
from spg.rollout import Carry, Episodes, reset, rollout
from spg.scans import divisors, over_steps, shuffle, side_by_side, split_segments
from spg.training import cli, loop, options
from spg.training.devices import take, vmap_envs
from spg.types import Env, LogProb, Scalar, Spec, Transition, critic_view, policy_view

M = TypeVar("M")


@dataclass(frozen=True)
class OnPolicyConfig(options.EnvConfig, PolicyConfig, options.RunConfig):
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
    takes the score for later reward; score takes it for all, as the paper does"""
    entropy_coef: Annotated[float, Range(0, 1000, usual="0 to 0.05 is usual")] = 0.0
    """weight of the entropy of actions in the objective"""
    max_grad_norm: Annotated[float, Range(0, open="low", usual="0.5 to 10 is usual")] = 10.0
    """norm to which longer gradients are cut"""

    @property
    def mixed(self) -> bool:
        return self.memory == "s2pg" and self.memory_gradient == "mixed"

    @property
    def num_updates(self) -> Any:  # in a program `total_steps` is traced
        return self.total_steps // (self.num_envs * self.num_steps)


class Agent(NamedTuple):
    kernel: Kernel
    critic: Any  # of V(o, z); of Q(o, a, z') in reppo.py


class Learned(NamedTuple):
    kernel: Kernel
    critic: Critic
    opt_state: optax.OptState


def optimiser(config: OnPolicyConfig) -> optax.GradientTransformation:
    """Adam with gradients cut, at a rate that falls to 0."""
    num_gradients = config.num_updates * config.num_epochs * config.num_minibatches
    schedule = lambda count: config.learning_rate * (1 - count / num_gradients)
    rule = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adam(schedule, eps=1e-5)
    )
    return optax.flatten(rule)  # one long vector takes less time than many short ones


def begin(
    config: OnPolicyConfig,
    env: Env,
    key: PRNGKeyArray,
    *,
    policy: Callable[..., Kernel],
    adam: Callable[[Agent], Any],
    critic: Callable[..., Any] | None = None,
) -> loop.State:
    """Fresh networks, with the statistics of one rollout from where the training starts.

    The kernel is `policy(config, env.spec, key=key)`; `adam` tells what of the agent `descend` is
    to move. The critic is one of V(o, z), or `critic(config, env.spec, kernel, key)`.
    """
    kernel_key, critic_key, env_key, rollout_key, key = jr.split(key, 5)
    kernel = policy(config, env.spec, key=kernel_key)
    values = (critic or make_critic)(config, env.spec, kernel, critic_key)
    env_keys = jr.split(env_key, config.num_envs)
    carry = jax.vmap(lambda k: reset(kernel, env, key=k))(env_keys)
    obs = collect(config, env, kernel, carry, rollout_key)[1].obs
    agent = Agent(
        start_statistics(kernel, policy_view(obs)), start_statistics(values, critic_view(obs))
    )
    moved = adam(agent)
    opt_state = optimiser(config).init(eqx.filter(moved, trainable(moved)))
    return loop.State(Learned(*agent, opt_state), carry, key)


def make_critic(config: OnPolicyConfig, spec: Spec, kernel: Kernel, key: PRNGKeyArray) -> Critic:
    """V(o, z)."""
    sizes = spec.critic_size, kernel.feature(kernel.z0).size, [*config.hidden]
    return Critic(*sizes, feature=kernel.feature, key=key)


def collect(
    config: OnPolicyConfig, env: Env, kernel: Kernel, carry: Carry, key: PRNGKeyArray
) -> tuple[Carry, Transition, Episodes]:
    """A rollout of every environment, `[N, T, ...]`, and the sums over the episodes that ended."""

    def run(kernel, carry, key):
        return rollout(kernel, env, carry, num_steps=config.num_steps, key=key)

    keys = jr.split(key, config.num_envs)
    carry, traj, episodes = vmap_envs(run, (None, 0, 0))(kernel, carry, keys)
    return carry, traj, jax.tree.map(jnp.sum, episodes)


def update(
    learn: Callable[..., tuple[Any, dict[str, Array]]],
    config: OnPolicyConfig,
    env: Env,
    state: loop.State,
) -> tuple[loop.State, loop.Report]:
    """A rollout of every environment, then `learn(config, learned, traj, key)` on it."""
    key, rollout_key, learn_key = jr.split(state.key, 3)
    carry, traj, episodes = collect(config, env, state.learned.kernel, state.world, rollout_key)
    learned, metrics = learn(config, state.learned, traj, learn_key)
    return loop.State(learned, carry, key), report(episodes, metrics)


def report(episodes: Episodes, metrics: dict[str, Array]) -> loop.Report:
    """Of an update with these episodes."""
    return loop.Report(
        score=episodes.return_sum / episodes.count,
        weight=episodes.count,
        metrics=metrics,
        of_episodes={"episode_length": episodes.length_sum / episodes.count},
    )


def weigh(
    config: OnPolicyConfig, kernel: Kernel, critic: Critic, traj: Transition
) -> tuple[tuple[Transition, Any, Array, Array], Array]:
    """(segments, what drew them, advantages, targets), and the explained variance of targets.

    Successors, which no gradient reads, are left out of the segments.
    """
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
    return (segments._replace(final_obs=None), old, advantage, target), explained


def surrogate(
    config: OnPolicyConfig,
    kernel: Kernel,
    segments: Transition,
    old: Any,
    advantage: Float[Array, "S L"],
    *,
    clip: Scalar,
    kl_coef: Scalar = 0.0,
) -> tuple[Surrogate, LogProb]:
    """That of the policy's gradient that `config` names, and the scores it is made of.

    The arguments are as `weigh` has them; `kl_coef` is of `mixed_surrogate` alone.
    """
    if config.mixed:

        def one(segment, old):  # in one `vmap`: what is the same for all rows is then computed once
            memory: Any = kernel.state_distribution(segment)
            new = kernel.log_prob(segment, memory)
            return mixed_surrogate(segment, new, memory, old, clip=clip, kl_coef=kl_coef), new

        return jax.vmap(one)(segments, old)
    new = jax.vmap(kernel.log_prob)(segments)
    return ppo_surrogate(new, old, advantage, clip=clip), new


def value_loss(
    critic: Critic, segments: Transition, target: Float[Array, "S L"]
) -> Float[Array, ""]:
    """Half the mean square of (V - target) / scale."""
    value = jax.vmap(over_steps(critic))(segments.obs, segments.z)
    return 0.5 * jnp.mean(((value - target) / critic.scale) ** 2)


def descend(
    config: OnPolicyConfig,
    loss: Callable[[M, Any], tuple[Array, dict[str, Array]]],
    module: M,
    opt_state: optax.OptState,
    batch: Any,
    key: PRNGKeyArray,
) -> tuple[M, optax.OptState, dict[str, Array]]:
    """Epochs of Adam on minibatches of the batch's rows; `loss` gives metrics too, their means."""
    num_rows = len(jax.tree.leaves(batch)[0])
    wide, apart = side_by_side(batch)

    def gradient_step(state, rows):
        module, opt_state = state
        params, fixed = eqx.partition(module, trainable(module))
        of_params = lambda params: loss(eqx.combine(params, fixed), rows)
        gradient, metrics = eqx.filter_grad(of_params, has_aux=True)(params)
        updates, opt_state = optimiser(config).update(gradient, opt_state, params)
        metrics |= {"gradient_norm": optax.global_norm(gradient)}
        return (eqx.apply_updates(module, updates), opt_state), metrics

    def epoch(state, key):
        order = shuffle(num_rows, key=key).reshape(config.num_minibatches, -1)
        return lax.scan(lambda s, i: gradient_step(s, apart(take(wide, i))), state, order)

    keys = jr.split(key, config.num_epochs)
    (module, opt_state), metrics = lax.scan(epoch, (module, opt_state), keys)
    return module, opt_state, jax.tree.map(jnp.mean, metrics)


def algorithm(
    config: OnPolicyConfig,
    name: str,
    *,
    init: Callable,
    step: Callable,
    policy: Callable[..., Kernel],
) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
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
        if not follows(shown):
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
