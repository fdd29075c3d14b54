import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_cell_scores_what_it_drew, assert_trees_close, jitter

from spg import envs
from spg.distributions import std_from_log
from spg.kernels.cells import GRU, Location
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.linear import LRU, Gated, LeakyFilter, Linear
from spg.kernels.matrix import LinearAttention
from spg.kernels.networks import Identity, Normalizer
from spg.kernels.stack import Stack

pytestmark = pytest.mark.usefixtures("float64")

OBS, Z, STEPS = 5, 4, 7
MAKE = {
    "linear": Linear,
    "lru": LRU,
    "gated": Gated,
    "leaky": lambda o, z, key: LeakyFilter(o, z, 2, key=key),
    "stack": lambda o, z, key: Stack(LRU, o, z, 2, key=key),
}
sigmoid = lambda x: 1 / (1 + np.exp(-x))
call = eqx.filter_jit(lambda unit, obs, z: unit(obs, z))
affine = eqx.filter_jit(lambda unit, obs: jax.vmap(unit.affine)(obs))
unroll = eqx.filter_jit(lambda unit, *inputs: unit.unroll(*inputs))


@eqx.filter_jit
def make(name):
    return jitter(MAKE[name](OBS, Z, key=jr.key(0)), jr.key(1), scale=0.2)


