"""The one recurrence: x_t = A_t x_{t-1} + u_t, and the cutting of rollouts into segments."""

from collections.abc import Callable
from math import isqrt
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.custom_batching import custom_vmap
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, Num, PRNGKeyArray, PyTree

Method = Literal["auto", "sequential", "associative", "chunked"]


def linear_scan(
    decay: Num[Array, "T ..."],
    u: Num[Array, "T ..."],
    init: Num[Array, "..."] | None = None,
    *,
    reverse: bool = False,
    method: Method = "auto",
) -> Num[Array, "T ..."]:
    """Solve x_t = A_t x_{t-1} + u_t for t = 0..T-1, with x_{-1} = `init` (zero by default).

    `decay` holds A_t, real or complex: one scalar or one diagonal a step (`[T]`, or leading axes
    of `u`), or a dense matrix `[T, n, n]` for `u` of shape `[T, n]`. A reset is A_t = 0. With
    `reverse` the recurrence runs from the end, x_t = A_t x_{t+1} + u_t. The methods give the same
    numbers:

        sequential   a loop of T steps, the least work
        associative  `lax.associative_scan`, Blelloch (1990): depth O(log T), twice the work
        chunked      √T chunks side by side, each a loop: depth O(√T), twice the work
        auto         sequential on a CPU, elsewhere associative

    (For dense A_t the work of the latter two is n times as much.) On a CPU XLA compiles the loop
    to one kernel: at the sizes of `scripts/benchmarks/scans.py` it takes 0.4 to 1.0 of the time of
    the best of JAX's scans, and with its backward pass 0.3 to 1.0, but up to 1.5 for one sequence
    of no more than 2048 numbers, which takes less than 20 microseconds. On accelerators the choice
    is by depth, and has not been measured.

    A scan is the solution of (I - A S) x = b, S the shift by a step, and derivatives are those of
    a linear solve: backward one scan with Aᵀ against time, g_t = x̄_t + A_{t+1}ᵀ g_{t+1}, after
    which ū = g and Ā_t = g_t x_{t-1}ᵀ. It keeps the decay and the solution and nothing else,
    whatever the method; forward mode and higher derivatives work too.
    """
    if len(decay) != len(u):
        raise ValueError(f"{len(decay)} steps of decay, {len(u)} of u")
    if method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(get_args(Method))}")
    dense = decay.ndim == u.ndim + 1
    if not dense:
        decay = decay.reshape(decay.shape + (1,) * (u.ndim - decay.ndim))
    dtype = jnp.result_type(decay, u, *([] if init is None else [init]))
    decay, u = decay.astype(dtype), u.astype(dtype)
    init = jnp.zeros(u.shape[1:], dtype) if init is None else jnp.asarray(init, dtype)
    if len(u) == 0:
        return u
    method = of_backend(method)
    form = {"sequential": _sequential, "associative": _associative, "chunked": _chunked}[method]

    tie = lax.optimization_barrier  # the solve wants tangents of both, x and init, or of neither

    def residual(solution):
        x, init = solution
        return tie((x - _apply(decay, _before(x, init, reverse)), init))

    def solve(_, b):
        u, init = b
        return form(decay, u, init, reverse), init

    def transpose_solve(_, b):
        by_x, by_init = b
        adjoint = jnp.swapaxes(decay, -1, -2) if dense else decay
        if method == "sequential":  # without a shifted copy of the decay
            by_first, g = _sequential_adjoint(adjoint, by_x, reverse)
        else:
            edge, zero = -1 if reverse else 0, jnp.zeros_like(by_init)
            shifted = _before(adjoint, jnp.zeros_like(adjoint[0]), not reverse)
            g = form(shifted, by_x, zero, not reverse)
            by_first = _apply(adjoint[edge], g[edge])
        return g, by_init + by_first

    return tie(lax.custom_linear_solve(residual, tie((u, init)), solve, transpose_solve))[0]


def of_backend(method: Method) -> Method:
    """The method that "auto" stands for where JAX runs; any other as it is."""
    if method != "auto":
        return method
    return "sequential" if jax.default_backend() == "cpu" else "associative"


