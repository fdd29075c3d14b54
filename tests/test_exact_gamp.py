import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from chains import INSIDES, KINDS, Truth, World, classes, long_run
from chains import random_world as random_chain
from conftest import assert_trees_close, largest_difference, make_pomdp

from scripts.gamp import average_reward as long_run_average
from spg.distributions import Categorical
from spg.exact import chain as chains
from spg.exact import enumeration, gamp, solvers
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


SOLVERS = {
    "default": {},
    "damped": {"stationary": solvers.power, "bias": solvers.richardson},
    "gmres": {
        "stationary": partial(solvers.krylov_stationary, solver=solvers.gmres),
        "bias": partial(solvers.krylov_bias, solver=solvers.gmres),
    },
    "bicgstab": {
        "stationary": partial(solvers.krylov_stationary, solver=solvers.bicgstab),
        "bias": partial(solvers.krylov_bias, solver=solvers.bicgstab),
    },
}
GRADIENTS = {k: eqx.filter_jit(partial(gamp.gamp_gradient, **x)) for k, x in SOLVERS.items()}
gradient_of = GRADIENTS["damped"]  # quick to compile
dense_gradient = eqx.filter_jit(eqx.filter_grad(average_reward))


def moved(kernel, direction, size):
    return jax.tree.map(
        lambda x, v: x if v is None else x + size * v,
        kernel,
        direction,
        is_leaf=lambda x: x is None,
    )


PROBLEMS = {
    "loadunload": lambda: load_unload().pomdp,
    "random": random_world,
    "random sparse": lambda: sparse(random_world()),
    "tiger": lambda: tiger().pomdp,
    "heavenhell": lambda: heaven_hell().pomdp,
}
slow = partial(pytest.param, marks=pytest.mark.slow)
LARGE = "random", "random sparse", "tiger", "heavenhell"


@pytest.mark.parametrize("name", ["loadunload", *map(slow, LARGE)])
def test_gradient_is_that_of_the_dense_solve_and_of_central_differences(name):
    pomdp = PROBLEMS[name]()
    whole = pomdp if isinstance(pomdp, DensePOMDP) else dense(pomdp)
    kernel = sparse_kernel(pomdp.num_obs, pomdp.num_actions)
    gradient, solution = gradient_of(kernel, pomdp)
    assert solution.converged
    assert np.allclose(solution.average_reward, average_reward(kernel, whole), atol=1e-11)
    truth = eqx.filter(dense_gradient(kernel, whole), eqx.is_inexact_array)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(truth))
    assert largest_difference(gradient, truth) < 1e-6 * scale + 1e-12  # heavenhell: scale 1e-7
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["damped", *map(slow, ("default", "gmres", "bicgstab"))])
def test_every_solver_finds_the_law_and_the_differential_values(name):
    pomdp = random_world()
    kernel = sparse_kernel(3, 3)
    gradient, solution = GRADIENTS[name](kernel, pomdp)
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


@pytest.mark.parametrize("block", [chains.BLOCK, 5, 4, 2, 1])
def test_the_two_applications_of_the_chain_are_transposes(block, monkeypatch):
    monkeypatch.setattr(chains, "BLOCK", block)
    pomdp = sparse(random_world())
    kernel = sparse_kernel(3, 3)
    table = tables(kernel, jnp.arange(3))
    reward = chains.evaluate(table, pomdp, jnp.zeros((5, 4)))
    pull = lambda x: chains.evaluate(table, pomdp, x) - reward
    d, x = jr.normal(jr.key(3), (5, 4)), jr.normal(jr.key(4), (5, 4))
    assert np.allclose(jnp.vdot(d, pull(x)), jnp.vdot(chains.push(table, pomdp, d), x), rtol=1e-12)
    chain = enumeration.joint_chain(kernel, dense(pomdp))
    assert np.allclose(pull(x), jnp.einsum("sgth,th->sg", chain, x), rtol=1e-12)


@pytest.mark.slow
def test_blocks_of_states_change_nothing(monkeypatch):
    pomdp, kernel = sparse(random_world()), sparse_kernel(3, 3)
    for world in (pomdp, dense(pomdp)):
        monkeypatch.setattr(chains, "BLOCK", 1024)
        whole, solution = eqx.filter_jit(partial(gamp.gamp_gradient))(kernel, world)
        monkeypatch.setattr(chains, "BLOCK", 2)
        blocked, again = eqx.filter_jit(partial(gamp.gamp_gradient))(kernel, world)
        assert largest_difference(whole, blocked) < 1e-12
        assert np.isclose(solution.average_reward, again.average_reward, rtol=1e-13)


