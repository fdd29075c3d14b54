"""How well a leaky filter decodes: the constants of Theorem 5.7 of Zhao et al. (2026).

For nearly deterministic transitions T = D + εQ and a decay δ = λ / log(1/ε) with λ < ξ, the
long-run probability that the likeliest state is the wrong one is of the order ε log(1/ε). The
optimal decoder errs with the same order.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from spg.worlds.hmm import HMM, deterministic_part


class Constants(NamedTuple):
    """Of the D and E of a hidden Markov model."""

    xi: float  # decays λ / log(1/ε) are valid for λ below it
    wide_xi: float  # the same with the Chernoff exponent at u = -1 in place of -1/M (derived here)
    kl: float  # largest mean KL divergence a step, over pairs of states
    least_a: (
        float  # log(kl + 2W) - log ξ, the bound on the window a/δ of the proof, W = max |log E|
    )


def constants(model: HMM, *, nodes: int = 64) -> Constants:
    """ξ, KL and the threshold of a, by Gauss-Legendre quadrature with so many nodes.

        ξ = min over ordered pairs of states of -(1/M) Σ_n ∫_0^{-1/M} Λ_n(t)/t dt,
        Λ_n(t) = log E_p[(p/q)^t],

    with p and q the emissions of the two states n steps on, and M the order of D. With several
    actions M is 1, Theorem 5.9, one step deciding (derived here).

    Raises ValueError where an assumption fails: an emission of zero (5.3), or two recurrent states
    that emit alike in all of a period, or with actions at all (5.6, 5.8).
    """
    permutation = deterministic_part(model).transition.argmax(1)
    emission = np.asarray(model.emission, np.float64)
    if not (emission > 0).all():
        o, s = np.argwhere(emission <= 0)[0]
        raise ValueError(f"emission {o} of state {s} is zero; Assumption 5.3 wants positive ones")
    controlled = len(permutation) > 1
    states = np.arange(emission.shape[1])
    if controlled:
        paths = states[None]
    else:
        raw = np.asarray(model.transition)[0].argmax(0)
        states = states[raw == permutation[0]]  # a transient state has been made to stay
        paths = _paths(permutation[0], states)
    if len(states) < 2:
        raise ValueError("fewer than two recurrent states: there is nothing to tell apart")
    period = len(paths)
    emitted = emission[:, paths]  # [O, M, S]
    log = np.log(emitted)
    p, ratio = emitted[..., None], log[..., :, None] - log[..., None, :]
    kl = (p * ratio).sum(0).mean(0)  # [S, S]
    alike = (np.abs(ratio).max((0, 1)) < 1e-12) & ~np.eye(len(states), dtype=bool)
    for i, j in np.argwhere(alike):
        raise ValueError(f"states {states[i]} and {states[j]} always emit alike")

    def exponent(u: float) -> float:
        x, weight = np.polynomial.legendre.leggauss(nodes)
        t = u * (x + 1) / 2
        cumulant = np.log(
            np.einsum(
                "omij,omijn->mijn", np.broadcast_to(p, ratio.shape), np.exp(ratio[..., None] * t)
            )
        )
        each = -(cumulant / t * weight).sum(-1).mean(0) * u / 2
        return float(each[~np.eye(len(states), dtype=bool)].min())

    xi = exponent(-1 / period)
    largest = float(kl.max())
    bound = np.abs(np.log(emission)).max()
    return Constants(xi, exponent(-1.0), largest, float(np.log(largest + 2 * bound) - np.log(xi)))


def _paths(
    permutation: Int[np.ndarray, " S"], states: Int[np.ndarray, " R"]
) -> Int[np.ndarray, "M R"]:
    """Where each of the states is after 1..M steps, M the order of the permutation."""
    paths = [permutation[states]]
    while (paths[-1] != states).any():
        paths.append(permutation[paths[-1]])
    return np.stack(paths)
