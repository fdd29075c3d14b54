"""Local search among finite-state controllers by exact values, without gradients.

An exchange mixes one row of a controller's tables with certainty,

    ω(· | g, o) ← (1 - p) ω(· | g, o) + p e_h,      μ(· | h, o) ← (1 - p) μ(· | h, o) + p e_a.

With p = 1 this is a search among deterministic controllers. Bounded policy iteration (Poupart &
Boutilier, 2003) is a relative: it improves one I-state at a time, too.

An exchange changes the joint chain K by E ΔM, with E(s, g; s) = 1 for the I-state g of the row, or
ω(h | g, o) where the row is one of actions. So one inverse gives the value of every exchange,

    η' - η = d E (I - ΔM N E)⁻¹ (Δr + ΔM x),      N = (I - K + 1v)⁻¹,  d = vN,  x = Nr,

by a system of |S| equations. v is the distribution of the first (s, g).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from spg.exact.checks import check
from spg.kernels.finite import finite_kernel, tables, transitions
from spg.kernels.kernel import Kernel
from spg.types import Scalar
from spg.worlds.models import DensePOMDP

ANEW = 1e-7  # Pr(all begins anew after a step): so there is one recurrent class


class Rows(NamedTuple):
    """A controller's tables; or a number for each exchange. It starts in I-state 0."""

    omega: Float[Array, "O G G"]  # ω(h | g, o), [o, g, h]
    mu: Float[Array, "O G A"]  # μ(a | h, o), [o, h, a]


class Neighbours(NamedTuple):
    average_reward: Float[Array, ""]  # η
    gain: Rows  # η' - η after each exchange; -∞ if it was not looked at
    visits: Float[Array, "O G"]  # Pr(o, h), h the I-state after o
    q_value: Float[Array, "O G A"]  # Σ_{s,g} d(s, g) O(o | s) [r + P x](s, a, h)


def rows_of(kernel: Kernel, pomdp: DensePOMDP) -> Rows:
    """ω and μ of a finite-state controller. Raises ValueError if it does not start in I-state 0."""
    check(kernel, pomdp)
    if kernel.z0 != 0:
        raise ValueError(f"the controller starts in I-state {kernel.z0}; it has to start in 0")
    table = tables(kernel, jnp.arange(pomdp.num_obs))
    return Rows(transitions(table), table.mu)


def kernel_of(rows: Rows, *, floor: Scalar = 0.0) -> Kernel:
    """The controller with these tables, none of whose probabilities is below `floor`."""
    log = lambda x: jnp.swapaxes(jnp.log(jnp.maximum(x, floor)), 0, 1)
    return finite_kernel(log(rows.omega), log(rows.mu))


@jax.jit
def average_reward(rows: Rows, pomdp: DensePOMDP) -> Float[Array, ""]:
    """η, up to `ANEW` times the steps that the chain takes to forget."""
    system, first, reward = _system(rows, pomdp)
    return first @ jnp.linalg.solve(system, reward)


@partial(jax.jit, static_argnames="most")
def neighbours(
    rows: Rows, pomdp: DensePOMDP, *, mix: Scalar = 1.0, most: int | None = None
) -> Neighbours:
    """η after every exchange of p = `mix`, or after `most` of each o, those of largest slopes."""
    system, first, reward = _system(rows, pomdp)
    size, num_z = len(pomdp.start), rows.omega.shape[1]
    inverse = jnp.linalg.inv(system)
    d, x = (v.reshape(size, num_z) for v in (first @ inverse, inverse @ reward))
    inverse = (1 - ANEW) * inverse.reshape(size, num_z, size, num_z)
    ahead = jnp.einsum("sat,thug->hgasu", pomdp.transition, inverse)  # P_a N
    q = pomdp.reward[..., None] + (1 - ANEW) * jnp.einsum("sat,th->sah", pomdp.transition, x)

    def at(o):
        omega, mu, seen = rows.omega[o], rows.mu[o], mix * pomdp.observation[:, o]
        after, v = jnp.einsum("ha,hgasu->hgsu", mu, ahead), jnp.einsum("ha,sah->hs", mu, q)
        before, mean = jnp.einsum("gh,hgsu->gsu", omega, after), omega @ v
        lead = (d * seen[:, None]).T @ v.T - jnp.sum((d * seen[:, None]).T * mean, 1)[:, None]
        act = jnp.einsum("sh,s,hsa->ha", d @ omega, seen, jnp.moveaxis(q, 2, 0) - v[..., None])
        slope = jnp.concatenate([lead.ravel(), act.ravel()])

        def lead_by(i):  # from g to h
            g, h = jnp.divmod(i, num_z)
            return d[:, g], after[h, g] - before[g], v[h] - mean[g]

        def act_by(i):  # a in h
            h, a = jnp.divmod(i - num_z**2, pomdp.num_actions)
            spread = jnp.einsum("g,gsu->su", omega[:, h], ahead[h, :, a] - after[h])
            return d @ omega[:, h], spread, q[:, a, h] - v[h]

        def gain(i):
            mass, spread, change = lax.cond(i < num_z**2, lead_by, act_by, i)
            system = jnp.eye(size) - seen[:, None] * spread
            return mass @ jnp.linalg.solve(system, seen * change)

        some = lax.top_k(slope, min(most or slope.size, slope.size))[1]
        gains = jnp.full_like(slope, -jnp.inf).at[some].set(lax.map(gain, some))
        return Rows(gains[: num_z**2].reshape(omega.shape), gains[num_z**2 :].reshape(mu.shape))

    seen = jnp.einsum("sg,so->sog", d, pomdp.observation)
    return Neighbours(
        first @ inverse.reshape(system.shape) @ reward / (1 - ANEW),
        lax.map(at, jnp.arange(pomdp.num_obs)),
        jnp.einsum("sog,ogh->oh", seen, rows.omega),
        jnp.einsum("sog,sah->oha", seen, q),
    )


