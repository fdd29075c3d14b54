"""`Adapter`: what the policy and the critic see of an environment, and how a policy acts there."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from spg.envs.resets import ResetsRarely, step_and_reset_rarely
from spg.envs.tabular import Tabular
from spg.types import Observation, Spec

View = Callable[[Array, PyTree], Array]  # (flat own observation, environment state) -> what is seen


@runtime_checkable
class ShowsState(Protocol):
    """An environment that says itself what makes its process Markov, in place of all leaves."""

    def see_state(self, obs: Array, state: Any) -> Array:
        """From the own observation and the environment's state, `[D]`."""
        ...


class AdapterState(NamedTuple):
    env: PyTree  # the inner environment's state
    previous_action: Float[Array, " A"]  # one-hot or in [-1, 1]; zeros when an episode opens


class Adapter(Environment):
    """Flat float32 observations and actions in [-1, 1]; a Gymnax environment around another.

    The adapter wraps `step_env` and `reset_env` alone. Gymnax's own `step`, or one to the same bits
    where resets are costly, makes the single auto-reset and the final observation. States keep one
    set of dtypes, so that a scan can carry them in 64-bit mode too. (In that mode Freeway,
    DiscountingChain, MetaMaze and GaussianBandit of Gymnax 1.0.1 cannot run: they mix 32 and 64
    bits within their own transition.)
    """

    def __init__(
        self,
        env: Environment,
        env_params: Any,
        *,
        policy: View,
        critic: View | None = None,
        previous_action: bool = False,
    ):
        self.inner, self._params = env, env_params
        self.policy, self._critic, self.previous_action = policy, critic, previous_action
        self.slots = getattr(env, "slots", None)  # of several agents: an entry for what each sees
        self._discrete_obs = isinstance(env.observation_space(env_params), spaces.Discrete)
        key = jr.key(0)
        space = env.action_space(env_params)
        if (
            not isinstance(space, spaces.Discrete)
            and not np.isfinite([space.low, space.high]).all()
        ):
            raise ValueError(f"the actions of {env.name} are unbounded: {space}")
        action = space.sample(key)
        state = jax.eval_shape(lambda: env.reset_env(key, env_params)[1])
        step = lambda s: env.step_env(key, s, action, env_params)[1]
        self._dtypes = jax.tree.map(lambda x: x.dtype, jax.eval_shape(step, state))
        obs = jax.eval_shape(lambda: self.reset_env(key, env_params)[0])
        self._obs_sizes = tuple(x.shape[0] for x in jax.tree.leaves(obs))

    @property
    def default_params(self) -> Any:
        return self._params

    @partial(jax.jit, static_argnames=("self",))
    def step(
        self, key: PRNGKeyArray, state: AdapterState, action: ArrayLike, params: Any = None
    ) -> tuple[PyTree, AdapterState, Array, Array, Array, dict]:
        params = self._params if params is None else params
        if isinstance(self.inner, ResetsRarely) and self.inner.resets_rarely:
            return step_and_reset_rarely(self, key, state, action, params)
        return super().step(key, state, action, params)

    def reset_env(self, key: PRNGKeyArray, params: Any) -> tuple[PyTree, AdapterState]:
        obs, env_state = self.inner.reset_env(key, params)
        size = self.inner.num_actions
        state = AdapterState(self._cast(env_state), jnp.zeros(size, jnp.float32))
        return self._see(obs, state, params), state

    def step_env(
        self, key: PRNGKeyArray, state: AdapterState, action: ArrayLike, params: Any
    ) -> tuple[PyTree, AdapterState, Array, Array, dict]:
        inner, vector = self._convert(action, params)
        obs, env_state, reward, terminated, info = self.inner.step_env(
            key, state.env, inner, params
        )
        state = AdapterState(self._cast(env_state), vector)
        obs = self._see(obs, state, params)
        return obs, state, jnp.asarray(reward, jnp.float32), jnp.asarray(terminated, bool), info

    def observe(self, key: PRNGKeyArray, state: AdapterState, action: Any, params: Any) -> PyTree:
        """The observation of a state. (MemoryChain's `step` gives that of the state before.)"""
        return self._see(self.inner.observe(key, state.env, action, params), state, params)

    def is_truncated(self, state: AdapterState, params: Any) -> Array:
        return jnp.asarray(self.inner.is_truncated(state.env, params), bool)

    def is_terminated(self, state: AdapterState, params: Any) -> Array:
        return jnp.asarray(self.inner.is_terminated(state.env, params), bool)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def num_actions(self) -> int:
        return self.inner.num_actions

    def action_space(self, params: Any = None) -> spaces.Discrete | spaces.Box:
        """Discrete, or [-1, 1]^A whatever the environment's own bounds are."""
        space = self.inner.action_space(self._params if params is None else params)
        if isinstance(space, spaces.Discrete):
            return space
        return spaces.Box(-1.0, 1.0, (self.num_actions,), jnp.float32)

    def observation_space(self, params: Any = None) -> spaces.Box:
        """The space of what the policy sees; `critic_size` is for the critic."""
        return spaces.Box(-jnp.inf, jnp.inf, (self._obs_sizes[0],), jnp.float32)

    def critic_size(self, params: Any = None) -> int:
        """Size of what the critic sees: the same as the policy, unless `privileged`."""
        return self._obs_sizes[-1]

    def spec(self, params: Any = None) -> Spec:
        """Raises ValueError for an action space that is neither Discrete nor a Box of one axis."""
        space = self.inner.action_space(self._params if params is None else params)
        discrete = isinstance(space, spaces.Discrete)
        if not discrete and not (isinstance(space, spaces.Box) and len(space.shape) <= 1):
            raise ValueError(f"action space {space} is neither Discrete nor a Box of one axis")
        return Spec(
            obs_size=self._obs_sizes[0],
            critic_size=self._obs_sizes[-1],
            num_actions=self.num_actions,
            discrete=discrete,
            previous_action=self.previous_action,
            model=self.inner.pomdp if isinstance(self.inner, Tabular) else None,
            slots=self.slots,
        )

    def _convert(self, action: ArrayLike, params: Any) -> tuple[Array, Float[Array, " A"]]:
        """The action in the environment's own form, and as a vector."""
        space = self.inner.action_space(params)
        if isinstance(space, spaces.Discrete):
            action = jnp.asarray(action, space.dtype)
            return action, jax.nn.one_hot(action, space.n, dtype=jnp.float32)
        action = jnp.clip(jnp.asarray(action, jnp.float32), -1.0, 1.0)
        middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
        return middle + half * action.reshape(space.shape), action

    def _see(self, obs: PyTree, state: AdapterState, params: Any) -> PyTree:
        if self.slots is not None:
            obs = jax.nn.one_hot(jnp.asarray(self.slots)[obs], int(self.slots.max()) + 1).sum(0)
        elif self._discrete_obs:
            obs = jax.nn.one_hot(obs, self.inner.observation_space(params).n)
        obs = flat(obs)
        action = [state.previous_action] if self.previous_action else []
        policy = jnp.concatenate([self.policy(obs, state.env), *action])
        if self._critic is None:
            return policy
        return Observation(policy, jnp.concatenate([self._critic(obs, state.env), *action]))

    def _cast(self, env_state: PyTree) -> PyTree:
        return jax.tree.map(jnp.asarray, env_state, self._dtypes)


def own(obs: Array, env_state: PyTree) -> Array:
    return obs


def own_and_state(obs: Array, env_state: PyTree) -> Array:
    return jnp.concatenate([obs, flat(env_state)])


def entries(index: np.ndarray, obs: Array, env_state: PyTree) -> Array:
    return obs[index]


def flat(tree: PyTree) -> Float[Array, " D"]:
    return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(tree)])
