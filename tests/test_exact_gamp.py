from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, largest_difference, make_finite_kernel, make_pomdp

from spg.distributions import Categorical
from spg.exact import enumeration, gamp
from spg.kernels.cells import Drawn
from spg.kernels.finite import NetworkMemory, finite_kernel, random_controller, tables
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Identity
from spg.worlds.models import DensePOMDP, dense, sparse
from spg.worlds.problems import heaven_hell, load_unload, tiger

pytestmark = pytest.mark.usefixtures("float64")


def random_world():
    return make_pomdp(jr.key(0), num_states=5, num_obs=3, num_actions=3)


def sparse_kernel(num_obs, num_actions, *, num_z=4, std=1.0):
    return random_controller(num_z, num_obs, num_actions, out_degree=2, std=std, key=jr.key(1))


@eqx.filter_jit
def average_reward(kernel, pomdp):
    """η by forming K and solving densely; `pomdp` is dense."""
    law = enumeration.stationary_distribution(kernel, pomdp)
    return jnp.einsum("sg,sgha,sa->", law, enumeration.joint_policy(kernel, pomdp), pomdp.reward)


damped = {"stationary": gamp.power, "bias": gamp.richardson}  # quick to compile
solve = eqx.filter_jit(partial(gamp.long_run, **damped))
gradient_of = eqx.filter_jit(partial(gamp.gamp_gradient, **damped))
fine = eqx.filter_jit(partial(gamp.gamp_gradient, tol=1e-14, **damped))
dense_gradient = eqx.filter_jit(eqx.filter_grad(average_reward))


def moved(kernel, direction, size):
    return jax.tree.map(
        lambda x, v: x if v is None else x + size * v,
        kernel,
        direction,
        is_leaf=lambda x: x is None,
    )


SOLVERS = {
    "default": {},
    "damped": damped,
    "gmres": {"stationary": partial(gamp.krylov_stationary, solver=gamp.gmres)},
    "bicgstab": {
        "stationary": partial(gamp.krylov_stationary, solver=gamp.bicgstab),
        "bias": partial(gamp.krylov_bias, solver=gamp.bicgstab),
    },
}


