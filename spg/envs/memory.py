"""Two tasks in which one early observation decides the reward much later; one sets how much."""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from spg.limits import Range, check

UP, DOWN, LEFT, RIGHT = range(4)


class TMazeState(NamedTuple):
    goal: Int[Array, ""]  # UP or DOWN
    position: Int[Array, ""]  # 0 at the start, `length` at the junction
    time: Int[Array, ""]


@struct.dataclass
class TMazeParams:
    length: Annotated[Any, Range(1, 10**9, whole=True)] = 10  # steps from the cue to the junction
    noise: Annotated[Any, Range(0)] = 0.0  # standard deviation of the noise on every entry

    @property
    def max_steps_in_episode(self) -> Any:
        """The horizon, which follows from the length and cannot be set apart."""
        return self.length + 1


class TMaze(Environment):
    """Remember for `length` = L steps which way to turn.

    Bakker (2002), in the fixed-horizon form of Ni et al. (2023): the first observation alone tells
    where the goal is; the agent walks L steps to the junction and has one step to turn.

    | observation entry | 1 when |
    | --- | --- |
    | 0, 1 | first step and the goal is up, down |
    | 2, 3 | later, in the corridor, at the junction |

    | step t | reward |
    | --- | --- |
    | 0 … L-1 | -1/L if behind schedule afterwards (position < t+1), else 0 |
    | L, the last | 1 for the correct turn at the junction, else 0 |

    Actions are up, down, left, right. Every episode terminates after L+1 steps: the clock is part
    of the task. The optimal return is 1, the best memoryless return 0.5, the worst -1.
    """

    @property
    def default_params(self) -> TMazeParams:
        return TMazeParams()

    def reset_env(
        self, key: PRNGKeyArray, params: TMazeParams
    ) -> tuple[Float[Array, "4"], TMazeState]:
        check(params)
        goal_key, obs_key = jr.split(key)
        goal = jr.bernoulli(goal_key).astype(jnp.int32)
        state = TMazeState(goal, jnp.int32(0), jnp.int32(0))
        return self.observe(obs_key, state, None, params), state

    def step_env(
        self, key: PRNGKeyArray, state: TMazeState, action: ArrayLike, params: TMazeParams
    ) -> tuple[Float[Array, "4"], TMazeState, Float[Array, ""], Bool[Array, ""], dict]:
        action = jnp.asarray(action, jnp.int32)
        move = jnp.where(action == RIGHT, 1, 0) - jnp.where(action == LEFT, 1, 0)
        position = jnp.clip(state.position + move, 0, params.length).astype(jnp.int32)
        time = state.time + 1
        last = state.time == params.length
        correct = (state.position == params.length) & (action == state.goal)
        behind = jnp.where(position < time, 1.0, 0.0)
        reward = jnp.where(last, correct, -behind / params.length)
        state = TMazeState(state.goal, position, time)
        obs = self.observe(key, state, action, params)
        return obs, state, reward.astype(jnp.float32), last, {"discount": 1.0 - last}

    def observe(
        self, key: PRNGKeyArray, state: TMazeState, action: Any, params: TMazeParams
    ) -> Float[Array, "4"]:
        place = jnp.where(state.position < params.length, 2, 3)
        clean = jax.nn.one_hot(jnp.where(state.time == 0, state.goal, place), 4, dtype=jnp.float32)
        return clean + jnp.float32(params.noise) * jr.normal(key, (4,), jnp.float32)

    def is_truncated(self, state: TMazeState, params: TMazeParams) -> Bool[Array, ""]:
        return jnp.array(False)

    def is_terminated(self, state: TMazeState, params: TMazeParams) -> Bool[Array, ""]:
        return state.time > params.length

    @property
    def name(self) -> str:
        return "TMaze-memory"

    @property
    def num_actions(self) -> int:
        return 4

    def action_space(self, params: TMazeParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(4)

    def observation_space(self, params: TMazeParams | None = None) -> spaces.Box:
        return spaces.Box(-jnp.inf, jnp.inf, (4,), jnp.float32)


class RepeatFirstState(NamedTuple):
    symbol: Int[Array, ""]  # the one to repeat
    time: Int[Array, ""]


@struct.dataclass
class RepeatFirstParams:
    delay: Annotated[Any, Range(0, 10**9, whole=True)] = 10  # steps between symbol and query
    distractors: Annotated[Any, Range(0, 1)] = 0.0  # Pr(a step of the delay shows a random symbol)
    noise: Annotated[Any, Range(0)] = 0.0  # standard deviation of the noise on every entry

    @property
    def max_steps_in_episode(self) -> Any:
        """The horizon, which follows from the delay and cannot be set apart."""
        return self.delay + 2


class RepeatFirst(Environment):
    """Repeat after `delay` steps the first of `num_symbols` = n symbols.

    Delayed recall, after the Copy Memory problem of Hochreiter & Schmidhuber (1997) and RepeatFirst
    of Morad et al. (2023), but with a single query, so that nothing is shown between the two.

    | observation entry | 1 when |
    | --- | --- |
    | 0 … n-1 | this symbol is shown: at step 0 the one to repeat, during the delay a distractor |
    | n | first step: remember what is shown |
    | n+1 | last step, t = delay+1: answer now |

    The answer pays 1 if right and -1/(n-1) if wrong; earlier actions do nothing. Every episode
    terminates after delay+2 steps. The optimal return is 1; every memoryless policy returns 0.
    """

    def __init__(self, num_symbols: int = 4):
        Range(2, 10**6, whole=True).check("num_symbols", num_symbols)
        self.num_symbols = num_symbols

    @property
    def default_params(self) -> RepeatFirstParams:
        return RepeatFirstParams()

    def reset_env(
        self, key: PRNGKeyArray, params: RepeatFirstParams
    ) -> tuple[Float[Array, " D"], RepeatFirstState]:
        check(params)
        symbol_key, obs_key = jr.split(key)
        symbol = jr.randint(symbol_key, (), 0, self.num_symbols, jnp.int32)
        state = RepeatFirstState(symbol, jnp.int32(0))
        return self.observe(obs_key, state, None, params), state

    def step_env(
        self,
        key: PRNGKeyArray,
        state: RepeatFirstState,
        action: ArrayLike,
        params: RepeatFirstParams,
    ) -> tuple[Float[Array, " D"], RepeatFirstState, Float[Array, ""], Bool[Array, ""], dict]:
        asked = state.time == params.delay + 1
        answer = jnp.where(action == state.symbol, 1.0, -1.0 / (self.num_symbols - 1))
        reward = jnp.where(asked, answer, 0.0).astype(jnp.float32)
        state = RepeatFirstState(state.symbol, state.time + 1)
        obs = self.observe(key, state, action, params)
        return obs, state, reward, asked, {"discount": 1.0 - asked}

    def observe(
        self, key: PRNGKeyArray, state: RepeatFirstState, action: Any, params: RepeatFirstParams
    ) -> Float[Array, " D"]:
        coin_key, symbol_key, noise_key = jr.split(key, 3)
        n = self.num_symbols
        first, asked = state.time == 0, state.time == params.delay + 1
        distracted = jr.bernoulli(coin_key, params.distractors) & (state.time <= params.delay)
        shown = jnp.where(first, state.symbol, jr.randint(symbol_key, (), 0, n, jnp.int32))
        symbol = jax.nn.one_hot(shown, n, dtype=jnp.float32) * (first | distracted)
        clean = jnp.append(symbol, jnp.array([first, asked], jnp.float32))
        return clean + jnp.float32(params.noise) * jr.normal(noise_key, clean.shape, jnp.float32)

    def is_truncated(self, state: RepeatFirstState, params: RepeatFirstParams) -> Bool[Array, ""]:
        return jnp.array(False)

    def is_terminated(self, state: RepeatFirstState, params: RepeatFirstParams) -> Bool[Array, ""]:
        return state.time > params.delay + 1

    @property
    def name(self) -> str:
        return "RepeatFirst-memory"

    @property
    def num_actions(self) -> int:
        return self.num_symbols

    def action_space(self, params: RepeatFirstParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(self.num_symbols)

    def observation_space(self, params: RepeatFirstParams | None = None) -> spaces.Box:
        return spaces.Box(-jnp.inf, jnp.inf, (self.num_symbols + 2,), jnp.float32)
