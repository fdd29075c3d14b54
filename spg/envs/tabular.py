"""A finite world as a Gymnax environment."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from spg.limits import Range
from spg.types import Observation
from spg.worlds.models import POMDP, DensePOMDP, Problem, SparsePOMDP, check, sparse


class TabularState(NamedTuple):
    state: Int[Array, ""]
    obs: Int[Array, ""]  # what the state has emitted
    time: Int[Array, ""]


@struct.dataclass
class TabularParams:
    """A world with cumulative probabilities: a row's last possible entry holds 2, not 1."""

    successor: Any  # [S, A, N]
    successor_cumulative: Any  # [S, A, N]
    reward: Any  # [S, A, N]
    observation: Any  # [S, M]
    observation_cumulative: Any  # [S, M]
    start_cumulative: Any  # [S]
    max_steps_in_episode: Any = None  # None: the world goes on for ever, and `step` never resets


class Tabular(Environment):
    """The world of a model; observations are integers in 0..O-1, actions in 0..A-1.

    With `privileged` an observation is an `Observation`, whose critic sees the state.

    Nothing terminates. With `max_steps_in_episode` an episode is truncated there and the next one
    opens; without it, the default, no reset is ever drawn. Models are parameters: `vmap` over
    `tabular_params` of several of the same shape. Of a `Problem` the environment also keeps the
    names, for pictures, and the `slots`, for policies in which each of several agents acts on what
    that agent sees.
    """

    def __init__(
        self,
        world: POMDP | Problem,
        *,
        privileged: bool = False,
        max_steps_in_episode: int | None = None,
    ):
        self.problem = world if isinstance(world, Problem) else None
        self.slots = world.slots if isinstance(world, Problem) else None
        self.pomdp: POMDP = world.pomdp if isinstance(world, Problem) else world
        pomdp = self.pomdp
        self._params = tabular_params(pomdp, max_steps_in_episode=max_steps_in_episode)
        self._num_obs = pomdp.num_obs
        self._privileged = privileged
        self._num_actions = pomdp.num_actions

    @property
    def default_params(self) -> TabularParams:
        return self._params

    def step(
        self,
        key: PRNGKeyArray,
        state: TabularState,
        action: ArrayLike,
        params: TabularParams | None = None,
    ) -> tuple[PyTree, TabularState, Array, Array, Array, dict]:
        params = self._params if params is None else params
        if params.max_steps_in_episode is not None:
            return super().step(key, state, action, params)
        obs, state, reward, terminated, info = self.step_env(key, state, action, params)
        return obs, state, reward, terminated, terminated, info | {"final_observation": obs}

    def reset_env(self, key: PRNGKeyArray, params: TabularParams) -> tuple[PyTree, TabularState]:
        u = jr.uniform(key, (2,))
        s = jnp.searchsorted(params.start_cumulative, u[0], side="right").astype(jnp.int32)
        state = TabularState(s, self._emit(u[1], s, params), jnp.int32(0))
        return self._see(state), state

    def step_env(
        self, key: PRNGKeyArray, state: TabularState, action: ArrayLike, params: TabularParams
    ) -> tuple[PyTree, TabularState, Float[Array, ""], Bool[Array, ""], dict]:
        u = jr.uniform(key, (2,))
        i = jnp.sum(u[0] >= params.successor_cumulative[state.state, action])
        s = params.successor[state.state, action, i]
        reward = params.reward[state.state, action, i]
        state = TabularState(s, self._emit(u[1], s, params), state.time + 1)
        return self._see(state), state, reward, jnp.array(False), {"discount": 1.0}

    def observe(
        self, key: PRNGKeyArray, state: TabularState, action: Any, params: TabularParams
    ) -> PyTree:
        return self._see(state)

    def is_truncated(self, state: TabularState, params: TabularParams) -> Bool[Array, ""]:
        limit = params.max_steps_in_episode
        return jnp.array(False) if limit is None else jnp.asarray(state.time >= limit)

    def is_terminated(self, state: TabularState, params: TabularParams) -> Bool[Array, ""]:
        return jnp.array(False)

    @property
    def name(self) -> str:
        return "Tabular"

    @property
    def num_actions(self) -> int:
        return self._num_actions

    def action_space(self, params: TabularParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(self._num_actions)

    def observation_space(self, params: TabularParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(self._num_obs)

    def _see(self, state: TabularState) -> PyTree:
        return Observation(state.obs, state.state) if self._privileged else state.obs

    def _emit(self, u: Array, s: Array, params: TabularParams) -> Int[Array, ""]:
        return params.observation[s, jnp.sum(u >= params.observation_cumulative[s])]


def tabular_params(pomdp: POMDP, *, max_steps_in_episode: int | None = None) -> TabularParams:
    """What `Tabular` needs of a model to draw from it."""
    check(pomdp)
    if max_steps_in_episode is not None:
        Range(1, 2**31 - 1, whole=True).check("max_steps_in_episode", max_steps_in_episode)
    model: SparsePOMDP = sparse(pomdp) if isinstance(pomdp, DensePOMDP) else pomdp
    parts = model.probability, model.emission, model.start
    successors, observations, start = map(_cumulative, parts)
    reward = model.reward.astype(jnp.float32)  # as of every environment here
    return TabularParams(
        model.successor, successors, reward, model.observation, observations, start,
        max_steps_in_episode,
    )  # fmt: skip


def _cumulative(p: Array) -> Float[Array, "..."]:
    """Cumulative probabilities in single precision, in which no rounding can draw a zero."""
    mass = np.asarray(p, np.float64)
    total = np.cumsum(mass, -1)
    beyond = np.cumsum(mass[..., ::-1], -1)[..., ::-1] - mass  # the mass of later entries
    return jnp.asarray(np.where(beyond > 0, total, 2.0), jnp.float32)
