"""A step that computes a reset only where an episode ended."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.random as jr
from gymnax.environments.environment import Environment
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree


@runtime_checkable
class ResetsRarely(Protocol):
    """An environment that asks for `step_and_reset_rarely` in place of Gymnax's step."""

    @property
    def resets_rarely(self) -> bool: ...


def step_and_reset_rarely(
    env: Environment, key: PRNGKeyArray, state: PyTree, action: Any, params: Any
) -> tuple[PyTree, PyTree, Array, Array, Array, dict]:
    """`Environment.step` of Gymnax to the same bits, but no reset is computed if no episode ended.

    Gymnax's own computes one in every step. Under `vmap` one is computed for all environments as
    soon as one of them ends, so this saves time where episodes are long, or end together. On a CPU
    it makes 1.3 times as many steps a second in POPGym's card games, and 25 times in its mazes.
    """
    step_key, reset_key = jr.split(key)
    obs, state, reward, terminated, info = env.step_env(step_key, state, action, params)
    truncated = env.is_truncated(state, params)
    info = {**info, "terminated": terminated, "truncated": truncated, "final_observation": obs}

    def reset(carry: tuple) -> tuple:
        key = carry[0]
        fresh = env.reset_env(key, params)
        after = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), fresh, carry[1])
        # a key that changes: XLA moves what is constant out of a loop
        return jr.fold_in(key, 0), after, jnp.array(False)

    carry = reset_key, (obs, state), terminated | truncated
    _, (obs, state), _ = lax.while_loop(lambda carry: carry[2], reset, carry)
    return obs, state, reward, terminated, truncated, info
