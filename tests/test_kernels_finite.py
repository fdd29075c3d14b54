import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import make_kernel
from scipy.sparse import csgraph

from spg.kernels.finite import (
    Tables,
    expected_kernel,
    finite_kernel,
    noise_free,
    random_controller,
    random_successors,
    start_distribution,
    tables,
)

pytestmark = pytest.mark.usefixtures("float64")


def masks(successors):
    """[G, O, G], whether h may follow (g, o)."""
    mask = np.zeros((*successors.shape[:2], len(successors)), bool)
    np.put_along_axis(mask, np.asarray(successors), True, -1)
    return mask


@pytest.mark.parametrize(
    ("num_z", "num_obs", "out_degree"), [(4, 3, 2), (20, 11, 3), (5, 2, 1), (2, 3, 2), (1, 3, 1)]
)
def test_random_graphs_are_connected_and_tell_observations_apart(num_z, num_obs, out_degree):
    draw = jax.jit(jax.vmap(lambda key: random_successors(num_z, num_obs, out_degree, key=key)))
    for successors in draw(jr.split(jr.key(0), 20)):
        mask = masks(successors)
        assert (mask.sum(-1) == out_degree).all()  # no successor twice
        count, _ = csgraph.connected_components(mask.any(1), connection="strong")
        assert count == 1
        if 1 < out_degree < num_z:
            for o, p in itertools.combinations(range(num_obs), 2):
                assert (mask[:, o] != mask[:, p]).any()


@pytest.mark.slow
def test_every_successor_is_equally_likely():
    draw = jax.jit(jax.vmap(lambda key: random_successors(6, 4, 2, key=key)))
    mask = np.mean([masks(s) for s in draw(jr.split(jr.key(0), 500))], 0)
    error = np.sqrt(1 / 3 * 2 / 3 / 500)
    assert np.abs(mask - 1 / 3).max() < 4.5 * error  # the largest of 144


def test_a_graph_that_chance_does_not_connect_gets_a_cycle():
    """One successor of each of 12 I-states, one observation: once in 10⁵ draws connected."""
    successors = jax.jit(lambda key: random_successors(12, 1, 1, key=key))(jr.key(0))
    count, _ = csgraph.connected_components(masks(successors)[:, 0], connection="strong")
    assert count == 1


@pytest.mark.slow
def test_istates_that_hold_are_their_own_successors():
    kernel = random_controller(5, 3, 2, out_degree=3, hold=4.0, key=jr.key(0))
    table = tables(kernel, jnp.arange(3))
    mask = masks(kernel.cell.distribution.successors)
    assert (mask.sum(-1) == 3).all()
    count, _ = csgraph.connected_components(mask.any(1), connection="strong")
    assert count == 1
    stays = table.successors == jnp.arange(5)[:, None]
    assert (stays.sum(-1) == 1).all()
    assert np.allclose(table.omega[stays], np.exp(4) / (np.exp(4) + 2))
    assert np.allclose(table.mu, 0.5)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((3, 2, 4), "out_degree 4 is more than the 3 I-states"),
        ((0, 2, 1), "num_z is 0"),
        ((3, 0, 1), "num_obs is 0"),
        ((3, 2, 0), "out_degree is 0"),
    ],
)
def test_impossible_graphs_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        random_successors(*numbers, key=jr.key(0))


def test_tables_are_the_laws():
    kernel = random_controller(4, 3, 2, out_degree=2, std=1.0, key=jr.key(0))
    table = eqx.filter_jit(tables)(kernel, jnp.arange(3))
    for o, g in np.ndindex(3, 4):
        cell = kernel.cell(jnp.array(o), jnp.array(g))
        for h in range(4):
            where = np.flatnonzero(table.successors[o, g] == h)
            assert np.allclose(jnp.exp(cell.log_prob(jnp.array(h))), table.omega[o, g, where].sum())
        head = kernel.head(jnp.array(o), jnp.array(g))
        assert np.allclose(table.mu[o, g], jax.nn.softmax(head.logits))
    with pytest.raises(TypeError, match="finite-state controller"):
        tables(make_kernel("gru", jr.key(0)), jnp.arange(3))


@pytest.mark.slow
def test_sampled_states_are_successors():
    kernel = random_controller(5, 2, 2, out_degree=2, std=1.0, key=jr.key(0))
    law = kernel.cell(jnp.array(1), jnp.array(3))
    draws = jax.jit(jax.vmap(lambda key: law.sample(key=key)))(jr.split(jr.key(1), 400))
    assert set(draws.tolist()) == set(kernel.cell.distribution.successors[3, 1].tolist())
    h = law.mode()
    assert np.allclose(jnp.mean(draws == h), jnp.exp(law.log_prob(h)), atol=0.1)


def test_noise_free_takes_the_most_probable():
    kernel = random_controller(4, 3, 2, out_degree=2, std=1.0, key=jr.key(0))
    kernel = eqx.tree_at(lambda k: k.z0, kernel, jnp.array(2))
    hard = noise_free(kernel, 3)
    assert hard.z0 == 2
    table = tables(hard, jnp.arange(3))
    assert set(np.unique(table.omega)) == set(np.unique(table.mu)) == {0.0, 1.0}
    for o, g in itertools.product(jnp.arange(3), jnp.arange(4)):
        assert hard.cell(o, g).mode() == kernel.cell(o, g).mode()
        assert hard.head(o, g).mode() == kernel.head(o, g).mode()


def test_the_expected_kernel_moves_the_law_of_the_istate():
    kernel = random_controller(4, 3, 2, out_degree=2, std=1.0, key=jr.key(0))
    other, o = expected_kernel(kernel), jnp.array(1)
    assert np.array_equal(other.z0, start_distribution(kernel))
    table = Tables(*(x[1] for x in tables(kernel, jnp.arange(3))))
    alpha = jnp.array([0.1, 0.2, 0.3, 0.4])
    expected = np.zeros(4)
    for g in range(4):
        for i in range(2):
            expected[table.successors[g, i]] += alpha[g] * table.omega[g, i]
    z = other.cell(o, alpha).loc
    assert np.allclose(z, expected)
    assert np.allclose(jax.nn.softmax(other.head(o, z).logits), expected @ table.mu)


def test_a_dense_controller_may_go_everywhere():
    kernel = finite_kernel(jnp.zeros((3, 2, 3)), jnp.zeros((3, 2, 2)))
    assert masks(kernel.cell.distribution.successors).all()


def test_actions_that_are_never_taken_leave_the_gradient_finite():
    """In single precision the softmax of -110 is 0, and its logarithm has no slope."""
    obs, z = jnp.array(0), jnp.full(2, 0.5, np.float32)

    @jax.jit
    def gradient(gap):
        head = jnp.full((2, 1, 2), -gap).at[..., 0].set(0)
        kernel = finite_kernel(jnp.zeros((2, 1, 2), np.float32), head)
        loss = lambda kernel: expected_kernel(kernel).head(obs, z).log_prob(jnp.array(0))
        return jax.tree.leaves(eqx.filter(eqx.filter_grad(loss)(kernel), eqx.is_inexact_array))

    assert all(np.isfinite(x).all() for x in gradient(jnp.float32(110)))
    assert any(np.any(x) for x in gradient(jnp.float32(2)))
