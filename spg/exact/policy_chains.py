"""Products with the chains of many deterministic policies of a sparse world, all at once.

The policies share the successors of an action, so x has a row for each state and, in it, a number
for each policy: one entry of P(s' | s, a) serves a row, several numbers at a time. Policies that
take another action in s are masked; that costs A times the multiplications. The transpose gathers
as well, from lists of the predecessors of each state.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from spg.worlds.models import SparsePOMDP

WIDTH = 8  # entries of a list, whose sum is one pass over the rows of x
BLOCK = 1024  # lists whose sums stay in the cache until they are added up by state


def products(pomdp: SparsePOMDP, action: Int[Array, "S N"]) -> tuple[Callable, Callable]:
    """P_D x_D and x_D P_D of every policy D, `[S, N]`, which takes `action[s, D]` in s."""
    each = jnp.arange(pomdp.num_actions)
    successors = each.repeat(-(-pomdp.successor.shape[2] // WIDTH)), *_successors(pomdp)
    num_blocks, *predecessors = _predecessors(pomdp)

    def expect(x):
        def add(y, lists):
            a, index, probability = lists
            return y + jnp.where(action == a, _weighted(index, probability, x), 0), None

        return lax.scan(add, jnp.zeros_like(x), successors)[0]

    def push(x):
        mass = jnp.where(action[:, None] == each[:, None], x[:, None], 0).reshape(-1, x.shape[1])

        def add(i, y):
            owner, index, probability = (lists[i] for lists in predecessors)
            part = _weighted(index, probability, mass)
            return y.at[owner].add(part, indices_are_sorted=True, mode="promise_in_bounds")

        return lax.fori_loop(0, num_blocks, add, jnp.zeros_like(x))

    return expect, push


def _successors(pomdp: SparsePOMDP) -> tuple[Int[Array, "C W S"], Float[Array, "C W S"]]:
    """The successors of each state in lists, those of one action after those of another."""
    num_states, _, most = pomdp.successor.shape

    def lists(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -most % WIDTH)))
        return x.reshape(num_states, -1, WIDTH).transpose(1, 2, 0)

    return lists(pomdp.successor), lists(pomdp.probability)


def _predecessors(
    pomdp: SparsePOMDP,
) -> tuple[Int[Array, ""], Int[Array, "B R"], Int[Array, "B W R"], Float[Array, "B W R"]]:
    """How many blocks of lists are in use; the state s' of each list, its pairs sA + a, P(s'|s, a).

    A state has as many lists as its predecessors need; what lies behind has probability 0.
    """
    num_states, _, most = pomdp.successor.shape
    probability, size = pomdp.probability.ravel(), pomdp.probability.size
    target = jnp.where(probability > 0, pomdp.successor.ravel(), num_states)
    order = jnp.argsort(target)
    count = jnp.zeros(num_states, int).at[target].add(1, mode="drop")
    needed = -(-count // WIDTH)
    num_blocks = -(-(size // WIDTH + num_states) // BLOCK)
    owner = jnp.arange(num_states).repeat(needed, total_repeat_length=num_blocks * BLOCK)
    nth = jnp.arange(num_blocks * BLOCK) - (jnp.cumsum(needed) - needed)[owner]
    place = WIDTH * nth + jnp.arange(WIDTH)[:, None]  # among the predecessors of the state
    entry = order[jnp.minimum((jnp.cumsum(count) - count)[owner] + place, size - 1)]
    weight = jnp.where(place < count[owner], probability[entry], 0)
    blocks = lambda x: x.reshape(WIDTH, num_blocks, BLOCK).swapaxes(0, 1)
    pairs = (entry // most).astype(pomdp.successor.dtype)
    return -(-needed.sum() // BLOCK), owner.reshape(-1, BLOCK), blocks(pairs), blocks(weight)


def _weighted(
    index: Int[Array, "W R"], weight: Float[Array, "W R"], x: Float[Array, "T N"]
) -> Float[Array, "R N"]:
    """Σ_i weight[i, r] x[index[i, r]], written out, so that XLA stores no term."""
    rows = [x.at[i].get(mode="promise_in_bounds") for i in index]
    return sum(
        (w[:, None] * row for w, row in zip(weight, rows, strict=True)), jnp.zeros((), x.dtype)
    )
