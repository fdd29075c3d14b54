"""POPGym's cart-pole and pendulum, whose velocities are not seen."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import jax.random as jr
from gymnax.environments import spaces
from gymnax.environments.classic_control.cartpole import CartPole
from gymnax.environments.classic_control.pendulum import Pendulum
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from spg.envs.popgym.task import Task
from spg.limits import Range

WORST = 16.2736044  # what a step of the pendulum can cost


class _PositionOnly(Task):
    """Gymnax's physics, of which some entries are seen, with Gaussian noise, clipped to a box."""

    physics: Any
    entries: tuple[int, int]

    def __init__(self, episode_length: int, noise: float, high: Sequence[float]):
        Range(1, 10**9, whole=True).check("episode_length", episode_length)
        Range(0).check("noise", noise)
        self.noise, self.high = noise, jnp.array(high, jnp.float32)
        num_actions = self.physics.num_actions
        super().__init__(parts=(1, 1), num_actions=num_actions, horizon=episode_length)

    def start(self, key: PRNGKeyArray) -> Any:
        state = self.physics.reset_env(key, self.physics.default_params)[1]
        return state.replace(time=jnp.array(0, jnp.int32))

    def show(self, state: Any) -> Int[Array, " P"]:
        raise NotImplementedError("what is seen is not discrete")

    def observe(self, key: PRNGKeyArray, state: Any, action: Any, params: Any) -> Float[Array, "2"]:
        seen = self._whole(state)[jnp.array(self.entries)]
        noise = self.noise * jr.normal(key, seen.shape, seen.dtype) if self.noise else 0.0
        return jnp.clip(seen + noise, -self.high, self.high).astype(jnp.float32)

    def see_state(self, obs: Array, state: Any) -> Array:
        """What is seen, and the whole observation of the physics without noise."""
        return jnp.concatenate([obs, self._whole(state)])

    def observation_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-self.high, self.high, (2,), jnp.float32)

    def _whole(self, state: Any) -> Array:
        return self.physics.observe(jr.key(0), state, None, self.physics.default_params)

    def _step(self, key: PRNGKeyArray, state: Any, action: Array) -> tuple[Any, Array]:
        after = self.physics.step_env(key, state, action, self.physics.default_params)
        return after[1:3]


class PositionOnlyCartPole(_PositionOnly):
    """Keep a pole upright of which only position and angle are seen.

    popgym/envs/position_only_cartpole.py, and noisy_position_only_cartpole.py for a standard
    deviation `noise` > 0. A step pays 1/H, the one in which the pole falls too. To fall, or to
    leave the track, terminates; H = `episode_length` steps truncate. Easy, Medium, Hard: 200, 400,
    600 steps; with noise 0.1, 0.2, 0.3 all have 200.
    """

    resets_rarely = False
    physics = CartPole()
    entries = 0, 2

    def __init__(self, episode_length: int = 200, noise: float = 0.0):
        limits = self.physics.default_params
        high = 2 * limits.x_threshold, 2 * limits.theta_threshold_radians
        super().__init__(episode_length, noise, high)

    def play(
        self, key: PRNGKeyArray, state: Any, action: Array
    ) -> tuple[Any, Float[ArrayLike, ""]]:
        return self._step(key, state, action)[0], 1 / self.horizon

    def over(self, state: Any) -> Bool[Array, ""]:
        return self.physics.is_terminated(state, self.physics.default_params)


class PositionOnlyPendulum(_PositionOnly):
    """Swing up a pendulum of which only cos θ and sin θ are seen.

    popgym/envs/position_only_pendulum.py, and noisy_position_only_pendulum.py for a standard
    deviation `noise` > 0. The torque is within [-2, 2]. Gym's reward r is shifted and scaled to
    (1 + r/8.137)/H, which is within ±1/H. H = `episode_length` steps truncate. Easy, Medium, Hard:
    200, 150, 100 steps; with noise 0.1, 0.2, 0.3 all have 200.
    """

    physics = Pendulum()
    entries = 0, 1

    def __init__(self, episode_length: int = 200, noise: float = 0.0):
        super().__init__(episode_length, noise, (1.0, 1.0))

    def play(
        self, key: PRNGKeyArray, state: Any, action: Array
    ) -> tuple[Any, Float[ArrayLike, ""]]:
        state, reward = self._step(key, state, action)
        return state, (1 + 2 * reward / WORST) / self.horizon

    def action_space(self, params: Any = None) -> spaces.Box:
        return self.physics.action_space(self.physics.default_params)
