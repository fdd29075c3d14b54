"""Finite hidden Markov models, and the permutations of those that are nearly deterministic.

Columns are distributions, as in Zhao et al. (2026), arXiv 2605.31261: T(a)[s', s] = P(s' | s, a)
and E[o, s] = O(o | s). Without actions A = 1.
"""

from typing import Any, NamedTuple

import numpy as np

from spg.worlds.models import POMDP, SparsePOMDP, dense


class HMM(NamedTuple):
    """A finite hidden Markov model, perhaps controlled by actions."""

    transition: Any  # [A, S, S], P(s' | s, a) at [a, s', s]
    emission: Any  # [O, S], O(o | s) at [o, s]
    start: Any  # [S]


def hmm(pomdp: POMDP) -> HMM:
    """The hidden Markov model of a finite world, dense. Raises ValueError for 10^8 entries of T."""
    size, num_actions = pomdp.start.size, pomdp.num_actions
    if num_actions * size**2 >= 1e8:
        raise ValueError(f"{num_actions} actions and {size} states are too many for dense filters")
    world = dense(pomdp) if isinstance(pomdp, SparsePOMDP) else pomdp
    transition, emission, _, start = map(np.asarray, world)
    return HMM(transition.transpose(1, 2, 0), emission.T, start)


def deterministic_part(model: HMM) -> HMM:
    """The model with permutations diag(Π, I_r) for nearly deterministic T(a) = D + εQ, eq. 28.

    D leads each state to its most probable successor; Π is D on the states that are on its
    cycles, and the r others stay. Raises ValueError, naming the column, where no successor has
    more than half of the probability.
    """
    model = checked(model)
    likely = model.transition.max(1)
    for a, s in np.argwhere(likely <= 0.5):
        raise ValueError(
            f"T({a}) is not nearly deterministic: the likeliest successor in column {s} "
            f"has probability {likely[a, s]:.6g}"
        )
    target = model.transition.argmax(1)
    size = target.shape[1]
    reached = np.broadcast_to(np.arange(size), target.shape)
    for _ in range(size):
        reached = np.take_along_axis(target, reached, 1)  # after S steps: all of the cycles
    recurrent = (reached[:, :, None] == np.arange(size)).any(1)
    target = np.where(recurrent, target, np.arange(size))
    return model._replace(transition=np.eye(size)[target].transpose(0, 2, 1))


def checked(model: HMM) -> HMM:
    """The model in NumPy's double precision. Raises ValueError for what is not one."""
    transition, emission, start = (np.asarray(x, np.float64) for x in model)
    shapes = [x.shape for x in (transition, emission, start)]
    size = start.size
    if transition.shape[1:] != (size, size) or emission.shape[1:] != (size,) or start.ndim != 1:
        raise ValueError(f"T [A, S, S], E [O, S] and start [S] of different S: {shapes}")
    columns = [(f"T({a})", matrix) for a, matrix in enumerate(transition)]
    for name, matrix in (*columns, ("E", emission), ("start", start[:, None])):
        total = matrix.sum(0)
        for s in np.flatnonzero(~(np.abs(total - 1) < 1e-5) | ~(matrix >= 0).all(0)):
            raise ValueError(
                f"column {s} of {name} is no distribution, it sums to {total[s]:.6g}: "
                f"{matrix[:, s]}"
            )
    for o in np.flatnonzero(~(emission > 0).any(1)):
        raise ValueError(f"the emissions of observation {o} are all zero; leave it out")
    return HMM(transition, emission, start)
