"""Kernels in environments: rollouts of one trajectory, and evaluation over whole episodes."""

from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from spg.kernels.kernel import Kernel
from spg.types import Env, Transition


@runtime_checkable
class Policy(Protocol):
    """What acts in an environment: a `Kernel`, or one that explores."""

    @property
    def z0(self) -> PyTree: ...
    def reset(self, first: Bool[Array, ""], z: PyTree) -> PyTree: ...
    def sample(self, obs: PyTree, z: PyTree, *, key: PRNGKeyArray) -> tuple[Array, PyTree]: ...


class Carry(NamedTuple):
    """Where a rollout stands in its environment."""

    env_state: PyTree
    obs: PyTree
    z: PyTree
    first: Bool[Array, ""]
    episode_return: Float[Array, ""]  # of the episode under way, not discounted
    episode_length: Int[Array, ""]


class Evaluation(NamedTuple):
    """Undiscounted returns of fresh episodes: of one, of several `[N]`, or their means."""

    sampled: Float[Array, "*N"]  # actions and internal states are drawn
    noise_free: Float[Array, "*N"]  # both are the modes of their distributions


class Episodes(NamedTuple):
    """The episodes that ended in a rollout."""

    count: Float[Array, ""]
    return_sum: Float[Array, ""]
    length_sum: Float[Array, ""]


def reset(kernel: Policy, env: Env, *, key: PRNGKeyArray) -> Carry:
    """The start of an episode."""
    obs, env_state = env.reset(key)
    zero = jnp.zeros((), jnp.float32)
    return Carry(env_state, obs, kernel.z0, jnp.array(True), zero, jnp.zeros((), jnp.int32))


def rollout(
    kernel: Policy,
    env: Env,
    carry: Carry,
    *,
    num_steps: int,
    key: PRNGKeyArray,
) -> tuple[Carry, Transition, Episodes]:
    """`num_steps` consecutive steps of one environment, across the ends of episodes."""

    def step(carry, key):
        policy_key, env_key = jr.split(key)
        z = kernel.reset(carry.first, carry.z)
        action, z_next = kernel.sample(carry.obs, z, key=policy_key)
        obs, env_state, reward, terminated, truncated, info = env.step(
            env_key, carry.env_state, action
        )
        transition = Transition(
            carry.obs, z, action, z_next, reward, carry.first,
            terminated, truncated, info["final_observation"],
        )  # fmt: skip
        done = terminated | truncated
        episode_return = carry.episode_return + reward
        length = carry.episode_length + 1
        ended = Episodes(done * 1.0, done * episode_return, (done * length).astype(jnp.float32))
        episode_return, length = (jnp.where(done, 0, x) for x in (episode_return, length))
        return Carry(env_state, obs, z_next, done, episode_return, length), (transition, ended)

    carry, (traj, ended) = lax.scan(step, carry, jr.split(key, num_steps))
    return carry, traj, jax.tree.map(lambda x: x.sum(0), ended)


def evaluate(
    kernel: Kernel,
    env: Env,
    *,
    noise: Bool[Array, ""],
    max_steps: int | Int[Array, ""],
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    """Undiscounted return of one fresh episode, cut after `max_steps`.

    With `noise` actions and internal states are sampled; without, both are the modes of their
    distributions. `vmap` over keys for several episodes.
    """
    reset_key, key = jr.split(key)
    start = reset(kernel, env, key=reset_key)

    def step(state):
        carry, t, _ = state
        policy_key, env_key = jr.split(jr.fold_in(key, t))
        z = kernel.reset(carry.first, carry.z)
        sampled, mode = kernel.sample(carry.obs, z, key=policy_key), kernel.mode(carry.obs, z)
        action, z_next = jax.tree.map(lambda s, m: jnp.where(noise, s, m), sampled, mode)
        obs, env_state, reward, terminated, truncated, _ = env.step(
            env_key, carry.env_state, action
        )
        episode_return = carry.episode_return + reward
        first = jnp.array(False)
        carry = Carry(env_state, obs, z_next, first, episode_return, carry.episode_length)
        return carry, t + 1, terminated | truncated

    going = lambda state: ~state[2] & (state[1] < max_steps)
    carry, _, _ = lax.while_loop(going, step, (start, jnp.zeros((), jnp.int32), jnp.array(False)))
    return carry.episode_return


def episode_returns(
    kernel: Kernel,
    env: Env,
    *,
    num_episodes: int,
    max_steps: int | None = None,
    key: PRNGKeyArray,
) -> Evaluation:
    """Returns `[N]` of N fresh episodes of the sampled policy, and of N of the noise-free one.

    An episode is cut after `max_steps`; None stands for the clock of the environment. Raises
    ValueError if there is no clock either.
    """
    if max_steps is None:
        max_steps = env.params.max_steps_in_episode
    if max_steps is None:
        raise ValueError(
            "this world goes on for ever, so its episodes have no return: say after how many steps "
            "one is cut, by max_steps, or by max_steps_in_episode of the environment"
        )
    noise = jnp.arange(2 * num_episodes) < num_episodes
    run = partial(evaluate, kernel, env, max_steps=max_steps)
    keys = jr.split(key, 2 * num_episodes)
    returns = jax.vmap(lambda noise, key: run(noise=noise, key=key))(noise, keys)
    return Evaluation(*returns.reshape(2, num_episodes))


def evaluation(
    kernel: Kernel,
    env: Env,
    *,
    num_episodes: int,
    max_steps: int | None = None,
    key: PRNGKeyArray,
) -> Evaluation:
    """Mean returns over fresh episodes, see `episode_returns`."""
    returns = episode_returns(kernel, env, num_episodes=num_episodes, max_steps=max_steps, key=key)
    return Evaluation(returns.sampled.mean(), returns.noise_free.mean())


def watch(
    kernel: Kernel, env: Env, *, num_steps: int, noise: bool = False, key: PRNGKeyArray
) -> tuple[PyTree, Transition]:
    """The policy from a reset on: the environment's states and the steps, `[T, ...]`.

    With `noise` actions and internal states are sampled, without they are the modes.
    """
    reset_key, key = jr.split(key)
    carry = reset(kernel, env, key=reset_key)

    def step(carry, key):
        env_state, obs, z, first = carry
        z = kernel.reset(first, z)
        sample = partial(kernel.sample, key=jr.fold_in(key, 2))  # not a key that `step` splits off
        action, z_next = (sample if noise else kernel.mode)(obs, z)
        next_obs, next_state, reward, terminated, truncated, info = env.step(key, env_state, action)
        transition = Transition(
            obs, z, action, z_next, reward, first,
            terminated, truncated, info["final_observation"],
        )  # fmt: skip
        return (next_state, next_obs, z_next, terminated | truncated), (env_state, transition)

    return lax.scan(step, carry[:4], jr.split(key, num_steps))[1]
