"""GAMP: the exact gradient of the long-run average reward of a finite-state controller.

Aberdeen & Baxter (2002). The joint chain K on (s, g) is applied, never formed: a step of either
iteration costs as many multiplications as the world and the controller have non-zeros. It takes a
block of states at a time, so that what it makes of them stays in the cache, and takes no memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import lu_factor, lu_solve
from jaxtyping import Array, Bool, Float, Int, PyTree

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
from spg.kernels.finite import Tables, start_distribution, tables, transitions
from spg.kernels.kernel import Kernel
from spg.types import Scalar
from spg.worlds.models import POMDP, DensePOMDP

BLOCK = 1024  # states


class LongRun(NamedTuple):
    """Long-run behaviour of a controller, to be trusted if `converged`."""

    average_reward: Float[Array, ""]  # η = d·r, differentiable once in the kernel
    stationary: Vector  # d(s, g)
    bias: Vector  # x(s, g), differential values, up to a constant
    stationary_error: Float[Array, ""]  # of d in the norm ‖·‖₁; of η at most max |r| times it
    bias_error: Float[Array, ""]  # of x and d, relative; that of the gradient is about the same
    products: Int[Array, "2"]  # applications of K that d and x took
    converged: Bool[Array, ""]  # both errors are at most 3 √tol


def long_run(
    kernel: Kernel,
    pomdp: POMDP,
    *,
    stationary: Callable[[Apply, Vector, Array], tuple[Vector, Array]] | None = None,
    bias: Callable[[Apply, Vector, Vector, Array], tuple[Vector, Array]] | None = None,
    tol: float | None = None,
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

    Raises ValueError where `checks.check` does.

    The derivative of `average_reward` is exact to first order in everything that it depends on:
    the kernel, probabilities and rewards. (d and x are constants to a second derivative.)
    """
    check(kernel, pomdp)
    table = tables(kernel, jnp.arange(pomdp.num_obs))
    start = lax.stop_gradient(
        pomdp.start[:, None] * start_distribution(kernel).astype(pomdp.start.dtype)
    )
    tol = {4: 1e-5, 8: 1e-12}[start.dtype.itemsize] if tol is None else tol

    frozen = lax.stop_gradient((table, pomdp))
    push: Apply = lambda d: _push(*frozen, d)
    evaluate = lambda x: _evaluate(*frozen, x)  # r + Kx
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
    surrogate = jnp.vdot(d, _evaluate(table, pomdp, x))  # its derivative is d (∇r + ∇K x)
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
        chain = joint_chain(kernel, pomdp).reshape(n, n)
        reward = jnp.einsum("sgha,sa->sg", joint_policy(kernel, pomdp), pomdp.reward).reshape(n)
        k, r = lax.stop_gradient((chain, reward))
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
        return d @ (reward + beta * (chain @ x)), solution  # its derivative is d (∇r + β ∇K x)

    return eqx.filter_grad(objective, has_aux=True)(kernel)


# --- the chain


def _reached(k: Float[Array, "N N"], start: Float[Array, " N"]) -> Bool[Array, " N"]:
    """What a chain may reach from its start."""

    def spread(state):
        more = state[0] | (state[0].astype(k.dtype) @ k > 0)
        return more, (more != state[0]).any()

    return lax.while_loop(lambda state: state[1], spread, (start > 0, jnp.array(True)))[0]


def _evaluate(table: Tables, pomdp: POMDP, x: Vector) -> Vector:
    """r + Kx, one step of policy evaluation.

    Q(s,h,a) = Σ P [r + x],  V(s,h,o) = Σ_a μ Q,  (r + Kx)(s,g) = Σ_o O(o|s) Σ_h ω(h|g,o) V(s,h,o)
    """

    def of(some: POMDP) -> Float[Array, "B G"]:
        obs, emission = some.emissions()
        q = some.mean_reward()[:, :, None] + some.expect(x)
        v = jnp.einsum("smga,sag->smg", table.mu[obs], q)
        omega, successors = table.omega[obs], table.successors[obs]  # [S, M, G, K]
        v = jnp.take_along_axis(v[:, :, None], successors, -1)
        return jnp.einsum("sm,smgk,smgk->sg", emission, omega, v)

    if len(x) <= BLOCK:
        return of(pomdp)
    firsts, block = _blocks(pomdp)
    found = lax.map(jax.checkpoint(lambda first: of(block(first))), firsts)
    whole, last = found[:-1].reshape(-1, x.shape[1]), found[-1]
    return jnp.concatenate([whole, last[len(whole) - len(x) :]])


def _push(table: Tables, pomdp: POMDP, d: Vector) -> Vector:
    """dK.

    W(s,o,h) = O(o|s) Σ_g d ω(h|g,o),   (dK)(s',h) = Σ_{s,a} [Σ_o W μ(a|h,o)] P(s'|s,a)
    """

    def add(onto: Vector, some: POMDP, d: Float[Array, "B G"]) -> Vector:
        obs, emission = some.emissions()
        w = emission[..., None] * jnp.einsum("sg,smgh->smh", d, transitions(table)[obs])
        return some.push(jnp.einsum("smh,smha->sah", w, table.mu[obs]), onto)

    if len(d) <= BLOCK:
        return add(jnp.zeros_like(d), pomdp, d)
    firsts, block = _blocks((pomdp, d))

    def step(onto, i):
        some, mass = block(firsts[i])
        new = firsts[i] + jnp.arange(BLOCK) >= i * BLOCK  # not in the block before
        return add(onto, some, jnp.where(new[:, None], mass, 0)), None

    return lax.scan(step, jnp.zeros_like(d), jnp.arange(len(firsts)))[0]


def _blocks(rows: PyTree) -> tuple[Int[Array, " B"], Callable[[Array], PyTree]]:
    """Where blocks of `BLOCK` rows begin, and the block that begins at a row.

    The last one begins early enough to be whole.
    """
    size = len(jax.tree.leaves(rows)[0])
    take = lambda first: lambda x: lax.dynamic_slice_in_dim(x, first, BLOCK)
    firsts = jnp.minimum(jnp.arange(0, size, BLOCK), size - BLOCK)
    return firsts, lambda first: jax.tree.map(take(first), rows)
