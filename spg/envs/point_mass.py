"""A point that is told at its start where to go, and has to remember it on the way.

The navigation tasks of S2PG (Al-Hafez et al., 2024, appendix E.1), after the authors' code. The
field is [0, 150]². An action a in [-1, 1] is a heading φ = π(a + 1): 0 is left, -1/2 up, ±1 right,
1/2 down. Three substeps of .6 follow it.
"""

import abc
import math
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from spg.limits import Range, check

FIELD = 150.0  # side of the field; what is observed is divided by it
SUBSTEPS, STRIDE = 3, 0.6
COLUMNS, LOW, HIGH = (25.0, 57.0, 88.0, 120.0), 15.0, 130.0  # starts are low, goals high
WALLS = (60.0, 90.0)  # heights of the walls of `Doors`
HALF_THICKNESS, DOOR_WIDTH, POINT_RADIUS = 2.5, 40.0, 2.0
REACHED = 5.0  # how close to the goal is a success


class PointMassState(NamedTuple):
    position: Float[Array, "2"]
    start: Float[Array, "2"]
    goal: Float[Array, "2"]
    crashed: Bool[Array, ""]  # into the border or a wall
    time: Int[Array, ""]


class DoorsState(NamedTuple):
    position: Float[Array, "2"]
    edges: Float[Array, "2"]  # left ends of the doors in the lower and in the upper wall
    crashed: Bool[Array, ""]
    time: Int[Array, ""]


@struct.dataclass
class PointParams:
    max_steps_in_episode: Annotated[Any, Range(1, 2**31 - 1, whole=True)] = 400


def reached(position: Float[Array, "*T 2"], goal: Float[Array, "2"]) -> Bool[Array, ""]:
    """Success: the point comes as near as `REACHED` to its goal in any of these steps."""
    return (_distance(position, goal) <= REACHED).any()


class _Point(Environment, abc.ABC):
    """Headings, substeps, and the clock, which truncates."""

    start_radius: float  # around the start, where the policy sees what it has to remember
    success_reward: float  # at least this much exactly where a step ends within REACHED of the goal

    @abc.abstractmethod
    def _substep(
        self, state: Any, place: Float[Array, "2"], stride: Float[Array, "2"]
    ) -> tuple[Float[Array, "2"], Bool[Array, ""], Float[Array, ""]]:
        """The next place after `place`, whether the point crashed, and the reward if not."""

    @property
    def default_params(self) -> PointParams:
        return PointParams()

    def step_env(
        self, key: PRNGKeyArray, state: Any, action: Float[Array, "1"], params: PointParams
    ) -> tuple[Float[Array, " D"], Any, Float[Array, ""], Bool[Array, ""], dict]:
        heading = jnp.pi * (jnp.clip(action[0], -1, 1) + 1)
        stride = STRIDE * jnp.stack([jnp.cos(heading), jnp.sin(heading)]).astype(jnp.float32)
        place, crashed, reward = state.position, jnp.array(False), jnp.float32(0)
        for _ in range(SUBSTEPS):  # a crash ends the step, and its reward is that of a crash
            after, hit, pay = self._substep(state, place, stride)
            place = jnp.where(crashed, place, after)
            crashed = crashed | hit
            reward = jnp.where(crashed, -2.0, pay).astype(jnp.float32)
        state = state._replace(position=place, crashed=crashed, time=state.time + 1)
        seen = self.observe(key, state, action, params)
        return seen, state, reward, crashed, {"discount": 1.0 - crashed}

    def is_truncated(self, state: Any, params: PointParams) -> Bool[Array, ""]:
        return jnp.asarray(state.time >= params.max_steps_in_episode)

    def is_terminated(self, state: Any, params: PointParams) -> Bool[Array, ""]:
        return state.crashed

    @property
    def num_actions(self) -> int:
        return 1

    def action_space(self, params: PointParams | None = None) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (1,), jnp.float32)

    def observation_space(self, params: PointParams | None = None) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (4,), jnp.float32)


