"""The figures of docs/results/questions.md measure what they say."""

import csv
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from scripts.benchmarks import questions
from scripts.benchmarks import questions_limit as limit
from scripts.benchmarks import questions_variance as variance
from spg.estimators.bounds import Constants, bptt_variance_bound, s2pg_variance_bound
from spg.exact.enumeration import trajectories

DECAYS, LENGTHS = (0.5, 0.9, 1.1), (8, variance.LENGTH, 64)


@pytest.fixture(scope="module")
def rows():
    """A small measurement of `variance`, with the methods that theorems speak of, and the path."""
    with pytest.MonkeyPatch.context() as patch:
        for method in set(variance.METHODS) - {"BPTT", "S2PG", "S2PG, path"}:  # to save compiling
            patch.delitem(variance.METHODS, method)
        return variance.measure(
            range(2), decays=DECAYS, lengths=LENGTHS, stds=(0.1, 1.0), num_trajectories=1000
        )


def curve(rows, method, decay):
    """Variance over T, without the growth of the squared return: (Σ_t γ^t)² = T² at γ = 1."""
    points = [r for r in rows if (r.sweep, r.method, r.decay) == ("length", method, decay)]
    return np.array([r.variance / r.num_steps**2 for r in points])


def slopes(rows, method, decay):
    """d log Var / d log T between neighbouring lengths."""
    return np.diff(np.log(curve(rows, method, decay))) / np.diff(np.log(LENGTHS))


@pytest.mark.slow
def test_measured_variances_stay_below_the_bounds(rows):
    assert len(rows) == 3 * len(DECAYS) * (len(LENGTHS) + 2)
    for row in rows:
        bounded = row.method in ("BPTT", "S2PG")
        assert bounded == np.isfinite(row.bound)
        assert 0 < row.variance < (row.bound if bounded else np.inf)


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
def test_variance_of_s2pg_is_linear_in_the_length(rows, decay):
    """Theorem 3.5: linear whatever |dz'/dz| is; within sampling error of 2000 trajectories."""
    assert np.allclose(slopes(rows, "S2PG", decay), 1, atol=0.25)


@pytest.mark.slow
def test_variance_of_bptt_is_polynomial_where_the_state_forgets(rows):
    """Theorem 3.4, Z = ½: Z̃ and Z̄ are linear in T."""
    assert np.allclose(slopes(rows, "BPTT", 0.5), 1, atol=0.3)


@pytest.mark.slow
def test_variance_of_bptt_is_exponential_where_the_state_grows(rows):
    """Theorem 3.4, Z = 1.1: Z̄ grows as Z^{2T}, so the slope in log T keeps growing with T."""
    slope = slopes(rows, "BPTT", 1.1)
    assert slope[1] > slope[0] + 1
    growth = np.diff(np.log(curve(rows, "BPTT", 1.1)))[-1] / (LENGTHS[-1] - LENGTHS[-2])
    assert np.isclose(growth, 2 * np.log(1.1), rtol=0.2)


@pytest.mark.slow
def test_s2pg_beats_bptt_by_more_the_longer_the_episode(rows):
    ratio = curve(rows, "BPTT", 1.1) / curve(rows, "S2PG", 1.1)
    assert (ratio > 1).all()
    assert (np.diff(ratio) > 0).all()


@pytest.mark.slow
def test_path_does_not_blow_up_with_the_score(rows):
    """From σ = 1 to 0.1 the score's variance grows about hundredfold, the path's does not."""
    for decay in DECAYS:
        for method, low, high in (("S2PG", 20, 200), ("S2PG, path", 0.1, 10)):
            some = [r for r in rows if (r.sweep, r.method, r.decay) == ("noise", method, decay)]
            small, large = (r.variance for r in some)
            assert low < small / large < high


@pytest.mark.slow
def test_seeds_are_independent(rows):
    assert all(0 < row.std_error < row.variance for row in rows)


def test_bounds_are_the_sums_of_the_theorems():
    """Every term written out: T = 3, γ = ½, Z = 2: Z̃ = 0 + 1 + 3 = 4, Z̄ = 0 + 1 + 9 = 10."""
    c = Constants(
        reward=3.0, action_by_params=2.0, z_by_params=5.0, action_by_z=7.0, z_by_z=2.0,
        action_precision=0.5, z_precision=4.0,
    )  # fmt: skip
    setting = {"gamma": 0.5, "num_steps": 3, "num_trajectories": 10}
    scale = 3**2 * 0.5 * 1.75**2 / 10
    bptt = scale * (3 * 2**2 + 2 * 2 * 5 * 7 * 4 + 5**2 * 7**2 * 10)
    assert np.isclose(bptt_variance_bound(c, **setting), bptt)
    assert np.isclose(s2pg_variance_bound(c, **setting), scale * (3 * 2**2 + 3 * 5**2 * 4 / 0.5))


@pytest.mark.parametrize("std", [0.0, 0.7])
def test_value_is_that_of_the_integral_over_one_step(std):
    """V(z) = E [(1 + sin a) / 2 + γ V'(z')] by quadrature over o and both noises."""
    with jax.enable_x64(True):
        theta, decay, gamma = jnp.array([1.3, 0.2, -0.4]), 1.1, 0.8
        value = partial(variance.value, theta, decay, std, num_steps=5, gamma=gamma)
        o, o_weight = np.polynomial.legendre.leggauss(20)
        x, x_weight = np.polynomial.hermite_e.hermegauss(40)
        o, x, y = np.meshgrid(o, x, x, indexing="ij")
        weight = np.einsum("i,j,k->ijk", o_weight, x_weight, x_weight)
        z_next = decay * 0.6 + theta[0] * o + theta[1] + std * x
        action = variance.GAIN * z_next + theta[2] + variance.ACTION_STD * y
        future = jax.vmap(lambda z: value(z, 3))(z_next.reshape(-1)).reshape(z_next.shape)
        total = (1 + np.sin(action)) / 2 + gamma * future
        assert np.isclose(np.average(total, weights=weight), value(jnp.array(0.6), 4), rtol=1e-10)


