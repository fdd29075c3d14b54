"""Central pattern generators: coupled oscillators in amplitude and phase as an internal state."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from spg.kernels.cells import Location
from spg.limits import Range

# name: upper limit, and mean and deviation of the raw parameter at the start (Al-Hafez et al.)
START = {
    "frequency": (5.0, 0.05, 0.01),  # v, in Hz
    "amplitude": (2.0, 0.1, 0.1),  # b
    "rate": (10.0, 2.0, 0.1),  # c, in 1/s
    "weight": (1.0, 0.1, 0.05),  # w
    "phase": (2 * math.pi, 0.1, 0.05),  # φ
}


class Oscillators(Location):
    """n coupled oscillators, Ijspeert et al. (2007), one Euler step of `dt` seconds on:

        ψ̇_i = 2π v_i + Σ_{j≠i} r_j w_ij sin(ψ_j - ψ_i - φ_ij)
        r̈_i = c_i ((c_i / 4) (b_i - r_i) - ṙ_i)

    as in Al-Hafez et al. (2024), appendix E.2. z = (ψ, r, ṙ), of size m = 3 n; observations do not
    enter. Phases are not wrapped: after 1000 turns float32 still tells .0005 rad apart. Each
    parameter is M σ(raw / M) < M, with M and the starts of `START`.
    """

    raw: dict[str, Array]  # [n], and [n, n] for weight and phase, whose diagonals are not used
    dt: float = eqx.field(static=True)

    def __init__(self, num_oscillators: int, *, dt: float = 0.05, key: PRNGKeyArray):
        """Raises ValueError unless dt is in (0, .2], where an amplitude settles without ringing."""
        Range(0, 0.2, open="low").check("dt", dt)
        self.dt, n = dt, num_oscillators
        shapes = {name: (n, n) if name in ("weight", "phase") else (n,) for name in START}
        keys = dict(zip(START, jr.split(key, len(START)), strict=True))
        self.raw = {
            name: mean + std * jr.normal(keys[name], shapes[name])
            for name, (_, mean, std) in START.items()
        }

    def parameter(self, name: str) -> Array:
        """v, b, c `[n]`, w or φ `[n, n]` by its name in `START`."""
        limit = START[name][0]
        return limit * jax.nn.sigmoid(self.raw[name] / limit)

    @property
    def write(self) -> Float[Array, " m"]:
        """How far a step moves ψ, r and ṙ of an oscillator alone, at the fastest of r and ṙ."""
        v, b, c = (self.parameter(name) for name in ("frequency", "amplitude", "rate"))
        return self.dt * jnp.concatenate([2 * jnp.pi * v, b * c / (2 * math.e), b * c**2 / 4])

    def __call__(self, obs: Array, z: Float[Array, " m"]) -> Float[Array, " m"]:
        psi, r, speed = jnp.split(z, 3)
        v, b, c, w, phi = (self.parameter(name) for name in START)
        pull = r * w * jnp.sin(psi - psi[:, None] - phi)  # [i, j]
        turn = 2 * jnp.pi * v + pull.sum(1) - jnp.diagonal(pull)
        slope = jnp.concatenate([turn, speed, c * (c / 4 * (b - r) - speed)])
        return z + self.dt * slope


class EmissionFeature(eqx.Module):
    """What a head sees of z' = (ψ, r, ṙ): r cos ψ of each oscillator."""

    def __call__(self, z: Float[Array, " m"]) -> Float[Array, " n"]:
        psi, r, _ = jnp.split(z, 3)
        return r * jnp.cos(psi)


class CycleFeature(eqx.Module):
    """What a critic sees of z: r sin ψ, r cos ψ and ṙ, in which whole turns make no difference."""

    def __call__(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        psi, r, speed = jnp.split(z, 3)
        return jnp.concatenate([r * jnp.sin(psi), r * jnp.cos(psi), speed])
