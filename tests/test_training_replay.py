"""The ring against a deque, segments against their probabilities, a refresh against a loop."""

from collections import deque
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close
from hypothesis import given, settings
from hypothesis import strategies as st

from spg.training import replay
from spg.types import Transition

pytestmark = pytest.mark.usefixtures("float64")


def make_rows(start, count, num_columns, *, first=0.3):
    """Rows `start`, `start + 1`, ... of a stream, in which z follows z' but where an episode opens.

    The internal state is a pytree, with a complex leaf.
    """
    number = np.arange(start, start + count)[:, None] * num_columns + np.arange(num_columns)
    opens = np.random.default_rng(0).random((1000, num_columns)) < first
    opens = opens[start : start + count]
    after = {"a": np.stack([number + 0.1, number + 0.2], -1), "b": number + 0.3j}
    before = {k: np.where(opens.reshape(*opens.shape, *[1] * (x.ndim - 2)), 0, x - num_columns)
              for k, x in after.items()}  # fmt: skip
    no = np.zeros(opens.shape, bool)
    reward = number.astype(float)
    row: Any = (reward[..., None], before, number, after, reward, opens, no, no, -reward)
    return Transition(*jax.tree.map(jnp.asarray, row))


def fill(capacity, written, num_columns=3, **words):
    """A ring into which the rows 0 to `written` - 1 of the stream went, one by one."""
    like = jax.tree.map(lambda x: x[0], make_rows(0, 1, num_columns))
    rows = make_rows(0, written, num_columns, **words)
    return _fill(like, rows, capacity)


@partial(jax.jit, static_argnums=2)
def _fill(like, rows, capacity):
    put = lambda ring, row: (replay.write(ring, jax.tree.map(lambda x: x[None], row)), None)
    return jax.lax.scan(put, replay.empty(like, capacity), rows)[0]


write, take = jax.jit(replay.write), jax.jit(replay.take)
refresh = jax.jit(replay.refresh, static_argnames="share")
places = jax.jit(replay.places, static_argnames=("num_segments", "length"))


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 2), multiple=st.sampled_from([1, 3]), writes=st.integers(0, 8))
def test_the_ring_is_a_deque(count, multiple, writes):
    capacity, model = count * multiple, deque(maxlen=count * multiple)
    with jax.enable_x64(True):
        ring = replay.empty(jax.tree.map(lambda x: x[0], make_rows(0, 1, 2)), capacity)
        for i in range(writes):
            rows = make_rows(i * count, count, 2)
            ring = write(ring, rows)
            model.extend(jax.tree.map(lambda x, j=j: np.asarray(x[j]), rows) for j in range(count))
            assert (ring.capacity, int(ring.size)) == (capacity, len(model))
            steps = jax.tree.map(np.asarray, ring.steps)
            for age, row in enumerate(reversed(model)):
                here = (int(ring.head) - 1 - age) % capacity
                jax.tree.map(np.testing.assert_array_equal, row, _at(steps, here))
    assert int(ring.head) == writes * count % capacity


def _at(steps, *index):
    return jax.tree.map(lambda x: x[index], steps)


def test_rows_that_would_be_written_across_the_end_are_refused():
    with pytest.raises(ValueError, match="4 rows at a time do not divide a ring of 6"):
        replay.write(fill(6, 3), make_rows(3, 4, 3))


RINGS = [  # capacity, rows written, columns, S, L
    (6, 4, 3, 2, 1),
    (6, 9, 2, 12, 1),  # every step of the ring
    (8, 8, 1, 1, 3),
    (8, 13, 3, 4, 3),
    (7, 5, 2, 2, 3),  # at the limit of `holds`
    (5, 11, 2, 2, 5),  # one segment for each column, and one offset at which it is there
]


@pytest.mark.parametrize(("capacity", "written", "columns", "count", "length"), RINGS[:-1])
def test_segments_are_disjoint_consecutive_and_uniform(capacity, written, columns, count, length):
    """For each of the L offsets alike, each segment that starts at every L-th row is."""
    ring, num_keys = fill(capacity, written, columns), 4000
    size = min(capacity, written)
    draw = lambda key: replay.places(ring, num_segments=count, length=length, key=key)
    place = jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(jr.split(jr.key(0), num_keys)))
    age = (int(ring.head) - 1 - place.row) % capacity
    assert age.max() < size
    assert np.array_equal(age - age[..., -1:], np.broadcast_to(np.arange(length)[::-1], age.shape))
    assert np.array_equal(place.newest, age == 0)
    step = (place.row * columns + place.column).reshape(num_keys, -1)
    assert all(len(np.unique(x)) == count * length for x in step)  # none shared, none twice
    found = np.zeros((size, columns))
    np.add.at(found, (age[..., -1], place.column[..., 0]), 1 / num_keys)
    for youngest in range(size - length + 1):
        offset = youngest % length
        starts = [
            x for x in range(offset, size) if (x - offset) % length == 0 and x + length <= size
        ]
        chance = count / (length * len(starts) * columns)
        error = np.sqrt(chance * (1 - chance) / num_keys)
        assert np.all(np.abs(found[youngest] - chance) <= 4 * error + 1e-12)
    assert not found[size - length + 1 :].any()


def test_holds_is_whether_every_offset_has_the_segments():
    for size, columns, count, length in np.ndindex(14, 4, 10, 5):
        columns, count, length = columns + 1, count + 1, length + 1
        fewest = min(
            sum(x + length <= size for x in range(offset, size, length)) * columns
            for offset in range(length)
        )
        words = {"num_segments": count, "length": length}
        assert replay.holds(size, columns, **words) == (fewest >= count)
    for capacity, written, columns, count, length in RINGS:
        enough = replay.holds(min(capacity, written), columns, num_segments=count, length=length)
        assert enough == (length < 5)