@pytest.mark.slow
def test_devices_may_share_the_states():
    """Nine states on two devices, so that one is added; each device has five rows of all."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, here / "states.py"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(here.parent), "XLA_FLAGS": flags},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    assert told.pop("states") == 10
    assert told.pop("rows") == told.pop("rows of x") == 5
    assert told.pop("converged")
    assert max(told.values()) < 1e-12


def test_states_that_devices_cannot_share_evenly_are_refused():
    pomdp, kernel = sparse(random_world()), sparse_kernel(3, 3)
    with pytest.raises(ValueError, match=r"5 states cannot be shared out evenly to 2 devices"):
        gamp.long_run(kernel, pomdp, devices=2 * jax.devices())


def test_load_unload_at_zero_logits():
    """Golden: η = .05, no gradient towards memory, ±1/800 at loading and unloading."""
    pomdp = load_unload().pomdp
    kernel = finite_kernel(jnp.zeros((4, 3, 4)), jnp.zeros((4, 3, 2)))
    gradient, solution = gradient_of(kernel, pomdp)
    assert np.allclose(solution.average_reward, 0.05, rtol=1e-10)
    assert np.allclose(gradient.cell.distribution.logits, 0, atol=1e-14)
    names = load_unload().observations
    loading, unloading, travel = (names.index(n) for n in ("loading", "unloading", "travel"))
    left, right = (load_unload().actions.index(n) for n in ("left", "right"))
    mu = gradient.head.logits
    assert np.allclose(mu[:, loading, right], 1 / 800, rtol=1e-8)
    assert np.allclose(mu[:, loading, left], -1 / 800, rtol=1e-8)
    assert np.allclose(mu[:, unloading, left], 1 / 800, rtol=1e-8)
    assert np.allclose(mu[:, travel], 0, atol=1e-13)
    assert np.allclose(mu.sum(0)[loading, right], 1 / 200)  # of the memoryless policy


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


@pytest.mark.slow
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
    pomdp, kernel = random_world(), sparse_kernel(3, 3)
    value = lambda pomdp: gamp.long_run(kernel, pomdp, **SOLVERS["damped"]).average_reward
    gradient = eqx.filter_jit(eqx.filter_grad(value))(pomdp)
    d, policy = gradient_of(kernel, pomdp)[1].stationary, enumeration.joint_policy(kernel, pomdp)
    assert np.allclose(gradient.reward, jnp.einsum("sg,sgha->sa", d, policy), rtol=1e-8)


@pytest.mark.slow
def test_controllers_are_vmapped():
    pomdp, kernel = random_world(), sparse_kernel(3, 3)
    kernels = [jax.tree.map(lambda x, n=n: x * n, kernel) for n in (1, 0, 1)]  # integers, too
    batch = jax.tree.map(lambda *x: jnp.stack(x), *kernels)
    together = eqx.filter_vmap(lambda k: gradient_of(k, pomdp)[0])(batch)
    apart = [gradient_of(kernel, pomdp)[0] for kernel in kernels]
    assert_trees_close(together, jax.tree.map(lambda *x: jnp.stack(x), *apart), atol=1e-11)


def test_a_world_where_all_earn_the_same_has_no_gradient():
    for reward in (0.0, 1 / 3):
        pomdp = random_world()._replace(reward=jnp.full((5, 3), reward))
        gradient, solution = gradient_of(sparse_kernel(3, 3), pomdp)
        assert solution.converged
        assert largest_difference(gradient, jax.tree.map(jnp.zeros_like, gradient)) < 1e-15


def test_a_saturated_controller_stays_finite():
    """Certain actions: the optimal controller of Load/Unload at logits of ±400."""
    problem = load_unload()
    loading, unloading, travel = map(problem.observations.index, ("loading", "unloading", "travel"))
    right = problem.actions.index("right")
    cell = jnp.zeros((4, 3, 2)).at[:, loading, 1].set(400.0).at[:, unloading, 0].set(400.0)
    cell = cell.at[0, travel, 0].set(400.0).at[1, travel, 1].set(400.0)
    head = jnp.zeros((4, 3, 2)).at[1, :, right].set(400.0).at[0, :, 1 - right].set(400.0)
    successors = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (4, 3, 2))
    kernel = finite_kernel(cell, head, successors)
    gradient, solution = gradient_of(kernel, problem.pomdp)
    assert np.allclose(solution.average_reward, 0.25, rtol=1e-9)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(eqx.filter(gradient, eqx.is_array)))


# --- chains that are no pleasure


def apply(chain):
    """d ↦ dK of a chain given as a matrix, G = 1."""
    return lambda d: (d[:, 0] @ chain)[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [slow(np.float64), np.float32])
def test_arnoldi_finds_the_limit_from_the_start_in_chains_of_two_classes(dtype):
    """Of 2 to 50 states each, also periodic, and with transient states ahead of them."""
    rng, size = np.random.default_rng(0), 104
    draws = [(kind, m) for kind in INSIDES for m in (2, 3, 5, 8, 20, 50) for _ in range(2)]
    pairs = [classes(rng, size, m, rng.integers(0, 4), kind) for kind, m in draws]
    alone = lambda chain, start: World(
        chain[:, None], np.zeros((size, 1)), start, np.zeros((size, 1))
    )
    truth = np.stack([long_run(alone(*pair)).stationary for pair in pairs])
    tol = jnp.asarray(1e-12 if dtype is np.float64 else 1e-5, dtype)
    one = lambda chain, start: solvers.arnoldi(apply(chain), start[:, None], tol)[0][:, 0]
    chains, starts = (jnp.asarray(np.stack(x), dtype) for x in zip(*pairs, strict=True))
    d = np.asarray(jax.jit(jax.vmap(one))(chains, starts))
    assert np.abs(d - truth).sum(1).max() < (1e-10 if dtype is np.float64 else 2e-4)
    assert d.min() >= 0


def worlds(kinds, size, dtype, seed):
    rng = np.random.default_rng(seed)
    found = [random_chain(rng, size, kind) for kind in kinds]
    return [World(*(x.astype(dtype) for x in world)) for world in found]


@jax.jit
@jax.vmap
def gradients(transition, reward, start, logits):
    size = len(logits)
    pomdp = DensePOMDP(transition, jnp.eye(size, dtype=logits.dtype), reward, start)
    kernel = finite_kernel(jnp.zeros((1, size, 1), logits.dtype), logits[None])
    gradient, solution = gamp.gamp_gradient(kernel, pomdp)
    return gradient.head.logits[0], solution


def errors(worlds):
    """The solutions of worlds, and the relative errors of η and ∇η."""
    truth = [long_run(world) for world in worlds]
    truth = Truth(*(np.stack(x) for x in zip(*truth, strict=True)))
    batch = World(*(jnp.stack(x) for x in zip(*worlds, strict=True)))
    gradient, solution = jax.tree.map(np.asarray, gradients(*batch))
    width = np.ptp(np.asarray(batch.reward), (1, 2))
    norm = lambda x: np.linalg.norm(x, axis=(1, 2))
    of_gain = np.abs(solution.average_reward - truth.average_reward)
    of_gain /= np.maximum(np.abs(truth.average_reward), width)
    of_gradient = norm(gradient - truth.gradient)
    of_gradient /= np.maximum(norm(truth.gradient), 1e-3 * width)
    return solution, truth, np.maximum(of_gain, of_gradient)


def check_converged(num, size, dtype, seed):
    kinds = np.repeat(KINDS, num)
    solution, truth, error = errors(worlds(kinds, size, dtype, seed))
    lie = solution.converged & ~(error < (1e-5 if dtype is np.float64 else 1e-2))
    assert not lie.any(), (kinds[lie], error[lie])
    mixing = (truth.num_classes == 1) & (truth.steps < (1000 if dtype is np.float64 else 30))
    assert solution.converged[mixing].all(), kinds[mixing & ~solution.converged]
    assert (solution.stationary >= 0).all()
    assert solution.converged[kinds == "equal classes"].mean() > 0.5
    assert not solution.converged[
        (kinds == "classes and transients") & (truth.num_classes > 1)
    ].any()


@pytest.mark.parametrize("dtype", [slow(np.float64), slow(np.float32)])
def test_what_has_converged_is_right_and_what_mixes_has_converged(dtype):
    check_converged(6, 16, dtype, 0)


@pytest.mark.long
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_what_has_converged_is_right_of_five_thousand_chains(dtype):
    for seed in range(9):
        check_converged(62, 20, dtype, seed)
    check_converged(3, 110, dtype, 9)


def test_a_slow_direction_is_seen_whatever_the_states():
    """Two cycles that hardly leak into each other: σ is the leak."""
    cycle = np.roll(np.eye(4), 1, 1)
    chain = jnp.asarray(np.kron(np.eye(2), cycle) * (1 - 1e-9) + 1e-9 / 8)
    d = jnp.full((8, 1), 1 / 8)
    sigma, misplaced = solvers.conditioning(apply(chain), d, d, jnp.asarray(1e-6))
    assert np.isclose(sigma, 1e-9, rtol=1e-3)
    assert misplaced < 1e-15


def test_classes_are_found_among_many_entries_in_single_precision():
    """Also where every entry of d is below the rounding of 1."""
    pair = lambda half: jnp.broadcast_to(half.mean(), half.shape)  # 2^19 (s, g) lead anywhere
    push = lambda d: jnp.concatenate([pair(d[:, :1]), pair(d[:, 1:])], 1)
    d = jnp.full((2**19, 2), 2.0**-20, np.float32)
    label = solvers._classes(push, d, jnp.asarray(True))
    assert (label == jnp.array([1, 2])).all()


def test_mass_of_many_entries_in_single_precision():
    """Added one by one, 2^24 entries of 2^-24 lose 1 % of their sum."""
    d = jr.exponential(jr.key(0), (2**21, 8), np.float32)
    label = 1 + jnp.broadcast_to(jnp.arange(8) // 6, d.shape)
    mass = jax.jit(solvers._masses(label))(d / d.sum())
    assert np.allclose(mass[:4], [0, 3 / 4, 1 / 4, 0], atol=1e-3)


def few(leak=0.0):
    """A cycle, two classes of different η, two of equal η, a state out of reach, and a leak."""
    successors = np.array([[1, 2, 0], [0, 1, 2], [0, 1, 2], [1, 0, 2], [0, 1, 2]])
    transition = np.eye(3)[successors]
    transition[4, 0] = [1 - leak, leak, 0]
    reward = np.array([[0.0, 1, 5], [1, 3, 0], [2, 2, 0], [0, 1, 100], [1, 0, 0]])
    start = np.array([[1.0, 0, 0], [0.25, 0.75, 0], [0.25, 0.75, 0], [1, 0, 0], [1, 0, 0]])
    make = lambda p, r, b: DensePOMDP(p[:, None], jnp.eye(3), r[:, None], b)
    return jax.vmap(make)(*map(jnp.asarray, (transition, reward, start)))


@pytest.mark.parametrize("name", ["default", "damped"])
def test_awkward_chains(name):
    kernel = finite_kernel(jnp.zeros((1, 3, 1)), jnp.zeros((1, 3, 1)))
    settings = SOLVERS[name]
    if name == "damped":
        settings = {k: partial(f, max_products=1000) for k, f in settings.items()}
    one = partial(gamp.long_run, kernel, **settings)
    solution = jax.jit(jax.vmap(one))(few())
    assert np.allclose(solution.average_reward, [2, 2.5, 2, 0.5, 1])
    assert np.array_equal(solution.converged, [True, False, True, True, True])
    assert np.allclose(solution.stationary[0], 1 / 3)
    assert np.allclose(solution.stationary[1:3, :, 0], [0.25, 0.75, 0])
    assert solution.stationary[3, 2] == 0
    assert (solution.bias_error[:2] > 1e-3).tolist() == [False, True]
    assert (solution.stationary_error < 1e-10).all()


@pytest.mark.slow
def test_the_script_reports_no_average_reward_that_a_leak_makes_wrong():
    """A leak of 1e-4 a step ends at 0 all the same; one of 1e-14 is told from none at all."""
    kernel = finite_kernel(jnp.zeros((1, 3, 1)), jnp.zeros((1, 3, 1)))
    found = jax.jit(jax.vmap(partial(long_run_average, kernel)))
    for leak, eta in ((1e-4, 0.0), (1e-14, np.nan), (0.0, 1.0)):
        assert np.allclose(found(few(leak)), [2, 2.5, 2, 0.5, eta], equal_nan=True)
