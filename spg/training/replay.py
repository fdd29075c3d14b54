"""A replay buffer as arrays: a ring of steps, one column for each environment."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from spg.training import devices
from spg.types import Transition


class Ring(NamedTuple):
    """The last steps of N environments that run side by side."""

    steps: Transition  # [capacity, N, ...]
    head: Int[Array, ""]  # the row that is written next
    size: Int[Array, ""]  # how many rows hold steps

    @property
    def capacity(self) -> int:
        """Rows."""
        return self.steps.reward.shape[0]


class Place(NamedTuple):
    """Where S segments of L consecutive steps stand in a ring."""

    row: Int[Array, "S L"]
    column: Int[Array, "S 1"]
    newest: Bool[Array, "S L"]  # the row that nothing follows yet


def empty(like: Transition, capacity: int) -> Ring:
    """A ring of `capacity` rows for the steps that `like` has one row of, `[N, ...]`."""
    room = lambda x: jnp.zeros((capacity, *x.shape), x.dtype)
    return Ring(jax.tree.map(room, like), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def write(ring: Ring, rows: Transition) -> Ring:
    """The ring with K more rows, `[K, N, ...]`, in place of the oldest; K divides the capacity.

    Raises ValueError if it does not: rows would be written across the end of the arrays.
    """
    count = rows.reward.shape[0]
    if ring.capacity % count:
        raise ValueError(f"{count} rows at a time do not divide a ring of {ring.capacity}")
    put = lambda old, new: lax.dynamic_update_slice_in_dim(old, new, ring.head, 0)
    steps = jax.tree.map(put, ring.steps, rows)
    size = jnp.minimum(ring.size + count, ring.capacity)
    return Ring(steps, (ring.head + count) % ring.capacity, size)


def places(ring: Ring, *, num_segments: int, length: int, key: PRNGKeyArray) -> Place:
    """S segments of L steps, none of which shares a step with another.

    Uniform over the segments that start at every L-th row, counted back from a row that is drawn,
    and one from each of S equal parts of these. No segment crosses the head. The ring has to hold
    S segments, (size - L + 1) // L · N >= S: `holds` tells.
    """
    offset_key, shift_key, part_key = jr.split(key, 3)
    num_columns = ring.steps.reward.shape[1]
    offset = jr.randint(offset_key, (), 0, length)
    count = (ring.size - offset) // length * num_columns
    width = count // num_segments
    part = jnp.arange(num_segments) * width + jr.randint(part_key, (num_segments,), 0, width)
    index = (jr.randint(shift_key, (), 0, count) + part) % count
    youngest = offset + length * (index // num_columns)
    age = youngest[:, None] + jnp.arange(length)[::-1]
    row = (ring.head - 1 - age) % ring.capacity
    return Place(row, (index % num_columns)[:, None], age == 0)


def holds(size: int, num_columns: int, *, num_segments: int, length: int) -> bool:
    """Whether `places` finds that many segments in `size` rows."""
    return (size - length + 1) // length * num_columns >= num_segments


def take(ring: Ring, place: Place) -> Transition:
    """The steps at these places, `[S, L, ...]`."""
    return devices.take(ring.steps, (place.row, place.column))


def refresh(ring: Ring, place: Place, z_next: PyTree, *, share: float = 1.0) -> Ring:
    """The ring with z' at these places as it is now, `[S, L, ...]`, Al-Hafez et al. (2024).

        z'_t <- (1 - share) z'_t + share z_next_t,   and z_{t+1} <- the same

    unless step t+1 opens an episode or has not been made yet.
    """
    steps, column = ring.steps, place.column
    after = (place.row + 1) % ring.capacity
    apart = place.newest | devices.everywhere(steps.first[after, column])
    nowhere = ring.capacity + jnp.arange(apart.size).reshape(apart.shape)  # each its own
    after = jnp.where(apart, nowhere, after)

    def put(row: Array) -> Callable[[Array, Array], Array]:
        return lambda old, new: old.at[row, column].set(new, mode="drop", unique_indices=True)

    # old values count by 0 at a share of 1, and yet have to be read first: else XLA may read them
    # for another purpose after they are overwritten, and copies the whole ring to be able to
    stale = take(ring, place).z_next
    z_next = jax.tree.map(lambda old, new: (1 - share) * old + share * new, stale, z_next)
    z_next = devices.everywhere(z_next)
    z = jax.tree.map(put(after), steps.z, z_next)
    z_next = jax.tree.map(put(place.row), steps.z_next, z_next)
    return ring._replace(steps=steps._replace(z=z, z_next=z_next))
