"""GAMP: the exact gradient of the long-run average reward of a finite-state controller.

Aberdeen & Baxter (2002). The joint chain K on (s, g) is applied, never formed (`spg.exact.chain`).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import lu_factor, lu_solve
from jaxtyping import Array, Bool, Float, Int

from spg.exact import chain
from spg.exact.checks import check
from spg.exact.enumeration import joint_chain, joint_policy
from spg.exact.solvers import (
    Apply,
    Vector,
    arnoldi,
    bias_residual,
    conditioning,
    relative_span,
    span,
    two_krylov_bias,
)
from spg.kernels.finite import start_distribution, tables
from spg.kernels.kernel import Kernel
from spg.types import Scalar
from spg.worlds.models import POMDP, DensePOMDP


class LongRun(NamedTuple):
    """Long-run behaviour of a controller, to be trusted if `converged`."""

    average_reward: Float[Array, ""]  # η = d·r, differentiable once in the kernel
    stationary: Vector  # d(s, g)
    bias: Vector  # x(s, g), differential values, up to a constant
    stationary_error: Float[Array, ""]  # of d in the norm ‖·‖₁; of η at most max |r| times it
    bias_error: Float[Array, ""]  # of x and d, relative; that of the gradient is about the same
    products: Int[Array, "2"]  # applications of K that d and x took
    converged: Bool[Array, ""]  # both errors are at most 3 √tol


@jax.default_matmul_precision("highest")  # a GPU would multiply numbers of 10 bits
def long_run(
    kernel: Kernel,
    pomdp: POMDP,
    *,
    stationary: Callable[[Apply, Vector, Array], tuple[Vector, Array]] | None = None,
    bias: Callable[[Apply, Vector, Vector, Array], tuple[Vector, Array]] | None = None,
    tol: float | None = None,
    devices: chain.Devices | None = None,
) -> LongRun:
    """d, x and η of a finite-state controller, with ∇η by implicit differentiation.

        d = dK,  d·1 = 1;      (I - K) x = r - η 1;      ∇η = d (∇K) x

    `stationary` finds d, by default `arnoldi`, else `power` or `krylov_stationary`; `bias` finds
    x, by default `two_krylov_bias`, else `krylov_bias` or `richardson`. d is the limit of the
    chain's time averages from the first states of the world and of the kernel, also where the chain
    is periodic or has several recurrent classes. There is no x unless the classes have the same η.

    `tol` is for the residuals of both equations, by default 1e-5 in single and 1e-12 in double
    precision. An error is a residual and its rounding, 8ε, times the number of steps in which the
    chain forgets: the larger of 1/σ of `conditioning`, and of span x over span (r - η). Both
    errors are estimates. `converged` is false for classes of different η, where x grows until its
    residual is rounded away, and for a chain that nearly falls apart into classes.

    `devices` share the states of a world made by `chain.share_states`; where that added states, d
    and x have zeros at their end.

    Raises ValueError where `checks.check` does, and for states that devices cannot share evenly.

    The derivative of `average_reward` is exact to first order in everything that it depends on:
    the kernel, probabilities and rewards. (d and x are constants to a second derivative.)
    """
    check(kernel, pomdp)
    if devices and len(pomdp.start) % len(devices):
        raise ValueError(
            f"{len(pomdp.start):,} states cannot be shared out evenly to {len(devices)} devices; "
            "`spg.exact.share_states` can"
        )
    table = tables(kernel, jnp.arange(pomdp.num_obs))
    start = lax.stop_gradient(
        pomdp.start[:, None] * start_distribution(kernel).astype(pomdp.start.dtype)
    )
    tol = {4: 1e-5, 8: 1e-12}[start.dtype.itemsize] if tol is None else tol

    frozen = lax.stop_gradient((table, pomdp))
    push: Apply = lambda d: chain.push(*frozen, d, devices)
    evaluate = lambda x: chain.evaluate(*frozen, x, devices)  # r + Kx
    reward = evaluate(jnp.zeros_like(start))
    stationary, bias = stationary or arnoldi, bias or two_krylov_bias
    d, stationary_products = stationary(push, start, jnp.asarray(tol, start.dtype))
    eta = jnp.vdot(d, reward)
    seen = d != 0  # exact: what cannot be reached takes no part, and may have another η
    pull: Apply = lambda x: jnp.where(seen, evaluate(x) - reward, 0)
    gain = jnp.where(seen, reward - eta, 0)
    eps = jnp.finfo(gain.dtype).eps
    least = 64 * eps * jnp.max(jnp.abs(reward))
    gain = jnp.where(span(gain) > least, gain, 0)  # else every (s, g) earns the same
    x, bias_products = bias(pull, gain, d, jnp.asarray(tol, start.dtype))
    x = jnp.where(jnp.isfinite(x).all(), x, 0)  # η is right without it; `bias_error` tells
    d, x = lax.stop_gradient((d, x))

    limit = 3 * jnp.sqrt(jnp.asarray(tol, d.dtype))
    of_d = jnp.abs(push(d) - d).sum() + 8 * eps
    of_x = bias_residual(pull, gain, x) + 8 * eps
    sigma, misplaced = conditioning(push, start, d, of_d / limit)
    steps = jnp.maximum(1 / sigma, relative_span(gain, x))
    errors = jnp.stack([of_d / sigma, (of_d + of_x) * steps]) + misplaced
    surrogate = jnp.vdot(
        d, chain.evaluate(table, pomdp, x, devices)
    )  # its derivative is d (∇r + ∇K x)
    return LongRun(
        average_reward=eta + (surrogate - lax.stop_gradient(surrogate)),
        stationary=d,
        bias=x,
        stationary_error=errors[0],
        bias_error=errors[1],
        products=jnp.stack([stationary_products, bias_products]),
        converged=(errors <= limit).all(),
    )


def gamp_gradient(kernel: Kernel, pomdp: POMDP, **settings) -> tuple[Kernel, LongRun]:
    """∇η, shaped like the kernel, and the solution it came from; settings are those of `long_run`.

    Any differentiable finite-state controller will do, tables or networks. `jit` and `vmap` over
    controllers.
    """

    def objective(kernel):
        solution = long_run(kernel, pomdp, **settings)
        return solution.average_reward, solution

    gradient, solution = eqx.filter_grad(objective, has_aux=True)(kernel)
    return gradient, lax.stop_gradient(solution)


@jax.default_matmul_precision("highest")
def direct_gradient(
    kernel: Kernel, pomdp: DensePOMDP, *, beta: Scalar = 1.0
) -> tuple[Kernel, LongRun]:
    """`gamp_gradient` by LU factorisation, v the distribution of the first (s, g):

        d (I - K + 1v) = v,      (I - βK + 1v) x = r

    With β < 1 the gradient is ∇_β = d (∇r + β ∇K x), the mean of the estimates of GPOMDP, and x are
    discounted values (plus a constant).

    The quickest way up to a few thousand (s, g), for a chain with one recurrent class among those
    that can be reached; the others, where d is 0, are sent to the start. Its errors
    are residuals times the span of x; where they are above 1e-5, as they are for a chain that
    falls apart, η is nan and ∇η is not to be used. What `long_run` searches for is not looked for.
    """

    discounted = not isinstance(beta, float) or beta < 1

    def objective(kernel):
        start = pomdp.start[:, None] * start_distribution(kernel)
        n = start.size
        shaped = lambda x: x.reshape(start.shape)
        joint = joint_chain(kernel, pomdp).reshape(n, n)
        reward = jnp.einsum("sgha,sa->sg", joint_policy(kernel, pomdp), pomdp.reward).reshape(n)
        k, r = lax.stop_gradient((joint, reward))
        k = jnp.where(_reached(k, start.reshape(n))[:, None], k, start.reshape(n))
        ones = jnp.eye(n) + start.reshape(n)
        factors = lu_factor(ones - k)
        d = lu_solve(factors, start.reshape(n), trans=1)
        x = lu_solve(lu_factor(ones - beta * k), r) if discounted else lu_solve(factors, r)
        solved = jnp.isfinite(d).all() & jnp.isfinite(x).all()
        d, x = jnp.where(solved, d, start.reshape(n)), jnp.where(solved, x, 0)
        eta = d @ r
        pull: Apply = lambda x: shaped(beta * (k @ x.reshape(n)))
        gain = shaped(r - eta)
        of_d, of_x = jnp.abs(d @ k - d).sum(), bias_residual(pull, gain, shaped(x))
        errors = jnp.stack([of_d, of_d + of_x]) * relative_span(gain, shaped(x))
        errors = jnp.where(solved, errors, 1)
        right = (errors < 1e-5).all()
        solution = LongRun(
            jnp.where(right, eta, jnp.nan), shaped(d), shaped(x), errors[0], errors[1],
            jnp.zeros(2, int), right,
        )  # fmt: skip
        return d @ (reward + beta * (joint @ x)), solution  # its derivative is d (∇r + β ∇K x)

    return eqx.filter_grad(objective, has_aux=True)(kernel)


def _reached(k: Float[Array, "N N"], start: Float[Array, " N"]) -> Bool[Array, " N"]:
    """What a chain may reach from its start."""

    def spread(state):
        more = state[0] | (state[0].astype(k.dtype) @ k > 0)
        return more, (more != state[0]).any()

    return lax.while_loop(lambda state: state[1], spread, (start > 0, jnp.array(True)))[0]