def exchange(
    rows: Rows,
    pomdp: DensePOMDP,
    *,
    mixes: tuple[float, ...] = (1.0,),
    most: int | None = None,
    tol: float = 1e-8,
    num_sweeps: int = 1000,
) -> tuple[Rows, float]:
    """Exchanges until none gains more than `tol`, and η, which never falls.

    A sweep takes the best exchange of each row, all of them at once if that earns as much as the
    best of them alone, else the best third, and so on. With `most` a sweep looks at all exchanges
    only where those of the largest slopes gain nothing. In an I-state that o never leads to, any
    action will do: it becomes the one that is best if o does.
    """
    some = most
    for _ in range(num_sweeps):
        found = [neighbours(rows, pomdp, mix=mix, most=some) for mix in mixes]
        moves = sorted(move for move in _moves([x.gain for x in found]) if move[0] > tol)[::-1]
        if not moves and some is None:
            break
        some = most if moves else None
        eta, idle = float(found[0].average_reward), found[0].visits < 1e-12
        best = jax.nn.one_hot(found[0].q_value.argmax(-1), pomdp.num_actions)
        filled = rows._replace(mu=jnp.where(idle[..., None], best, rows.mu))
        number = len(moves)
        new = _moved(filled, moves, mixes)
        while moves and average_reward(new, pomdp) < eta + moves[0][0] - tol / 2:
            if number == 1:  # it led to an action that was filled in
                new = _moved(rows, moves[:1], mixes)
                break
            number = -(-number // 3)
            new = _moved(filled, moves[:number], mixes)
        rows = new
    return rows, float(average_reward(rows, pomdp))


def _system(rows: Rows, pomdp: DensePOMDP) -> tuple[Array, Array, Array]:
    """I - K + 1v, v and r."""
    policy = jnp.einsum("so,ogh,oha->sgha", pomdp.observation, *rows)
    first = jnp.outer(pomdp.start, jnp.eye(rows.omega.shape[1])[0]).reshape(-1)
    chain = jnp.einsum("sgha,sat->sgth", policy, pomdp.transition).reshape(first.size, -1)
    reward = jnp.einsum("sgha,sa->sg", policy, pomdp.reward).reshape(-1)
    return jnp.eye(first.size) - (1 - ANEW) * (chain - first), first, reward


def _moves(gains: list[Rows]):
    """(gain, table, o, row, certainty, mix) of the best exchange of each row."""
    for table, of_mixes in enumerate(zip(*gains, strict=True)):
        stacked = np.stack(of_mixes, -1)
        for o, row in np.ndindex(stacked.shape[:2]):
            i, mix = np.unravel_index(stacked[o, row].argmax(), stacked.shape[2:])
            yield float(stacked[o, row, i, mix]), table, o, row, int(i), int(mix)


def _moved(rows: Rows, moves: list, mixes: tuple[float, ...]) -> Rows:
    """The tables after these exchanges."""
    new = tuple(np.array(x) for x in rows)
    for _, table, o, row, i, mix in moves:
        new[table][o, row] *= 1 - mixes[mix]
        new[table][o, row, i] += mixes[mix]
    return Rows(*map(jnp.asarray, new))
