"""GAMP: the exact gradient of the long-run average reward of a finite-state controller.

Aberdeen & Baxter (2002). The joint chain K on (s, g) is applied, never formed: a step of either
iteration costs as many multiplications as the world and the controller have non-zeros.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from spg.kernels.finite import Tables, start_distribution, tables
from spg.kernels.kernel import Kernel
from spg.worlds.models import POMDP

Vector = Float[Array, "S G"]  # a law of (s, g), or a function of it
Apply = Callable[[Vector], Vector]


class LongRun(NamedTuple):
    """Long-run behaviour of a controller. Trust it if `converged`: look at the residuals if not."""

    average_reward: Float[Array, ""]  # η = d·r, differentiable once in the kernel
    stationary: Vector  # d(s, g)
    bias: Vector  # x(s, g), differential values, up to a constant
    stationary_residual: Float[Array, ""]  # ‖dK - d‖₁
    bias_residual: Float[Array, ""]  # span of r - η + Kx - x, over that of r - η
    products: Int[Array, "2"]  # applications of K that d and x took
    converged: Bool[Array, ""]  # both residuals are about as small as was asked for


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
    x, by default `two_krylov_bias`, else `krylov_bias` or `richardson`. d is the limit from the
    first states of the world and of the kernel, so that η means the same where the chain has
    several recurrent classes; unless they all have the same η there is no x then, and
    `converged` is false. A periodic chain is no obstacle.
    `tol` is for both residuals, by default 1e-5 in single and 1e-12 in double precision; what it
    leaves of error in d and x is larger by the mixing time.

    The derivative of `average_reward` is exact to first order in everything that it depends on:
    the kernel, probabilities and rewards. (d and x are constants to a second derivative.)
    """
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
    rounding = 64 * jnp.finfo(gain.dtype).eps * jnp.max(jnp.abs(reward))
    gain = jnp.where(_span(gain) > rounding, gain, 0)  # else every (s, g) earns the same
    x, bias_products = bias(pull, gain, d, jnp.asarray(tol, start.dtype))
    d, x = lax.stop_gradient((d, x))
    stationary_residual = jnp.abs(push(d) - d).sum()
    bias_residual, least = _poisson_residual(pull, gain, x)
    x = jnp.where(jnp.isfinite(x), x, 0)  # η is right without it; `bias_residual` tells
    surrogate = jnp.vdot(d, _evaluate(table, pomdp, x))  # its derivative is d (∇r + ∇K x)
    return LongRun(
        average_reward=eta + (surrogate - lax.stop_gradient(surrogate)),
        stationary=d,
        bias=x,
        stationary_residual=stationary_residual,
        bias_residual=bias_residual,
        products=jnp.stack([stationary_products, bias_products]),
        converged=(stationary_residual <= 10 * tol)
        & (bias_residual <= 10 * jnp.maximum(tol, least)),
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


# --- the chain


def _evaluate(table: Tables, pomdp: POMDP, x: Vector) -> Vector:
    """r + Kx, one step of policy evaluation.

    Q(s,h,a) = Σ P [r + x],  V(s,h,o) = Σ_a μ Q,  (r + Kx)(s,g) = Σ_o O(o|s) Σ_h ω(h|g,o) V(s,h,o)
    """
    obs, emission = pomdp.emissions()
    q = pomdp.mean_reward()[:, :, None] + pomdp.expect(x)
    v = jnp.einsum("smga,sag->smg", table.mu[obs], q)
    omega, successors = table.omega[obs], table.successors[obs]  # [S, M, G, K]
    v = jnp.take_along_axis(v[:, :, None], successors, -1)
    return jnp.einsum("sm,smgk,smgk->sg", emission, omega, v)


def _push(table: Tables, pomdp: POMDP, d: Vector) -> Vector:
    """dK.

    W(s,o,h) = O(o|s) Σ_g d ω(h|g,o),   (dK)(s',h) = Σ_{s,a} [Σ_o W μ(a|h,o)] P(s'|s,a)
    """
    obs, emission = pomdp.emissions()
    num_z = d.shape[1]
    every = jax.nn.one_hot(table.successors, num_z, dtype=d.dtype)
    omega = jnp.einsum("ogk,ogkh->ogh", table.omega, every)
    w = emission[..., None] * jnp.einsum("sg,smgh->smh", d, omega[obs])
    return pomdp.push(jnp.einsum("smh,smha->sah", w, table.mu[obs]))


def _poisson_residual(
    pull: Apply, gain: Array, x: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Span of gain + Kx - x over that of the gain, and what rounding leaves of it at best.

    Where there is no solution x grows without bound; half of the digits have to be right.
    """
    eps = jnp.finfo(x.dtype).eps
    scale = _span(gain)
    scale = jnp.where(scale > 0, scale, 1)
    least = jnp.minimum(32 * eps * _span(x) / scale, jnp.sqrt(eps))
    return _span(gain + pull(x) - x) / scale, least


def _span(x: Array) -> Float[Array, ""]:
    return jnp.max(x) - jnp.min(x)


# --- stationary law


def power(
    push: Apply, start: Vector, tol: Array, *, max_products: int = 100_000
) -> tuple[Vector, Int[Array, ""]]:
    """Damped power iteration d ← ½ d + ½ dK from the start; ends when ‖dK - d‖₁ <= tol.

    Its limit is that of the chain's time averages, also where the chain is periodic.
    """

    def step(state):
        d, _, n = state
        moved = push(d)
        moved /= moved.sum()
        return (d + moved) / 2, jnp.abs(moved - d).sum(), n + 1

    going = lambda state: (state[1] > tol) & (state[2] < max_products)
    d, _, n = lax.while_loop(going, step, (start, jnp.full((), jnp.inf, start.dtype), 0))
    return d, jnp.asarray(n)


def arnoldi(
    push: Apply, start: Vector, tol: Array, *, basis: int | None = None, max_restarts: int = 500
) -> tuple[Vector, Int[Array, ""]]:
    """Restarted Arnoldi iteration for the known eigenvalue 1, Golub & Greif (2006), algorithm 1.

    Of all d in the Krylov space of `basis` vectors the one with the least ‖dK - d‖₂: the smallest
    right singular vector of the Hessenberg matrix minus the identity. By default 40 vectors, 20
    above 10^5 entries.
    """
    basis = min(basis or _basis(start), start.size)
    identity = jnp.eye(basis + 1, basis, dtype=start.dtype)
    eps = jnp.finfo(start.dtype).eps

    def grow(j, state):
        vectors, hessenberg = state
        w = push(vectors[j].reshape(start.shape)).reshape(-1)
        first = vectors @ w
        w = w - first @ vectors
        second = vectors @ w  # once more, for orthogonality
        w = w - second @ vectors
        norm = jnp.linalg.norm(w)
        fresh = norm > 100 * eps * jnp.linalg.norm(first)  # else the space is exhausted
        vectors = vectors.at[j + 1].set(jnp.where(fresh, w / norm, 0.0))
        column = (first + second).at[j + 1].set(jnp.where(fresh, norm, 0.0))
        return vectors, hessenberg.at[:, j].set(column)

    def step(state):
        d, best, least, stalled, n = state
        vectors = jnp.zeros((basis + 1, d.size), d.dtype).at[0].set(d.reshape(-1))
        vectors = vectors / jnp.linalg.norm(vectors[0])
        hessenberg = jnp.zeros((basis + 1, basis), d.dtype)
        vectors, hessenberg = lax.fori_loop(0, basis, grow, (vectors, hessenberg))
        y = jnp.linalg.svd(hessenberg - identity)[2][-1]
        d = (y @ vectors[:-1]).reshape(d.shape)
        d = d / d.sum()
        residual = jnp.abs(push(d) - d).sum()
        stalled = jnp.where(residual < 0.9 * least, 0, stalled + 1)
        best = jnp.where(residual < least, d, best)
        return d, best, jnp.minimum(residual, least), stalled, n + basis + 1

    def going(state):  # until rounding, in single precision well above the tolerance, stops it
        return (state[2] > tol) & (state[3] < 20) & (state[4] < max_restarts * (basis + 1))

    inf = jnp.full((), jnp.inf, start.dtype)
    _, d, _, _, n = lax.while_loop(going, step, (start, start, inf, 0, 0))
    return d, jnp.asarray(n)


def krylov_stationary(
    push: Apply, start: Vector, tol: Array, *, solver: Callable[[Array], lx.GMRES | lx.BiCGStab]
) -> tuple[Vector, Int[Array, ""]]:
    """d from d (I - K + 1v) = v, v the law of the first state, by a solver of lineax.

    `solver` makes it from a tolerance: `gmres` or `bicgstab`. With several recurrent classes the
    system is singular, and d what the solver leaves.
    """
    closed = lambda d: d - push(d) + start * d.sum()
    scaled = start * start.size  # so that the entries of d are around 1, as tolerances expect
    d, n = _lineax(closed, scaled, scaled, solver(tol))
    return d / d.sum(), n


# --- differential values


def richardson(
    pull: Apply, gain: Vector, law: Vector, tol: Array, *, max_products: int = 100_000
) -> tuple[Vector, Int[Array, ""]]:
    """x ← ½ x + ½ (Kx + r - η) from zero, `gain` being r - η; ends by the span of the change."""

    eps, scale = jnp.finfo(gain.dtype).eps, _span(gain)

    def step(state):
        x, _, n = state
        change = gain + pull(x) - x
        moved = x + change / 2
        enough = jnp.maximum(tol * scale, 8 * eps * _span(x))
        return moved - jnp.vdot(law, moved) * (law != 0), _span(change) > enough, n + 1

    going = lambda state: state[1] & (state[2] < max_products)
    x, _, n = lax.while_loop(going, step, (jnp.zeros_like(gain), jnp.array(True), 0))
    return x, jnp.asarray(n)


def krylov_bias(
    pull: Apply,
    gain: Vector,
    law: Vector,
    tol: Array,
    *,
    solver: Callable[[Array], lx.GMRES | lx.BiCGStab],
    guess: Vector | None = None,
) -> tuple[Vector, Int[Array, ""]]:
    """x from (I - K + 1d) x = r - η, so that d·x = 0, by a solver of lineax."""
    closed = lambda x: x - pull(x) + jnp.vdot(law, x)
    largest = jnp.max(jnp.abs(gain))
    scale = jnp.where(largest > 0, largest, 1)  # tolerances are for entries around 1
    guess = jnp.zeros_like(gain) if guess is None else guess / scale
    x, n = _lineax(closed, gain / scale, guess, solver(tol))
    return scale * x, n


def two_krylov_bias(
    pull: Apply, gain: Vector, law: Vector, tol: Array
) -> tuple[Vector, Int[Array, ""]]:
    """`krylov_bias` by BiCGStab, and from where that breaks down or gives up by GMRES.

    BiCGStab takes the fewest products where it succeeds, and needs no basis.
    """
    x, n = krylov_bias(pull, gain, law, tol, solver=partial(bicgstab, max_steps=1_000))
    residual, least = _poisson_residual(pull, gain, x)
    x = jnp.where(residual < 1, x, 0)  # nan, too
    enough = residual <= jnp.maximum(tol, least)
    solver = lambda tol: gmres(jnp.where(enough, jnp.inf, tol), restart=_basis(gain))
    x, m = krylov_bias(pull, gain, law, tol, solver=solver, guess=x)
    return x, n + m + 1


def gmres(tol: Any, *, restart: int = 20, max_restarts: int = 500) -> lx.GMRES:
    return lx.GMRES(rtol=tol, atol=tol, restart=restart, max_steps=max_restarts)


def bicgstab(tol: Any, *, max_steps: int = 20_000) -> lx.BiCGStab:
    return lx.BiCGStab(rtol=tol, atol=tol, max_steps=max_steps)


def _basis(x: Vector) -> int:
    return 40 if x.size <= 100_000 else 20


def _lineax(
    apply: Apply, rhs: Vector, guess: Vector, solver: lx.GMRES | lx.BiCGStab
) -> tuple[Vector, Int[Array, ""]]:
    """The solution, and how many times `apply` was called."""
    operator = lx.FunctionLinearOperator(apply, jax.eval_shape(lambda: rhs))
    solution = lx.linear_solve(operator, rhs, solver, options={"y0": guess}, throw=False)
    steps = jnp.asarray(solution.stats["num_steps"])
    if isinstance(solver, lx.GMRES):  # its steps are restarts, the first of which is empty
        return solution.value, 1 + (steps - 1) * (solver.restart + 1)
    return solution.value, 1 + 2 * steps
