import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from spg.scans import Method, linear_scan, over_steps, shuffle, side_by_side, split_segments

pytestmark = pytest.mark.usefixtures("float64")

FORMS = ["scalar", "diagonal", "dense"]
SIZES = {"scalar": 2, "diagonal": 4, "dense": 4}  # a step of few numbers is looped over otherwise
METHODS: list[Method] = ["sequential", "associative", "chunked"]
CALLS: list[tuple[Method, bool, bool]] = [
    (m, reverse, not reverse or m == "chunked") for m in METHODS for reverse in (False, True)
]


def problem(form, num_steps, size, seed, dtype=float):
    """decay, u, init, with about a third of the steps reset."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        x = rng.normal(size=(2, *shape))
        return x[0] + 1j * x[1] if dtype is complex else x[0]

    shape = {"scalar": (), "diagonal": (size,), "dense": (size, size)}[form]
    decay = normal(num_steps, *shape)
    decay[rng.random(num_steps) < 0.3] = 0
    return decay, normal(num_steps, size), normal(size)


def loop(decay, u, init, reverse):
    x, out = init, np.zeros_like(u)
    for t in reversed(range(len(u))) if reverse else range(len(u)):
        x = (decay[t] @ x if decay[t].ndim == 2 else decay[t] * x) + u[t]
        out[t] = x
    return out


@partial(jax.jit, static_argnames=("reverse", "method"))
def solve(decay, u, init, *, reverse=False, method="auto"):
    return linear_scan(decay, u, init, reverse=reverse, method=method)


@jax.jit
def every(decay, u, init):
    """By each method, against time or not, with a start and without."""
    return {
        (method, reverse, with_init): linear_scan(
            decay, u, init if with_init else None, reverse=reverse, method=method
        )
        for method, reverse, with_init in CALLS
    }


@pytest.mark.parametrize("num_steps", [1, 7])
@pytest.mark.parametrize("dtype", [float, complex])
@pytest.mark.parametrize("form", FORMS)
def test_linear_scan_solves_the_recurrence(form, dtype, num_steps):
    for seed in range(4):
        decay, u, init = problem(form, num_steps, SIZES[form], seed, dtype)
        for (_, reverse, with_init), x in every(decay, u, init).items():
            truth = loop(decay, u, init if with_init else 0 * init, reverse)
            assert np.allclose(x, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("reverse", "dtype"), [(False, float), (True, complex)])
@pytest.mark.parametrize("form", FORMS)
def test_linear_scan_has_the_gradients_of_a_plain_loop(form, reverse, dtype):
    """Cotangents and tangents of decay, inputs and start, under `vmap`; in complex numbers too."""
    batch = [problem(form, 5, SIZES[form], seed, dtype) for seed in range(3)]
    decay, u, init = (jnp.stack([jnp.asarray(x[i]) for x in batch]) for i in range(3))
    inputs, tangents = (decay, u, init), (jnp.cos(decay), jnp.sin(u), init**2)

    def plain(decay, u, init):
        def step(x, inputs):
            x = (inputs[0] @ x if form == "dense" else inputs[0] * x) + inputs[1]
            return x, x

        return lax.scan(step, init, (decay, u), reverse=reverse)[1]

    def derivatives(function):
        function = jax.vmap(function)
        x, pull = jax.vjp(function, *inputs)
        return x, pull(jnp.sin(u) + decay.mean()), jax.jvp(function, inputs, tangents)[1]

    def compare():
        solvers = [partial(linear_scan, reverse=reverse, method=method) for method in METHODS]
        return [derivatives(function) for function in (plain, *solvers)]

    truth, *found = jax.jit(compare)()
    for each in found:
        for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(truth), strict=True):
            assert np.allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", METHODS[:2])  # the third goes backward as the second does
def test_linear_scan_has_the_derivatives_of_finite_differences(method):
    """To second order, through a decay that is shared by the entries of u."""
    inputs = jax.tree.map(jnp.asarray, problem("scalar", 5, 2, seed=1))
    check_grads(jax.jit(partial(solve, method=method)), inputs, order=2, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("pair", itertools.product(range(3), repeat=2))
def test_linear_scan_has_second_derivatives_by_any_two_of_its_inputs(pair, method):
    inputs = tuple(map(jnp.asarray, problem("diagonal", 3, 2, seed=0)))

    def unrolled(decay, u, init):
        found = [init]
        for a, b in zip(decay, u, strict=True):
            found.append(a * found[-1] + b)
        return jnp.stack(found[1:])

    hessian = lambda f: jax.jit(
        jax.jacrev(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), pair[0]), pair[1])
    )(*inputs)
    truth, found = hessian(unrolled), hessian(partial(linear_scan, method=method))
    assert np.allclose(found, truth, rtol=1e-10, atol=1e-12)


def test_linear_scan_has_the_derivatives_by_any_of_its_inputs():
    inputs = tuple(map(jnp.asarray, problem("diagonal", 3, 4, seed=0)))
    subsets = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]

    def derivatives(some):
        def function(*chosen):
            full = dict(enumerate(inputs)) | dict(zip(some, chosen, strict=True))
            return linear_scan(*full.values())

        chosen = [inputs[i] for i in some]
        return jax.jacrev(function, range(len(some)))(*chosen), jax.jacfwd(
            function, range(len(some))
        )(*chosen)

    whole, *found = jax.jit(lambda: [derivatives(some) for some in [(0, 1, 2), *subsets]])()
    for some, (backward, forward) in zip(subsets, found, strict=True):
        for i, *both in zip(some, backward, forward, strict=True):
            assert all(np.allclose(x, whole[0][i], rtol=1e-12) for x in both)


def test_the_backward_pass_stores_the_decay_and_the_solution_alone():
    decay, u, init = map(jnp.asarray, problem("diagonal", 512, 4, seed=0))
    backward = lambda *inputs: jax.vjp(partial(linear_scan, method="sequential"), *inputs)[1]
    kept = jax.tree.leaves(jax.eval_shape(backward, decay, u, init))
    assert sum(x.size for x in kept) <= 2 * u.size + 2 * init.size


def test_mismatched_lengths_are_refused():
    with pytest.raises(ValueError, match="2 steps of decay, 3 of u"):
        inspect.unwrap(linear_scan)(jnp.ones(2), jnp.ones((3, 1)))  # without annotations


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_linear_scan_of_no_steps_is_empty(form, method):
    decay, u, init = map(jnp.asarray, problem(form, 0, 4, seed=0))
    assert linear_scan(decay, u, init, method=method).shape == (0, 4)
    assert linear_scan(decay, u, reverse=True, method=method).dtype == u.dtype


@pytest.mark.parametrize("method", METHODS)
def test_linear_scan_promotes_integer_inputs(method):
    decay, u, init = jnp.full(3, 0.5), jnp.array([2, 0, 1]), jnp.array(1)
    x = linear_scan(decay, u, init, method=method)
    assert np.array_equal(x, [2.5, 1.25, 1.625])


def test_linear_scan_agrees_with_itself_under_jit_and_vmap():
    inputs = [problem("diagonal", 6, 4, seed) for seed in range(4)]
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


@pytest.mark.parametrize("num_steps", [1, 3])
def test_over_steps_is_vmap(num_steps):
    f = lambda x, tree: {"sum": x @ tree[0] + tree[1], "first": x[0]}
    x, b = jnp.arange(4.0 * num_steps).reshape(num_steps, 4), jnp.arange(float(num_steps))
    weight = jr.normal(jr.key(0), (num_steps, 4, 2))
    found, expected = (m(f)(x, (weight, b)) for m in (over_steps, jax.vmap))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.parametrize("state", [float, complex])
def test_rows_side_by_side_come_apart_as_they_were(state):
    size = (5, 3, 2)
    tree = {
        "obs": jr.normal(jr.key(0), size), "z": jr.normal(jr.key(1), size, state),
        "reward": jnp.arange(5.0).astype(jnp.float32), "action": 2**31 - 1 - jnp.arange(5),
        "first": jnp.arange(5) > 2,
    }  # fmt: skip
    wide, apart = side_by_side(tree)
    assert [x.shape for x in jax.tree.leaves(wide)] == [(5, 13), (5,), (5,)]
    rows = jnp.array([3, 0, 3])
    found = jax.jit(lambda wide: apart(jax.tree.map(lambda x: x[rows], wide)))(wide)
    expected = jax.tree.map(lambda x: x[rows], tree)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype, found, expected))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.slow
def test_shuffle_is_a_permutation_and_every_order_is_as_likely():
    keys = jr.split(jr.key(0), 24 * 400)
    orders = np.asarray(jax.vmap(lambda k: shuffle(4, key=k))(keys))
    assert (np.sort(orders, 1) == np.arange(4)).all()
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert (np.abs(counts - 400) < 4 * np.sqrt(400)).all()
    large = shuffle(10_240, key=keys[0])
    assert (np.sort(large) == np.arange(10_240)).all()
