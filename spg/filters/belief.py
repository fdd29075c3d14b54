"""Filters of finite hidden Markov models: the belief, and its linear recurrences on logits.

Zhao et al. (2026), arXiv 2605.31261. Action a_k is taken before observation o_k. Where `first`, o_k
opens an episode: the prior is the start, and no transition precedes. A filter is a step,
`filter(z, obs, action, first)`, and the same over a sequence, `filter.unroll`.

A history of probability zero has no belief; for it the filters return finite
numbers.
"""

from functools import partial
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from spg.scans import Method, linear_scan
from spg.worlds.hmm import HMM, checked, deterministic_part

IMPOSSIBLE = -1e30  # log 0 whose sums stay finite, so that a reset does not make nan of 0 · log 0


@runtime_checkable
class Filter(Protocol):
    """A recursion over (a_k, o_k) that starts from `init`."""

    init: Array

    def __call__(self, z: Array, obs: Array, action: Array, first: Array) -> Array: ...

    def unroll(self, z: Array, obs: Array, action: Array, first: Array) -> Array: ...


class ForwardFilter(eqx.Module):
    """The belief, b_k ∝ diag(E'o_k) T(a_k) b_{k-1}: the forward filter of a hidden Markov model.

    An observation that is impossible after all others is ignored.
    """

    transition: Float[Array, "A S S"]
    emission: Float[Array, "O S"]
    init: Float[Array, " S"]

    def __call__(
        self, z: Float[Array, " S"], obs: Int[Array, ""], action: Int[Array, ""],
        first: Bool[Array, ""],
    ) -> Float[Array, " S"]:  # fmt: skip
        prior = jnp.where(first, self.init, self.transition[action] @ z)
        joint = self.emission[obs] * prior
        total = joint.sum()
        return jnp.where(total > 0, joint / jnp.where(total > 0, total, 1), prior)

    def unroll(
        self, z: Float[Array, " S"], obs: Int[Array, " T"], action: Int[Array, " _"],
        first: Bool[Array, " _"],
    ) -> Float[Array, "T S"]:  # fmt: skip
        return _unroll(self, z, obs, action, first)


class LogForwardFilter(eqx.Module):
    """The belief's logits for any T: l_k = log E'o_k + log Σ_s exp(log T(a_k) + l_{k-1}), Thm 4.4.

    The largest logit is shifted to 0, which leaves the softmax as it is.
    """

    log_transition: Float[Array, "A S S"]
    log_emission: Float[Array, "O S"]
    init: Float[Array, " S"]

    def __call__(
        self, z: Float[Array, " S"], obs: Int[Array, ""], action: Int[Array, ""],
        first: Bool[Array, ""],
    ) -> Float[Array, " S"]:  # fmt: skip
        prior = jax.nn.logsumexp(self.log_transition[action] + z, axis=1)
        z = jnp.where(first, self.init, prior) + self.log_emission[obs]
        return z - z.max()

    def unroll(
        self, z: Float[Array, " S"], obs: Int[Array, " T"], action: Int[Array, " _"],
        first: Bool[Array, " _"],
    ) -> Float[Array, "T S"]:  # fmt: skip
        return _unroll(self, z, obs, action, first)


class LinearFilter(eqx.Module):
    """w_k = (1-δ) Π(a_k) w_{k-1} + `evidence`(o_k), linear in w, with permutations Π(a).

    LOF, Cor. 4.3 and 4.5: δ = 0, evidence log E, and w are the belief's logits. ALF, eqs 28 and 65:
    0 < δ < 1, evidence δ log E. (Π w)(s') = w(source[s']).

    With `centred` the largest logit is shifted to 0, since the logits of LOF drift; the softmax
    stays as it is.
    `method` is that of `linear_scan`, and of the composition.
    """

    source: Int[Array, "A S"]
    evidence: Float[Array, "O S"]
    keep: Float[Array, ""]  # 1 - δ
    init: Float[Array, " S"]
    centred: bool = eqx.field(static=True)
    method: Method = eqx.field(static=True, default="auto")

    def __call__(
        self, z: Float[Array, " S"], obs: Int[Array, ""], action: Int[Array, ""],
        first: Bool[Array, ""],
    ) -> Float[Array, " S"]:  # fmt: skip
        prior = jnp.where(first, self.init, self.keep * z[self.source[action]])
        z = prior + self.evidence[obs]
        return z - z.max() if self.centred else z

    def unroll(
        self, z: Float[Array, " S"], obs: Int[Array, " T"], action: Int[Array, " _"],
        first: Bool[Array, " _"],
    ) -> Float[Array, "T S"]:  # fmt: skip
        """One diagonal scan, in the frame of the states before the sequence.

        P_k = Π(a_k) … Π(a_1) is composed as an index array. Then v_k = P_k^{-1} w_k solves
        v_k = (1-δ) v_{k-1} + P_k^{-1} evidence(o_k); and w_k = P_k v_k. When centred, a second scan
        is given evidence less the growth of max v: rounding is of small numbers, and the first
        scan's cancels, because any constant may be subtracted from all states.
        """
        _check_lengths(obs, action, first)
        target = jnp.argsort(self.source, -1)
        moves = jnp.where(first[:, None], jnp.arange(len(z), dtype=target.dtype), target[action])
        place = _compose(moves, method=self.method)
        u = self.evidence[obs] + jnp.where(first[:, None], self.init, 0)
        u = jnp.take_along_axis(u, place, 1)
        keep = jnp.where(first, 0, self.keep)
        solve = partial(linear_scan, init=z, method=self.method)
        v = solve(keep, u)
        if self.centred:
            top = v.max(1)
            growth = top - keep * jnp.roll(top, 1).at[0].set(0)
            v = solve(keep, u - growth[:, None])
            v -= v.max(1, keepdims=True)
        return jnp.put_along_axis(v, place, v, 1, inplace=False)