PROBLEMS = {
    "loadunload": lambda: load_unload().pomdp,
    "heavenhell": lambda: heaven_hell().pomdp,
    "tiger": lambda: tiger().pomdp,
    "random": random_world,
    "random sparse": lambda: sparse(random_world()),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_is_that_of_the_dense_solve_and_of_central_differences(name):
    pomdp = PROBLEMS[name]()
    whole = pomdp if isinstance(pomdp, DensePOMDP) else dense(pomdp)
    kernel = sparse_kernel(pomdp.num_obs, pomdp.num_actions)
    gradient, solution = fine(kernel, pomdp)
    assert solution.converged
    assert np.allclose(solution.average_reward, average_reward(kernel, whole), atol=1e-11)
    truth = eqx.filter(dense_gradient(kernel, whole), eqx.is_inexact_array)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(truth))
    assert largest_difference(gradient, truth) < 1e-6 * scale
    params = eqx.filter(kernel, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(params)
    keys = jr.split(jr.key(2), len(leaves))
    draws = [jr.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    direction = jax.tree.unflatten(structure, draws)
    step = 0.01
    at = lambda n: average_reward(moved(kernel, direction, n * step), whole)
    difference = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)  # of fourth order
    slope = sum(
        jnp.vdot(g, v)
        for g, v in zip(
            jax.tree.leaves(eqx.filter(gradient, eqx.is_inexact_array)), draws, strict=True
        )
    )
    assert np.allclose(difference, slope, rtol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_finds_the_law_and_the_differential_values(name):
    pomdp = random_world()
    kernel = sparse_kernel(3, 3)
    gradient, solution = eqx.filter_jit(partial(gamp.gamp_gradient, **SOLVERS[name]))(kernel, pomdp)
    assert solution.converged
    assert (solution.products > 0).all()
    assert np.allclose(
        solution.stationary, enumeration.stationary_distribution(kernel, pomdp), atol=1e-11
    )
    chain = enumeration.joint_chain(kernel, pomdp).reshape(20, 20)
    reward = jnp.einsum(
        "sgha,sa->sg", enumeration.joint_policy(kernel, pomdp), pomdp.reward
    ).reshape(-1)
    x = solution.bias.reshape(-1)
    assert np.allclose(x - chain @ x, reward - solution.average_reward, atol=1e-10)
    assert largest_difference(gradient, dense_gradient(kernel, pomdp)) < 1e-10


def test_the_two_applications_of_the_chain_are_transposes():
    pomdp = sparse(random_world())
    kernel = sparse_kernel(3, 3)
    table = tables(kernel, jnp.arange(3))
    reward = gamp._evaluate(table, pomdp, jnp.zeros((5, 4)))
    pull = lambda x: gamp._evaluate(table, pomdp, x) - reward
    d, x = jr.normal(jr.key(3), (5, 4)), jr.normal(jr.key(4), (5, 4))
    assert np.allclose(jnp.vdot(d, pull(x)), jnp.vdot(gamp._push(table, pomdp, d), x), rtol=1e-12)
    chain = enumeration.joint_chain(kernel, dense(pomdp))
    assert np.allclose(pull(x), jnp.einsum("sgth,th->sg", chain, x), rtol=1e-12)


def test_load_unload_at_zero_logits():
    """Golden: η = .05, no gradient towards memory, ±1/800 at loading and unloading."""
    pomdp = load_unload().pomdp
    for num_z, size in ((4, 1 / 800), (1, 1 / 200)):
        kernel = finite_kernel(jnp.zeros((num_z, 3, num_z)), jnp.zeros((num_z, 3, 2)))
        gradient, solution = gradient_of(kernel, pomdp)
        assert np.allclose(solution.average_reward, 0.05, rtol=1e-10)
        assert np.allclose(gradient.cell.distribution.logits, 0, atol=1e-14)
        names = load_unload().observations
        loading, unloading, travel = (names.index(n) for n in ("loading", "unloading", "travel"))
        left, right = (load_unload().actions.index(n) for n in ("left", "right"))
        mu = gradient.head.logits
        assert np.allclose(mu[:, loading, right], size, rtol=1e-8)
        assert np.allclose(mu[:, loading, left], -size, rtol=1e-8)
        assert np.allclose(mu[:, unloading, left], size, rtol=1e-8)
        assert np.allclose(mu[:, travel], 0, atol=1e-13)


def test_a_sparse_zero_start_moves_actions_apart_and_then_memory():
    """Section 4.2 of the paper: first the gradient of ω is zero, that of μ differs across h."""
    pomdp = load_unload().pomdp
    kernel = sparse_kernel(3, 2, std=0.0)
    gradient, _ = gradient_of(kernel, pomdp)
    assert np.allclose(gradient.cell.distribution.logits, 0, atol=1e-14)
    assert float(jnp.ptp(gradient.head.logits, axis=0).max()) > 1e-4
    assert 5.3e-3 < jnp.linalg.norm(gradient.head.logits) < 5.9e-3
    after = moved(kernel, eqx.filter(gradient, eqx.is_inexact_array), 100.0)
    assert jnp.linalg.norm(gradient_of(after, pomdp)[0].cell.distribution.logits) > 1e-4


class Network(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, obs, z):
        features = jnp.concatenate([jax.nn.one_hot(obs, 3), jax.nn.one_hot(z, 2)])
        return Categorical(jnp.tanh(self.layer(features)))


def test_networks_take_the_place_of_tables():
    memory = NetworkMemory(Network(eqx.nn.Linear(5, 2, key=jr.key(0))), 2)
    head = Network(eqx.nn.Linear(5, 3, key=jr.key(1)))
    kernel = Kernel(Drawn(memory), head, Identity(), jnp.zeros((), int))
    pomdp = random_world()
    gradient, solution = gradient_of(kernel, pomdp)
    assert solution.converged
    truth = dense_gradient(kernel, pomdp)
    assert_trees_close(gradient, truth, rtol=1e-8, atol=1e-11)
    assert largest_difference(truth, jax.tree.map(jnp.zeros_like, truth)) > 1e-3


def test_the_derivative_in_the_reward_is_how_often_it_is_received():
    pomdp, kernel = random_world(), make_finite_kernel(jr.key(0), num_obs=3, num_actions=3)
    value = lambda pomdp: gamp.long_run(kernel, pomdp, **damped).average_reward
    gradient = eqx.filter_jit(eqx.filter_grad(value))(pomdp)
    law, policy = (
        enumeration.stationary_distribution(kernel, pomdp),
        enumeration.joint_policy(kernel, pomdp),
    )
    assert np.allclose(gradient.reward, jnp.einsum("sg,sgha->sa", law, policy), rtol=1e-8)


def test_controllers_are_vmapped():
    pomdp = random_world()
    kernels = [make_finite_kernel(key, num_obs=3, num_actions=3) for key in jr.split(jr.key(0), 3)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *kernels)
    together = eqx.filter_jit(eqx.filter_vmap(lambda k: gamp.gamp_gradient(k, pomdp, **damped)[0]))(
        batch
    )
    one = eqx.filter_jit(lambda k: gamp.gamp_gradient(k, pomdp, **damped)[0])
    apart = jax.tree.map(lambda *x: jnp.stack(x), *[one(k) for k in kernels])
    assert_trees_close(together, apart, rtol=1e-8, atol=1e-11)


# --- chains that are no pleasure


def world(successors, rewards, start):
    """Deterministic, every state seen, one action."""
    size = len(successors)
    transition = jnp.zeros((size, 1, size)).at[jnp.arange(size), 0, jnp.array(successors)].set(1.0)
    return DensePOMDP(transition, jnp.eye(size), jnp.array(rewards)[:, None], jnp.array(start))


def memoryless(num_obs):
    return finite_kernel(jnp.zeros((1, num_obs, 1)), jnp.zeros((1, num_obs, 1)))


SOUND = ["default", "damped"]


@pytest.mark.parametrize("name", SOUND)
def test_a_periodic_chain_is_solved(name):
    pomdp = world([1, 2, 0], [0.0, 1.0, 5.0], [1.0, 0.0, 0.0])
    solution = eqx.filter_jit(partial(gamp.long_run, **SOLVERS[name]))(memoryless(3), pomdp)
    assert solution.converged
    assert np.allclose(solution.average_reward, 2.0)
    assert np.allclose(solution.stationary, 1 / 3)


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize(("rewards", "equal"), [((1.0, 3.0), False), ((2.0, 2.0), True)])
def test_a_multichain_is_told_unless_its_classes_earn_the_same(name, rewards, equal):
    """η is the mean over the classes, from the first state; ∇η exists where they agree."""
    pomdp = world([0, 1], rewards, [0.25, 0.75])
    settings = SOLVERS[name]
    if name == "damped":
        settings = settings | {"bias": partial(gamp.richardson, max_products=1000)}
    solution = eqx.filter_jit(partial(gamp.long_run, **settings))(memoryless(2), pomdp)
    assert np.allclose(solution.average_reward, 0.25 * rewards[0] + 0.75 * rewards[1])
    assert bool(solution.converged) == equal
    assert np.isfinite(solution.bias_residual)
    assert (solution.bias_residual < 1e-10) == equal


@pytest.mark.parametrize("name", SOUND)
def test_what_cannot_be_reached_takes_no_part(name):
    """State 2 keeps to itself and pays 100; states 0 and 1 alternate."""
    pomdp = world([1, 0, 2], [0.0, 1.0, 100.0], [1.0, 0.0, 0.0])
    solution = eqx.filter_jit(partial(gamp.long_run, **SOLVERS[name]))(memoryless(3), pomdp)
    assert solution.converged
    assert np.allclose(solution.average_reward, 0.5)
    assert solution.stationary[2, 0] == 0


@pytest.mark.parametrize("reward", [0.0, 1 / 3])
def test_a_world_where_all_earn_the_same_has_no_gradient(reward):
    pomdp = random_world()._replace(reward=jnp.full((5, 3), reward))
    gradient, solution = gradient_of(sparse_kernel(3, 3), pomdp)
    assert solution.converged
    assert largest_difference(gradient, jax.tree.map(jnp.zeros_like, gradient)) < 1e-15


def test_a_saturated_controller_stays_finite():
    """Certain actions: the optimal controller of Load/Unload at logits of ±400."""
    cell = jnp.zeros((2, 3, 2)).at[:, 0, 1].set(400.0).at[:, 1, 0].set(400.0)
    cell = cell.at[0, 2, 0].set(400.0).at[1, 2, 1].set(400.0)
    names = load_unload().observations
    order = jnp.array([("loading", "unloading", "travel").index(n) for n in names])
    right = load_unload().actions.index("right")
    head = jnp.zeros((2, 3, 2)).at[1, :, right].set(400.0).at[0, :, 1 - right].set(400.0)
    kernel = finite_kernel(cell[:, order], head)
    gradient, solution = gradient_of(kernel, load_unload().pomdp)
    assert np.allclose(solution.average_reward, 0.25, rtol=1e-9)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(eqx.filter(gradient, eqx.is_array)))


def test_single_precision_converges_to_its_own_tolerance():
    with jax.enable_x64(False):
        pomdp = make_pomdp(jr.key(0), num_states=5, num_obs=3, num_actions=3)
        kernel = sparse_kernel(3, 3)
        solution = eqx.filter_jit(gamp.long_run)(kernel, pomdp)
        assert solution.average_reward.dtype == jnp.float32
        assert solution.converged
