"""What the tasks of POPGym share: how they are shown, how they end, and fair draws."""

import abc
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from spg.envs.resets import step_and_reset_rarely


class Task(Environment, abc.ABC):
    """A task of POPGym (Morad et al., 2023) by the rules of version 1.0.7 of its package.

    **Observations** are flat, as they were for the published results: RLlib flattened them as
    `gymnasium.spaces.utils.flatten` does, each Discrete entry one-hot and one behind the other. The
    published runs appended the previous action (of the action 0 where an episode opens) and whether
    an episode opens, by POPGym's wrappers PreviousAction and Antialias. `envs.make(...,
    previous_action=True)` appends the previous action, or zeros where an episode opens, which tells
    both. **Actions** on a board are one Discrete number, row by row, as POPGym's wrapper
    DiscreteAction has it. (The published runs drew row and column independently.)

    **Ends.** `terminated` and `truncated` are those of the package. A task's own clock truncates
    except where the last card terminates. `max_steps_in_episode` can cut episodes shorter, and pays
    as before: rewards are scaled by the task's own length.

    **Hidden state.** Boards, mazes and chances are drawn at the start. A card is drawn when it is
    shown, with the probabilities that a shuffled deck would give it: the process is the same, a
    reset costs no shuffle, and `observe="state"`, the leaves of a state behind the observation,
    knows no card before it is dealt or turned. (POPGym's own `get_state` knows all of the cards in
    Autoencode and Concentration.)
    """

    both_ends = True  # may the clock truncate in the step that terminates?
    resets_rarely = True  # most episodes end by a clock, so those side by side end together

    def __init__(self, *, parts: Sequence[int], num_actions: int, horizon: int):
        self._num_actions, self.horizon = num_actions, horizon
        # entry i of the flat observation is 1 where part `_part[i]` is in category `_category[i]`
        self._part = np.repeat(np.arange(len(parts)), parts)
        self._category = np.concatenate([np.arange(size) for size in parts])

    @abc.abstractmethod
    def start(self, key: PRNGKeyArray) -> Any:
        """The hidden state in which an episode opens; its field `time` is 0."""

    @abc.abstractmethod
    def play(
        self, key: PRNGKeyArray, state: Any, action: Array
    ) -> tuple[Any, Float[ArrayLike, ""]]:
        """The next hidden state, and the reward."""

    @abc.abstractmethod
    def show(self, state: Any) -> Int[Array, " P"]:
        """The category of each part of the observation."""

    def over(self, state: Any) -> Bool[Array, ""]:
        """Did the task itself end?"""
        return jnp.array(False)

    @property
    def default_params(self) -> EnvParams:
        return EnvParams(max_steps_in_episode=self.horizon)

    @partial(jax.jit, static_argnames=("self",))
    def step(
        self, key: PRNGKeyArray, state: Any, action: ArrayLike, params: EnvParams | None = None
    ) -> tuple[Float[Array, " D"], Any, Array, Array, Array, dict]:
        params = self.default_params if params is None else params
        if self.resets_rarely:
            return step_and_reset_rarely(self, key, state, action, params)
        return super().step(key, state, action, params)

    def reset_env(self, key: PRNGKeyArray, params: EnvParams) -> tuple[Float[Array, " D"], Any]:
        start_key, obs_key = jr.split(key)
        state = self.start(start_key)
        return self.observe(obs_key, state, None, params), state

    def step_env(
        self, key: PRNGKeyArray, state: Any, action: ArrayLike, params: EnvParams
    ) -> tuple[Float[Array, " D"], Any, Float[Array, ""], Bool[Array, ""], dict]:
        play_key, obs_key = jr.split(key)
        state, reward = self.play(play_key, state, jnp.asarray(action))
        terminated = self.over(state)
        obs = self.observe(obs_key, state, action, params)
        info = {"discount": 1.0 - terminated}
        return obs, state, jnp.asarray(reward, jnp.float32), terminated, info

    def observe(
        self, key: PRNGKeyArray, state: Any, action: Any, params: EnvParams
    ) -> Float[Array, " D"]:
        return (self.show(state)[self._part] == self._category).astype(jnp.float32)

    def is_truncated(self, state: Any, params: EnvParams) -> Bool[Array, ""]:
        late = jnp.asarray(state.time >= params.max_steps_in_episode)
        return late if self.both_ends else late & ~self.over(state)

    def is_terminated(self, state: Any, params: EnvParams) -> Bool[Array, ""]:
        return self.over(state)

    @property
    def name(self) -> str:
        return f"popgym/{type(self).__name__}"

    @property
    def num_actions(self) -> int:
        return self._num_actions

    def action_space(self, params: EnvParams | None = None) -> spaces.Discrete | spaces.Box:
        return spaces.Discrete(self._num_actions)

    def observation_space(self, params: EnvParams | None = None) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (len(self._part),), jnp.float32)


def draw(key: PRNGKeyArray, weights: Int[Array, " N"]) -> Int[Array, ""]:
    """An index, in proportion to the weights (but for W/2³², of a total W); N if all are zero."""
    total = jnp.maximum(weights.sum(), 1).astype(jnp.uint32)
    ticket = (jr.bits(key, (), jnp.uint32) % total).astype(jnp.int32)
    return (jnp.cumsum(weights) <= ticket).sum().astype(jnp.int32)


def deal(key: PRNGKeyArray, left: Int[Array, " K"]) -> tuple[Int[Array, " K"], Int[Array, ""]]:
    """Of a deck with `left` cards of each kind: what is left after a card, and its kind."""
    kind = draw(key, left)
    return left - (jnp.arange(len(left)) == kind), kind
