"""Linear attention and the delta rule: memories whose state is a matrix."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_cell_scores_what_it_drew, assert_trees_close, jitter
from jax.test_util import check_grads

from spg import envs
from spg.distributions import Categorical
from spg.kernels.cells import Location
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.heads import CategoricalHead
from spg.kernels.matrix import (
    DeltaRule,
    Hybrid,
    LinearAttention,
    QueryHead,
    Retention,
    cut,
    matrix_shape,
    outer,
    read,
)
from spg.kernels.stack import Stack

pytestmark = pytest.mark.usefixtures("float64")

OBS, HEADS, KEY, VALUE, STEPS = 5, 2, 3, 2, 7
Z = HEADS * KEY * VALUE
UNITS = {"attention": LinearAttention, "delta": DeltaRule, "retention": Retention}
CELLS = UNITS | {"hybrid": Hybrid}
sigmoid = lambda x: 1 / (1 + np.exp(-x))
call = eqx.filter_jit(lambda unit, obs, z: unit(obs, z))
unroll = eqx.filter_jit(lambda unit, *inputs: unit.unroll(*inputs))


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("values", [2, 8])
def test_small_and_large_matrices_are_written_read_and_cut_alike(size, values):
    k, v, state = (
        np.random.default_rng(0).normal(size=(HEADS, *shape))
        for shape in ((size,), (values,), (size, values))
    )
    k *= np.array([[0.5], [2.0]]) / np.linalg.norm(k, axis=1, keepdims=True)
    truth = k * np.array([[1.0], [0.5]])
    close = lambda x, y: jnp.allclose(x, y, rtol=1e-12)
    assert close(outer(jnp.asarray(k), jnp.asarray(v)), np.einsum("hk,hv->hkv", k, v))
    assert close(read(jnp.asarray(state), jnp.asarray(k)), np.einsum("hkv,hk->hv", state, k))
    assert close(cut(jnp.asarray(k)), truth)


@eqx.filter_jit
def make(name, method: Any = "auto"):
    unit = CELLS[name](OBS, Z, num_heads=HEADS, key_size=KEY, method=method, key=jr.key(0))
    return jitter(unit, jr.key(1), scale=0.2)


def data():
    obs, z, z0 = (jr.normal(jr.key(i), s) for i, s in enumerate([(STEPS, OBS), (Z,), (Z,)], 2))
    return obs, z, jnp.array([False, False, True, True, False, False, True]), z0


def parts(unit, obs):
    """Decays, gates, keys and values of each head in NumPy."""
    x = np.asarray(unit.inputs.weight @ obs + unit.inputs.bias)
    gates, rest = np.split(x, [HEADS * unit.num_gates])
    keys, values = np.split(rest, [HEADS * KEY])
    keys = keys.reshape(HEADS, KEY)
    keys = keys / np.maximum(1, np.linalg.norm(keys, axis=1))[:, None]
    gates = gates.reshape(unit.num_gates, HEADS) if unit.num_gates else unit.rate[None]
    return sigmoid(-gates[0]), sigmoid(gates[-1]), keys, values.reshape(HEADS, VALUE)


@pytest.mark.parametrize("name", ["attention", "retention"])
def test_linear_attention_is_the_sum_of_decayed_outer_products(name):
    """S_t = Σ_i (Π_{i<j≤t} a_j) √(1 - a_i²) k_i v_iᵀ, and the decayed start."""
    unit, (obs, z, _, z0) = make(name), data()
    found = unroll(unit, obs, z, jnp.zeros(STEPS, bool), z0).reshape(-1, HEADS, KEY, VALUE)
    steps = [parts(unit, o) for o in obs]
    for t in range(STEPS):
        for h in range(HEADS):
            decay = np.array([a[h] for a, *_ in steps])
            truth = decay[: t + 1].prod() * np.asarray(z.reshape(HEADS, KEY, VALUE)[h])
            for i in range(t + 1):
                _, _, k, v = steps[i]
                write = np.sqrt(1 - decay[i] ** 2) * np.outer(k[h], v[h])
                truth = truth + decay[i + 1 : t + 1].prod() * write
            assert np.allclose(found[t, h], truth, rtol=1e-10)


def test_the_delta_rule_is_its_recurrence_in_matrices():
    unit, (obs, z, _, _) = make("delta"), data()
    decay, beta, k, v = parts(unit, obs[0])
    S = np.asarray(z).reshape(HEADS, KEY, VALUE)
    for h in range(HEADS):
        erase = np.eye(KEY) - beta[h] * np.outer(k[h], k[h])
        truth = decay[h] * erase @ S[h] + beta[h] * np.outer(k[h], v[h])
        assert np.allclose(call(unit, obs[0], z).reshape(S.shape)[h], truth, rtol=1e-12)


def with_gates(unit, *, decay, gate):
    """The unit with constant gates: their logits, for all heads."""
    n = HEADS * unit.num_gates
    logits = jnp.repeat(jnp.array([decay, gate])[: unit.num_gates], HEADS)
    where = lambda u: (u.inputs.weight, u.inputs.bias)
    weight, bias = unit.inputs.weight.at[:n].set(0.0), unit.inputs.bias.at[:n].set(logits)
    return eqx.tree_at(where, unit, (weight, bias))


def test_a_delta_rule_replaces_the_value_at_a_key_exactly():
    """With β = 1 and |k| = 1 the key reads v, and what an orthogonal key reads stays."""
    unit = with_gates(make("delta"), decay=-50.0, gate=50.0)  # a = β = 1
    obs, z = 9.0 * data()[0][0], data()[1]
    _, _, k, v = parts(unit, obs)
    assert np.allclose(np.linalg.norm(k, axis=1), 1, rtol=1e-12)
    before, after = (np.asarray(x).reshape(HEADS, KEY, VALUE) for x in (z, call(unit, obs, z)))
    other = np.cross(k, np.arange(KEY) + 1.0)
    for h in range(HEADS):
        assert np.allclose(k[h] @ after[h], v[h], rtol=1e-10)
        assert np.allclose(other[h] @ after[h], other[h] @ before[h], rtol=1e-10)
    half = with_gates(unit, decay=-50.0, gate=0.0)
    between = np.asarray(call(half, obs, z)).reshape(HEADS, KEY, VALUE)
    assert np.allclose(k[0] @ between[0], (v[0] + k[0] @ before[0]) / 2, rtol=1e-10)
    attention = with_gates(make("attention"), decay=-1.0, gate=0.0)
    _, _, k, v = parts(attention, obs)  # in linear attention the values of a key add up
    added = np.asarray(call(attention, obs, z)).reshape(HEADS, KEY, VALUE)
    assert not np.allclose(k[0] @ added[0], v[0], rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "associative"])
@pytest.mark.parametrize("name", CELLS)
def test_a_segment_of_matrices_is_its_steps_in_value_and_gradient(name, method):
    """By the associative form too, in which matrices A are composed."""
    obs, z, first, z0 = data()
    weight = jnp.cos(jnp.arange(STEPS * Z)).reshape(STEPS, Z)

    @eqx.filter_jit
    def both(*inputs):
        def value(inputs, run):
            unit, obs, z, z0 = inputs
            out = run(unit, obs, z, first, z0)
            return jnp.sum(weight * out), out

        with_grad = eqx.filter_value_and_grad(value, has_aux=True)
        return [with_grad(inputs, run) for run in (CELLS[name].unroll, Location.unroll)]

    by_scan, by_steps = both(make(name, method), obs, z, z0)
    assert all(np.any(x) for x in jax.tree.leaves(by_steps))
    assert_trees_close(by_scan, by_steps, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", UNITS)
def test_gradients_of_matrix_units_are_finite_differences(name):
    unit, (obs, z, first, z0) = make(name), data()
    run = lambda unit, obs, z: unit.unroll(obs, z, first, z0)
    check_grads(jax.jit(run), (unit, obs, z), order=1, modes=["rev"], rtol=1e-5)


@pytest.mark.parametrize("name", UNITS)
def test_the_heads_of_matrix_units_start_log_evenly_from_slow_to_fast(name):
    unit = UNITS[name](OBS, 60, num_heads=5, key_size=3, max_decay=0.99, key=jr.key(0))
    z = np.ones(60)
    decay = np.asarray(call(unit, jnp.zeros(OBS), jnp.asarray(z))).reshape(5, -1)
    assert np.ptp(decay, axis=1).max() < 1e-12  # without input nothing is written or erased
    rates = np.log(-np.log(decay[:, 0]))
    low, high = np.log(-np.log([0.99, 0.4]))
    assert np.allclose(rates, np.linspace(low, high, 5), rtol=1e-10)


@pytest.mark.parametrize("name", UNITS)
def test_matrix_units_are_stable_whatever_their_parameters(name):
    unit = jitter(make(name), jr.key(0), scale=5.0)
    decay, u = jax.vmap(unit.affine)(100.0 * data()[0])
    size = np.abs(decay) if decay.ndim == 2 else np.linalg.norm(decay, 2, (2, 3))
    assert (size <= 1 + 1e-12).all()
    assert np.isfinite(u).all()


@pytest.mark.parametrize("name", UNITS)
def test_a_value_enters_a_matrix_with_the_weight_write(name):
    """Keys of length 1 with equal entries, β at its start."""
    unit = UNITS[name](OBS, Z, num_heads=HEADS, key_size=KEY, key=jr.key(0))
    bias = jnp.asarray(unit.inputs.bias).at[HEADS * unit.num_gates :].set(KEY**-0.5)
    unit = eqx.tree_at(lambda u: u.inputs.bias, unit, bias.at[-HEADS * VALUE :].set(0.5))
    assert np.allclose(call(unit, jnp.zeros(OBS), jnp.zeros(Z)), 0.5 * unit.write, rtol=1e-12)


def test_a_query_reads_the_value_of_its_key():
    head = CategoricalHead([OBS + HEADS * VALUE, 4], gain=1.0, key=jr.key(0))
    query = QueryHead(head, OBS, (HEADS, KEY, VALUE), key=jr.key(1))
    obs, z = data()[0][0], data()[1]
    q = np.asarray(query.queries(obs)).reshape(HEADS, KEY)
    q = q / np.maximum(1, np.linalg.norm(q, axis=1))[:, None]
    y = np.einsum("hk,hkv->hv", q, np.asarray(z).reshape(HEADS, KEY, VALUE)).ravel()
    found, truth = query(obs, z), head(obs, jnp.asarray(y))
    assert isinstance(found, Categorical)
    assert np.allclose(found.logits, truth.logits, rtol=1e-12)


def test_a_hybrid_is_linear_in_one_half_and_retention_in_the_other():
    unit, (obs, z, _, _) = make("hybrid"), data()
    sums, state = jnp.split(z, 2)
    after = call(unit, obs[0], z)
    assert unit.attention.shape == (HEADS, KEY, 1)
    assert np.allclose(after[: Z // 2], unit.linear(obs[0], sums), rtol=1e-12)
    assert np.allclose(after[Z // 2 :], unit.attention(obs[0], state), rtol=1e-12)
    assert np.array_equal(unit.write, [*unit.linear.write, *unit.attention.write])
    head = CategoricalHead([OBS + Z // 2 + HEADS, 4], gain=1.0, key=jr.key(0))
    query: Any = QueryHead(head, OBS, unit.attention.shape, key=jr.key(1))
    q = cut(query.queries(obs[0]).reshape(HEADS, KEY))
    seen = jnp.concatenate([sums, read(state.reshape(HEADS, KEY, 1), q).ravel()])
    assert np.allclose(query(obs[0], z).logits, head(obs[0], seen).logits, rtol=1e-12)


@pytest.mark.parametrize("state_std", [None, 0.3])
@pytest.mark.parametrize("name", CELLS)
def test_matrix_cells_with_or_without_noise_score_what_they_drew(name, state_std):
    assert_cell_scores_what_it_drew(make(name), *data(), state_std)


@pytest.mark.parametrize("cell", ["attention", "delta"])
@pytest.mark.parametrize("memory", ["bptt", "s2pg"])
def test_the_factory_reads_matrices_by_queries(cell, memory):
    env = envs.make("TMaze-memory")
    config = PolicyConfig(
        memory=memory, cell=cell, z_size=48, num_heads=2, key_size=3, num_layers=2
    )
    make = lambda key: make_kernel(config, env.spec, key=key)
    kernel = eqx.filter_eval_shape(make, jr.key(0))
    assert isinstance(kernel.head, QueryHead)
    assert kernel.head.shape == (4, 3, 4)  # heads of both layers
    location = kernel.cell.location if memory == "bptt" else kernel.cell.distribution.location
    assert isinstance(location, Stack)
    assert [type(unit) for unit in location.units] == [UNITS[cell]] * 2
    assert kernel.z0.shape == (48,)


def test_the_factory_makes_hybrids():
    env = envs.make("TMaze-memory")
    config = PolicyConfig(cell="hybrid", z_size=48, num_heads=2, key_size=3)
    build = lambda key: make_kernel(config, env.spec, key=key)
    kernel: Any = eqx.filter_eval_shape(build, jr.key(0))
    assert isinstance(kernel.cell.distribution.location, Hybrid)
    assert kernel.head.shape == (2, 3, 4)
    assert kernel.head.head.mlp.layers[0].weight.shape[1] == env.spec.obs_size + 24 + 2 * 4
    with pytest.raises(
        ValueError, match="num_layers is 2; layers are for linear cells, not hybrid"
    ):
        make_kernel(replace(config, num_layers=2), env.spec, key=jr.key(0))
    with pytest.raises(ValueError, match=r"z_size 42 is not 2 x num_heads 2 .* a multiple of 12"):
        Hybrid(OBS, 42, num_heads=2, key_size=3, key=jr.key(0))


def test_sizes_that_no_matrix_has_are_refused():
    assert matrix_shape(24, 2, 3) == (2, 3, 4)
    message = "z_size 30 is not num_heads 4 x key_size 4 x .* a multiple of 16 would do"
    for unit in UNITS.values():
        with pytest.raises(ValueError, match=message):
            unit(OBS, 30, key=jr.key(0))
        with pytest.raises(ValueError, match=r"max_decay is 1.0; it has to be inside \(0, 1\)"):
            unit(OBS, 32, max_decay=1.0, key=jr.key(0))
