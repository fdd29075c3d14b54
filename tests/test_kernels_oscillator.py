"""Oscillators against their differential equation, and as a cell of the factory."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_cell_scores_what_it_drew, jitter
from jax.test_util import check_grads
from scipy.integrate import solve_ivp

from spg import envs
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.oscillator import CycleFeature, EmissionFeature, Oscillators

pytestmark = pytest.mark.usefixtures("float64")

N = 3
OBS = jnp.zeros(0)


@eqx.filter_jit
def make(dt=0.05):
    return jitter(Oscillators(N, dt=dt, key=jr.key(0)), jr.key(1), scale=1.0)


def run(unit, z, num_steps):
    first = jnp.zeros(num_steps, bool)
    return eqx.filter_jit(unit.unroll)(jnp.zeros((num_steps, 0)), z, first, jnp.zeros_like(z))


def slope(unit, z):
    """The equations entry by entry."""
    v, b, c, w, phi = map(
        np.asarray, map(unit.parameter, ("frequency", "amplitude", "rate", "weight", "phase"))
    )
    psi, r, speed = np.split(z, 3)
    turn = [
        2 * np.pi * v[i]
        + sum(r[j] * w[i, j] * np.sin(psi[j] - psi[i] - phi[i, j]) for j in range(N) if j != i)
        for i in range(N)
    ]
    return np.concatenate([turn, speed, c * (c / 4 * (b - r) - speed)])


def test_a_step_is_eulers():
    unit, z = make(), jr.normal(jr.key(2), (3 * N,))
    expected = z + 0.05 * slope(unit, np.asarray(z))
    assert np.allclose(eqx.filter_jit(unit)(OBS, z), expected, rtol=1e-12)


def test_small_steps_follow_the_differential_equation():
    unit, z = make(dt=1e-4), jnp.zeros(3 * N).at[N].set(0.5)
    solved = solve_ivp(lambda t, z: slope(unit, z), (0, 0.5), np.asarray(z), rtol=1e-9, atol=1e-9)
    assert np.allclose(run(unit, z, 5000)[-1], solved.y[:, -1], atol=2e-3)
    assert np.abs(solved.y[:, -1]).min() > 0.01


def test_amplitudes_settle_without_ringing():
    unit = make(dt=0.2)
    fastest = eqx.tree_at(lambda unit: unit.raw["rate"], unit, jnp.full(N, 50.0))
    _, r, _ = np.split(np.asarray(run(fastest, jnp.zeros(3 * N), 200)), 3, axis=1)
    assert (np.diff(r, axis=0) > -1e-9).all()
    assert np.allclose(r[-1], unit.parameter("amplitude"), rtol=1e-6)


def test_two_equal_oscillators_keep_the_phase_that_their_coupling_asks_for():
    """ψ_1 - ψ_0 goes to φ_01 = -φ_10."""
    unit = Oscillators(2, dt=0.01, key=jr.key(0))
    raw = {name: jnp.broadcast_to(x.reshape(-1)[0], x.shape) for name, x in unit.raw.items()}
    limit = 2 * np.pi
    wanted = np.array([[np.pi, 1.0], [limit - 1.0, np.pi]]) / limit
    raw["phase"] = jnp.asarray(limit * np.log(wanted / (1 - wanted)))
    unit = eqx.tree_at(lambda unit: unit.raw, unit, raw)
    z = jnp.array([0.0, 2.0, 1.0, 1.0, 0.0, 0.0])
    psi = run(unit, z, 2000)[-1, :2]
    assert np.allclose((psi[1] - psi[0] - 1.0 + np.pi) % limit, np.pi, atol=1e-6)


def test_parameters_start_as_published():
    unit = eqx.filter_jit(Oscillators)(400, key=jr.key(3))
    starts = {"frequency": 2.51, "amplitude": 1.025, "rate": 5.5, "weight": 0.525, "phase": 3.167}
    for name, start in starts.items():
        assert abs(float(unit.parameter(name).mean()) - start) < 0.02


def test_gradients():
    unit, z = make(), jr.normal(jr.key(2), (3 * N,))
    through = lambda raw, z: run(eqx.tree_at(lambda unit: unit.raw, unit, raw), z, 5)[-1]
    check_grads(through, (unit.raw, z), order=1, modes=["rev"], eps=1e-6, rtol=1e-6, atol=1e-6)
    slopes = jax.grad(lambda raw: through(raw, z).sum())(unit.raw)
    assert all(np.any(x) for x in jax.tree.leaves(slopes))


def test_noise_is_relative_to_what_a_step_moves():
    unit = Oscillators(1, dt=1e-3, key=jr.key(0))
    steps = np.diff(np.asarray(run(unit, jnp.zeros(3), 3000)), axis=0)
    assert np.allclose(np.abs(steps).max(0), unit.write, rtol=0.02)


@pytest.mark.parametrize("state_std", [None, 0.3])
def test_oscillators_with_or_without_noise_score_what_they_drew(state_std):
    z, z0 = jr.normal(jr.key(2), (2, 3 * N))
    first = jnp.array([False, False, True, False])
    assert_cell_scores_what_it_drew(make(), jnp.zeros((4, 0)), z, first, z0, state_std)


@pytest.mark.parametrize("memory", ["s2pg", "bptt"])
def test_the_factory_shows_emissions_to_the_head_and_turns_to_the_critic(memory):
    env = envs.make("Pendulum-v1", observe="nothing", previous_action=True)
    assert env.spec.obs_size == 1
    config = PolicyConfig(memory=memory, cell="oscillator", z_size=3 * N, dt=0.1)
    kernel: Any = eqx.filter_jit(lambda key: make_kernel(config, env.spec, key=key))(jr.key(0))
    cell = kernel.cell.location if memory == "bptt" else kernel.cell.distribution.location
    assert cell.dt == 0.1
    z, turned = jr.normal(jr.key(1), (3 * N,)), jnp.zeros(3 * N).at[:N].set(2 * np.pi)
    o = jnp.zeros(1)
    assert np.allclose(kernel.head(o, z).mode(), kernel.head(o, z + turned).mode(), atol=1e-9)
    assert np.allclose(kernel.feature(z), kernel.feature(z + turned), atol=1e-9)
    psi, r, speed = np.split(np.asarray(z), 3)
    assert np.allclose(EmissionFeature()(z), r * np.cos(psi))
    assert np.allclose(CycleFeature()(z), [*(r * np.sin(psi)), *(r * np.cos(psi)), *speed])


def test_errors():
    spec = envs.make("Pendulum-v1", observe="nothing", previous_action=True).spec
    build = lambda **words: make_kernel(
        PolicyConfig(cell="oscillator", **words), spec, key=jr.key(0)
    )
    with pytest.raises(ValueError, match=r"z_size is 64 .* z_size 3 is one for each action"):
        build()
    with pytest.raises(ValueError, match="num_layers 2; oscillators"):
        build(z_size=6, num_layers=2)
    with pytest.raises(ValueError, match=r"dt is 0\.3"):
        build(z_size=3, dt=0.3)
    with pytest.raises(ValueError, match="'nothing' shows the previous action alone"):
        envs.make("Pendulum-v1", observe="nothing")
