"""Ascents of the k-step return over distributions w of deterministic policies, and their bounds.

DeWeese & Qu (2026); bound and step sizes are derived here, after that paper. For every w, with
rewards in an interval of length R and c_k = 2Rγ^k / ((1 - γ)(1 - γ^k)),

    max_D J^D - J(w) <= max_D ∂J/∂w_D - Σ_D w_D ∂J/∂w_D + c_k,

so no stationary point is worse than the best policy by more than c_k (`gap_bound`).
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int
from optax.projections import projection_simplex

from spg.exact.kstep import Steps, check, kstep_values
from spg.types import Scalar
from spg.worlds.models import POMDP


def range_of_rewards(pomdp: POMDP) -> Float[Array, ""]:
    """max r(s, a) - min r(s, a)."""
    reward = pomdp.mean_reward()
    return reward.max() - reward.min()


def gap_bound(k: Steps, gamma: Scalar, *, reward_range: Scalar = 1.0) -> Scalar:
    """c_k, the most by which a stationary point can fall short of the best policy."""
    return 2 * reward_range * gamma**k / ((1 - gamma) * (1 - gamma**k))


def smoothness(k: Steps, gamma: Scalar, *, reward_range: Scalar = 1.0) -> Scalar:
    """L₁ with |∂²J along u| <= L₁ ‖u‖₁²; in the Euclidean norm N L₁."""
    return 2 * reward_range * gamma**k / ((1 - gamma) * (1 - gamma**k) ** 2)


def steps_needed(gap: float, gamma: float, *, reward_range: float = 1.0) -> int:
    """The least k with c_k <= `gap`."""
    return math.ceil(math.log(1 + 2 * reward_range / ((1 - gamma) * gap)) / math.log(1 / gamma))


def step_size(k: Steps, gamma: Scalar, *, reward_range: Scalar = 1.0) -> Scalar:
    """1/L₁, of mirror ascent; 10^6 at most, where L₁ vanishes. Projected ascent takes it over N."""
    return 1 / jnp.maximum(smoothness(k, gamma, reward_range=reward_range), 1e-6)


def mirror_step(
    log_weights: Float[Array, " N"], gradient: Float[Array, " N"], size: Scalar
) -> Float[Array, " N"]:
    """log of w_D exp(size ∂J/∂w_D) / Z, from log w: mirror ascent with the entropy."""
    return jax.nn.log_softmax(log_weights + size * gradient)


def projected_step(
    weights: Float[Array, " N"], gradient: Float[Array, " N"], size: Scalar
) -> Float[Array, " N"]:
    """The distribution nearest to w + size ∂J/∂w in the Euclidean norm."""
    return projection_simplex(weights + size * gradient)


def ascend(
    pomdp: POMDP,
    policies: Int[Array, "N O"] | Int[np.ndarray, "N O"],
    *,
    k: Steps,
    gamma: Scalar,
    num_steps: int,
    method: Literal["mirror", "projected"] = "mirror",
    reward_range: Scalar | None = None,
) -> tuple[Float[Array, " N"], Float[Array, " T"]]:
    """Ascent from the uniform distribution: the last w, and J(w_0) … J(w_{T-1}), which never falls.

    With the steps of `smoothness`, 1/L₁ for mirror and 1/(N L₁) for projected ascent, T steps end
    within `rate_bound` of the best policy. `reward_range` is max r - min r by default. Raises
    ValueError as `kstep_values` does.
    """
    check(pomdp, policies, None, k=k, gamma=gamma)
    if method not in ("mirror", "projected"):
        raise ValueError(f"unknown method {method!r}; choose mirror or projected")
    num_policies = len(policies)
    width = range_of_rewards(pomdp) if reward_range is None else reward_range
    size = step_size(k, gamma, reward_range=width)
    start = jnp.full(num_policies, 1 / num_policies, pomdp.start.dtype)

    def mirror(log_weights, _):
        solution = kstep_values(pomdp, policies, jnp.exp(log_weights), k=k, gamma=gamma)
        moved = mirror_step(log_weights, solution.gradient, size)
        return moved, solution.expected_return

    def projected(weights, _):
        solution = kstep_values(pomdp, policies, weights, k=k, gamma=gamma)
        moved = projected_step(weights, solution.gradient, size / num_policies)
        return moved, solution.expected_return

    if method == "projected":
        return lax.scan(projected, start, length=num_steps)
    log_weights, returns = lax.scan(mirror, jnp.log(start), length=num_steps)
    return jnp.exp(log_weights), returns


def rate_bound(
    num_steps: Array | int,
    num_policies: int,
    *,
    k: Steps,
    gamma: Scalar,
    method: Literal["mirror", "projected"] = "mirror",
    reward_range: Scalar = 1.0,
) -> Array:
    """How far T steps of `ascend` may end below the best policy: O(1/T) down to c_k.

    c_k + L₁ log N / T (mirror), c_k + N L₁ (1 - 1/N) / (2T) (projected). No coefficient of
    mismatch between state distributions appears.
    """
    first = smoothness(k, gamma, reward_range=reward_range)
    start = {"mirror": math.log(num_policies), "projected": (num_policies - 1) / 2}[method]
    return gap_bound(k, gamma, reward_range=reward_range) + first * start / jnp.asarray(num_steps)