def data(name="linear"):
    """Complex internal states for the complex units."""
    obs, *z = (jr.normal(jr.key(i), s) for i, s in enumerate([(STEPS, OBS), (2, Z), (2, Z)], 2))
    z, z0 = (x[0] if name in ("linear", "gated") else (x[0] + 1j * x[1])[: Z // 2] for x in z)
    return obs, z, jnp.array([False, False, True, True, False, False, True]), z0


@pytest.mark.parametrize("name", [*list(MAKE)[:-1], pytest.param("stack", marks=pytest.mark.slow)])
def test_a_segment_is_the_unit_step_by_step_in_value_and_gradient(name):
    location, (obs, z, first, z0) = make(name), data(name)
    weight = jnp.cos(jnp.arange(STEPS * z.size)).reshape(STEPS, z.size)

    @eqx.filter_jit
    def both(*inputs):
        def value(inputs, run):
            location, obs, z, z0 = inputs
            out = run(location, obs, z, first, z0)
            return jnp.sum(weight * (out.real + 0.5 * out.imag)), out

        with_grad = eqx.filter_value_and_grad(value, has_aux=True)
        by_scan = with_grad(inputs, lambda location, *rest: location.unroll(*rest))
        return by_scan, with_grad(inputs, Location.unroll)

    by_scan, by_steps = both(location, obs, z, z0)
    assert all(np.any(x) for x in jax.tree.leaves(by_steps))
    assert_trees_close(by_scan, by_steps, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("state_std", [None, 0.3])
def test_a_stack_with_or_without_noise_scores_what_it_drew(state_std):
    assert_cell_scores_what_it_drew(make("stack"), *data("stack"), state_std)


def test_lru_is_its_recurrence_in_complex_numbers():
    unit, (obs, z, _, _) = make("lru"), data("lru")
    decay = np.exp(-np.exp(unit.nu) + 1j * unit.theta)
    weight, bias = (
        x[:2] + 1j * x[2:] for x in map(np.asarray, (unit.inputs.weight, unit.inputs.bias))
    )
    truth = decay * z + np.exp(unit.gamma) * (weight @ obs[0] + bias)
    assert np.allclose(unit(obs[0], z), truth, rtol=1e-12)


def test_lru_starts_in_its_ring_with_inputs_of_unit_variance():
    unit = LRU(1, 400, min_decay=0.4, max_decay=0.99, max_phase=1.0, key=jr.key(0))
    decay, _ = unit.affine(jnp.zeros(1))
    assert 0.4 < np.abs(decay).min() < 0.5
    assert 0.95 < np.abs(decay).max() < 0.99
    assert 0 <= np.angle(decay).min() < 0.1 < 0.9 < np.angle(decay).max() < 1
    assert np.allclose(np.abs(decay) ** 2 + np.exp(unit.gamma) ** 2, 1, rtol=1e-12)


@pytest.mark.slow
def test_gated_unit_is_that_of_griffin():
    unit, (obs, z, _, _) = make("gated"), data()
    r, i, x = np.split(np.asarray(unit.inputs.weight @ obs[0] + unit.inputs.bias), 3)
    a = sigmoid(-np.asarray(unit.rate)) ** (8 * sigmoid(r))  # 1 - σ(Λ) = σ(-Λ)
    truth = a * z + np.sqrt(1 - a**2) * sigmoid(i) * x
    assert np.allclose(call(unit, obs[0], z), truth, rtol=1e-12)
    half_open = np.exp(-4 * jax.nn.softplus(Gated(1, 50, key=jr.key(0)).rate))
    assert 0.4 < half_open.min() < 0.6
    assert 0.99 < half_open.max() < 0.999


@pytest.mark.parametrize(("kind", "gates"), [(Gated, 16), (LinearAttention, 4)])
def test_gradients_are_finite_where_a_gate_is_rounded_to_0(kind, gates):
    """In single precision; log a = -0 then, and the slope of √(1 - a²) infinite."""

    @eqx.filter_jit
    def gradient(bias):
        unit = kind(3, 16, key=jr.key(0))
        unit = eqx.tree_at(
            lambda unit: unit.inputs.bias, unit, unit.inputs.bias.at[:gates].set(bias)
        )
        loss = lambda unit: sum(jnp.sum(x**2) for x in unit.affine(jnp.full(3, 0.1)))
        return eqx.filter_grad(loss)(unit).inputs.weight

    with jax.enable_x64(False):
        found = {bias: gradient(jnp.float32(bias)) for bias in (-20.0, -105.0)}
    assert all(np.isfinite(x).all() for x in found.values())
    assert np.any(found[-20.0][:gates])


@pytest.mark.parametrize("name", ["linear", "lru", "gated"])
def test_nothing_is_written_at_the_start_where_there_is_no_input(name):
    _, u = MAKE[name](OBS, Z, key=jr.key(0)).affine(jnp.zeros(OBS))
    assert not np.any(u)


@pytest.mark.parametrize("name", ["linear", "lru", "gated"])
def test_units_are_stable_whatever_their_parameters(name):
    unit = jitter(make(name), jr.key(0), scale=5.0)
    decay, u = affine(unit, data()[0])
    assert (np.abs(decay) <= 1).all()
    assert np.isfinite(u).all()


def ring_filter(num_states, shifts, emission, leak):
    """The unit with phases and basis by which it filters cyclic shifts."""
    unit = LeakyFilter(emission.shape[0] + len(shifts), 2 * num_states, len(shifts), key=jr.key(0))
    phases = -2 * np.pi * np.outer(shifts, np.arange(num_states)) / num_states
    where = lambda u: (u.logits, u.phases, u.leak)
    new = jnp.log(emission), jnp.asarray(phases), jnp.log(leak / (1 - leak))
    return eqx.tree_at(where, unit, new)


def read(unit, z):
    """w = U⁻¹ z, where U is unitary."""
    basis = np.asarray(unit.basis[0] + 1j * unit.basis[1])
    return (basis.conj().T @ z.T).T


def test_a_leaky_filter_turned_by_cyclic_shifts_is_the_action_controlled_filter():
    """w_k = (1 - δ) Π(a_k) w_{k-1} + δ log E'y_k, Zhao et al. (2026), eq. 65, with matrices."""
    rng, leak, shifts = np.random.default_rng(0), 0.2, [1, -2]
    emission = rng.dirichlet(np.ones(4), 5).T
    unit = ring_filter(5, shifts, emission, leak)
    y, a = rng.integers(4, size=STEPS), rng.integers(2, size=STEPS)
    obs = jnp.asarray(np.concatenate([np.eye(4)[y], np.eye(2)[a]], 1))
    zero = jnp.zeros(5, complex)
    z = unroll(unit, obs, zero, jnp.zeros(STEPS, bool), zero)
    w, truth = np.zeros(5), []
    for k in range(STEPS):
        w = (1 - leak) * np.roll(w, shifts[a[k]]) + leak * np.log(emission[y[k]])
        truth += [w]
    assert np.allclose(read(unit, np.asarray(z)), truth, rtol=1e-10)


def test_a_leaky_filter_of_the_swap_chain_has_the_golden_gaps():
    unit = ring_filter(2, [1], np.array([[0.9, 0.1], [0.1, 0.9]]), 0.1)
    y = np.eye(2)[[0, 1, 0, 0, 1]]
    obs = jnp.asarray(np.concatenate([y, np.ones((5, 1))], 1))
    zero = jnp.zeros(2, complex)
    w = read(unit, np.asarray(unroll(unit, obs, zero, jnp.zeros(5, bool), zero)))
    gaps = [0.2197225, -0.4174727, 0.5954479, -0.3161806, 0.0648401]
    assert np.allclose(w[:, 0] - w[:, 1], gaps, atol=1e-7)


@pytest.mark.slow
def test_a_layer_sees_the_gated_state_of_the_layer_below():
    stack, (obs, z, _, _) = make("stack"), data("stack")
    state = call(stack.units[0], obs[0], z[:1])
    low = np.concatenate([state.real, state.imag])
    norm, gate = stack.norms[0], stack.gates[0]
    normed = norm.weight * (low - low.mean()) / np.sqrt(low.var() + norm.eps) + norm.bias
    value, opening = np.split(np.asarray(gate.weight @ normed + gate.bias), 2)
    x = stack.skips[0].weight @ obs[0] + value * sigmoid(opening)
    truth = [*state, *call(stack.units[1], x, z[1:])]
    assert np.allclose(call(stack, obs[0], z), truth, rtol=1e-10)


def test_sizes_that_cannot_be_are_refused():
    for name in ("lru", "leaky"):
        with pytest.raises(ValueError, match="z_size 3 is odd"):
            MAKE[name](OBS, 3, key=jr.key(0))
    with pytest.raises(ValueError, match="num_layers 3 does not divide z_size 4"):
        Stack(Linear, OBS, 4, 3, key=jr.key(0))


def at_rest(location, unit):
    """The location with no weight on inputs or state, and `unit` for the candidate's bias."""
    if isinstance(location, GRU):  # the candidate is tanh(bias): its gate stays
        bias = location.bias.at[:Z].set(0).at[2 * Z :].set(jnp.arctanh(unit))
        rest = jax.tree.map(jnp.zeros_like, location)
        return eqx.tree_at(lambda l: l.bias, rest, bias)
    inputs = jax.tree.map(jnp.zeros_like, location.inputs)
    gates = inputs.bias.size - Z if isinstance(location, Gated) else 0
    if isinstance(location, LRU):
        unit = jnp.where(jnp.arange(Z) < Z // 2, unit, 0.0)
    inputs = eqx.tree_at(lambda i: i.bias, inputs, inputs.bias.at[gates:].set(unit))
    return eqx.tree_at(lambda l: l.inputs, location, inputs)


@pytest.mark.parametrize("unit", [GRU, Linear, LRU, Gated])
def test_what_is_new_enters_with_the_weight_write(unit):
    location = at_rest(unit(OBS, Z, key=jr.key(0)), 0.5)
    z = call(location, jnp.ones(OBS), jnp.zeros_like(data("lru" if unit is LRU else "linear")[3]))
    gate = 0.5 if unit is Gated else 1.0  # its input gate is half open, too
    assert np.allclose(z, 0.5 * gate * location.write, rtol=1e-12)


def test_time_constants_of_a_gru_start_log_uniform():
    gru = GRU(1, 400, min_decay=0.4, max_decay=0.99, key=jr.key(0))
    rest = jax.tree.map(jnp.zeros_like, gru)
    free = eqx.tree_at(lambda l: l.bias, rest, gru.bias.at[800:].set(0.0))
    decay = call(free, jnp.zeros(1), jnp.ones(400))  # the candidate is 0
    assert np.allclose(decay, 1 - gru.write, rtol=1e-12)
    rates = np.sort(np.log(-np.log(decay)))
    low, high = np.log(-np.log([0.99, 0.4]))
    assert np.allclose(rates, np.linspace(low, high, 400), atol=0.4)


@pytest.mark.parametrize("cell", ["gru", "linear", "lru", "gated"])
def test_noise_starts_in_proportion_to_what_a_unit_writes(cell):
    env = envs.make("TMaze-memory")
    config = PolicyConfig(cell=cell, z_size=8, state_std=0.3)
    make = eqx.filter_jit(lambda key: make_kernel(config, env.spec, key=key).cell.distribution)
    normal = make(jr.key(0))
    assert np.allclose(std_from_log(normal.log_std), 0.3 * normal.location.write, rtol=1e-12)
    assert normal.log_std.shape == normal.location.write.shape


@pytest.mark.parametrize("cell", ["lru", "gated", "leaky"])
def test_the_factory_makes_linear_cells(cell):
    env = envs.make("TMaze-memory", previous_action=True)
    config = PolicyConfig(memory="bptt", cell=cell, z_size=8)
    kernel = eqx.filter_eval_shape(lambda key: make_kernel(config, env.spec, key=key), jr.key(0))
    location = kernel.cell.location
    assert type(location) is {"lru": LRU, "gated": Gated, "leaky": LeakyFilter}[cell]
    assert type(kernel.normalizer) is (Identity if cell == "leaky" else Normalizer)
    assert kernel.z0.shape == ((8,) if cell == "gated" else (4,))
    assert jnp.iscomplexobj(kernel.z0) == (cell != "gated")


@pytest.mark.slow
def test_the_factory_stacks_layers_and_refuses_what_cannot_be():
    config = PolicyConfig(cell="gated", num_layers=2, z_size=8)
    env = envs.make("TMaze-memory")
    kernel = eqx.filter_eval_shape(lambda key: make_kernel(config, env.spec, key=key), jr.key(0))
    assert [type(unit) for unit in kernel.cell.distribution.location.units] == [Gated, Gated]
    config = PolicyConfig(cell="leaky", num_layers=2, z_size=8)
    env_with_action = envs.make("TMaze-memory", previous_action=True)
    kernel = make_kernel(config, env_with_action.spec, key=jr.key(0))
    location = kernel.cell.distribution.location
    assert [type(unit) for unit in location.units] == [LeakyFilter, LRU]
    assert location(jnp.ones(8), kernel.z0).shape == (4,)
    for cell, num_layers in (("gru", 2), ("lru", 0)):
        config = PolicyConfig(cell=cell, num_layers=num_layers)
        with pytest.raises(ValueError, match=f"num_layers is {num_layers}; "):
            make_kernel(config, env.spec, key=jr.key(0))
    with pytest.raises(ValueError, match="previous_action on"):
        make_kernel(PolicyConfig(cell="leaky"), env.spec, key=jr.key(0))


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.2])
def test_decays_out_of_range_are_refused(decay):
    for make in (Linear, LRU, Gated):
        with pytest.raises(
            ValueError, match=rf"max_decay is {decay}; it has to be inside \(0, 1\)"
        ):
            make(2, 4, max_decay=decay, key=jr.key(0))
    with pytest.raises(ValueError, match=f"leak is {decay}"):
        LeakyFilter(4, 4, 2, leak=decay, key=jr.key(0))


def test_gradient_of_a_slow_unit_is_finite_in_single_precision():
    """λ rounds to 1 there, and √(1 - λ²) to 0, if computed so."""
    unit = eqx.tree_at(lambda u: u.nu, Linear(2, 3, key=jr.key(0)), jnp.full(3, -20.0))
    unit = jax.tree.map(lambda x: x.astype(jnp.float32), unit)
    obs, z = jnp.ones(2, jnp.float32), jnp.ones(3, jnp.float32)
    gradient = eqx.filter_grad(lambda u: u(obs, z).sum())(unit)
    assert jnp.isfinite(gradient.nu).all()
