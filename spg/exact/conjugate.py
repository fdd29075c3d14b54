"""CONJPOMDP: conjugate gradient ascent by gradients alone, with the line search GSEARCH.

Baxter, Bartlett & Weaver (2001), algorithms 2 and 3. An ascent is a state machine that is asked for
the next parameters and told the gradient there, so that exact and sampled gradients, one ascent or
a `vmap` of many, cost one gradient a turn:

    state = init(params)
    for ...:
        trial = ask(state, settings)
        state = tell(state, settings, value, gradient)    # both at `trial`

GSEARCH looks at the sign of Δ·h along the line, never at a value; it doubles or halves the step
until the sign changes, then interpolates. `state.params` are those of the last line search.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from spg.types import Scalar

FIRST, START, DOWN, UP, LAND = range(5)  # what the evaluation under way is for


class Settings(NamedTuple):
    first_step: Scalar = 1.0  # s0, of every line search
    tolerance: Scalar = 1e-26  # ε of a line search, for Δ·h
    stop: Scalar = 1e-26  # ε of the ascent, for ‖g‖²
    bound: Scalar = (
        12.0  # parameters end a search in [-bound, bound], and may go twice as far in it
    )
    safeguard: bool | Bool[Array, ""] = True  # halve a step that has lowered the value


class Ascent(NamedTuple):
    params: PyTree  # where the last line search ended
    value: Float[Array, ""]  # there
    gradient: PyTree  # there, g
    direction: PyTree  # of the line search under way, h
    step: Float[Array, ""]  # s, of the parameters to be evaluated
    lower: Float[Array, "2"]  # s₋, p₋: a step with Δ·h > 0
    upper: Float[Array, "2"]  # s₊, p₊: a longer one with Δ·h < 0
    phase: Int[Array, ""]
    searches: Int[Array, ""]  # line searches that have ended
    converged: Bool[Array, ""]  # ‖g‖² < stop: `tell` does nothing any more


def init(params: PyTree) -> Ascent:
    """The ascent from these parameters, a pytree of floats."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(params)))
    pair = jnp.zeros(2, zero.dtype)
    count = jnp.zeros((), jnp.int32)
    done = jnp.zeros((), bool)
    return Ascent(params, zero, zeros, zeros, zero, pair, pair, count, count, done)


def ask(state: Ascent, settings: Settings) -> PyTree:
    """The parameters to evaluate next, θ0 + s h within bounds."""
    bound = jnp.where((state.phase == DOWN) | (state.phase == UP), 2, 1) * settings.bound
    return jax.tree.map(
        lambda x, h: jnp.clip(x + state.step * h, -bound, bound), state.params, state.direction
    )


def tell(state: Ascent, settings: Settings, value: Float[Array, ""], gradient: PyTree) -> Ascent:
    """Go on with the value and the gradient at `ask(state, settings)`.

    With the safeguard, for exact values, a search that ended below the value of its start halves
    its step: it may have ended in a saturated corner, where the gradient is 0.
    """
    slope = _inner(gradient, state.direction)
    here = jnp.stack([state.step, slope])
    longest = 1e3 * settings.bound / _largest(state.direction)  # far beyond the bounds

    def land(lower, upper):
        (s0, p0), (s1, p1) = lower, upper
        interpolated = s0 - p0 * (s1 - s0) / (p1 - p0)
        s = jnp.where((p0 > 0) & (p1 < 0), interpolated, (s0 + s1) / 2)
        return state._replace(step=s, lower=lower, upper=upper, phase=_phase(LAND))

    def arrive():
        norm, old = _inner(gradient, gradient), _inner(state.gradient, state.gradient)
        c = (norm - _inner(state.gradient, gradient)) / jnp.where(old > 0, old, jnp.inf)
        conjugate = jax.tree.map(lambda g, h: g + c * h, gradient, state.direction)
        uphill = _inner(conjugate, gradient) >= 0  # else start again along the gradient
        return Ascent(
            params=ask(state, settings),
            value=value,
            gradient=gradient,
            direction=_select(uphill, conjugate, gradient),
            step=jnp.full_like(state.step, settings.first_step),
            lower=state.lower,
            upper=state.upper,
            phase=_phase(START),
            searches=state.searches + (state.phase == LAND),
            converged=norm < settings.stop,
        )

    halved = state._replace(step=state.step / 2)
    rise = state._replace(step=2 * state.step, lower=here, phase=_phase(UP))
    fall = halved._replace(upper=here, phase=_phase(DOWN))
    crossed_down = (slope > -settings.tolerance) | (state.step < 1e-12)
    crossed_up = (slope < settings.tolerance) | (state.step > longest)
    least = 8 * jnp.finfo(value.dtype).eps * jnp.abs(state.value)
    worse = settings.safeguard & (value < state.value - least) & (state.step > 1e-12)
    following = [
        arrive(),
        _select(slope < 0, fall, rise),
        _select(crossed_down, land(here, state.upper), fall),
        _select(crossed_up, land(state.lower, here), rise),
        _select(worse, halved, arrive()),
    ]
    is_phase = lambda i: (state.phase == i) & ~state.converged
    result = state
    for i, candidate in enumerate(following):
        result = _select(is_phase(i), candidate, result)
    return result


def _inner(x: PyTree, y: PyTree) -> Float[Array, ""]:
    return jnp.asarray(optax.tree.vdot(x, y))


def _phase(i: int) -> Int[Array, ""]:
    return jnp.asarray(i, jnp.int32)


def _select(condition: Bool[Array, ""], x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)


def _largest(tree: PyTree) -> Float[Array, ""]:
    return jnp.max(jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(tree)]))
