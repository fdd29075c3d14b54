"""A memory task with continuous actions, in which actions move nothing: repeat a vector."""

from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from spg.limits import Range, check


class RepeatVectorState(NamedTuple):
    cue: Float[Array, " d"]  # the vector to repeat
    time: Int[Array, ""]


@struct.dataclass
class RepeatVectorParams:
    delay: Annotated[Any, Range(0, 10**9, whole=True)] = 4  # steps between cue and query
    distractors: Annotated[Any, Range(0)] = 4.0  # size of what is shown meanwhile; the cue's is 1

    @property
    def max_steps_in_episode(self) -> Any:
        """The horizon, which follows from the delay and cannot be set apart."""
        return self.delay + 2


class RepeatVector(Environment):
    """Repeat after `delay` steps the first of the vectors shown, uniform on [-1, 1]^d.

    `RepeatFirst` with vectors for symbols. The policy's way through the world tells nothing of the
    cue, so the memory has to hold it, and distractors come by the entries by which the cue came.

    | observation entry | what it shows |
    | --- | --- |
    | 0 … d-1 | at step 0 the cue; during the delay distractors, drawn anew in each step; then 0 |
    | d | 1 at the first step: remember what is shown |
    | d+1 | 1 at the last step, t = delay+1: answer now |

    The answer a in [-1, 1]^d pays 1 - (3/d) |a - cue|²; earlier actions do nothing. |cue|² is d/3
    in the mean, so the expected return is the share of the cue's variance that the answers explain,
    R². The optimal return is 1; that of the best memoryless policy, a = 0, is 0. Every episode
    terminates after delay+2 steps. The state is the two flags, the cue and the time.
    """

    def __init__(self, size: int = 2):
        Range(1, 10**6, whole=True).check("size", size)
        self.size = size

    @property
    def default_params(self) -> RepeatVectorParams:
        return RepeatVectorParams()

    def reset_env(
        self, key: PRNGKeyArray, params: RepeatVectorParams
    ) -> tuple[Float[Array, " D"], RepeatVectorState]:
        check(params)
        cue = jr.uniform(key, (self.size,), jnp.float32, -1, 1)
        state = RepeatVectorState(cue, jnp.int32(0))
        return self.observe(key, state, None, params), state

    def step_env(
        self,
        key: PRNGKeyArray,
        state: RepeatVectorState,
        action: Float[Array, " d"],
        params: RepeatVectorParams,
    ) -> tuple[Float[Array, " D"], RepeatVectorState, Float[Array, ""], Bool[Array, ""], dict]:
        asked = state.time == params.delay + 1
        square = jnp.mean((jnp.clip(action, -1, 1) - state.cue) ** 2)
        reward = jnp.where(asked, 1 - 3 * square, 0.0).astype(jnp.float32)
        state = state._replace(time=state.time + 1)
        obs = self.observe(key, state, action, params)
        return obs, state, reward, asked, {"discount": 1.0 - asked}

    def observe(
        self, key: PRNGKeyArray, state: RepeatVectorState, action: Any, params: RepeatVectorParams
    ) -> Float[Array, " D"]:
        first, asked = state.time == 0, state.time == params.delay + 1
        size = jnp.where(state.time <= params.delay, jnp.float32(params.distractors), 0.0)
        distractor = size * jr.uniform(key, (self.size,), jnp.float32, -1, 1)
        shown = jnp.where(first, state.cue, distractor)
        return jnp.append(shown, jnp.array([first, asked], jnp.float32))

    def see_state(self, obs: Float[Array, " D"], state: RepeatVectorState) -> Float[Array, " S"]:
        time = state.time[None].astype(jnp.float32)
        return jnp.concatenate([obs[-2:], state.cue, time])

    def is_truncated(self, state: RepeatVectorState, params: RepeatVectorParams) -> Bool[Array, ""]:
        return jnp.array(False)

    def is_terminated(
        self, state: RepeatVectorState, params: RepeatVectorParams
    ) -> Bool[Array, ""]:
        return state.time > params.delay + 1

    @property
    def name(self) -> str:
        return "RepeatVector-memory"

    @property
    def num_actions(self) -> int:
        return self.size

    def action_space(self, params: RepeatVectorParams | None = None) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (self.size,), jnp.float32)

    def observation_space(self, params: RepeatVectorParams | None = None) -> spaces.Box:
        return spaces.Box(-jnp.inf, jnp.inf, (self.size + 2,), jnp.float32)