def forward_filter(model: HMM) -> ForwardFilter:
    """The belief. Raises ValueError for what is not a hidden Markov model, like the others."""
    return ForwardFilter(*map(_floats, checked(model)))


def log_forward_filter(model: HMM) -> LogForwardFilter:
    """The logits of the belief for any transitions; O(S²) a step, and sequential."""
    return LogForwardFilter(*(_floats(_log(x)) for x in checked(model)))


def exact_filter(
    model: HMM, *, least: float = 0.0, centred: bool = True, method: Method = "auto"
) -> LinearFilter:
    """LOF. Raises ValueError, naming the column, unless every T(a) is a permutation.

    Emissions and start probabilities below `least` are raised to `least`: a positive value helps
    where the permutations are an approximation, which may rule out what happens. In single
    precision sequences of more than about 10^4 steps need `centred`.
    """
    model = checked(model)
    for a, matrix in enumerate(model.transition):
        target = matrix.argmax(0)
        for s, column in enumerate(matrix.T):
            same = np.flatnonzero(target == target[s])
            wrong = f"holds {column.max():.6g} at most" if abs(column.max() - 1) > 1e-6 else ""
            if not wrong and len(same) > 1:
                wrong = f"leads to state {target[s]}, as column {same[same != s][0]} does"
            if wrong:
                raise ValueError(
                    f"the exact filter needs permutations, but column {s} of T({a}) {wrong}; "
                    "leaky_filter is for nearly deterministic transitions"
                )
    evidence, init = (_log(np.maximum(x, least)) for x in (model.emission, model.start))
    return _linear(model, evidence, 1.0, init, centred=centred, method=method)


def leaky_filter(
    model: HMM, *, decay: float, least: float = 1e-6, method: Method = "auto"
) -> LinearFilter:
    """ALF of δ = `decay`, with Π(a) of the nearly deterministic T(a): see `deterministic_part`.

    Emissions below `least` are raised to `least`, because Assumption 5.3 asks for positive ones;
    the filter can then return to a state that it has ruled out. w starts as δ log of the start
    distribution. Raises ValueError for a decay outside (0, 1), and unless `least` is positive.
    """
    if not least > 0:
        raise ValueError(f"least is {least}; it has to be positive")
    if not 0 < decay < 1:
        raise ValueError(f"decay is {decay}; it has to be inside (0, 1)")
    model = deterministic_part(model)
    evidence, init = (decay * np.log(np.maximum(x, least)) for x in (model.emission, model.start))
    return _linear(model, evidence, 1 - decay, init, centred=False, method=method)


def _linear(
    permutations: HMM, evidence: np.ndarray, keep: float, init: np.ndarray, *, centred: bool,
    method: Method,
) -> LinearFilter:  # fmt: skip
    source = jnp.asarray(permutations.transition.argmax(2), jnp.int32)
    parts = _floats(evidence), _floats(np.asarray(keep)), _floats(init - init.max())
    return LinearFilter(source, *parts, centred, method)


def _compose(moves: Int[Array, "T S"], *, method: Method) -> Int[Array, "T S"]:
    """Where each state of before the sequence is after the moves s -> moves[t, s] up to t."""
    if method == "associative":
        return lax.associative_scan(lambda x, y: jnp.take_along_axis(y, x, -1), moves)
    step = lambda place, move: (move[place],) * 2
    return lax.scan(step, jnp.arange(moves.shape[1], dtype=moves.dtype), moves)[1]


def _floats(x: np.ndarray) -> Array:
    return jnp.asarray(x, float)


def _log(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, np.log(np.where(x > 0, x, 1)), IMPOSSIBLE)


def _check_lengths(*sequences: Array) -> None:
    lengths = [len(x) for x in sequences]
    if len(set(lengths)) > 1:
        raise ValueError(f"obs, action and first have different lengths: {lengths}")


def _unroll(
    step: Filter, z: Float[Array, " S"], obs: Int[Array, " T"], action: Int[Array, " _"],
    first: Bool[Array, " _"],
) -> Float[Array, "T S"]:  # fmt: skip
    _check_lengths(obs, action, first)

    def body(z, x):
        z = step(z, *x)
        return z, z

    return lax.scan(body, z, (obs, action, first))[1]
