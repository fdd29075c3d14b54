"""The data that every part of the library exchanges."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray, PyTree

Scalar = float | Float[Array, ""]  # a hyper-parameter: a Python float, or traced to be vmapped


class Observation(NamedTuple):
    """What the policy sees and, apart, what only the critic sees (a privileged critic)."""

    policy: Num[Array, "..."]  # floats `[obs]`, or an integer of a finite world
    critic: Num[Array, "..."]


class Transition(NamedTuple):
    """Facts of one step; a rollout stacks T of them. What can be recomputed is not stored."""

    obs: PyTree  # [T, ...] o_t, an array or an `Observation`
    z: PyTree  # [T, ...] internal state before the step, already reset where `first`
    action: PyTree  # [T, ...] a_t
    z_next: PyTree  # [T, ...] internal state drawn together with the action
    reward: Float[Array, "*T"]  # received after the action
    first: Bool[Array, "*T"]  # o_t opens an episode
    terminated: Bool[Array, "*T"]  # the episode ended after the action: no value beyond it
    truncated: Bool[Array, "*T"]  # the clock ran out after the action: bootstrap from final_obs
    final_obs: PyTree  # [T, ...] true successor of o_t, before any reset


class LogProb(NamedTuple):
    """log π(a, z' | o, z) in its two factors, and the entropy of the actions."""

    z: Float[Array, "*T"]  # log ω(z' | o, z)
    action: Float[Array, "*T"]  # log μ(a | o, z')
    entropy: Float[Array, "*T"]  # of μ( . | o, z')

    @property
    def joint(self) -> Float[Array, "*T"]:
        """log π(a, z' | o, z)."""
        return self.z + self.action


@runtime_checkable
class Environment(Protocol):
    """The part of the Gymnax 1.0 contract that rollouts use; auto-reset happens inside `step`."""

    def reset(self, key: PRNGKeyArray, params: Any) -> tuple[PyTree, PyTree]: ...

    def step(
        self, key: PRNGKeyArray, state: PyTree, action: PyTree, params: Any
    ) -> tuple[PyTree, PyTree, jax.Array, jax.Array, jax.Array, dict]: ...


class Env(NamedTuple):
    """An environment together with its parameters, as `spg.envs.make` opens it."""

    environment: Environment
    params: Any

    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        """The first observation and the state of an episode."""
        return self.environment.reset(key, self.params)

    def step(self, key: PRNGKeyArray, state: PyTree, action: PyTree) -> tuple:
        """(obs, state, reward, terminated, truncated, info), with auto-reset."""
        return self.environment.step(key, state, action, self.params)

    @property
    def spec(self) -> "Spec":
        """What a policy needs to know; of environments that `spg.envs.make` opened."""
        adapter: Any = self.environment
        return adapter.spec(self.params)


class Spec(NamedTuple):
    """What a policy needs to know of an environment: sizes, actions, and the model if it is known.

    An environment that `spg.envs.make` opened has one, `env.spec`.
    """

    obs_size: int  # of what the policy sees
    critic_size: int  # of what the critic sees
    num_actions: int  # choices, or dimensions of a continuous action in [-1, 1]
    discrete: bool
    previous_action: bool = False  # the observation ends with the previous action
    model: Any = None  # the `spg.worlds` model of a finite world
    slots: np.ndarray | None = None  # [O, I] of I agents, as in `spg.worlds.Problem`


def policy_view(obs: PyTree) -> Any:
    """The policy's part of an observation."""
    return obs.policy if isinstance(obs, Observation) else obs


def critic_view(obs: PyTree) -> Any:
    """The critic's part of an observation."""
    return obs.critic if isinstance(obs, Observation) else obs
