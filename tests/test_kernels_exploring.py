"""Noise on actions that lasts from step to step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, make_kernel
from jax import lax

from spg.kernels.cells import Computed, Empty
from spg.kernels.exploring import Exploring
from spg.kernels.heads import DeterministicHead, TanhNormalHead
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Identity

pytestmark = pytest.mark.usefixtures("float64")
HEADS = [TanhNormalHead, DeterministicHead]


def make(head, correlation):
    """A kernel with memory whose two actions have noise, exploring."""
    kernel = make_kernel("gru", jr.key(0), state_std=0.3)
    kernel = eqx.tree_at(lambda k: k.head, kernel, head([4, 8, 2], std=0.5, key=jr.key(1)))
    return Exploring(kernel, 2, correlation)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_the_noise_is_a_share_of_the_last_one_and_z_is_as_without(head):
    obs, key, noise = jnp.ones(2), jr.key(2), jnp.array([0.5, -2.0])
    z = jnp.array([0.1, -0.2])
    white, lasting = make(head, 0.0), make(head, 0.8)
    action, (z_next, fresh) = white.sample(obs, (z, noise), key=key)
    assert_trees_close((action, z_next), white.kernel.sample(obs, z, key=key))
    action, (z_after, after) = lasting.sample(obs, (z, noise), key=key)
    np.testing.assert_allclose(z_after, z_next)
    np.testing.assert_allclose(after, 0.8 * noise + 0.6 * fresh)
    actions = lasting.kernel.head(lasting.kernel.normalizer(obs), z_next)
    np.testing.assert_allclose(action, actions.at(after))


def test_the_noise_opens_at_zero_and_becomes_that_of_the_kernel():
    head = DeterministicHead([1, 1], std=1.0, key=jr.key(0))
    head = jax.tree.map(jnp.zeros_like, head)  # a = ε', of deviation exp(0)
    kernel = Exploring(Kernel(Computed(Empty()), head, Identity(), jnp.zeros(0)), 1, 0.9)
    opened = kernel.reset(jnp.array(True), (jnp.zeros(0), jnp.ones(1)))
    assert_trees_close(opened, kernel.z0)

    def step(z, key):
        action, z = kernel.sample(jnp.zeros(1), z, key=key)
        return z, action[0]

    run = lambda key: lax.scan(step, kernel.z0, jr.split(key, 40))[1]
    actions = jax.jit(jax.vmap(run))(jr.split(jr.key(3), 20_000))
    products = actions[:, [0, 29]].T @ actions / len(actions)
    late, times = 1 - 0.9 ** (2 * 30), np.arange(40)
    np.testing.assert_allclose(products[0], 0.19 * 0.9**times, atol=0.02)  # 5 deviations
    np.testing.assert_allclose(products[1, 29:], late * 0.9 ** (times[29:] - 29), atol=0.05)


def test_actions_without_such_noise_are_refused():
    kernel = Exploring(make_kernel("gru", jr.key(0)), 2, 0.5)
    z = kernel.kernel.z0, jnp.zeros(2)
    with pytest.raises(ValueError, match="which Categorical cannot do"):
        kernel.sample(jnp.ones(2), z, key=jr.key(1))