class PointMass(_Point):
    """Go to a goal that is seen near the start only: S2PG's memory point mass.

    Starts (x, 15) and goals (x', 130) have x and x' independent and uniform on `COLUMNS`. The
    policy sees (p, goal)/150 within `start_radius` = 30 of the start and (p, 0)/150 elsewhere. The
    reward is exp(-|goal - p|/10) where a step ends; leaving the field pays -2 and terminates. The
    goal does not: the best to do there is to alternate between 0 and 1.8 away, for .9176 per step.
    The straight way takes 64 to 83 steps. An episode has 1000 in the paper, by default 400 here.

    The state is (p, goal)/150, as the critic's in the paper. It decides what is earned and when the
    episode ends. Where the policy sees its goal depends on the start too, which the state lacks.
    """

    start_radius = 30.0
    success_reward = math.exp(-0.1 * REACHED)

    def reset_env(
        self, key: PRNGKeyArray, params: PointParams
    ) -> tuple[Float[Array, "4"], PointMassState]:
        check(params)
        x = jr.choice(key, jnp.array(COLUMNS, jnp.float32), (2,))
        start, goal = jnp.stack([x, jnp.array([LOW, HIGH], jnp.float32)], 1)
        state = PointMassState(start, start, goal, jnp.array(False), jnp.int32(0))
        return self.observe(key, state, None, params), state

    def _substep(
        self, state: PointMassState, place: Float[Array, "2"], stride: Float[Array, "2"]
    ) -> tuple[Float[Array, "2"], Bool[Array, ""], Float[Array, ""]]:
        after = jnp.clip(place + stride, 0, FIELD)
        return after, (after != place + stride).any(), jnp.exp(-0.1 * _distance(state.goal, after))

    def observe(
        self, key: PRNGKeyArray, state: PointMassState, action: Any, params: PointParams
    ) -> Float[Array, "4"]:
        near = _distance(state.position, state.start) <= self.start_radius
        return jnp.concatenate([state.position, jnp.where(near, state.goal, 0.0)]) / FIELD

    def see_state(self, obs: Float[Array, "4"], state: PointMassState) -> Float[Array, "4"]:
        return jnp.concatenate([state.position, state.goal]) / FIELD

    @property
    def name(self) -> str:
        return "PointMass-memory"


class Doors(_Point):
    """Pass two walls whose doors are seen near the start only: S2PG's maze with doors.

    The start is (75, 10), the goal (75, 140). Walls stand at heights 60 and 90; the left ends e₁
    and e₂ of their doors, 40 wide, are independent and uniform on [10, 100]. The policy sees
    (p, e₁, e₂)/150 within `start_radius` = 20 of the start, and (p/150, -1, -1) elsewhere.

    The point cannot leave the field. It touches wall i if a substep begins within 2.5 of its height
    and not inside the door, e_i + 2 < x < e_i + 38, which pays -2 and terminates. Else the reward
    is 10 exp(-.03 |goal - p|) where a step ends. The straight way takes 73 steps; a blind one
    passes both doors with probability .16. An episode has 1000 in the paper, by default 400 here.
    The state is (p, e₁, e₂)/150.
    """

    start, goal = (75.0, 10.0), (75.0, 140.0)
    start_radius = 20.0
    success_reward = 10 * math.exp(-0.03 * REACHED)

    def reset_env(
        self, key: PRNGKeyArray, params: PointParams
    ) -> tuple[Float[Array, "4"], DoorsState]:
        check(params)
        edges = jr.uniform(key, (2,), jnp.float32, 10, 100)
        state = DoorsState(
            jnp.array(self.start, jnp.float32), edges, jnp.array(False), jnp.int32(0)
        )
        return self.observe(key, state, None, params), state

    def _substep(
        self, state: DoorsState, place: Float[Array, "2"], stride: Float[Array, "2"]
    ) -> tuple[Float[Array, "2"], Bool[Array, ""], Float[Array, ""]]:
        aside = jnp.abs(place[0] - state.edges - DOOR_WIDTH / 2)
        outside = aside >= DOOR_WIDTH / 2 - POINT_RADIUS
        touched = (jnp.abs(place[1] - jnp.array(WALLS)) < HALF_THICKNESS) & outside
        after = jnp.clip(place + stride, 0, FIELD)
        reward = 10 * jnp.exp(-0.03 * _distance(jnp.array(self.goal), after))
        return after, touched.any(), reward

    def observe(
        self, key: PRNGKeyArray, state: DoorsState, action: Any, params: PointParams
    ) -> Float[Array, "4"]:
        near = _distance(state.position, jnp.array(self.start)) <= self.start_radius
        return jnp.append(state.position / FIELD, jnp.where(near, state.edges / FIELD, -1.0))

    def see_state(self, obs: Float[Array, "4"], state: DoorsState) -> Float[Array, "4"]:
        return jnp.concatenate([state.position, state.edges]) / FIELD

    @property
    def name(self) -> str:
        return "Doors-memory"


def _distance(x: Float[Array, "*#T 2"], y: Float[Array, "*#T 2"]) -> Float[Array, "*T"]:
    return jnp.sqrt(((x - y) ** 2).sum(-1))
