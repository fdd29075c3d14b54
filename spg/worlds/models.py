"""Finite worlds as arrays: dense, or with padded lists of the successors and emissions that occur.

Both forms have what GAMP and the environment `spg.envs.Tabular` need. Order of events in a step:
s emits o, the policy draws z' and a, s moves to s', the reward r(s, a, s') is received.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float, Int

from spg.limits import Range, fits


class DensePOMDP(NamedTuple):
    """Finite world, dense."""

    transition: Float[Array, "S A S"]  # P(s' | s, a)
    observation: Float[Array, "S O"]  # O(o | s)
    reward: Float[Array, "S A"]  # r(s, a)
    start: Float[Array, " S"]  # distribution of the first state

    @property
    def num_obs(self) -> int:
        return self.observation.shape[1]

    @property
    def num_actions(self) -> int:
        return self.transition.shape[1]

    def mean_reward(self) -> Float[Array, "S A"]:
        """E[r | s, a]."""
        return self.reward

    def expect(self, x: Float[Array, "T G"]) -> Float[Array, "S A G"]:
        """Σ_{s'} P(s' | s, a) x(s', ·)."""
        return jnp.einsum("sat,tg->sag", self.transition, x)

    def push(
        self, w: Float[Array, "S A G"], onto: Float[Array, "T G"] | None = None
    ) -> Float[Array, "T G"]:
        """Σ_{s,a} w(s, a, ·) P(s' | s, a), the transpose of `expect`, added to what is given."""
        pushed = jnp.einsum("sat,sag->tg", self.transition, w)
        return pushed if onto is None else onto + pushed

    def emissions(self) -> tuple[Int[Array, "S M"], Float[Array, "S M"]]:
        """The observations that each state may emit, and their probabilities."""
        return jnp.broadcast_to(jnp.arange(self.num_obs), self.observation.shape), self.observation


class SparsePOMDP(eqx.Module):
    """Finite world with at most N successors of each (s, a) and M observations of each s.

    Lists are padded by entries of probability 0.
    """

    successor: Int[Array, "S A N"]
    probability: Float[Array, "S A N"]  # P(s' | s, a) of the successors
    reward: Float[Array, "S A N"]  # r(s, a, s')
    observation: Int[Array, "S M"]
    emission: Float[Array, "S M"]  # O(o | s) of the observations
    start: Float[Array, " S"]  # distribution of the first state
    num_obs: int = eqx.field(static=True)

    @property
    def num_actions(self) -> int:
        return self.successor.shape[1]

    def mean_reward(self) -> Float[Array, "S A"]:
        """E[r | s, a]."""
        return jnp.sum(self.probability * self.reward, -1)

    def expect(self, x: Float[Array, "T G"]) -> Float[Array, "S A G"]:
        """Σ_{s'} P(s' | s, a) x(s', ·)."""
        return jnp.einsum("san,sang->sag", self.probability, x[self.successor])

    def push(
        self, w: Float[Array, "S A G"], onto: Float[Array, "T G"] | None = None
    ) -> Float[Array, "T G"]:
        """Σ_{s,a} w(s, a, ·) P(s' | s, a), the transpose of `expect`, added to what is given."""
        flow = self.probability[..., None] * w[:, :, None]
        if onto is None:
            onto = jnp.zeros((len(self.start), w.shape[-1]), flow.dtype)
        return onto.at[self.successor].add(flow)

    def emissions(self) -> tuple[Int[Array, "S M"], Float[Array, "S M"]]:
        """The observations that each state may emit, and their probabilities."""
        return self.observation, self.emission


POMDP = DensePOMDP | SparsePOMDP


class Problem(NamedTuple):
    """A world with the names of its parts."""

    name: str
    pomdp: SparsePOMDP
    states: tuple[str, ...]
    actions: tuple[str, ...]
    observations: tuple[str, ...]
    discount: float
    slots: np.ndarray | None = None  # [O, I] of I agents: the pair (agent, what it sees), numbered


def sparse_pomdp(
    transitions: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    emissions: tuple[np.ndarray, np.ndarray, np.ndarray],
    start: np.ndarray,
    *,
    num_actions: int,
    num_obs: int,
    states: tuple[str, ...] = (),
    actions: tuple[str, ...] = (),
    observations: tuple[str, ...] = (),
    unemitted: bool = False,
) -> SparsePOMDP:
    """A world from the list of its non-zeros, as equally long one-dimensional arrays.

    `transitions` are (s, a, s', P(s' | s, a), r(s, a, s')), in any order; where an (s, a, s')
    repeats, probabilities add up and rewards are averaged by them. `emissions` are (s, o, O(o|s)).
    `start` is the distribution of the first state; its length is the number of states. The names
    appear in messages.

    Raises ValueError, naming the row, for lists of different lengths, an index out of range, a
    probability that is negative or not finite, a reward that is not finite, or a row that does not
    sum to one (within 1e-5; rows are then normalised); and for an observation that no state emits,
    unless `unemitted`.
    """
    size = len(start)
    s, a, t, p, r = (np.asarray(x) for x in transitions)
    u, o, q = (np.asarray(x) for x in emissions)
    for lists in ((s, a, t, p, r), (u, o, q)):
        if len({x.shape for x in lists}) > 1 or lists[0].ndim != 1:
            raise ValueError(f"lists of different lengths: {[x.shape for x in lists]}")
    limits = ((s, size, "state"), (a, num_actions, "action"), (t, size, "state"))
    for x, limit, what in (*limits, (u, size, "state"), (o, num_obs, "observation")):
        if len(x) and (x.min() < 0 or x.max() >= limit):
            bad = x[(x < 0) | (x >= limit)][0]
            raise ValueError(f"{what} {bad} is out of range: there are {limit}")
    if not np.isfinite(r).all():
        i = np.flatnonzero(~np.isfinite(r))[0]
        raise ValueError(f"the reward of {_pair(s[i], a[i], states, actions)} is {r[i]}")
    row = s.astype(np.int64) * num_actions + a
    pair = lambda i: _pair(i // num_actions, i % num_actions, states, actions)
    total = _total(p, row, size * num_actions, lambda i: f"transitions of {pair(i)}")
    key, p, rp = _merge(row * size + t, p, p * r)
    row, t = key // size, key % size
    r = rp / np.where(p > 0, p, 1)
    p = p / total[row]
    total = _total(q, u, size, lambda i: f"observations of {_name(i, states, 'state')}")
    key, q = _merge(u.astype(np.int64) * num_obs + o, q)
    u, o = key // num_obs, key % num_obs
    q = q / total[u]
    start = start / _total(start, np.zeros(size, int), 1, lambda i: "start probabilities")[0]
    missing = np.setdiff1d(np.arange(num_obs), o[q > 0])
    if missing.size and not unemitted:
        raise ValueError(
            f"no state emits {_name(missing[0], observations, 'observation')}; leave it out"
        )
    t, p, r = (_pad(x, row, p > 0, size * num_actions) for x in (t, p, r))
    o, q = (_pad(x, u, q > 0, size) for x in (o, q))
    shape = (size, num_actions, -1)
    return SparsePOMDP(
        successor=jnp.asarray(t.reshape(shape), jnp.int32),
        probability=jnp.asarray(p.reshape(shape), float),
        reward=jnp.asarray(r.reshape(shape), float),
        observation=jnp.asarray(o, jnp.int32),
        emission=jnp.asarray(q, float),
        start=jnp.asarray(start, float),
        num_obs=num_obs,
    )


def sparse(pomdp: DensePOMDP) -> SparsePOMDP:
    """The same world with lists. Raises ValueError as `sparse_pomdp` does."""
    transition, observation, reward, start = (np.asarray(x, np.float64) for x in pomdp)
    s, a, t = np.nonzero(transition)
    u, o = np.nonzero(observation)
    return sparse_pomdp(
        (s, a, t, transition[s, a, t], reward[s, a]), (u, o, observation[u, o]), start,
        num_actions=pomdp.num_actions, num_obs=pomdp.num_obs, unemitted=True,
    )  # fmt: skip


def dense(pomdp: SparsePOMDP) -> DensePOMDP:
    """The same world without lists, its rewards averaged over the successors.

    Raises ValueError for one that does not fit into memory.
    """
    size, num_actions, _ = pomdp.successor.shape
    entries = size * (num_actions * size + pomdp.num_obs)
    fits(entries * pomdp.probability.dtype.itemsize, f"{size:,} states, without lists,")
    s, a = jnp.arange(size)[:, None], jnp.arange(num_actions)[None, :, None]
    transition = jnp.zeros((size, num_actions, size), pomdp.probability.dtype)
    transition = transition.at[s[..., None], a, pomdp.successor].add(pomdp.probability)
    observation = jnp.zeros((size, pomdp.num_obs), pomdp.emission.dtype)
    observation = observation.at[s, pomdp.observation].add(pomdp.emission)
    return DensePOMDP(transition, observation, pomdp.mean_reward(), pomdp.start)


def aggregate(pomdp: SparsePOMDP, groups: np.ndarray) -> SparsePOMDP:
    """The same world, of which the group `groups[s]` of the state s is observed, and no more.

    Raises ValueError for a map that skips a state or a group, or numbers a group below 0.
    """
    groups = np.asarray(groups)
    if groups.shape != pomdp.start.shape:
        raise ValueError(
            f"the aggregation map has {groups.size} entries; there are {pomdp.start.size} states"
        )
    if groups.min() < 0:
        raise ValueError(f"state {groups.argmin()} is in group {groups.min()}; groups count from 0")
    num_groups = int(groups.max()) + 1
    empty = np.setdiff1d(np.arange(num_groups), groups)
    if empty.size:
        raise ValueError(f"no state is in group {empty[0]}, of {num_groups}")
    return SparsePOMDP(
        pomdp.successor, pomdp.probability, pomdp.reward, jnp.asarray(groups, jnp.int32)[:, None],
        jnp.ones_like(pomdp.emission[:, :1]), pomdp.start, num_groups,
    )  # fmt: skip


def interrupted(pomdp: SparsePOMDP, gamma: float) -> SparsePOMDP:
    """The same world, which with probability 1 - γ begins anew after a step.

    Its average reward under a policy that knows a beginning when it sees one is (1 - γ) times the
    discounted return of this policy from the start; under any other it is at most that of the best.
    So what learns by average reward, and what plans with a discount, are compared by one number.
    Raises ValueError for γ outside (0, 1).
    """
    Range(0, 1, open="both").check("gamma", gamma)
    p, size = np.asarray(pomdp.probability), pomdp.start.size
    first = np.flatnonzero(pomdp.start)
    s, a, n = np.nonzero(p)
    u, b, i = (x.ravel() for x in np.indices((size, pomdp.num_actions, first.size)))
    lists = (
        (s, u), (a, b), (np.asarray(pomdp.successor)[s, a, n], first[i]),
        (gamma * p[s, a, n], (1 - gamma) * np.asarray(pomdp.start)[first[i]]),
        (np.asarray(pomdp.reward)[s, a, n], np.asarray(pomdp.mean_reward())[u, b]),
    )  # fmt: skip
    s, a, t, p, r = (np.concatenate(x) for x in lists)
    u, m = np.nonzero(np.asarray(pomdp.emission))
    emissions = u, np.asarray(pomdp.observation)[u, m], np.asarray(pomdp.emission)[u, m]
    return sparse_pomdp(
        (s, a, t, p, r), emissions, np.asarray(pomdp.start),
        num_actions=pomdp.num_actions, num_obs=pomdp.num_obs, unemitted=True,
    )  # fmt: skip


def check(pomdp: POMDP) -> None:
    """Raise ValueError for arrays that are no world, naming the row.

    Shapes have to fit each other, indices to be in range, probabilities to be at least 0 and to sum
    to 1 (within 1e-5), and rewards to be finite. Traced arrays are checked by their shapes alone.
    """
    names = ("successor", "probability", "reward", "observation", "emission", "start")
    names = DensePOMDP._fields if isinstance(pomdp, DensePOMDP) else names
    x = {name: getattr(pomdp, name) for name in names}
    dense_axes = {"transition": "SAS", "observation": "SO", "reward": "SA", "start": "S"}
    axes = {"successor": "SAN", "probability": "SAN", "reward": "SAN", "start": "S"}
    axes |= {"observation": "SM", "emission": "SM"}
    axes = dense_axes if isinstance(pomdp, DensePOMDP) else axes
    sizes: dict[str, int] = {}
    for name, letters in axes.items():
        shape = x[name].shape
        if len(shape) != len(letters) or any(
            sizes.setdefault(letter, n) != n for letter, n in zip(letters, shape, strict=True)
        ):
            listed = ", ".join(f"{k} {v.shape}" for k, v in x.items())
            raise ValueError(f"the arrays of a world do not fit each other: {listed}")
    if any(isinstance(array, core.Tracer) for array in x.values()):
        return
    x = {name: np.asarray(array) for name, array in x.items()}
    pair = lambda i: f"transitions of {_pair(i // sizes['A'], i % sizes['A'], (), ())}"
    rows = {"start": lambda i: "start probabilities"}
    rows |= {"transition": pair, "probability": pair}
    rows |= {"observation": lambda i: f"observations of state {i}"}
    if isinstance(pomdp, SparsePOMDP):
        limits = {"successor": sizes["S"], "observation": pomdp.num_obs}
        rows["emission"] = rows.pop("observation")
        for name, limit in limits.items():
            bad = x[name][(x[name] < 0) | (x[name] >= limit)]
            if bad.size:
                raise ValueError(f"{name} {bad[0]} is out of range: there are {limit}")
    for name, title in rows.items():
        if name in x:
            p = x[name].reshape(-1, x[name].shape[-1]).astype(np.float64)
            _total(p.ravel(), np.repeat(np.arange(len(p)), p.shape[1]), len(p), title)
    if not np.isfinite(x["reward"]).all():
        s, a, *_ = np.argwhere(~np.isfinite(x["reward"]))[0]
        raise ValueError(f"the reward of {_pair(s, a, (), ())} is not finite")


def _merge(key: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sort by key, adding up the values of equal keys."""
    unique, inverse = np.unique(key, return_inverse=True)
    sums = (np.bincount(inverse, v, len(unique)) for v in values)
    return unique, *sums


def _total(p: np.ndarray, row: np.ndarray, num_rows: int, name: Callable[[Any], str]) -> np.ndarray:
    """Σ p of each row, which has to be 1."""
    bad = ~(p >= 0) | ~np.isfinite(p)
    if bad.any():
        i = np.flatnonzero(bad)[0]
        raise ValueError(f"the {name(row[i])} have probability {p[i]:.6g}")
    total = np.bincount(row, p, num_rows)
    bad = np.abs(total - 1) > 1e-5
    if bad.any():
        i = np.flatnonzero(bad)[0]
        more = f" (and {bad.sum() - 1} rows more)" if bad.sum() > 1 else ""
        raise ValueError(f"the {name(i)} sum to {total[i]:.6g}, not to 1{more}")
    return total


def _pad(x: np.ndarray, row: np.ndarray, keep: np.ndarray, num_rows: int) -> np.ndarray:
    """`x` by rows, `[num_rows, longest]`, with zeros behind; `row` is sorted."""
    x, row = x[keep], row[keep]
    count = np.bincount(row, minlength=num_rows)
    position = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    out = np.zeros((num_rows, max(count.max(initial=0), 1)), x.dtype)
    out[row, position] = x
    return out


def _pair(s: Any, a: Any, states: tuple[str, ...], actions: tuple[str, ...]) -> str:
    return f"{_name(s, states, 'state')} under {_name(a, actions, 'action')}"


def _name(i: Any, names: tuple[str, ...], what: str) -> str:
    return f"{what} {names[i]!r}" if names else f"{what} {i}"
