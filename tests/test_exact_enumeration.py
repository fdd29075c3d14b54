import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, make_finite_kernel, make_kernel, make_pomdp
from jax.test_util import check_grads
from scipy import special

from spg.exact import enumeration
from spg.worlds.models import DensePOMDP

pytestmark = pytest.mark.usefixtures("float64")

GAMMA = 0.9


@pytest.fixture
def pomdp():
    return make_pomdp(jr.key(0), num_states=3, num_obs=2, num_actions=2)


@pytest.fixture
def kernel():
    return make_finite_kernel(jr.key(1))


@pytest.mark.slow
def test_forward_recursion_equals_the_sum_over_trajectories(pomdp, kernel):
    setting = {"gamma": GAMMA, "num_steps": 3}
    forward = lambda kernel: enumeration.expected_return(kernel, pomdp, **setting)
    summed = lambda kernel: enumeration.enumerate_return(kernel, pomdp, **setting)
    recursion = eqx.filter_jit(eqx.filter_value_and_grad(forward))(kernel)
    sums = eqx.filter_jit(eqx.filter_value_and_grad(summed))(kernel)
    assert_trees_close(recursion, sums, rtol=1e-12)


def test_expected_return_has_the_gradient_of_finite_differences(pomdp, kernel):
    def value(cell_logits, head_logits):
        where = lambda k: (k.cell.distribution.logits, k.head.logits)
        moved = eqx.tree_at(where, kernel, (jnp.asarray(cell_logits), jnp.asarray(head_logits)))
        return enumeration.expected_return(moved, pomdp, gamma=GAMMA, num_steps=5)

    check_grads(
        jax.jit(value), (kernel.cell.distribution.logits, kernel.head.logits), order=1, rtol=1e-6
    )


def test_values_solve_their_equations_and_start_with_the_return(pomdp, kernel):
    """V is the mean of Q over (o, z', a), written as loops; J is the limit of long horizons."""
    exact_values = eqx.filter_jit(enumeration.discounted_values)(kernel, pomdp, gamma=GAMMA)
    value, q_value, _, expected_return = map(np.asarray, exact_values)
    omega, mu = (special.softmax(x.logits, -1) for x in (kernel.cell.distribution, kernel.head))
    long = eqx.filter_jit(enumeration.expected_return)(kernel, pomdp, gamma=GAMMA, num_steps=400)
    pomdp = jax.tree.map(np.asarray, pomdp)
    for s, g in np.ndindex(value.shape):
        mean = sum(
            pomdp.observation[s, o] * omega[g, o, h] * mu[h, o, a] * q_value[s, a, h]
            for o, h, a in np.ndindex(2, 2, 2)
        )
        assert np.allclose(value[s, g], mean, rtol=1e-12)
    for s, a, h in np.ndindex(q_value.shape):
        future = sum(pomdp.transition[s, a, t] * value[t, h] for t in range(3))
        assert np.allclose(q_value[s, a, h], pomdp.reward[s, a] + GAMMA * future, rtol=1e-12)
    assert np.allclose(expected_return, long, rtol=1e-12)


def test_policy_gradient_theorem(pomdp, kernel):
    """Theorem 2.2: Σ ρ O ∇π Q is the derivative of J, both by different routes."""
    theorem = eqx.filter_jit(enumeration.policy_gradient)(kernel, pomdp, gamma=GAMMA)
    value = lambda kernel: enumeration.discounted_values(kernel, pomdp, gamma=GAMMA).expected_return
    derivative = eqx.filter_jit(eqx.filter_grad(value))(kernel)
    assert_trees_close(theorem, derivative, rtol=1e-11, atol=1e-13)
    value = lambda kernel: enumeration.expected_return(kernel, pomdp, gamma=GAMMA, num_steps=400)
    horizon = eqx.filter_jit(eqx.filter_grad(value))(kernel)
    assert_trees_close(theorem, horizon, rtol=1e-10, atol=1e-13)


def test_occupancy_has_the_mass_of_all_discounted_steps(pomdp, kernel):
    occupancy = eqx.filter_jit(enumeration.discounted_values)(kernel, pomdp, gamma=GAMMA).occupancy
    assert np.allclose(occupancy.sum(), 1 / (1 - GAMMA), rtol=1e-12)
    assert (occupancy >= 0).all()


