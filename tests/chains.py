"""Random worlds whose chain is told by their states, and the long run of each by dense algebra."""

from typing import NamedTuple

import numpy as np
from scipy.sparse.csgraph import connected_components

INSIDES = ("random", "sparse", "periodic", "cycle", "lazy")  # of a recurrent class
KINDS = (
    "one class", "one class and transients", "slow", "equal classes", "different classes",
    "absorbing", "classes and transients", "nearly apart", "nearly apart and equal",
)  # fmt: skip


class World(NamedTuple):
    transition: np.ndarray  # [S, 2, S]; states that are left over keep to themselves
    reward: np.ndarray  # [S, 2]
    start: np.ndarray
    logits: np.ndarray  # [S, 2] of the actions


class Truth(NamedTuple):
    average_reward: float
    stationary: np.ndarray
    gradient: np.ndarray  # in the logits
    num_classes: int  # with mass
    steps: float  # 1 / the least singular value of I - K + Π


def inside(rng, size, kind):
    """A random irreducible chain; `lazy` mixes slowly, `periodic` and `cycle` do not mix."""
    every, order, chain = np.arange(size), rng.permutation(size), np.zeros((size, size))
    if kind in ("random", "lazy"):
        chain = rng.dirichlet(np.ones(size), size)
        return chain if kind == "random" else 0.9 * np.eye(size) + 0.1 * chain
    if kind == "periodic":
        phase = every % min(size, rng.integers(2, 6))
        for i in every:
            after = np.flatnonzero(phase == (phase[i] + 1) % (phase.max() + 1))
            chain[i, after] = rng.dirichlet(np.ones(len(after)))
        return chain
    chain[order, np.roll(order, 1)] = rng.uniform(0.05, 1, size) if kind == "sparse" else 1
    for _ in range(2 * (kind == "sparse")):
        chain[every, rng.integers(0, size, size)] += rng.uniform(0, 1, size)
    return chain / chain.sum(1, keepdims=True)


def classes(rng, size, members, num_transients=0, kind="random"):
    """K of two classes of `members` states each, of `size` states; and a first distribution."""
    chain, start, used = np.eye(size), np.zeros(size), 2 * members + num_transients
    for i in (slice(members), slice(members, 2 * members)):
        chain[i, i] = inside(rng, members, kind)
    chain[2 * members : used] = 0
    chain[2 * members : used, :used] = rng.dirichlet(np.ones(used), num_transients)
    start[:used] = rng.dirichlet(np.ones(used))
    return chain, start


