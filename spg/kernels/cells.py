"""Laws of the next internal state: where z' lies, and whether it is computed or drawn.

A *location* maps (o, z) to a point: `GRU`, `Window`, `Empty`, those of `linear.py` and `stack.py`,
or any module with `__call__(obs, z)` and `unroll(obs, z, first, z0)`. A *cell* puts a law on that
point: `Computed` (BPTT, window, memoryless) or `Noisy` (S2PG).
"""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from spg.distributions import Delta, Distribution, Normal


@runtime_checkable
class Location(Protocol):
    """A point z' for each (o, z), and the same along a segment that starts from z."""

    def __call__(self, obs: Array, z: Array) -> Array: ...

    def unroll(self, obs: Array, z: Array, first: Array, z0: Array) -> Array: ...


@runtime_checkable
class Cell(Protocol):
    """The law ω( . | o, z) of the next internal state."""

    def __call__(self, obs: Array, z: Array) -> Distribution: ...

    def replay(
        self, obs: Array, z: Array, z_next: Array, first: Array, z0: Array
    ) -> tuple[Array, Array]:
        """log ω(z' | o, z) of each recorded step, and the z' that the actions depend on."""
        ...


class GRU(eqx.Module):
    """Gated recurrent unit of Cho et al. (2014) on (o, z)."""

    gru: eqx.nn.GRUCell

    def __init__(self, obs_size: int, z_size: int, *, key: PRNGKeyArray):
        self.gru = eqx.nn.GRUCell(obs_size, z_size, key=key)

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " n"]) -> Float[Array, " n"]:
        return self.gru(obs, z)

    def unroll(
        self,
        obs: Array,
        z: Float[Array, " n"],
        first: Bool[Array, " L"],
        z0: Float[Array, " n"],
    ) -> Float[Array, "L n"]:
        return unroll(self, obs, z, first, z0)


class Window(eqx.Module):
    """The last N observations, oldest first: z' = (z without its oldest, o). No parameters."""

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " n"]) -> Float[Array, " n"]:
        return jnp.concatenate([z, obs])[obs.size :]

    def unroll(
        self,
        obs: Array,
        z: Float[Array, " n"],
        first: Bool[Array, " L"],
        z0: Float[Array, " n"],
    ) -> Float[Array, "L n"]:
        return unroll(self, obs, z, first, z0)


class Empty(eqx.Module):
    """No memory: z is, and stays, a vector of size 0."""

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " 0"]) -> Float[Array, " 0"]:
        return z

    def unroll(
        self,
        obs: Array,
        z: Float[Array, " 0"],
        first: Bool[Array, " L"],
        z0: Float[Array, " 0"],
    ) -> Float[Array, "L 0"]:
        return jnp.zeros((obs.shape[0], 0), z.dtype)


class Computed(eqx.Module):
    """z' is computed: replaying a segment runs the location through it, with its gradients."""

    location: Location

    def __call__(self, obs: Array, z: Float[Array, " n"]) -> Delta:
        return Delta(self.location(obs, z))

    def replay(
        self,
        obs: Array,
        z: Float[Array, "L n"],
        z_next: Float[Array, "L n"],
        first: Bool[Array, " L"],
        z0: Float[Array, " n"],
    ) -> tuple[Float[Array, " L"], Float[Array, "L n"]]:
        return jnp.zeros(obs.shape[0]), self.location.unroll(obs, z[0], first, z0)


class Noisy(eqx.Module):
    """z' ~ N(location(o, z), diag(exp(2 log_std))), log_std learned: each step stands alone.

    Nothing is propagated from step to step, so a segment replays in parallel and its length
    does not matter (Al-Hafez et al., 2024, lemma 2.1).
    """

    location: Location
    log_std: Float[Array, " n"]

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " n"]) -> Normal:
        return Normal(self.location(obs, z), jnp.exp(jnp.clip(self.log_std, -20.0, 2.0)))

    def replay(
        self,
        obs: Array,
        z: Float[Array, "L n"],
        z_next: Float[Array, "L n"],
        first: Bool[Array, " L"],
        z0: Float[Array, " n"],
    ) -> tuple[Float[Array, " L"], Float[Array, "L n"]]:
        return replay_drawn(self, obs, z, z_next)


def replay_drawn(
    cell: Cell, obs: Array, z: Shaped[Array, "L *n"], z_next: Shaped[Array, "L *n"]
) -> tuple[Float[Array, " L"], Shaped[Array, "L *n"]]:
    """`Cell.replay` where z' is drawn: each step stands alone, and z' is as recorded."""
    return jax.vmap(lambda o, z, z_next: cell(o, z).log_prob(z_next))(obs, z, z_next), z_next


def unroll(
    location: Location,
    obs: Array,
    z: Float[Array, " n"],
    first: Bool[Array, " L"],
    z0: Float[Array, " n"],
) -> Float[Array, "L n"]:
    """z'_t = location(o_t, z_t) over a segment, z_{t+1} = z'_t, or `z0` where an episode opens."""

    def step(z, inputs):
        obs, first = inputs
        z = location(obs, jnp.where(first, z0, z))
        return z, z

    return lax.scan(step, z, (obs, first))[1]
