"""Finite-state controllers: the internal state is an integer, the I-state g → h.

Observations are integers, or one-hot vectors, of which the position of the largest entry is read.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import core, lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from spg.distributions import Categorical
from spg.kernels.cells import Computed, Drawn, Location
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Identity
from spg.types import Scalar


@runtime_checkable
class FiniteMemory(Protocol):
    """ω(h | g, o) over `num_z` I-states; a `Categorical` whose support lists the successors."""

    @property
    def num_z(self) -> int: ...

    def __call__(self, obs: Array, z: Array) -> Categorical: ...


class TableMemory(eqx.Module):
    """ω(h | g, o) ∝ exp(logits[g, o, i]) for h = successors[g, o, i]; other h never follow."""

    logits: Float[Array, "G O K"]
    successors: Int[Array, "G O K"]

    @property
    def num_z(self) -> int:
        return self.logits.shape[0]

    def __call__(self, obs: Array, z: Int[Array, ""]) -> Categorical:
        o = integer(obs)
        return Categorical(self.logits[z, o], self.successors[z, o])


class NetworkMemory(eqx.Module):
    """Any module in place of the table: `network(o, g)` is the `Categorical` of h."""

    network: Callable[[Array, Array], Categorical]
    num_z: int = eqx.field(static=True)

    def __call__(self, obs: Array, z: Int[Array, ""]) -> Categorical:
        return self.network(obs, z)


class TableHead(eqx.Module):
    """μ(a | h, o) ∝ exp(logits[h, o, a])."""

    logits: Float[Array, "G O A"]

    def __call__(self, obs: Array, z_next: Int[Array, ""]) -> Categorical:
        return Categorical(self.logits[z_next, integer(obs)])


def finite_kernel(
    cell_logits: Float[Array, "G O K"],
    head_logits: Float[Array, "G O A"],
    successors: Int[Array, "G O K"] | None = None,
) -> Kernel:
    """The finite-state controller with these tables, which opens every episode in I-state 0.

    Without `successors` every I-state may follow, K = G. Raises ValueError for tables whose sizes
    do not fit each other, and for a successor that is no I-state.
    """
    num_z, _, out_degree = cell_logits.shape
    known = isinstance(successors, core.Tracer) or successors is None
    if not (
        head_logits.shape[:2] == cell_logits.shape[:2]
        and (out_degree == num_z if successors is None else successors.shape == cell_logits.shape)
        and (known or np.all((np.asarray(successors) >= 0) & (np.asarray(successors) < num_z)))
    ):
        listed = [None if x is None else x.shape for x in (cell_logits, head_logits, successors)]
        raise ValueError(
            f"tables [G, O, K], [G, O, A] and successors [G, O, K] of I-states 0 to {num_z - 1}, "
            f"with K = G if there are none: {listed} do not fit"
        )
    if successors is None:
        successors = jnp.broadcast_to(jnp.arange(cell_logits.shape[2]), cell_logits.shape)
    memory = TableMemory(cell_logits, jnp.asarray(successors, int))  # of the dtype of actions
    return Kernel(Drawn(memory), TableHead(head_logits), Identity(), jnp.zeros((), int))


def random_controller(
    num_z: int,
    num_obs: int,
    num_actions: int,
    *,
    out_degree: int,
    std: Scalar = 0.0,
    hold: Scalar = 0.0,
    key: PRNGKeyArray,
) -> Kernel:
    """A controller with random successors, out of each (g, o) as many as `out_degree`.

    Logits are N(0, std²), by default all zero, as in Aberdeen & Baxter (2002). Their graph is
    sparse because a dense controller with zero logits has no gradient towards memory. With `hold`
    above zero each I-state is one of its own successors, and `hold` is added to the logit of that:
    what an I-state has been told lasts, for about e^hold / (out_degree - 1) steps, from the start.
    Raises ValueError as `random_successors` does.
    """
    graph_key, cell_key, head_key = jr.split(key, 3)
    successors = random_successors(num_z, num_obs, out_degree, loops=hold > 0, key=graph_key)
    stays = successors == jnp.arange(num_z)[:, None, None]
    return finite_kernel(
        std * jr.normal(cell_key, successors.shape) + hold * stays,
        std * jr.normal(head_key, (num_z, num_obs, num_actions)),
        successors,
    )


def random_successors(
    num_z: int,
    num_obs: int,
    out_degree: int,
    *,
    loops: bool | Bool[Array, ""] = False,
    key: PRNGKeyArray,
) -> Int[Array, "G O K"]:
    """For every (g, o) an independent uniform subset of the I-states, of `out_degree` members.

    With `loops` g itself is one of them, the first; then take an `out_degree` of 2 or more.

    Drawn again until the union over o is strongly connected and, where there are enough graphs for
    that, no two observations have the same one; after 1000 draws a random cycle is laid into the
    graph of observation 0. Raises ValueError for a number below 1 or an `out_degree` above `num_z`.
    """
    for name, value in (("num_z", num_z), ("num_obs", num_obs), ("out_degree", out_degree)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it has to be at least 1")
    if out_degree > num_z:
        raise ValueError(f"out_degree {out_degree} is more than the {num_z} I-states")
    if out_degree == num_z:
        return jnp.broadcast_to(jnp.arange(num_z), (num_z, num_obs, num_z))
    free = _log_binomial(num_z, out_degree), _log_binomial(num_z - 1, out_degree - 1)
    log_graphs = num_z * jnp.where(loops, free[1], free[0])  # of one observation
    distinct = 2 * math.log(num_obs) < log_graphs

    def draw(key):
        own = jnp.where(loops, 1, 0) * jnp.eye(num_z)[:, None]
        return lax.top_k(own + jr.uniform(key, (num_z, num_obs, num_z)), out_degree)[1]

    def unfit(state):
        return ~_is_fit(state[1], distinct) & (state[2] < 1000)

    def again(state):
        key, draw_key = jr.split(state[0])
        return key, draw(draw_key), state[2] + 1

    key, first_key, cycle_key = jr.split(key, 3)
    _, successors, _ = lax.while_loop(unfit, again, (key, draw(first_key), 1))
    order = jr.permutation(cycle_key, num_z).astype(successors.dtype)
    follower = jnp.zeros_like(order).at[order].set(jnp.roll(order, -1))
    row = successors[:, 0]
    found = row == follower[:, None]
    slot = jnp.where(found.any(1), jnp.argmax(found, 1), jnp.where(loops, 1, 0))
    cycle = successors.at[jnp.arange(num_z), 0, slot].set(follower)
    return jnp.where(_is_fit(successors, jnp.asarray(False)), successors, cycle)


class Tables(NamedTuple):
    """A finite-state controller written out at N observations."""

    omega: Float[Array, "N G K"]  # ω(h | g, o) of the successors
    successors: Int[Array, "N G K"]
    mu: Float[Array, "N G A"]  # μ(a | h, o)


def tables(kernel: Kernel, obs: Array) -> Tables:
    """ω and μ at the observations `[N, ...]` in every I-state; differentiable in the kernel."""
    memory, head = finite_memory(kernel), kernel.head
    z = jnp.arange(memory.num_z)
    at_every_z = lambda choice: jax.vmap(lambda o: jax.vmap(choice, (None, 0))(o, z))
    obs = jax.vmap(kernel.normalizer)(obs)
    step, act = at_every_z(memory)(obs), at_every_z(head)(obs)
    return Tables(jax.nn.softmax(step.logits), _successors(step), jax.nn.softmax(act.logits))


def transitions(table: Tables) -> Float[Array, "N G G"]:
    """ω(h | g, o) of every h, zero for those that are no successors."""
    num_z = table.omega.shape[1]
    every = jax.nn.one_hot(table.successors, num_z, dtype=table.omega.dtype)
    return jnp.einsum("ogk,ogkh->ogh", table.omega, every)


def start_distribution(kernel: Kernel) -> Float[Array, " G"]:
    """The distribution of the I-state that opens an episode, which is certain."""
    return jax.nn.one_hot(kernel.z0, finite_memory(kernel).num_z)


def predict(
    alpha: Float[Array, " G"], omega: Float[Array, "G K"], successors: Int[Array, "G K"]
) -> Float[Array, " G"]:
    """Σ_g α(g) ω(h | g, o): the distribution of the next I-state, for α that of the present one."""
    return jnp.zeros_like(alpha).at[successors].add(alpha[:, None] * omega)


class ExpectedIState(Location):
    """The distribution of the I-state given the observations alone, moved by `predict`."""

    memory: FiniteMemory

    def __call__(self, obs: Array, z: Float[Array, " G"]) -> Float[Array, " G"]:
        choice = jax.vmap(self.memory, (None, 0))(obs, jnp.arange(len(z)))
        return predict(z, jax.nn.softmax(choice.logits), _successors(choice))


class MixtureHead(eqx.Module):
    """Σ_h z(h) μ(a | h, o)."""

    head: Callable[..., Categorical]

    def __call__(self, obs: Array, z_next: Float[Array, " G"]) -> Categorical:
        choice = jax.vmap(self.head, (None, 0))(obs, jnp.arange(len(z_next)))
        p = z_next @ jax.nn.softmax(choice.logits)
        some = p > 0  # else the gradient of log 0 makes all others nan
        return Categorical(jnp.where(some, jnp.log(jnp.where(some, p, 1)), -jnp.inf))


def expected_kernel(kernel: Kernel) -> Kernel:
    """The policy of Exp-GPOMDP by observations, whose z is the distribution of the I-state.

    It draws actions independently, where the controller's depend on each other by way of the
    I-state: another policy, with another average reward.
    """
    head: Any = kernel.head
    return Kernel(
        Computed(ExpectedIState(finite_memory(kernel))),
        MixtureHead(head),
        kernel.normalizer,
        start_distribution(kernel),
    )


def noise_free(kernel: Kernel, num_obs: int) -> Kernel:
    """The table controller that always takes the most probable successor and action."""
    omega, successors, mu = tables(kernel, jnp.arange(num_obs))
    certain = lambda p: jnp.where(jax.nn.one_hot(jnp.argmax(p, -1), p.shape[-1]) > 0, 0.0, -jnp.inf)
    swap = lambda x: jnp.swapaxes(x, 0, 1)
    hard = finite_kernel(swap(certain(omega)), swap(certain(mu)), swap(successors))
    return eqx.tree_at(lambda k: k.z0, hard, kernel.z0)


def finite_memory(kernel: Kernel) -> FiniteMemory:
    """ω of a finite-state controller. Raises TypeError for another kernel."""
    memory = kernel.cell.distribution if isinstance(kernel.cell, Drawn) else kernel.cell
    if not isinstance(memory, FiniteMemory):
        raise TypeError(f"a finite-state controller is needed; this cell is {type(memory)}")
    return memory


def integer(obs: Array) -> Array:
    """The integer of an observation: its value, or the position of its largest entry."""
    return obs if obs.ndim == 0 else jnp.argmax(obs)


def _successors(choice: Categorical) -> Int[Array, "..."]:
    if choice.support is not None:
        return choice.support
    return jnp.broadcast_to(jnp.arange(choice.logits.shape[-1]), choice.logits.shape)


def _is_fit(successors: Int[Array, "G O K"], distinct: Bool[Array, ""]) -> Bool[Array, ""]:
    """Is the union graph strongly connected, and, if `distinct`, has each observation its own?"""
    num_z = len(successors)
    mask = jax.nn.one_hot(successors, num_z).sum(2) > 0  # [G, O, G]
    reach = jnp.any(mask, 1) | jnp.eye(num_z, dtype=bool)
    for _ in range((num_z - 1).bit_length()):
        reach = jnp.matmul(reach.astype(jnp.float32), reach.astype(jnp.float32)) > 0
    code = jr.normal(jr.key(0), mask.shape[::2])  # a random number tells graphs apart
    code = jnp.sort(jnp.einsum("goh,gh->o", mask.astype(code.dtype), code))
    return reach.all() & (~distinct | jnp.all(jnp.diff(code) > 1e-6))


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
