import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from spg.exact import ascent, kstep
from spg.worlds import traps
from spg.worlds.models import dense

pytestmark = pytest.mark.usefixtures("float64")

GAMMA = 0.9
KS = jnp.array([1, 2, 4, 8, 16, 32])


@pytest.fixture(scope="module")
def random_worlds(float64):
    worlds = [dense(traps.random_aggregated(seed=seed).pomdp) for seed in range(40)]
    return jax.tree.map(lambda *x: jnp.stack(x), *worlds)


def test_step_sizes_stay_finite_where_the_smoothness_vanishes():
    pomdp = dense(traps.chain(4, 0.3).pomdp)
    for method in ("mirror", "projected"):
        _, returns = ascent.ascend(
            pomdp, np.array([[0], [1]]), k=3000, gamma=GAMMA, num_steps=3, method=method
        )
        assert np.isclose(returns[-1], 6.561)


def test_from_the_uniform_start_one_step_stays_and_seven_advance():
    pomdp = dense(traps.chain(4, 0.3).pomdp)
    run = lambda k: ascent.ascend(
        pomdp, np.array([[0], [1]]), k=k, gamma=GAMMA, num_steps=3000, method="projected"
    )
    returns = jax.jit(jax.vmap(run))(jnp.array([1, 7, 8, 16]))[1][:, -1]
    assert np.allclose(returns, [3.0, 6.561, 6.561, 6.561])


@pytest.mark.slow
def test_no_law_falls_short_by_more_than_the_bound(random_worlds):
    """J^D* - J(w) <= max ∂J/∂w - w ∂J/∂w + c_k for random w."""
    policies = kstep.all_policies(3, 2)
    weights = jr.dirichlet(jr.key(0), jnp.full(8, 0.3), (40,))

    def gap(pomdp, w, k):
        best = kstep.policy_returns(pomdp, policies, gamma=GAMMA).max()
        solution = kstep.kstep_values(pomdp, policies, w, k=k, gamma=GAMMA)
        towards = solution.gradient.max() - w @ solution.gradient
        return best - solution.expected_return, towards + ascent.gap_bound(k, GAMMA)

    of_every_world = jax.vmap(gap, (0, 0, None))
    gaps, bounds = jax.jit(jax.vmap(of_every_world, (None, None, 0)))(random_worlds, weights, KS)
    assert (gaps <= bounds).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mirror", "projected"])
def test_ascent_is_monotone_and_ends_as_the_theorem_says(random_worlds, method):
    """After every number of steps, for every k; and the worst gap falls with k."""
    policies = kstep.all_policies(3, 2)

    def run(pomdp, k):
        _, returns = ascent.ascend(
            pomdp, policies, k=k, gamma=GAMMA, num_steps=301, method=method, reward_range=1.0
        )
        return kstep.policy_returns(pomdp, policies, gamma=GAMMA).max() - returns

    gaps = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))(
        random_worlds, KS
    )  # [k, world, T]
    steps = jnp.arange(1, 301)
    bounds = jax.vmap(lambda k: ascent.rate_bound(steps, 8, k=k, gamma=GAMMA, method=method))(KS)
    assert (gaps[..., 1:] <= bounds[:, None]).all()
    assert (jnp.diff(gaps) <= 1e-12).all()
    worst = gaps[..., -1].max(1)
    assert (jnp.diff(worst) < 0).all()
    assert worst[0] > 1
    if method == "mirror":
        assert worst[3] < 0.1
        assert worst[5] < 0.001
        table = [192, 88, 39, 15, 4.6, 0.72]
        assert np.allclose(bounds[:, -1], table, rtol=0.03)


@pytest.mark.slow
def test_curvature_stays_below_the_smoothness_constant(random_worlds):
    policies = kstep.all_policies(3, 2)
    weights = jr.dirichlet(jr.key(1), jnp.ones(8), (40,))
    directions = jr.normal(jr.key(2), (40, 8))

    def curvature(pomdp, w, u, k):
        slope = lambda h: (
            kstep.kstep_values(pomdp, policies, w + h * u, k=k, gamma=GAMMA).gradient @ u
        )
        h = 1e-4
        return jnp.abs(slope(h) - slope(-h)) / (2 * h * jnp.abs(u).sum() ** 2)

    every = jax.vmap(jax.vmap(curvature, (0, 0, 0, None)), (None, None, None, 0))
    ratio = jax.jit(every)(random_worlds, weights, directions, KS)
    most = jax.vmap(lambda k: ascent.smoothness(k, GAMMA))(KS)
    assert (ratio <= most[:, None]).all()


def test_windows_that_the_bound_asks_for():
    assert ascent.steps_needed(0.1, 0.9) == 51
    assert ascent.steps_needed(0.5, 0.99) == 597
    assert ascent.gap_bound(51, 0.9) <= 0.1 < ascent.gap_bound(50, 0.9)
