"""Every estimator against the enumeration of two windows of three steps, in a world of 3 states."""

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import largest_difference
from jaxtyping import Array

from spg.envs import Tabular
from spg.estimators import gpomdp, held
from spg.estimators.score import score_estimate
from spg.exact import kstep as exact
from spg.kernels.held import HeldState, certain_logits, held_kernel
from spg.rollout import reset, rollout
from spg.types import Env, Transition
from spg.worlds.models import DensePOMDP

pytestmark = pytest.mark.usefixtures("float64")

K, T, GAMMA = 3, 6, 0.9
OBS = np.array([0, 0, 1])  # of each state
POLICIES = exact.all_policies(2, 2)


class Record(NamedTuple):
    """Every trajectory of a policy that draws (component, policy) pairs for two windows."""

    traj: Transition
    prob: Array  # of the states given the actions
    component: np.ndarray  # [N, 2]
    policy: np.ndarray  # [N, 2], an index of POLICIES


@pytest.fixture(scope="module")
def world(float64):
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.ones(3), (3, 2))
    reward = rng.normal(size=(3, 2))
    start = np.array([0.2, 0.3, 0.5])
    return DensePOMDP(*map(jnp.asarray, (transition, np.eye(2)[OBS], reward, start)))


def enumerate_record(world, num_components):
    transition, _, reward, start = map(np.asarray, world)
    sizes = (num_components, 4) * 2 + (3,) * T
    c0, d0, c1, d1, *s = np.indices(sizes).reshape(len(sizes), -1)
    s, component, policy = np.stack(s, 1), np.stack([c0, c1], 1), np.stack([d0, d1], 1)
    obs = OBS[s]
    window = np.arange(T) // K
    action = POLICIES[policy[:, window], obs]
    prob = start[s[:, 0]] * transition[s[:, :-1], action[:, :-1], s[:, 1:]].prod(1)
    held, steps = np.full((len(s), 2), -1), []
    for t in range(T):
        held = np.full_like(held, -1) if t % K == 0 else held.copy()
        held[np.arange(len(s)), obs[:, t]] = action[:, t]
        steps.append(np.column_stack([np.full(len(s), t + 1), component[:, t // K], held]))
    z_next = np.stack(steps, 1)
    z0 = np.broadcast_to([0, 0, -1, -1], z_next[:, :1].shape)
    state = lambda z: HeldState(z[..., 0], z[..., 1], z[..., 2:])
    ends = np.broadcast_to(np.arange(T) == T - 1, obs.shape)
    traj = Transition(
        obs, state(np.concatenate([z0, z_next[:, :-1]], 1)), action, state(z_next),
        reward[s, action],
        np.broadcast_to(np.arange(T) == 0, obs.shape), ends, ~ends & ends, np.roll(obs, -1, 1),
    )  # fmt: skip
    traj, prob = jax.tree.map(jnp.asarray, (traj, prob))
    return Record(traj, prob, component, policy)


def draws(kernel, record):
    """Probability of the components and of the whole policies drawn, visited or not."""
    cell = kernel.cell.distribution
    log_w, log_p = jax.nn.log_softmax(cell.mixture), jax.nn.log_softmax(cell.logits)
    component, table = record.component, jnp.asarray(POLICIES)[record.policy]  # [N, 2], [N, 2, L]
    slots = np.arange(2)
    log_prob = log_w[component] + log_p[component[..., None], slots, table].sum(-1)
    return jnp.exp(log_prob.sum(-1))


def exact_gradient(kernel, record):
    discounted = record.traj.reward @ GAMMA ** jnp.arange(T)
    return eqx.filter_grad(lambda k: jnp.sum(record.prob * draws(k, record) * discounted))(kernel)


def mean(estimator, kernel, record):
    estimates = jax.vmap(partial(estimator, kernel))(record.traj)
    prob = record.prob * draws(kernel, record)
    return jax.tree.map(lambda g: jnp.tensordot(prob, g, 1), estimates)


def first_visits(kernel, traj):
    weight = held.discounted_returns(traj, gamma=GAMMA)
    return score_estimate(kernel, traj, weight, segment_length=1)


def from_window_start(kernel, traj):
    weight = held.window_returns(kernel, traj, gamma=GAMMA)
    return score_estimate(kernel, traj, weight, segment_length=1)


def in_window_return(kernel, traj):
    ends = (jnp.arange(T) + 1) % K == 0
    weight = held.discounted_returns(traj._replace(terminated=ends), gamma=GAMMA)
    return score_estimate(kernel, traj, weight, segment_length=1)


def every_visit(kernel, traj):
    weight = held.discounted_returns(traj, gamma=GAMMA)

    def surrogate(kernel):
        log_probs = jax.nn.log_softmax(kernel.cell.distribution.logits)[0, traj.obs, traj.action]
        return weight @ log_probs

    return eqx.filter_grad(surrogate)(kernel)


def expected_component(kernel, traj, *, weight=None):
    if weight is None:
        weight = held.discounted_returns(traj, gamma=GAMMA)
    memory = jnp.zeros((1, len(kernel.cell.distribution.mixture)))
    trajs, weights = jax.tree.map(lambda x: x[None], (traj, weight))
    gradient = gpomdp.gradient(held.responsibilities, kernel, memory, trajs, T * weights)
    return gradient


def expected_component_of_windows(kernel, traj):
    weight = held.window_returns(kernel, traj, gamma=GAMMA)
    return expected_component(kernel, traj, weight=weight)


@pytest.fixture(scope="module")
def product(world):
    return held_kernel(jr.normal(jr.key(0), (1, 2, 2)), k=K), enumerate_record(world, 1)


@pytest.fixture(scope="module")
def mixture(world):
    kernel = held_kernel(jr.normal(jr.key(1), (2, 2, 2)), jnp.array([0.5, -0.5]), k=K)
    return kernel, enumerate_record(world, 2)


def test_the_record_is_complete(product):
    kernel, record = product
    assert np.isclose(jnp.sum(record.prob * draws(kernel, record)), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [first_visits, from_window_start, expected_component, expected_component_of_windows],
)
@pytest.mark.parametrize("policy", ["product", "mixture"])
def test_estimates_are_unbiased(estimator, policy, request):
    kernel, record = request.getfixturevalue(policy)
    truth = eqx.filter_jit(exact_gradient)(kernel, record)
    assert largest_difference(eqx.filter_jit(mean)(estimator, kernel, record), truth) < 1e-12
    assert largest_difference(truth, jax.tree.map(jnp.zeros_like, truth)) > 0.1


@pytest.mark.parametrize("estimator", [every_visit, in_window_return])
def test_tempting_estimates_are_biased(estimator, product):
    kernel, record = product
    truth = eqx.filter_jit(exact_gradient)(kernel, record)
    assert largest_difference(eqx.filter_jit(mean)(estimator, kernel, record), truth) > 0.01


@pytest.mark.long
def test_expectation_over_the_component_varies_less(mixture):
    kernel, record = mixture
    prob = record.prob * draws(kernel, record)

    @eqx.filter_jit
    def spread(estimator):
        estimates = jax.vmap(partial(estimator, kernel))(record.traj)
        square = lambda g: jnp.tensordot(prob, g**2, 1) - jnp.tensordot(prob, g, 1) ** 2
        return sum(square(g).sum() for g in jax.tree.leaves(estimates))

    assert spread(expected_component_of_windows) < 0.95 * spread(from_window_start)


def test_responsibilities_are_those_of_bayes(mixture):
    """Over a window the scores add up to ρ_c - w_c and ρ_c Σ ∇ log p_c."""
    kernel, record = mixture
    traj = jax.tree.map(lambda x: x[12345], record.traj)

    def surrogate(kernel):
        log_m, memory = held.responsibilities(kernel, jnp.zeros(2), traj)
        return log_m[K:].sum(), memory

    gradient, memory = eqx.filter_grad(surrogate, has_aux=True)(kernel)
    cell = kernel.cell.distribution
    w, p = jax.nn.softmax(cell.mixture), jax.nn.softmax(cell.logits)
    kept = np.asarray(traj.z_next.actions[-1])
    visited = kept >= 0
    joint = w * np.prod(np.where(visited, p[:, np.arange(2), kept], 1), 1)
    rho = joint / joint.sum()
    assert np.allclose(jax.nn.softmax(memory), rho)
    assert np.allclose(gradient.cell.distribution.mixture, rho - w)
    score = visited[:, None] * (np.eye(2)[kept] - p)
    assert np.allclose(gradient.cell.distribution.logits, rho[:, None, None] * score)


def test_a_list_of_policies_is_a_mixture_of_certain_components(world):
    """Its mixture has the exact gradient, of both estimates, and certain logits never move."""
    kernel = held_kernel(certain_logits(POLICIES[:3], 2), jnp.array([0.3, -0.2, 0.0]), k=K)
    record = enumerate_record(world, 3)
    keep = (record.component == record.policy).all(1)  # the others have probability 0
    record = jax.tree.map(lambda x: x[keep], record)
    truth = eqx.filter_jit(exact_gradient)(kernel, record)
    for estimator in (first_visits, expected_component):
        found = eqx.filter_jit(mean)(estimator, kernel, record)
        found, exactly = found.cell.distribution, truth.cell.distribution
        assert np.allclose(found.mixture, exactly.mixture, atol=1e-12)
        assert not found.logits.any()


def test_direct_estimate_is_unbiased(world):
    """∂J/∂w_D over w, D forced in window M; windows beyond the second earn nothing here."""
    record = enumerate_record(world, 1)
    w = jnp.array([0.1, 0.2, 0.3, 0.4])
    discounted = (record.traj.reward * GAMMA ** jnp.arange(T)).reshape(-1, 2, K).sum(-1)

    def of_windows(v):  # as in V = Σ_D w_D Q, a later draw does not multiply earlier rewards
        first, second = record.policy.T
        early = v[first] * w[second] * discounted[:, 0]
        return jnp.sum(record.prob * (early + v[first] * v[second] * discounted[:, 1]))

    truth = jax.grad(of_windows)(w)
    alive = GAMMA**K
    found = np.zeros(4)
    for window in (0, 1):
        for life, chance in ((0, 1 - alive), (1, alive)):  # a longer life changes nothing
            estimate = jax.vmap(partial(held.direct_estimate, k=K, gamma=GAMMA), (0, None, None))
            values = estimate(record.traj, jnp.array(window), jnp.array(life))
            prob = (1 - alive) * alive**window * chance * record.prob
            others = w[record.policy[:, 1 - window]]
            for d in range(4):
                forced = record.policy[:, window] == d
                found[d] += jnp.sum(prob * others * forced * values)
    assert np.allclose(found, truth, rtol=1e-12)


def held_trajectory(kernel, env, component, *, num_steps, key):
    hold_key, start_key, key = jr.split(key, 3)
    forced, window, life = held.hold(kernel, component, gamma=GAMMA, key=hold_key)
    carry = reset(forced, env, key=start_key)
    return rollout(forced, env, carry, num_steps=num_steps, key=key)[1], window, life


def open_env(world, **words):
    tabular = Tabular(world, **words)
    return Env(tabular, tabular.default_params)


@pytest.mark.slow
def test_hold_holds_the_component_in_its_window_alone(world):
    kernel = held_kernel(certain_logits(POLICIES, 2), k=K)
    run = partial(held_trajectory, kernel, open_env(world), jnp.array(2), num_steps=60)
    traj, window, life = jax.jit(jax.vmap(lambda key: run(key=key)))(jr.split(jr.key(0), 2000))
    component = traj.z_next.component[:, ::K]  # [N, windows]
    forced = np.arange(20) == window[:, None]
    assert (component[forced] == 2).all()
    share = np.bincount(component[~forced], minlength=4) / (~forced).sum()
    assert np.allclose(share, 0.25, atol=0.01)
    alive = GAMMA**K
    for n in range(4):
        for number in (window, life):
            assert np.isclose((number == n).mean(), (1 - alive) * alive**n, atol=0.03)


def test_nothing_counts_after_an_episode(world):
    kernel = held_kernel(certain_logits(POLICIES, 2), k=K)
    env = open_env(world, max_steps_in_episode=4)
    traj, _, _ = held_trajectory(kernel, env, jnp.array(0), num_steps=10, key=jr.key(0))
    assert traj.reward.all()
    whole = partial(held.direct_estimate, window=jnp.array(0), life=jnp.array(9), k=K, gamma=GAMMA)
    cut = traj._replace(reward=traj.reward.at[4:].set(0.0))
    assert np.allclose(whole(traj), whole(cut))
    assert not np.allclose(whole(traj), 0)


@pytest.mark.slow
def test_sampled_ascents_agree_with_the_exact_gradient(world):
    """Of 4000 endless trajectories, within four standard errors of the solution's gradient."""
    kernel = held_kernel(certain_logits(POLICIES, 2), jnp.array([0.5, 0.0, -0.5, 0.2]), k=K)
    env = open_env(world)

    @jax.jit
    @jax.vmap
    def one(key):
        traj, window, life = held_trajectory(kernel, env, jnp.array(1), num_steps=120, key=key)
        return held.direct_estimate(traj, window, life, k=K, gamma=GAMMA)

    samples = one(jr.split(jr.key(1), 4000))
    weights = jax.nn.softmax(kernel.cell.distribution.mixture)
    truth = exact.kstep_values(world, POLICIES, weights, k=K, gamma=GAMMA).gradient[1]
    assert abs(samples.mean() - truth) < 4 * samples.std() / 4000**0.5
