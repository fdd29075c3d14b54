"""The clipped surrogate of PPO on the joint ratio over actions and internal states."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spg.types import LogProb, Scalar


class Surrogate(NamedTuple):
    """The objective of each step, to be maximised, and what to watch while doing so."""

    objective: Float[Array, "*T"]
    clipped: Float[Array, "*T"]  # 1 where the clip binds or would
    kl: Float[Array, "*T"]  # estimate of KL(π_old || π) from the joint ratio
    kl_action: Float[Array, "*T"]  # its action part
    kl_z: Float[Array, "*T"]  # its internal-state part


def ppo_surrogate(
    new: LogProb, old: LogProb, advantage: Float[Array, "*T"], *, clip: Scalar
) -> Surrogate:
    """min(ρ A, clip(ρ, 1 - ε, 1 + ε) A), Schulman et al. (2017), eq. 7, on the joint ratio

        ρ = π(a, z' | o, z) / π_old(a, z' | o, z)

    of PPO-RS (Al-Hafez et al., 2024, algorithm 3). Exactly ρ = 1 at the first minibatch. The
    KL estimates are ρ - 1 - log ρ of each factor, non-negative, Schulman's k3.
    """
    log_ratio_z = new.z - old.z
    log_ratio_action = new.action - old.action
    log_ratio = log_ratio_z + log_ratio_action
    ratio = jnp.exp(log_ratio)
    objective = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    k3 = lambda x: jnp.expm1(x) - x
    clipped = (jnp.abs(ratio - 1) > clip).astype(ratio.dtype)
    kl = jax.tree.map(k3, (log_ratio, log_ratio_action, log_ratio_z))
    return Surrogate(objective, clipped, *kl)