def test_stationary_law_is_the_limit_of_the_chain(pomdp, kernel):
    law = eqx.filter_jit(enumeration.stationary_distribution)(kernel, pomdp)
    chain = eqx.filter_jit(enumeration.joint_chain)(kernel, pomdp).reshape(6, 6)
    assert np.allclose(chain.sum(1), 1)
    limit = np.linalg.matrix_power(np.asarray(chain), 200)
    assert np.allclose(limit, np.broadcast_to(law.reshape(-1), (6, 6)), atol=1e-12)
    assert np.allclose(law.sum(), 1)


def test_stationary_distribution_of_several_classes_is_that_from_the_start(kernel):
    """State 0 leads to states 1 and 2, which keep to themselves, with 1/3 and 2/3."""
    step = jnp.array([[0.0, 1 / 3, 2 / 3], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    transition = jnp.broadcast_to(step[:, None], (3, 2, 3))
    observation = jnp.full((3, 2), 0.5)
    pomdp = DensePOMDP(transition, observation, jnp.ones((3, 2)), jnp.array([0.75, 0.25, 0.0]))
    d = eqx.filter_jit(enumeration.stationary_distribution)(kernel, pomdp)
    assert np.allclose(d.sum(1), [0, 0.5, 0.5], atol=1e-15)
    chain = eqx.filter_jit(enumeration.joint_chain)(kernel, pomdp)
    assert np.allclose(jnp.einsum("sg,sgth->th", d, chain), d, atol=1e-15)


@pytest.mark.parametrize("name", ["finite", "gru", "window", "empty"])
def test_probabilities_of_all_trajectories_sum_to_one(pomdp, name):
    kernel = make_kernel(name, jr.key(2))
    one = lambda kernel, traj: jnp.ones(())
    total = lambda kernel: enumeration.enumerate_mean(one, kernel, pomdp, num_steps=3)
    assert np.allclose(eqx.filter_jit(total)(kernel), 1, rtol=1e-12)


def test_impossible_trajectories_are_left_out(kernel):
    """Identity observations and a cyclic world: s is free in s_0 only, o = s."""
    cycle = jnp.broadcast_to(jnp.roll(jnp.eye(2), 1, 1)[:, None], (2, 2, 2))
    pomdp = DensePOMDP(cycle, jnp.eye(2), jnp.ones((2, 2)), jnp.array([1.0, 0.0]))
    traj, prob = enumeration.trajectories(kernel, pomdp, num_steps=3)
    assert len(prob) == (2 * 2) ** 3  # the choices of a and z'
    assert np.array_equal(prob, np.ones(len(prob)))
    assert np.array_equal(traj.obs[0], [0, 1, 0])
    assert np.array_equal(traj.first[0], [True, False, False])
    assert np.array_equal(traj.terminated[0], [False, False, True])
    assert np.array_equal(traj.final_obs[0, :2], [1, 0])
    assert np.array_equal(traj.z[:, 1:], traj.z_next[:, :-1])


def test_a_law_that_cannot_be_enumerated_is_refused(pomdp, kernel):
    noisy = make_kernel("gru", jr.key(0), state_std=0.1)
    with pytest.raises(TypeError, match="Drawn"):
        enumeration.trajectories(noisy, pomdp, num_steps=2)
    with pytest.raises(TypeError, match="NormalAround"):
        enumeration.expected_return(noisy, pomdp, gamma=1.0, num_steps=2)


def test_exact_functions_agree_under_jit_and_vmap(pomdp):
    kernels = [make_finite_kernel(key) for key in jr.split(jr.key(3), 3)]
    value = lambda kernel: enumeration.discounted_values(kernel, pomdp, gamma=GAMMA)
    batch = jax.tree.map(lambda *x: jnp.stack(x), *kernels)
    plain = jax.tree.map(lambda *x: jnp.stack(x), *map(value, kernels))
    assert_trees_close(eqx.filter_jit(eqx.filter_vmap(value))(batch), plain, rtol=1e-12)
