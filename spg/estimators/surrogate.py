"""The clipped surrogate of PPO on the joint ratio over actions and internal states."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from spg.types import LogProb, Scalar

MAX_LOG_RATIO = 20.0  # beyond it exp goes on as a straight line


class Divergence(NamedTuple):
    """An estimate of KL(π_old ‖ π) from each recorded step, and its two factors apart."""

    kl: Float[Array, "*T"]  # from the joint ratio
    kl_action: Float[Array, "*T"]  # its action part
    kl_z: Float[Array, "*T"]  # its internal-state part


class Surrogate(NamedTuple):
    """The objective of each step, to be maximised, and what to watch while doing so."""

    objective: Float[Array, "*T"]
    clipped: Float[Array, "*T"]  # 1 where the clip binds or would
    kl: Float[Array, "*T"]  # as in `Divergence`
    kl_action: Float[Array, "*T"]
    kl_z: Float[Array, "*T"]


def ppo_surrogate(
    new: LogProb, old: LogProb, advantage: Float[Array, "*T"], *, clip: Scalar
) -> Surrogate:
    """min(ρ A, clip(ρ, 1 - ε, 1 + ε) A), Schulman et al. (2017), eq. 7, on the joint ratio

        ρ = π(a, z' | o, z) / π_old(a, z' | o, z)

    of PPO-RS (Al-Hafez et al., 2024, algorithm 3). Exactly ρ = 1 at the first minibatch.

    exp(x) overflows in single precision from x = 88 on. Beyond x = 20 it goes on along its tangent,
    e²⁰ (1 + x - 20). Where A > 0 that is clipped anyway. Where A < 0 the gradient points back, as
    before, with the finite size e²⁰ |A|; a step with such a ratio outweighs all others either way,
    and the norm of the gradient is what an optimiser clips.
    """
    log_ratio = (new.z - old.z) + (new.action - old.action)
    clipped = (jnp.abs(_exp(log_ratio) - 1) > clip).astype(log_ratio.dtype)
    return Surrogate(pessimistic(log_ratio, advantage, clip=clip), clipped, *divergence(new, old))


def pessimistic(
    log_ratio: Float[Array, "*T"], advantage: Float[Array, "*T"], *, clip: Scalar
) -> Float[Array, "*T"]:
    """min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) with ρ bounded as in `ppo_surrogate`."""
    ratio = _exp(log_ratio)
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def divergence(new: LogProb, old: LogProb) -> Divergence:
    """ρ - 1 - log ρ of each factor of the ratio, Schulman's k3: non-negative, KL in the mean.

    The mean is over steps recorded under π_old. ρ is bounded as in `ppo_surrogate`.
    """
    z, action = new.z - old.z, new.action - old.action
    return Divergence(_k3(z + action), _k3(action), _k3(z))


def _exp(x: Array) -> Array:
    return jnp.exp(jnp.minimum(x, MAX_LOG_RATIO)) * (1 + jnp.maximum(x - MAX_LOG_RATIO, 0.0))


def _k3(x: Array) -> Array:
    """exp(x) - 1 - x, without cancellation near 0."""
    near, far = jnp.minimum(x, MAX_LOG_RATIO), jnp.maximum(x - MAX_LOG_RATIO, 0.0)
    return jnp.expm1(near) + jnp.exp(near) * far - x