def test_steps_are_taken_from_their_places():
    ring = fill(6, 9, 2)
    place = places(ring, num_segments=3, length=2, key=jr.key(1))
    taken = take(ring, place)
    number = np.asarray(taken.action)  # of the stream: 2 rows x columns + column
    assert np.array_equal(number % 2, np.broadcast_to(place.column, (3, 2)))
    assert np.array_equal(number[:, 1] - number[:, 0], [2, 2, 2])
    assert number.min() >= 2 * (9 - 6)
    assert np.array_equal(taken.z_next["b"], number + 0.3j)
    follows = ~np.asarray(taken.first[:, 1])
    assert np.allclose(taken.z["a"][follows, 1], taken.z_next["a"][follows, 0], rtol=1e-12)


def slow_refresh(ring, place, z_next, share):
    """Step by step."""
    steps, fresh = (jax.tree.map(np.array, x) for x in (ring.steps, z_next))
    capacity, head = ring.capacity, int(ring.head)
    row, column = np.asarray(place.row), np.asarray(place.column)
    linked = 0
    for s, i in np.ndindex(row.shape):
        here, c = row[s, i], column[s, 0]
        after = (here + 1) % capacity
        goes_on = after != head and not steps.first[after, c]
        for name in fresh:
            mixed = (1 - share) * steps.z_next[name][here, c] + share * fresh[name][s, i]
            steps.z_next[name][here, c] = mixed
            if goes_on:
                steps.z[name][after, c] = mixed
        linked += goes_on
    return ring._replace(steps=steps), linked


REFRESHES = [  # capacity, rows written, S, L
    (8, 8, 24, 1),  # every step: the newest row and every opening among them
    (8, 13, 24, 1),  # and across the end of the arrays
    (9, 14, 6, 3),
    (9, 5, 3, 3),
]


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(("capacity", "written", "count", "length"), REFRESHES)
def test_refresh_is_that_of_a_loop(capacity, written, count, length, share):
    """z' and the z of the step that follows, but for openings and the row that nothing follows."""
    ring = fill(capacity, written)
    draw = partial(places, ring, num_segments=count, length=length)
    linked = 0
    for seed in range(6):
        place = draw(key=jr.key(seed))
        z_next = jax.tree.map(
            lambda x: jnp.asarray(-100.0 - np.arange(x.size).reshape(x.shape), x.dtype),
            take(ring, place).z_next,
        )
        truth, links = slow_refresh(ring, place, z_next, share)
        linked += links
        new = refresh(ring, place, z_next, share=share)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-14), new, truth)
        for name in ("obs", "action", "reward", "first", "terminated", "truncated", "final_obs"):
            np.testing.assert_array_equal(getattr(new.steps, name), getattr(ring.steps, name))
    assert 0 < linked < 6 * count * length


def test_an_episode_of_one_row_and_the_last_row_before_the_head_are_linked_to_nothing():
    ring = fill(4, 6, 1, first=1.1)  # every step opens an episode
    place = places(ring, num_segments=4, length=1, key=jr.key(0))
    new = refresh(ring, place, jax.tree.map(jnp.zeros_like, take(ring, place).z_next))
    jax.tree.map(np.testing.assert_array_equal, new.steps.z, ring.steps.z)
    assert not any(x.any() for x in jax.tree.leaves(new.steps.z_next))


def learn(ring, rows, key):
    """Write, take, refresh; how far z' moved needs old values after the new ones are known."""
    ring = replay.write(ring, rows)
    place = replay.places(ring, num_segments=4, length=2, key=key)
    steps = replay.take(ring, place)
    fresh = jax.tree.map(lambda z: jnp.tanh(0.01 * z), steps.z)
    ring = replay.refresh(ring, place, fresh)
    apart = jax.tree.map(lambda a, b: jnp.abs(a - b).sum(), fresh, steps.z_next)
    return ring, apart["a"] + apart["b"]


@pytest.mark.slow
def test_rings_side_by_side_are_each_as_alone():
    rings = [fill(8, written, 2) for written in (6, 12)]
    rows, keys = [make_rows(20 + 2 * i, 2, 2) for i in range(2)], jr.split(jr.key(3))
    stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
    one = jax.jit(learn)
    plain = [one(*x) for x in zip(rings, rows, keys, strict=True)]
    batch = jax.tree.map(jnp.asarray, (stack(rings), stack(rows)))
    both = jax.jit(jax.vmap(learn))(*batch, keys)
    assert_trees_close(both, stack(plain), rtol=1e-14)
    assert np.array_equal(both[0].head, [x[0].head for x in plain])


def test_a_step_makes_no_copy_of_the_ring():
    """In the loop of a training: seeds vmapped, the ring donated."""

    def needs(capacity):
        row = jax.tree.map(lambda x: x[0], make_rows(0, 1, 16))
        rows = make_rows(0, 4, 16)

        def body(i, carry):
            ring, total = carry
            ring, apart = learn(ring, rows, jr.fold_in(jr.key(0), i))
            return ring, total + apart

        def train(ring, total, count):
            return jax.lax.fori_loop(0, count, body, (ring, total))

        rings = jax.eval_shape(
            lambda: jax.vmap(lambda _: replay.empty(row, capacity))(jnp.zeros(2))
        )
        total = jax.ShapeDtypeStruct((2,), float)
        train = jax.jit(jax.vmap(train, (0, 0, None)), donate_argnums=0)
        memory: Any = train.lower(rings, total, 3).compile().memory_analysis()
        assert memory.alias_size_in_bytes > capacity * 16 * 8
        return memory.temp_size_in_bytes

    assert needs(10_000) - needs(1_000) < 10_000
