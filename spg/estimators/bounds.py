"""How large the variance of a score estimate can be: theorems 3.4 and 3.5 of S2PG.

The estimate is ĝ = J(τ) Σ_t ∇ log π with Gaussian ω and μ, averaged over N trajectories. The
variance of ĝ is the trace of its covariance. Every bound is a Frobenius norm that holds wherever
the policy goes:

    |r| ≤ R,   ‖∂f^a/∂θ‖ ≤ F,   ‖∂f^z/∂θ‖ ≤ H,   ‖∂f^a/∂z‖ ≤ K,   ‖∂f^z/∂z‖ ≤ Z

f^a, f^z are the means of a and z' given (o, z); Σ, Υ their covariances.
"""

from typing import NamedTuple

import numpy as np


class Constants(NamedTuple):
    """What the two theorems take; named after the norms above."""

    reward: float  # R
    action_by_params: float  # F
    z_by_params: float  # H
    action_by_z: float  # K
    z_by_z: float  # Z
    action_precision: float  # ‖Σ⁻¹‖
    z_precision: float  # ‖Υ⁻¹‖


def bptt_variance_bound(
    c: Constants, *, gamma: float, num_steps: int, num_trajectories: int = 1
) -> float:
    """Al-Hafez et al. (2024), theorem 3.4: z is computed and gradients run through all of it.

    Var ≤ R² ‖Σ⁻¹‖ ((1-γ^T) / (1-γ))² / N · [ T F² + 2 F H K Z̃ + H² K² Z̄ ]

    Linear in T beyond the returns for Z < 1, exponential for Z > 1.
    """
    mixed, square = path_sums(c.z_by_z, num_steps)
    through = c.z_by_params * c.action_by_z
    paths = num_steps * c.action_by_params**2
    paths += 2 * c.action_by_params * through * mixed + through**2 * square
    return _scale(c, gamma, num_steps, num_trajectories) * paths


def s2pg_variance_bound(
    c: Constants, *, gamma: float, num_steps: int, num_trajectories: int = 1
) -> float:
    """Al-Hafez et al. (2024), theorem 3.5: z' is drawn; linear in T whatever Z and K are.

    Var ≤ R² ‖Σ⁻¹‖ ((1-γ^T) / (1-γ))² / N · [ T F² + T H² ‖Υ⁻¹‖ / ‖Σ⁻¹‖ ]
    """
    noise = c.z_precision / c.action_precision
    paths = num_steps * (c.action_by_params**2 + c.z_by_params**2 * noise)
    return _scale(c, gamma, num_steps, num_trajectories) * paths


def path_sums(decay: float, num_steps: int) -> tuple[float, float]:
    """Z̃ = Σ_{t<T} Σ_{i<t} Z^{t-i-1} and Z̄ = Σ_{t<T} (Σ_{i<t} Z^{t-i-1})²."""
    inner = np.concatenate([[0.0], np.cumsum(decay ** np.arange(num_steps - 1.0))])
    return float(inner.sum()), float((inner**2).sum())


def _scale(c: Constants, gamma: float, num_steps: int, num_trajectories: int) -> float:
    largest_return = c.reward * float(np.sum(gamma ** np.arange(num_steps)))
    return largest_return**2 * c.action_precision / num_trajectories
