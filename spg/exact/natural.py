"""Natural gradient ascent of exact values, within a trust region of the policy.

Kakade (2002), for tables of logits, whose Fisher matrix F = E[∇log ωμ ∇log ωμᵀ] in the long run is
known: F⁺∇η are the advantages,

    C(g, o, h) / (Pr(g, o) ω(h | g, o)),      B(h, o, a) / (Pr(h, o) μ(a | h, o)),      ∇η = (C, B),

so that neither a rare visit nor a saturated probability makes a step small. A step goes as far as
a mean KL divergence ρ, to second order; ρ grows by a half when the step has raised the value, and
falls to a quarter when it has not, which takes the step back. One ascent is told one gradient a
turn, as in `spg.exact.conjugate`.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree

from spg.exact.gamp import direct_gradient
from spg.kernels.finite import tables, transitions
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.types import Scalar
from spg.worlds.models import POMDP, DensePOMDP

LONGEST = 4.0  # of a step in one logit: where Pr(g, o) vanishes an advantage is rounding


class Ascent(NamedTuple):
    params: PyTree  # the best so far
    value: Float[Array, ""]  # there; -∞ at first
    gradient: PyTree  # there
    direction: PyTree  # F⁺ times it
    radius: Float[Array, ""]  # ρ


def init(params: PyTree, *, radius: float = 0.05) -> Ascent:
    """The ascent from these parameters, which it evaluates first."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    dtype = jnp.result_type(*jax.tree.leaves(params))
    return Ascent(params, jnp.asarray(-jnp.inf, dtype), zeros, zeros, jnp.asarray(radius, dtype))


def ask(state: Ascent, *, bound: Scalar = 12.0) -> PyTree:
    """The parameters to evaluate next, θ + F⁺∇η √(2ρ / ∇ηᵀF⁺∇η), within bounds."""
    gain = jnp.asarray(optax.tree.vdot(state.gradient, state.direction))
    scale = jnp.sqrt(2 * state.radius / jnp.where(gain > 0, gain, jnp.inf))
    move = lambda x, v: jnp.clip(x + jnp.clip(scale * v, -LONGEST, LONGEST), -bound, bound)
    return jax.tree.map(move, state.params, state.direction)


def tell(
    state: Ascent, trial: PyTree, value: Float[Array, ""], gradient: PyTree, direction: PyTree
) -> Ascent:
    """Go on with value, gradient and natural gradient at `trial`, from `ask`."""
    first, better = jnp.isneginf(state.value), value > state.value
    grown = jnp.minimum(1.5 * state.radius, 1.0)
    radius = jnp.where(first, state.radius, jnp.where(better, grown, state.radius / 4))
    there = trial, value, gradient, direction
    kept: PyTree = jax.tree.map(lambda x, y: jnp.where(better, x, y), there, state[:4])
    params, value, gradient, direction = kept
    return Ascent(params, value, gradient, direction, radius)


def ascend(
    kernel: Kernel, pomdp: DensePOMDP, *, num_steps: int, bound: Scalar = 12.0
) -> tuple[Kernel, Ascent]:
    """An ascent of η from a kernel of tables: the best, and the states `[num_steps]` on the way."""
    params, static = eqx.partition(kernel, trainable(kernel))

    def turn(state, _):
        trial = ask(state, bound=bound)
        there = eqx.combine(trial, static)
        gradient, solution = direct_gradient(there, pomdp)
        direction = natural_gradient(there, gradient, pomdp, solution.stationary)
        slopes = (eqx.filter(x, trainable(kernel)) for x in (gradient, direction))
        state = tell(state, trial, solution.average_reward, *slopes)
        return state, state

    last, states = lax.scan(turn, init(params), length=num_steps)
    return eqx.combine(last.params, static), states


def natural_gradient(
    kernel: Kernel, gradient: Kernel, pomdp: POMDP, stationary: Float[Array, "S G"]
) -> Kernel:
    """F⁺∇η of a kernel of tables, from ∇η and d(s, g)."""
    obs, emission = pomdp.emissions()
    table = tables(kernel, jnp.arange(pomdp.num_obs))
    flow = emission[..., None] * stationary[:, None]
    visits = jnp.zeros(table.omega.shape[:2]).at[obs].add(flow)  # Pr(o, g)
    after = jnp.einsum("og,ogh->oh", visits, transitions(table))
    where = lambda k: (k.cell.distribution.logits, k.head.logits)
    weights = visits[..., None] * table.omega, after[..., None] * table.mu
    natural = [
        g / (jnp.swapaxes(w, 0, 1) + 1e-12) for g, w in zip(where(gradient), weights, strict=True)
    ]
    return eqx.tree_at(where, gradient, natural)
