import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import make_finite_kernel, make_pomdp
from jax.flatten_util import ravel_pytree

from spg.exact import enumeration, natural
from spg.exact.gamp import direct_gradient
from spg.kernels.finite import random_controller, tables
from spg.kernels.networks import trainable
from spg.worlds.models import dense
from spg.worlds.problems import load_unload

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.slow
def test_direct_gradient_is_that_of_the_dense_solve_and_of_discounted_values():
    pomdp, kernel = make_pomdp(jr.key(0)), make_finite_kernel(jr.key(1))

    def average_reward(kernel, beta=1.0, d=None):
        """η; with β the return Σ βⁿ r of a start from d, whose slope is that of GPOMDP's mean."""
        law = enumeration.stationary_distribution(kernel, pomdp)
        policy = enumeration.joint_policy(kernel, pomdp)
        reward = jnp.einsum("sgha,sa->sg", policy, pomdp.reward).reshape(-1)
        chain = enumeration.joint_chain(kernel, pomdp).reshape(law.size, law.size)
        if d is None:
            return law.reshape(-1) @ reward
        x = jnp.linalg.solve(jnp.eye(law.size) - beta * jax.lax.stop_gradient(chain), reward)
        return d.reshape(-1) @ (reward + beta * chain @ jax.lax.stop_gradient(x))

    value, truth = eqx.filter_jit(eqx.filter_value_and_grad(average_reward))(kernel)
    gradient, solution = eqx.filter_jit(direct_gradient)(kernel, pomdp)
    assert solution.converged
    assert np.allclose(solution.average_reward, value, rtol=1e-12)
    d = enumeration.stationary_distribution(kernel, pomdp)
    assert np.allclose(solution.stationary, d, rtol=1e-9)
    discounted = eqx.filter_grad(lambda k: average_reward(k, 0.8, d))(kernel)
    other, _ = direct_gradient(kernel, pomdp, beta=0.8)
    flat = lambda tree: ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))[0]
    assert np.allclose(flat(gradient), flat(truth), rtol=1e-9, atol=1e-12)
    assert np.allclose(flat(other), flat(discounted), rtol=1e-9, atol=1e-12)
    assert np.abs(flat(gradient) - flat(other)).max() > 1e-3


def test_two_recurrent_classes_have_no_average_reward():
    pomdp = make_pomdp(jr.key(0))
    pomdp = pomdp._replace(transition=jnp.broadcast_to(jnp.eye(2)[:, None], (2, 2, 2)))
    _, solution = direct_gradient(make_finite_kernel(jr.key(1)), pomdp)
    assert np.isnan(solution.average_reward)
    assert not solution.converged


@pytest.mark.slow
def test_natural_gradient_solves_the_fisher_system():
    """F = E[∇log ωμ ∇log ωμᵀ] over the joint distribution of (o, g, h, a), written out."""
    pomdp = make_pomdp(jr.key(0))
    kernel = random_controller(3, 2, 2, out_degree=2, std=1.0, key=jr.key(1))
    params, static = eqx.partition(kernel, trainable(kernel))
    theta, unravel = ravel_pytree(params)
    gradient, solution = direct_gradient(kernel, pomdp)
    o, g, k, a = (x.reshape(-1) for x in np.indices((2, 3, 2, 2)))

    def log_joint(theta):
        omega, successors, mu = tables(eqx.combine(unravel(theta), static), jnp.arange(2))
        h = successors[o, g, k]
        return jnp.log(omega[o, g, k] * mu[o, h, a])

    visits = solution.stationary.T @ pomdp.observation  # [G, O]
    weight = visits[g, o] * jnp.exp(log_joint(theta))
    score = jax.jacrev(log_joint)(theta)
    fisher = jnp.einsum("n,ni,nj->ij", weight, score, score)
    found = natural.natural_gradient(kernel, gradient, pomdp, solution.stationary)
    flat = lambda tree: ravel_pytree(eqx.filter(tree, trainable(kernel)))[0]
    assert np.allclose(fisher @ flat(found), flat(gradient), rtol=1e-6, atol=1e-9)
    assert np.linalg.norm(flat(gradient)) > 1e-3


@pytest.mark.slow
def test_ascent_never_falls_and_finds_the_optimum_of_load_unload():
    pomdp = dense(load_unload().pomdp)
    kernel = random_controller(4, pomdp.num_obs, 2, out_degree=3, hold=2.0, key=jr.key(0))
    best, states = jax.jit(lambda: natural.ascend(kernel, pomdp, num_steps=60))()
    values = np.asarray(states.value)
    assert np.all(np.diff(values) >= 0)
    assert values[-1] > 0.249
    there = enumeration.stationary_distribution(best, pomdp)
    pays = jnp.einsum("sgha,sa->sg", enumeration.joint_policy(best, pomdp), pomdp.reward)
    assert np.isclose(jnp.vdot(there, pays), values[-1], rtol=1e-9)