def over_steps(f: Callable) -> Callable:
    """`jax.vmap(f)` over the leading axis of all arguments, the steps of a segment.

    A single step is taken without its axis: under the `vmap` of a caller, XLA would make sums of
    products, several times slower, of a matrix product in which one axis has length 1.
    """

    def mapped(*args: PyTree) -> PyTree:
        if any(x.shape[0] != 1 for x in jax.tree.leaves(args)):
            return jax.vmap(f)(*args)
        return jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], args)))

    return mapped


def split_segments(tree: PyTree, segment_length: int) -> PyTree:
    """Cut the time axis of every leaf, `[T, ...] -> [T / L, L, ...]`.

    Raises ValueError if `segment_length` does not divide T.
    """
    count = num_segments(jax.tree.leaves(tree)[0].shape[0], segment_length)
    return jax.tree.map(lambda x: x.reshape(count, segment_length, *x.shape[1:]), tree)


def join_segments(tree: PyTree) -> PyTree:
    """Each leaf `[S, L, ...]` as `[S L, ...]`."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def side_by_side(tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """The rows of all leaves, `[n, ...]`, as few arrays; and the tree of some rows of these.

    One gather then takes a minibatch of all that is real or complex, `[n, K]`, where one for each
    leaf takes several times as long on a CPU. Integers and booleans stay as they are.
    """
    numbers, rest = eqx.partition(tree, eqx.is_inexact_array)
    unravel = ravel_pytree(jax.tree.map(lambda x: x[0], numbers))[1]
    wide = jax.vmap(lambda row: ravel_pytree(row)[0])(numbers)
    return (wide, rest), lambda rows: eqx.combine(jax.vmap(unravel)(rows[0]), rows[1])


def shuffle(n: int, *, key: PRNGKeyArray) -> Int[Array, " n"]:
    """A random order of 0..n-1; up to 2^16 by one sort of integers: random high bits, then index.

    On a CPU that is 6 times faster than `jr.permutation`, which sorts pairs, twice. Where two draws
    of the 16 or more random bits agree the smaller index comes first; beyond 2^16 that would be
    often, and `jr.permutation` serves.
    """
    low = (n - 1).bit_length()
    if low > 16:
        return jr.permutation(key, n)
    bits = jr.bits(key, (n,), jnp.uint32) << low | jnp.arange(n, dtype=jnp.uint32)
    return (jnp.sort(bits) & (1 << low) - 1).astype(jnp.int32)


def num_segments(num_steps: int, segment_length: int) -> int:
    """T / L. Raises ValueError, with the lengths that would do, unless L divides T."""
    if segment_length < 1 or num_steps % segment_length:
        raise ValueError(
            f"segment_length {segment_length} does not divide num_steps {num_steps}; "
            f"{divisors(num_steps)} would"
        )
    return num_steps // segment_length


def divisors(n: int) -> str:
    """The numbers that divide `n`, as a message to a user lists them."""
    small = [i for i in range(1, isqrt(n) + 1) if n % i == 0]
    return ", ".join(map(str, sorted({*small, *(n // i for i in small)})))


def _sequential(decay: Array, u: Array, init: Array, reverse: bool) -> Array:
    def step(x, inputs):
        x = _apply(inputs[0], x) + inputs[1]
        return x, x

    return _loop(step, init, (decay, u), reverse)[1]


def _sequential_adjoint(decay: Array, by_x: Array, reverse: bool) -> tuple[Array, Array]:
    """A_0ᵀ g_0, which belongs to `init`, and g_t = x̄_t + A_{t+1}ᵀ g_{t+1}, carrying A_tᵀ g_t."""

    def step(carried, inputs):
        g = inputs[1] + carried
        return _apply(inputs[0], g), g

    return _loop(step, jnp.zeros_like(by_x[0]), (decay, by_x), not reverse)


def _loop(
    step: Callable, x: Array, inputs: tuple[Array, Array], reverse: bool
) -> tuple[Array, Array]:
    """`lax.scan`, but under `vmap` it leaves the time axis where it is.

    `lax.scan` brings time to the front, a copy of each array, which on a CPU takes as long as the
    recurrence; only where a step is a few numbers the strided ones are slower.
    """
    if x.size < 4:
        return lax.scan(step, x, inputs, reverse=reverse)
    num_steps = len(inputs[0])
    take, put = _take(0), _put(0)

    def body(i, state):
        x, out = state
        t = num_steps - 1 - i if reverse else i
        x, y = step(x, tuple(take(a, t) for a in inputs))
        return x, put(out, y, t)

    return lax.fori_loop(0, num_steps, body, (x, jnp.zeros_like(inputs[1])))


def _take(axis: int) -> Callable[[Array, Array], Array]:
    """a[t] along `axis`. (By itself `vmap` would make a gather of it, and of `_put` a scatter.)"""

    @custom_vmap
    def take(a, t):
        return lax.dynamic_index_in_dim(a, t, axis, False, allow_negative_indices=False)

    take.def_vmap(lambda size, batched, a, t: (_take(axis + 1)(a, t), True))
    return take


def _put(axis: int) -> Callable[[Array, Array, Array], Array]:
    """a with a[t] = x along `axis`."""

    @custom_vmap
    def put(a, x, t):
        return lax.dynamic_update_index_in_dim(a, x, t, axis, allow_negative_indices=False)

    @put.def_vmap
    def rule(size, batched, a, x, t):
        a, x = (
            v if b else jnp.broadcast_to(v, (size, *v.shape))
            for v, b in zip((a, x), batched[:2], strict=True)
        )
        return _put(axis + 1)(a, x, t), True

    return put


def _associative(decay: Array, u: Array, init: Array, reverse: bool) -> Array:
    compose = _compose(decay, u)
    edge = -1 if reverse else 0
    u = u.at[edge].add(_apply(decay[edge], init))
    combine = lambda x, y: (compose(y[0], x[0]), _apply(y[0], x[1]) + y[1])
    return lax.associative_scan(combine, (decay, u), reverse=reverse)[1]


def _chunked(decay: Array, u: Array, init: Array, reverse: bool) -> Array:
    """Reduce every chunk to one step, scan these, and scan every chunk from its true start."""
    compose = _compose(decay, u)
    num_steps, length = len(u), isqrt(len(u))
    count = -(-num_steps // length)
    fill = count * length - num_steps

    def split(x):  # [T, ...] -> [length, count, ...]; the filling comes last in the scan's order
        x = jnp.pad(x, [(fill, 0) if reverse else (0, fill)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(x.reshape(count, length, *x.shape[1:]), 0, 1)

    chunks = split(decay), split(u)

    def reduce(carry, inputs):
        decay, x = carry
        return (compose(inputs[0], decay), _apply(inputs[0], x) + inputs[1]), None

    first, rest = (-1, slice(None, -1)) if reverse else (0, slice(1, None))
    start = jax.tree.map(lambda x: x[first], chunks)
    rest = jax.tree.map(lambda x: x[rest], chunks)
    (whole, end), _ = lax.scan(reduce, start, rest, reverse=reverse)
    before = _before(_sequential(whole, end, init, reverse), init, reverse)
    x = jnp.swapaxes(_sequential(*chunks, before, reverse), 0, 1)
    x = x.reshape(count * length, *u.shape[1:])
    return x[fill:] if reverse else x[:num_steps]


def _before(x: Array, init: Array, reverse: bool) -> Array:
    """x_{t-1}, or x_{t+1} with `reverse`."""
    parts = [x[1:], init[None]] if reverse else [init[None], x[:-1]]
    return jnp.concatenate(parts)


def _apply(decay: Array, x: Array) -> Array:
    return jnp.einsum("...ij,...j->...i", decay, x) if decay.ndim > x.ndim else decay * x


def _compose(decay: Array, u: Array) -> Callable[[Array, Array], Array]:
    return jnp.matmul if decay.ndim > u.ndim else jnp.multiply
