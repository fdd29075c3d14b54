"""Steps in a trust region: natural gradients from Fisher-vector products, and a line search.

TRPO of Schulman et al. (2015) on the joint distribution of (a, z'), TRPO-RS of Al-Hafez et al.
(2024), lemma A.1. Nothing here knows what the steps are of: a policy is a function from parameters
to its distributions of z' and of a at each step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from spg.distributions import Comparable, Distribution
from spg.estimators.surrogate import Divergence
from spg.types import Scalar

STEPS = 10  # that the line search tries
GRAIN = 2.0**20  # see `natural_gradient`

Factors = tuple[Distribution, Distribution]
"""ω( . | o, z) and μ( . | o, z') of N steps, each with a leading axis `[N]`."""


class Trial(NamedTuple):
    """A step of the line search; all 0 where it found none."""

    accepted: Bool[Array, ""]
    share: Float[Array, ""]  # of the longest step
    gain: Float[Array, ""]  # of the objective
    kl: Divergence  # its means


def factor_kl(old: Factors, new: Factors) -> Divergence:
    """KL(ω_old ‖ ω) and KL(μ_old ‖ μ) of each step in closed form, and their sum.

    Where z' is recorded from ω_old, the mean of the sum over z' is the KL of (a, z'). Raises
    TypeError for a distribution without `kl`.
    """
    for distribution in old:
        if not isinstance(distribution, Comparable):
            raise TypeError(
                f"a trust region needs a KL, and {type(distribution).__name__} has none"
            )
    pairs: Any = zip(old, new, strict=True)
    kl_z, kl_action = (jax.vmap(lambda p, q: p.kl(q))(*pair) for pair in pairs)
    return Divergence(kl_z + kl_action, kl_action, kl_z)


def fisher_product(policy: Callable[[Any], Factors], params: PyTree) -> Callable[[Any], PyTree]:
    """v ↦ F v with the Fisher matrix of the joint distribution of (a, z'), the mean over the steps.

        F = mean_t E_π[ ∇log ω ∇log ωᵀ + ∇log μ ∇log μᵀ ] = Jᵀ H J

    J is the derivative of what the distributions consist of, as logits, by the parameters; H is the
    Hessian of KL(old ‖ new) in the former, at old. Products of the two factors have mean 0. The
    expectations over a and z' are exact; the z' on which actions depend are the recorded ones.
    """
    old, push, fixed = jax.linearize(
        lambda params: eqx.partition(policy(params), eqx.is_inexact_array), params, has_aux=True
    )
    pull = jax.linear_transpose(push, params)
    whole = lambda numbers: eqx.combine(numbers, fixed)
    slope = jax.grad(lambda new: factor_kl(whole(old), whole(new)).kl.mean())
    return lambda v: pull(jax.jvp(slope, (old,), (push(v),))[1])[0]


def natural_gradient(
    product: Callable[[Any], PyTree], gradient: PyTree, *, damping: Scalar, cg_steps: int
) -> PyTree:
    """(F + λ I)⁻¹ g by conjugate gradients from 0; `product` is F.

    Ends early where the residual is √ε of g, ε that of the numbers. A direction in which F + λ I
    does not curve upwards makes it nan.
    """
    g, unravel = ravel_pytree(gradient)
    norm = jnp.linalg.norm(g)
    unit = g / jnp.where(norm > 0, norm, 1)
    zero = jnp.zeros_like(unit) * unit  # which XLA does not know to be 0

    def damped(v):
        # lineax begins with F 0, of which XLA on CPUs makes garbage (jax-ml/jax#39120); and it
        # takes curvature below 100 n ε for none: a power of two changes no digit else
        moved = ravel_pytree(product(unravel(v + zero)))[0]
        return GRAIN * (moved + damping * v)

    operator = lx.FunctionLinearOperator(
        damped, jax.eval_shape(lambda: unit), lx.positive_semidefinite_tag
    )
    solver = lx.CG(
        rtol=0.0, atol=float(jnp.finfo(g.dtype).eps) ** 0.5, norm=jnp.linalg.norm,
        stabilise_every=None, max_steps=cg_steps,
    )  # fmt: skip
    solution = lx.linear_solve(operator, unit, solver, throw=False).value
    return unravel(GRAIN * norm * solution)


def trust_region_step(
    objective: Callable[[Any], Float[Array, ""]],
    policy: Callable[[Any], Factors],
    product: Callable[[Any], PyTree],
    params: PyTree,
    *,
    max_kl: Scalar,
    damping: Scalar,
    cg_steps: int,
) -> tuple[PyTree, Trial, PyTree]:
    """New parameters, how they were found, and the plain gradient g of the objective.

    `product` is v ↦ F v. Up the natural gradient d, as far as the objective rises and the policy
    stays near:

        θ + β d,    β = √(2 max_kl / dᵀ(F + λ I)d),    then with ½, ¼, ... of β

    The first of these for which the mean of `factor_kl` is at most `max_kl` and the objective is
    above that of θ. If there is none, or d is not finite, the parameters stay as they were.
    """
    value, gradient = jax.value_and_grad(objective)(params)
    direction = natural_gradient(product, gradient, damping=damping, cg_steps=cg_steps)
    curvature = jnp.asarray(optax.tree.vdot(direction, gradient))  # dᵀ(F + λ I)d, as CG began at 0
    uphill = (curvature > 0) & jnp.isfinite(curvature)
    longest = jnp.sqrt(2 * max_kl / jnp.where(uphill, curvature, 1.0))
    old = policy(params)
    towards = lambda share: jax.tree.map(lambda x, d: x + share * longest * d, params, direction)

    def halve(last):
        new = towards(last.share / 2)
        kl = jax.tree.map(jnp.mean, factor_kl(old, policy(new)))
        gain = objective(new) - value
        return Trial((kl.kl <= max_kl) & (gain > 0), last.share / 2, gain, kl)

    # under vmap a loop ends with the last lane, mostly after one or two steps of at most `STEPS`
    going = lambda last: uphill & ~last.accepted & (last.share > 2.0 ** (1 - STEPS))
    zero = jnp.zeros_like(value)
    none = Trial(jnp.zeros((), bool), zero, zero, Divergence(zero, zero, zero))
    last = lax.while_loop(going, halve, none._replace(share=zero + 2.0))
    found = jax.tree.map(partial(jnp.where, last.accepted), last, none)
    moved = jax.tree.map(partial(jnp.where, last.accepted), towards(last.share), params)
    return moved, found, gradient
