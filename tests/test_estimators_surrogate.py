from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, make_kernel, make_trajectory

from spg.estimators.score import score_estimate
from spg.estimators.surrogate import ppo_surrogate
from spg.scans import split_segments
from spg.types import LogProb

pytestmark = pytest.mark.usefixtures("float64")

CASES = [
    ("gru", 0.3, 1),
    pytest.param("gru", None, 4, marks=pytest.mark.slow),
    ("finite", None, 3),
    pytest.param("linear", None, 12, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "state_std", "segment_length"), CASES)
def test_the_first_ratio_is_one_and_its_gradient_the_score_estimate(
    name, state_std, segment_length
):
    kernel = make_kernel(name, jr.key(0), state_std=state_std)
    traj = make_trajectory(kernel, jr.key(1))
    segments = split_segments(traj, segment_length)
    advantage = jr.normal(jr.key(2), segments.reward.shape)
    score = eqx.filter_jit(lambda kernel: jax.vmap(kernel.log_prob)(segments))
    old = score(kernel)

    @eqx.filter_jit
    @partial(eqx.filter_grad, has_aux=True)
    def objective(kernel):
        surrogate = ppo_surrogate(score(kernel), old, advantage, clip=0.2)
        return surrogate.objective.sum(), surrogate

    gradient, surrogate = objective(kernel)
    assert np.array_equal(surrogate.objective, advantage)  # the ratio is exactly 1
    assert not np.any(surrogate.clipped)
    assert not any(np.any(kl) for kl in (surrogate.kl, surrogate.kl_action, surrogate.kl_z))
    estimate = eqx.filter_jit(score_estimate)(
        kernel, traj, advantage.reshape(-1), segment_length=segment_length
    )
    assert_trees_close(gradient, estimate, rtol=1e-10, atol=1e-12)


def scores(seed, num_steps=40):
    rng = np.random.default_rng(seed)
    numbers = lambda: jnp.asarray(rng.normal(size=num_steps) * 0.3)
    new, old = (LogProb(numbers(), numbers(), numbers()) for _ in range(2))
    return new, old, numbers()


def slow_surrogate(new, old, advantage, clip):
    """Case by case: is the step better or worse than expected, is its ratio inside the clip?"""
    out = np.zeros(len(advantage))
    for t in range(len(advantage)):
        ratio = np.exp(new.z[t] - old.z[t])
        ratio *= np.exp(new.action[t] - old.action[t])
        if advantage[t] > 0 and ratio > 1 + clip:
            ratio = 1 + clip
        if advantage[t] < 0 and ratio < 1 - clip:
            ratio = 1 - clip
        out[t] = ratio * advantage[t]
    return out


@pytest.mark.parametrize("clip", [0.0, 0.1, 0.5])
def test_surrogate_is_pessimistic_about_large_ratios(clip):
    new, old, advantage = scores(0)
    out = ppo_surrogate(new, old, advantage, clip=clip)
    assert np.allclose(out.objective, slow_surrogate(new, old, advantage, clip), rtol=1e-12)


def test_clipped_steps_have_no_gradient_only_where_the_clip_binds():
    new, old, advantage = scores(1)
    slope = jax.grad(
        lambda x: ppo_surrogate(new._replace(z=x), old, advantage, clip=0.2).objective.sum()
    )(new.z)
    ratio = np.exp(new.joint - old.joint)
    binds = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    assert 0 < binds.sum() < len(binds)
    assert np.array_equal(slope == 0, binds)
    assert np.allclose(slope[~binds], (ratio * advantage)[~binds], rtol=1e-12)


def test_clipped_counts_ratios_beyond_the_clip():
    new, old, advantage = scores(2)
    ratio = np.exp(new.joint - old.joint)
    out = ppo_surrogate(new, old, advantage, clip=0.2)
    assert np.array_equal(out.clipped, (ratio > 1.2) | (ratio < 0.8))


def test_kl_estimates_are_non_negative_and_have_the_right_mean():
    """Two Gaussians of unit variance, means m apart: KL = m²/2; samples are from the old one."""
    shift, x = 0.3, jr.normal(jr.key(0), (100_000,))
    log_p = lambda mean: -0.5 * (x - mean) ** 2
    zeros = jnp.zeros_like(x)
    out = ppo_surrogate(
        LogProb(log_p(shift), zeros, zeros), LogProb(log_p(0.0), zeros, zeros), zeros, clip=0.2
    )
    kl = np.asarray(out.kl_z)
    assert kl.min() >= 0
    assert abs(kl.mean() - shift**2 / 2) < 4 * kl.std() / len(kl) ** 0.5
    assert np.array_equal(out.kl, out.kl_z)
    assert not np.any(out.kl_action)


def test_clip_can_be_vmapped():
    new, old, advantage = scores(3)
    clips = jnp.array([0.1, 0.2])
    sweep = jax.jit(jax.vmap(lambda c: ppo_surrogate(new, old, advantage, clip=c).objective))(clips)
    plain = [ppo_surrogate(new, old, advantage, clip=float(c)).objective for c in clips]
    assert np.allclose(sweep, jnp.stack(plain), rtol=1e-12)


@jax.jit
@partial(jax.grad, has_aux=True)
def of_one_step(log_ratio, advantage):
    zero = jnp.zeros_like(log_ratio)
    new, old = (LogProb(zero, x, zero) for x in (log_ratio, zero))
    out = ppo_surrogate(new, old, advantage, clip=0.2)
    return out.objective, out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("log_ratio", [-1e3, -100.0, 21.0, 100.0, 1e3])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_a_ratio_beyond_the_range_of_exp_is_finite_and_points_back(log_ratio, advantage, dtype):
    """Beyond e^20 the objective is the tangent of exp there, clipped as before."""
    slope, out = of_one_step(jnp.asarray(log_ratio, dtype), jnp.asarray(advantage, dtype))
    assert all(np.isfinite(x) for x in (slope, *out))
    assert out.clipped == 1
    assert min(out.kl, out.kl_action, out.kl_z) >= 0
    if log_ratio < 0:
        assert np.allclose((out.kl, out.kl_action), -1 - log_ratio)  # ratio - 1 - log ratio
        assert np.allclose(out.objective, 0 if advantage > 0 else -1.6)
        assert np.allclose(slope, 0, atol=1e-40)
    else:
        ratio = np.exp(20.0) * (1 + log_ratio - 20)
        assert np.isclose(out.kl, ratio - 1 - log_ratio, rtol=1e-5)
        if advantage > 0:
            assert np.isclose(out.objective, 2.4)
            assert slope == 0
        else:
            assert np.isclose(out.objective, -2 * ratio, rtol=1e-5)
            assert np.isclose(slope, -2 * np.exp(20.0), rtol=1e-5)


def test_the_bound_on_the_ratio_has_no_kink():
    x = jnp.array([19.999999, 20.0, 20.000001])
    old = LogProb(*3 * [jnp.zeros(3)])
    objective = lambda x: ppo_surrogate(old._replace(z=x), old, -jnp.ones(3), clip=0.2).objective
    assert np.allclose(objective(x), -np.exp(x), rtol=1e-11)
    slope = jax.grad(lambda x: objective(x).sum())(x)
    assert np.allclose(slope, -np.exp(np.minimum(x, 20)), rtol=1e-11)