@pytest.mark.parametrize("method", variance.METHODS)
def test_every_estimate_is_unbiased(method):
    """Each component within four standard errors of the exact gradient, T = 3, Z = 1.1, γ = ½."""
    estimate = partial(variance.estimate, method, 3, jnp.array(1.1), jnp.array(0.5), gamma=0.5)
    g = jax.jit(jax.vmap(estimate))(jr.split(jr.key(0), 20_000))
    exact = variance.exact_gradient(method, 3, 1.1, 0.5, gamma=0.5)
    assert (jnp.abs(g.mean(0) - exact) < 4 * g.std(0) / len(g) ** 0.5).all()
    assert jnp.linalg.norm(exact) > 0.1


@pytest.fixture(scope="module")
def case():
    """World, noise-free policy, its trajectories: T = 2."""
    with jax.enable_x64(True):
        world_key, kernel_key = jr.split(jr.key(0))
        world, kernel = limit.make_world(world_key), limit.make_kernel(kernel_key)
        yield world, kernel, trajectories(kernel, world, num_steps=2)


@pytest.mark.slow
def test_exact_gradient_of_the_noise_free_policy_is_theorem_2_3(case):
    """Local derivatives alone: ∇f^z ∂Q/∂z' and ∇μ Q at each step, weighted by probability."""
    world, kernel, _ = case
    exact = limit.exact_gradient(kernel, world, num_steps=2)
    gamma, eye = limit.GAMMA, jnp.eye(2)

    def value(kernel, z, left):  # V(s, z) of every s
        if left == 0:
            return jnp.zeros(2)
        steps = [half(kernel, obs, kernel.cell(obs, z).loc, left) for obs in eye]
        return jnp.einsum("so,os->s", world.observation, jnp.stack(steps))

    def half(kernel, obs, z_next, left):  # U(s, o, z') = Σ_a μ(a | o, z') Q(s, a, z')
        future = world.transition @ value(frozen, z_next, left - 1)
        return (world.reward + gamma * future) @ jax.nn.softmax(kernel.head(obs, z_next).logits)

    frozen = kernel
    theorem = 0.0
    reach = [(1.0, world.start, kernel.z0)]
    for t in range(2):
        ahead = []
        for discount, prob, z in reach:
            for o, obs in enumerate(eye):
                weight = discount * prob * world.observation[:, o]
                local = lambda k, obs=obs, z=z, w=weight, t=t: (
                    w @ half(k, obs, k.cell(obs, z).loc, 2 - t)
                )
                theorem += limit._flat(limit.eqx.filter_grad(local)(kernel))
                z_next = kernel.cell(obs, z).loc
                mu = jax.nn.softmax(kernel.head(obs, z_next).logits)
                moved = jnp.einsum(
                    "s,a,sat->t", prob * world.observation[:, o], mu, world.transition
                )
                ahead.append((discount * gamma, moved, z_next))
        reach = ahead
    assert jnp.allclose(theorem, exact, rtol=1e-10, atol=1e-12)


def test_mean_of_the_score_estimate_tends_to_the_noise_free_gradient(case):
    """The error is O(σ²), the variance of one estimate O(σ⁻²)."""
    _, kernel, steps = case
    with jax.enable_x64(True):
        exact = limit.exact_gradient(kernel, case[0], num_steps=2)
        found = [
            limit.moments(limit.drawn(kernel, std), *steps, limit.grid(2, 5)) for std in (0.1, 0.01)
        ]
    error = [float(jnp.linalg.norm(mean - exact)) for mean, _ in found]
    assert 0 < error[1] < 1e-3
    assert np.isclose(error[0] / error[1], 100, rtol=0.1)
    assert np.isclose(found[1][1] / found[0][1], 100, rtol=0.1)


def test_quadrature_has_converged(case):
    _, kernel, steps = case
    with jax.enable_x64(True):
        mean, more = (
            limit.moments(limit.drawn(kernel, 0.3), *steps, limit.grid(2, n))[0] for n in (6, 9)
        )
    assert jnp.allclose(mean, more, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["variance", "limit"])
def test_script_leaves_table_and_picture(tmp_path, monkeypatch, name):
    module = {"variance": variance, "limit": limit}[name]
    fake = {
        "variance": [
            variance.Row(sweep, method, 0.5, n, n / 8, 1.5 * n, 0.1, 1.0, float("nan"))
            for sweep in ("length", "noise") for method in variance.METHODS for n in (2, 4)
        ],
        "limit": [limit.Row(3, std, std**2, std**-2, 1.0) for std in (0.01, 0.1, 1.0)],
    }[name]  # fmt: skip
    monkeypatch.setattr(module, "measure", lambda seeds: fake)
    questions.main(questions.Config(question=name, num_seeds=2, seed=3, out=str(tmp_path)))
    with (tmp_path / f"{name}.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(fake)
    assert list(table[0]) == list(fake[0]._fields)
    assert name == "limit" or table[0]["bound"] == ""
    assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_slope_of_a_power_is_its_exponent():
    rows = [limit.Row(0, std, 3 * std**2, std**-2, 1.0) for std in (0.001, 0.01, 0.1, 1.0)]
    assert np.isclose(limit.slope(rows, "error"), 2)
    assert np.isclose(limit.slope(rows, "variance"), -2)
