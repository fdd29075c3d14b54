import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from spg.scans import linear_scan, shuffle, split_segments

pytestmark = pytest.mark.usefixtures("float64")

FORMS = ["scalar", "diagonal", "dense"]


def problem(form, num_steps, size, seed):
    """decay, u, init, with about a third of the steps reset."""
    rng = np.random.default_rng(seed)
    shape = {"scalar": (), "diagonal": (size,), "dense": (size, size)}[form]
    decay = rng.normal(size=(num_steps, *shape))
    decay[rng.random(num_steps) < 0.3] = 0
    return decay, rng.normal(size=(num_steps, size)), rng.normal(size=size)


def loop(decay, u, init, reverse):
    x, out = init, np.zeros_like(u)
    for t in reversed(range(len(u))) if reverse else range(len(u)):
        x = (decay[t] @ x if decay[t].ndim == 2 else decay[t] * x) + u[t]
        out[t] = x
    return out


@pytest.mark.parametrize("associative", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=6, deadline=None)
@given(
    num_steps=st.sampled_from([1, 2, 7]),
    size=st.just(2),
    with_init=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_linear_scan_solves_the_recurrence(
    form, reverse, associative, num_steps, size, with_init, seed
):
    decay, u, init = problem(form, num_steps, size, seed)
    truth = loop(decay, u, init if with_init else np.zeros(size), reverse)
    given_init = jnp.asarray(init) if with_init else None
    x = linear_scan(
        jnp.asarray(decay), jnp.asarray(u), given_init, reverse=reverse, associative=associative
    )
    assert np.allclose(x, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("associative", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_linear_scan_has_the_gradients_of_finite_differences(form, reverse, associative):
    inputs = jax.tree.map(jnp.asarray, problem(form, 5, 2, seed=1))

    def solve(*inputs):  # finite differences hand over numpy arrays
        inputs = map(jnp.asarray, inputs)
        return linear_scan(*inputs, reverse=reverse, associative=associative)

    check_grads(solve, inputs, order=1, rtol=1e-6)


@pytest.mark.parametrize("associative", [False, True])
def test_linear_scan_promotes_integer_inputs(associative):
    decay, u, init = jnp.full(3, 0.5), jnp.array([2, 0, 1]), jnp.array(1)
    x = linear_scan(decay, u, init, associative=associative)
    assert np.array_equal(x, [2.5, 1.25, 1.625])


def test_linear_scan_agrees_with_itself_under_jit_and_vmap():
    inputs = [problem("diagonal", 6, 3, seed) for seed in range(4)]
    decay, u, init = (jnp.stack([jnp.asarray(x[i]) for x in inputs]) for i in range(3))
    plain = jnp.stack([linear_scan(*x) for x in zip(decay, u, init, strict=True)])
    assert np.allclose(jax.jit(jax.vmap(linear_scan))(decay, u, init), plain, rtol=1e-14)


@pytest.mark.parametrize("segment_length", [1, 2, 3, 6])
def test_segments_are_consecutive(segment_length):
    tree = {"a": jnp.arange(6), "b": jnp.arange(12).reshape(6, 2)}
    segments = split_segments(tree, segment_length)
    assert segments["b"].shape == (6 // segment_length, segment_length, 2)
    assert all(map(np.array_equal, jax.tree.leaves(tree), (
        segments["a"].reshape(-1), segments["b"].reshape(-1, 2)
    )))  # fmt: skip
    assert np.array_equal(segments["a"][-1], np.arange(6)[-segment_length:])


@pytest.mark.parametrize("segment_length", [0, 4, 7])
def test_segments_that_do_not_divide_are_refused_with_what_would(segment_length):
    with pytest.raises(ValueError, match="does not divide num_steps 6; 1, 2, 3, 6 would"):
        split_segments(jnp.arange(6), segment_length)


def test_shuffle_is_a_permutation_and_every_order_is_as_likely():
    keys = jr.split(jr.key(0), 24 * 400)
    orders = np.asarray(jax.vmap(lambda k: shuffle(4, key=k))(keys))
    assert (np.sort(orders, 1) == np.arange(4)).all()
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert (np.abs(counts - 400) < 4 * np.sqrt(400)).all()
    large = shuffle(10_240, key=keys[0])
    assert (np.sort(large) == np.arange(10_240)).all()