def random_world(rng, size, kind):
    transition, start = np.repeat(np.eye(size)[:, None], 2, 1), np.zeros(size)
    reward = rng.normal(size=(size, 2))
    logits = rng.normal(size=(size, 2)) * rng.choice([0.1, 1, 3])
    single = kind in ("one class", "one class and transients", "slow")
    count, what = 1 if single else rng.integers(2, 5), rng.choice(INSIDES)
    sizes = rng.integers(1 + single, max(2, (size - 6) // count) + 1, count)
    ends = np.cumsum(np.ones_like(sizes) if kind == "absorbing" else sizes)
    blocks, used = [np.arange(*x) for x in zip([0, *ends], ends, strict=False)], ends[-1]
    for block in blocks:
        chain = inside(rng, len(block), what)
        for a in range(2):
            own = chain * rng.uniform(0.2, 1, chain.shape)
            transition[np.ix_(block, [a], block)] = (own / own.sum(1, keepdims=True))[:, None]
    start[:used] = rng.dirichlet(np.ones(used)) * (rng.random(used) < rng.choice([0.3, 1]))
    start[rng.integers(used)] += 1e-2
    if "transients" in kind or kind == "absorbing" or ("classes" in kind and rng.random() < 0.5):
        more = used + np.arange(rng.integers(1, 6))
        used += len(more)
        transition[more] = 0
        transition[more, :, :used] = rng.dirichlet(np.full(used, 0.3), (len(more), 2))
        start[more] = rng.uniform(size=len(more))
    if "nearly" in kind:
        leak = 10 ** rng.uniform(-15, -1)
        for block, other in zip(blocks, [*blocks[1:], blocks[0]], strict=True):
            for s in rng.choice(block, rng.integers(1, len(block) + 1), replace=False):
                transition[s] *= 1 - leak
                transition[s, :, rng.choice(other)] += leak
    if kind == "slow":
        pace = 10 ** rng.uniform(-8, 0)
        transition[:used] = (1 - pace) * np.eye(size)[:used, None] + pace * transition[:used]
    if "equal" in kind:
        for i in blocks:
            mu = _softmax(logits[i])
            chain = np.einsum("sa,sat->st", mu, transition[np.ix_(i, [0, 1], i)])
            gain = _stationary(chain / chain.sum(1, keepdims=True)) @ (mu * reward[i]).sum(1)
            reward[i] += 1 - float(gain)
    scale = 10 ** rng.uniform(-3, 3) if rng.random() < 0.3 else 1
    return World(transition, reward * scale, start / start.sum(), logits)


def long_run(world):
    """η, d and ∇η in extended precision, classes told by where probabilities are exactly 0.

    With Π the limit of the chain's time averages and D = (I - K + Π)⁻¹ - Π, x = D r and
    ∂η = d ∂K x + start D ∂K Π r.
    """
    transition, reward, start, logits = (x.astype(np.longdouble) for x in world)
    transition = transition / transition.sum(2, keepdims=True)
    mu = _softmax(logits)
    chain = np.einsum("sa,sat->st", mu, transition)
    count, label = connected_components(chain > 0, connection="strong")
    closed = [i for c in range(count) if not chain[np.ix_(i := label == c, ~i)].any()]
    transient = ~np.any(closed, 0)
    system = -chain * (1 - np.eye(len(chain)))
    system -= np.diag(system.sum(1))  # I - K without cancellation
    limit = np.zeros_like(chain)
    for i in closed:
        limit[np.ix_(i, i)] = own = _stationary(chain[np.ix_(i, i)])
        arrive = chain[np.ix_(transient, i)].sum(1)
        absorbed = _solve(system[np.ix_(transient, transient)], arrive)
        limit[np.ix_(transient, i)] = absorbed[:, None] * own
    mean = (mu * reward).sum(1)
    d, gain = start @ limit, limit @ mean
    x = _solve(system + limit, mean - gain)
    visits = _solve((system + limit).T, start - d)
    centred = lambda q: mu * (q - (mu * q).sum(1, keepdims=True))
    gradient = d[:, None] * centred(reward + transition @ x)
    gradient += visits[:, None] * centred(transition @ gain)
    return Truth(
        float(d @ mean), d.astype(float), gradient.astype(float),
        sum(bool(d[i].sum() > 0) for i in closed),
        1 / np.linalg.svd((system + limit).astype(float), compute_uv=False)[-1],
    )  # fmt: skip


def _softmax(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def _stationary(chain):
    """Of an irreducible chain, without subtractions (Grassmann, Taksar & Heyman, 1985)."""
    chain, size = chain.astype(np.longdouble), len(chain)
    for k in range(size - 1, 0, -1):
        chain[:k, k] /= chain[k, :k].sum()
        chain[:k, :k] += np.outer(chain[:k, k], chain[k, :k])
    d = np.eye(1, size, dtype=np.longdouble)[0]
    for k in range(1, size):
        d[k] = d[:k] @ chain[:k, k]
    return d / d.sum()


def _solve(matrix, rhs):
    """By elimination with pivots: NumPy's own solver has no extended precision."""
    matrix, rhs = matrix.copy(), rhs.copy()
    for k in range(len(rhs)):
        pivot = k + np.abs(matrix[k:, k]).argmax()
        matrix[[k, pivot]], rhs[[k, pivot]] = matrix[[pivot, k]], rhs[[pivot, k]]
        factor = matrix[k + 1 :, k] / matrix[k, k]
        matrix[k + 1 :] -= np.outer(factor, matrix[k])
        rhs[k + 1 :] -= factor * rhs[k]
    for k in reversed(range(len(rhs))):
        rhs[k] = (rhs[k] - matrix[k, k + 1 :] @ rhs[k + 1 :]) / matrix[k, k]
    return rhs
