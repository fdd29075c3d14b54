import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spg.estimators.returns import gae, returns_to_go

pytestmark = pytest.mark.usefixtures("float64")

GAMMA = 0.9


def random_rollout(seed, num_steps=8):
    rng = np.random.default_rng(seed)
    numbers = [jnp.asarray(rng.normal(size=num_steps)) for _ in range(3)]
    flags = [jnp.asarray(rng.random(num_steps) < 0.25) for _ in range(2)]
    return *numbers, *flags


def slow_gae(reward, value, next_value, terminated, truncated, gamma, gae_lambda):
    """Σ_k (γλ)^k δ_{t+k}, each t on its own, up to the first end."""
    out = np.zeros(len(reward))
    for t in range(len(reward)):
        weight = 1.0
        for k in range(t, len(reward)):
            future = 0.0 if terminated[k] else gamma * next_value[k]
            out[t] += weight * (reward[k] + future - value[k])
            weight *= gamma * gae_lambda
            if terminated[k] or truncated[k]:
                break
    return out


def slow_returns(reward, next_value, terminated, truncated, gamma):
    out = np.zeros(len(reward))
    for t in range(len(reward)):
        for k in range(t, len(reward)):
            out[t] += gamma ** (k - t) * reward[k]
            if terminated[k]:
                break
            if truncated[k] or k == len(reward) - 1:
                out[t] += gamma ** (k - t + 1) * next_value[k]
                break
    return out


@given(seed=st.integers(0, 2**16), gamma=st.floats(0, 1), gae_lambda=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_gae_is_the_sum_of_discounted_errors(seed, gamma, gae_lambda):
    rollout = random_rollout(seed)
    fast = gae(*rollout, gamma=gamma, gae_lambda=gae_lambda)
    assert np.allclose(fast, slow_gae(*rollout, gamma, gae_lambda), rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 2**16), gamma=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_returns_to_go_are_sums_up_to_the_end(seed, gamma):
    reward, _, next_value, terminated, truncated = random_rollout(seed)
    fast = returns_to_go(reward, next_value, terminated, truncated, gamma=gamma)
    slow = slow_returns(reward, next_value, terminated, truncated, gamma)
    assert np.allclose(fast, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gae_at_lambda_zero_is_the_td_error(seed):
    reward, value, next_value, terminated, _ = rollout = random_rollout(seed)
    td_error = reward + GAMMA * jnp.where(terminated, 0, next_value) - value
    assert np.array_equal(gae(*rollout, gamma=GAMMA, gae_lambda=0.0), td_error)


@pytest.mark.parametrize("seed", range(3))
def test_gae_at_lambda_one_is_returns_minus_value(seed):
    """Along an episode the next value is the value of the next step, so the sum telescopes."""
    reward, value, next_value, terminated, truncated = random_rollout(seed)
    ended = terminated | truncated
    next_value = jnp.where(ended.at[-1].set(True), next_value, jnp.roll(value, -1))
    advantage = gae(reward, value, next_value, terminated, truncated, gamma=GAMMA, gae_lambda=1.0)
    returns = returns_to_go(reward, next_value, terminated, truncated, gamma=GAMMA)
    assert np.allclose(advantage, returns - value, rtol=1e-12, atol=1e-12)


# Rewards 1, 2, 4; values 10, 20, 40; next values 100, 200, 400; γ = λ = ½. The errors δ are
# 1 + 50 - 10 = 41, 2 + 100 - 20 = 82, 4 + 200 - 40 = 164 where the step is not terminated and
# -9, -18, -36 where it is; δ_t + ¼ A_{t+1} unless the step ends the episode.
TRUNCATION = {
    "no end": ("...", "...", [41 + 123 / 4, 82 + 164 / 4, 164], [53, 104, 204]),
    "terminated first": ("x..", "...", [-9, 123, 164], [1, 104, 204]),
    "terminated inside": (".x.", "...", [41 - 18 / 4, -18, 164], [2, 2, 204]),
    "terminated last": ("..x", "...", [41 + 73 / 4, 82 - 36 / 4, -36], [3, 4, 4]),
    "truncated first": ("...", "x..", [41, 123, 164], [51, 104, 204]),
    "truncated inside": ("...", ".x.", [41 + 82 / 4, 82, 164], [52, 102, 204]),
    "truncated last": ("...", "..x", [41 + 123 / 4, 123, 164], [53, 104, 204]),
    "both inside": (".x.", ".x.", [41 - 18 / 4, -18, 164], [2, 2, 204]),
    "both last": ("..x", "..x", [41 + 73 / 4, 73, -36], [3, 4, 4]),
    "every step": ("x.x", ".x.", [-9, 82, -36], [1, 102, 4]),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUNCATION)
def test_truncation_table(name):
    terminated, truncated, advantage, returns = TRUNCATION[name]
    terminated, truncated = (jnp.array([c == "x" for c in x]) for x in (terminated, truncated))
    reward, value, next_value = (jnp.array([1.0, 2.0, 4.0]) * scale for scale in (1, 10, 100))
    out = gae(reward, value, next_value, terminated, truncated, gamma=0.5, gae_lambda=0.5)
    assert np.allclose(out, advantage)
    out = returns_to_go(reward, next_value, terminated, truncated, gamma=0.5)
    assert np.allclose(out, returns)


@pytest.mark.parametrize("terminated", [False, True])
@pytest.mark.parametrize("truncated", [False, True])
def test_one_step_is_a_rollout(terminated, truncated):
    """T = 1: A = r + γ V' - V and G = r + γ V', without the value where it terminated."""
    flags = jnp.array([terminated]), jnp.array([truncated])
    reward, value, next_value = (jnp.array([x]) for x in (1.0, 10.0, 100.0))
    target = 1 + (0 if terminated else 50)
    out = gae(reward, value, next_value, *flags, gamma=0.5, gae_lambda=0.5)
    assert np.allclose(out, target - 10)
    assert np.allclose(returns_to_go(reward, next_value, *flags, gamma=0.5), target)


def test_hyper_parameters_can_be_vmapped():
    rollout = random_rollout(0)
    gammas, lambdas = jnp.array([0.5, 0.9, 1.0]), jnp.array([0.0, 0.5, 1.0])
    sweep = jax.jit(jax.vmap(lambda g, l: gae(*rollout, gamma=g, gae_lambda=l)))(gammas, lambdas)
    plain = [
        gae(*rollout, gamma=float(g), gae_lambda=float(l))
        for g, l in zip(gammas, lambdas, strict=True)
    ]
    assert np.allclose(sweep, np.stack(plain), rtol=1e-12)
