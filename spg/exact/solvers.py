"""Iterations on a chain K that is applied and never formed: its stationary distribution d = dK, the
solution x of its Poisson equation (I - K) x = r - η, and how well the chain determines the two."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Vector = Float[Array, "S G"]  # a distribution of (s, g), or a function of it
Apply = Callable[[Vector], Vector]


def span(x: Array) -> Float[Array, ""]:
    return jnp.max(x) - jnp.min(x)


# --- stationary distribution


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
    """d = start p(K) with the least ‖dK - d‖₂ of all polynomials p with p(1) = 1, by Arnoldi.

    The polynomials keep the mass of every recurrent class, so that d is the limit of the chain's
    time averages. (The least residual of all d in the Krylov space, Golub & Greif (2006), is that
    of any class once rounding has let it in.) That is GMRES for w (I - K) = start - start K from
    w = 0 with d = start - w; a pass ends at `basis` vectors, or where it has reached rounding,
    beyond which the vectors are noise. By default 40 vectors, 20 above 10^5 entries.
    """
    size = min(basis or _basis(start), start.size)
    eps = jnp.finfo(start.dtype).eps
    enough = tol / (2 * start.size**0.5)

    def step(state):
        d, moved, best, least, stalled, n = state
        b = d - moved
        rounding = 4 * eps * jnp.linalg.norm(d)
        vectors, hessenberg, j = _krylov(
            lambda v: v - push(v), b, size, jnp.maximum(enough, rounding)
        )
        rhs = jnp.zeros(size + 1, d.dtype).at[0].set(jnp.linalg.norm(b))
        d = d - (jnp.linalg.lstsq(hessenberg, rhs)[0] @ vectors[:-1]).reshape(d.shape)
        d = d / d.sum()
        moved = push(d)
        residual = jnp.abs(moved - d).sum()
        stalled = jnp.where(residual < 0.9 * least, 0, stalled + 1)
        best = jnp.where(residual < least, d, best)
        return d, moved, best, jnp.minimum(residual, least), stalled, n + j + 1

    def going(state):  # until rounding, in single precision well above the tolerance, stops it
        return (state[3] > tol) & (state[4] < 20) & (state[5] < max_restarts * (size + 1))

    inf = jnp.full((), jnp.inf, start.dtype)
    _, _, d, _, _, n = lax.while_loop(going, step, (start, push(start), start, inf, 0, 1))
    return _distribution(d), jnp.asarray(n)


def krylov_stationary(
    push: Apply, start: Vector, tol: Array, *, solver: Callable[[Array], lx.GMRES | lx.BiCGStab]
) -> tuple[Vector, Int[Array, ""]]:
    """d = v - w with w (I - K + 1v) = v - vK, v the first distribution, by a solver of lineax.

    `solver` makes it from a tolerance: `gmres` or `bicgstab`. w has no mass, so that 1v does
    nothing but keep the system regular where there is one recurrent class.
    """
    closed = lambda w: w - push(w) + start * w.sum()
    rhs = start.size * (start - push(start))  # entries around 1, as tolerances expect
    w, n = _lineax(closed, rhs, jnp.zeros_like(rhs), solver(tol))
    return _distribution(start - w / start.size), n + 1


def _distribution(d: Vector) -> Vector:
    """d without the small negative entries that rounding leaves; what is 0 stays 0."""
    return jnp.abs(d) / jnp.abs(d).sum()


# --- differential values


def richardson(
    pull: Apply, gain: Vector, stationary: Vector, tol: Array, *, max_products: int = 100_000
) -> tuple[Vector, Int[Array, ""]]:
    """x ← ½ x + ½ (Kx + r - η) from zero, `gain` being r - η; ends by the span of the change."""

    eps, scale = jnp.finfo(gain.dtype).eps, span(gain)

    def step(state):
        x, _, n = state
        change = gain + pull(x) - x
        moved = x + change / 2
        enough = jnp.maximum(tol * scale, 8 * eps * span(x))
        return moved - jnp.vdot(stationary, moved) * (stationary != 0), span(change) > enough, n + 1

    going = lambda state: state[1] & (state[2] < max_products)
    x, _, n = lax.while_loop(going, step, (jnp.zeros_like(gain), jnp.array(True), 0))
    return x, jnp.asarray(n)


def krylov_bias(
    pull: Apply,
    gain: Vector,
    stationary: Vector,
    tol: Array,
    *,
    solver: Callable[[Array], lx.GMRES | lx.BiCGStab],
    guess: Vector | None = None,
) -> tuple[Vector, Int[Array, ""]]:
    """x from (I - K + 1d) x = r - η, so that d·x = 0, by a solver of lineax."""
    closed = lambda x: x - pull(x) + jnp.vdot(stationary, x)
    largest = jnp.max(jnp.abs(gain))
    scale = jnp.where(largest > 0, largest, 1)  # tolerances are for entries around 1
    guess = jnp.zeros_like(gain) if guess is None else guess / scale
    x, n = _lineax(closed, gain / scale, guess, solver(tol))
    return scale * x, n


def two_krylov_bias(
    pull: Apply, gain: Vector, stationary: Vector, tol: Array
) -> tuple[Vector, Int[Array, ""]]:
    """`krylov_bias` by BiCGStab, and from where that breaks down or gives up by GMRES.

    BiCGStab takes the fewest products where it succeeds, and needs no basis.
    """
    x, n = krylov_bias(pull, gain, stationary, tol, solver=partial(bicgstab, max_steps=1_000))
    residual, eps = bias_residual(pull, gain, x), jnp.finfo(x.dtype).eps
    least = jnp.minimum(32 * eps * relative_span(gain, x), jnp.sqrt(eps))
    better = jnp.isfinite(x).all() & (residual < 1)  # the span of a nan may be anything
    x = jnp.where(better, x, 0)
    enough = better & (residual <= jnp.maximum(tol, least))
    solver = lambda tol: gmres(jnp.where(enough, jnp.inf, tol), restart=_basis(gain))
    x, m = krylov_bias(pull, gain, stationary, tol, solver=solver, guess=x)
    return x, n + m + 1


def bias_residual(pull: Apply, gain: Vector, x: Vector) -> Float[Array, ""]:
    """Span of r - η + Kx - x over that of r - η."""
    scale = span(gain)
    return span(gain + pull(x) - x) / jnp.where(scale > 0, scale, 1)


def relative_span(gain: Vector, x: Vector) -> Float[Array, ""]:
    """Span of x over that of r - η: a number of steps."""
    scale = span(gain)
    return span(x) / jnp.where(scale > 0, scale, 1)


def gmres(tol: Any, *, restart: int = 20, max_restarts: int = 500) -> lx.GMRES:
    return lx.GMRES(rtol=tol, atol=tol, restart=restart, max_steps=max_restarts)


def bicgstab(tol: Any, *, max_steps: int = 20_000) -> lx.BiCGStab:
    return lx.BiCGStab(rtol=tol, atol=tol, max_steps=max_steps)


# --- how well the chain determines them


def conditioning(
    push: Apply, start: Vector, d: Vector, enough: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """σ, the least ‖v - vK‖₂ / ‖v‖₂ of all v without mass, and by how much d misplaces mass.

    An error of d is its residual over σ. With several recurrent classes σ is 0; where σ falls below
    `enough` the classes are looked for. Then v has no mass in any class, so that a small σ means a
    class that leaks, and the mass of d in each class is compared with what arrives there from the
    start. σ is estimated from above, by Krylov spaces of a random v.
    """
    size = min(40 if d.size <= 100_000 else 10, d.size)
    noise = jr.normal(jr.key(0), d.shape, d.dtype) * (d + push(d) != 0)
    unused = jnp.eye(size + 1, size, dtype=d.dtype)
    zero, inf = jnp.zeros((), d.dtype), jnp.full((), jnp.inf, d.dtype)

    def look(state):
        label = _classes(push, d, state[0] == 1)
        mass = _masses(label)
        share = jnp.where(label > 0, d / jnp.where(label > 0, mass(d)[label], 1), 0)
        massless = lambda v: v - share * mass(v)[label]

        def narrow(state):  # from the worst v so far
            v, _, sigma, i = state
            vectors, hessenberg, j = _krylov(lambda v: v - massless(push(v)), v, size, zero)
            hessenberg = jnp.where(jnp.arange(size) < j, hessenberg, unused)
            _, values, rows = jnp.linalg.svd(hessenberg, full_matrices=False)
            v = massless((rows[-1] @ vectors[:-1]).reshape(d.shape))
            return v, sigma, jnp.minimum(sigma, values[-1]), i + 1

        def falling(state):
            _, before, sigma, i = state
            return (i == 0) | (sigma < before / 2) & (sigma > enough) & (i < 10)

        sigma = lax.while_loop(falling, narrow, (massless(noise), inf, inf, 0))[2]
        outside = lambda p: jnp.where(label == 0, p, 0).sum()
        arrive = lambda state: (push(state[0]), state[1] + 1)
        waiting = lambda state: (outside(state[0]) > jnp.finfo(d.dtype).eps) & (state[1] < 10_000)
        arrived = lax.while_loop(waiting, arrive, (start, 0))[0]
        return state[0] + 1, sigma, jnp.abs(mass(arrived - d)).sum()

    going = lambda state: (state[0] == 0) | (state[0] == 1) & (state[1] < enough)
    return lax.while_loop(going, look, (0, zero, zero))[1:]


def _masses(label: Int[Array, "S G"]) -> Callable[[Vector], Float[Array, " N"]]:
    """Σ v in each class, as a function of v.

    The second sum, of what differs from a class's mean, makes up for the rounding of the first,
    which in single precision loses 7 % of the mass of 3 x 10^7 entries.
    """
    add = lambda v: jnp.zeros(label.size + 1, v.dtype).at[label].add(v)
    size = jnp.maximum(add(jnp.ones_like(label)), 1)

    def mass(v: Vector) -> Float[Array, " N"]:
        rough = add(v)
        rest = lax.optimization_barrier(add(v - (rough / size)[label]))  # else added onto `rough`
        return rough + rest

    return mass


def _classes(push: Apply, d: Vector, wanted: Bool[Array, ""]) -> Int[Array, "S G"]:
    """1, 2, … in each recurrent class with mass and 0 elsewhere; 1 everywhere unless `wanted`.

    A class is all that can follow its most probable (s, g).
    """
    left = lambda label: jnp.where(label == 0, d, 0)

    def add(state):
        label, k = state
        seed = (jnp.arange(d.size) == jnp.argmax(left(label))).reshape(d.shape)
        grow = lambda state: (state[1], state[1] | (push(state[1].astype(d.dtype)) > 0))
        growing = lambda state: (state[0] != state[1]).any()
        found = lax.while_loop(growing, grow, (jnp.zeros_like(seed), seed))[1]
        return jnp.where(found & (label == 0), k, label), k + 1

    least = 8 * jnp.finfo(d.dtype).eps * d.max()
    going = lambda state: wanted & (left(state[0]).max() > least)
    label = lax.while_loop(going, add, (jnp.zeros(d.shape, int), 1))[0]
    return jnp.where(wanted, label, 1)


def _basis(x: Vector) -> int:
    return 40 if x.size <= 100_000 else 20


def _krylov(
    apply: Apply, b: Vector, size: int, least: Array
) -> tuple[Float[Array, "M1 N"], Float[Array, "M1 M"], Int[Array, ""]]:
    """Orthonormal v_0 … v_m from b/‖b‖ on, H with A v_j = Σ_i H_ij v_i, and how many v_j A took.

    It ends early where min_y ‖b - A Σ_j y_j v_j‖ <= `least`, or where the space is exhausted, with
    zeros for the rest.
    """
    eps = jnp.finfo(b.dtype).eps
    norm = jnp.linalg.norm(b)

    def grow(state):
        vectors, hessenberg, t, j = state
        w = apply(vectors[j].reshape(b.shape)).reshape(-1)
        first = vectors @ w
        w = w - first @ vectors
        second = vectors @ w  # once more, for orthogonality
        w = w - second @ vectors
        h = jnp.linalg.norm(w)
        fresh = h > 10 * eps * jnp.linalg.norm(first)
        column = (first + second).at[j + 1].set(jnp.where(fresh, h, 0))
        h = jnp.where(fresh, h, jnp.inf)
        t = t.at[j + 1].set(jnp.where(fresh, -(t @ (first + second)) / h, jnp.inf))
        return vectors.at[j + 1].set(w / h), hessenberg.at[:, j].set(column), t, j + 1

    def going(state):  # t H = 0, so that the least residual is ‖b‖ t_0 / ‖t‖
        return (state[3] < size) & (norm > least * jnp.linalg.norm(state[2]))

    vectors = jnp.zeros((size + 1, b.size), b.dtype)
    vectors = vectors.at[0].set(b.reshape(-1) / jnp.where(norm > 0, norm, 1))
    hessenberg = jnp.zeros((size + 1, size), b.dtype)
    t = jnp.zeros(size + 1, b.dtype).at[0].set(1)
    vectors, hessenberg, _, j = lax.while_loop(going, grow, (vectors, hessenberg, t, 0))
    return vectors, hessenberg, jnp.asarray(j)


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
