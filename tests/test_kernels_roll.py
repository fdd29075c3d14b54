"""A recorded segment run again, and the parts of policies and critics that learn from a buffer."""

import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, jitter, make_kernel, make_trajectory

from spg.distributions import Normal
from spg.kernels.cells import draw
from spg.kernels.critics import QCritic
from spg.kernels.heads import DeterministicHead, TanhNormalHead
from spg.kernels.networks import MLP, Normalizer, Unseen, trainable
from spg.types import Observation

pytestmark = pytest.mark.usefixtures("float64")

slow = partial(pytest.param, marks=pytest.mark.slow)
KERNELS = [("gru", None), slow("gru", 0.3), slow("linear", 0.3), ("lru", 0.3), slow("window", None)]
STARTS = (2, 3, 6)  # the segment opens inside an episode; one episode has a single step

roll = eqx.filter_jit(lambda kernel, steps, key=None: kernel.roll(steps, key=key))


def make(name, state_std, *, num_steps=8, starts=STARTS):
    """A kernel and a segment that another kernel recorded."""
    kernel, other = (make_kernel(name, jr.key(i), state_std=state_std) for i in range(2))
    steps = make_trajectory(other, jr.key(2), num_steps=num_steps, starts=starts)
    return kernel, steps._replace(z=steps.z + 0.1)


@pytest.mark.parametrize(("name", "state_std"), KERNELS)
def test_without_noise_a_roll_is_the_noise_free_policy_from_the_first_z_on(name, state_std):
    kernel, steps = make(name, state_std)
    rolled, z = roll(kernel, steps), steps.z[0]
    mode = jax.jit(lambda obs, z: kernel.mode(obs, z))
    actions, log_prob = jax.jit(lambda s, z: kernel.act(s, z, key=None))(steps, rolled.z_next)
    for t in range(8):
        z = kernel.z0 if t in STARTS else z
        assert np.allclose(rolled.z[t], z, rtol=1e-12)
        action, z = mode(steps.obs[t], z)
        for found in (rolled.z_next, rolled.chosen):
            assert np.allclose(found[t], z, rtol=1e-12)
        assert actions[t] == action
    assert not np.any(rolled.log_prob)
    assert not np.any(log_prob)


@pytest.mark.parametrize(("name", "state_std"), KERNELS)
def test_with_noise_a_roll_chains_draws_of_the_cell(name, state_std):
    """Each z' is scored by the cell at the z before it; z is z' of the step before, or z0."""
    kernel, steps = make(name, state_std)
    rolled = roll(kernel, steps, jr.key(3))
    assert np.allclose(rolled.z[0], steps.z[0])
    for t in range(1, 8):
        assert np.array_equal(rolled.z[t], kernel.z0 if t in STARTS else rolled.z_next[t - 1])

    @jax.jit
    @jax.vmap
    def score(obs, z, z_next):
        law: Any = kernel.cell(obs, z)
        return law.loc, law.log_prob(z_next)

    loc, truth = score(steps.obs, rolled.z, rolled.z_next)
    assert np.allclose(rolled.log_prob, truth, rtol=1e-9, atol=1e-12)
    if state_std is not None:
        assert np.unique(np.abs(rolled.z_next - loc)).size >= 8


def test_the_noise_of_a_roll_is_that_of_the_cell_and_fresh_in_every_step():
    """Standardised: means 0, variances 1, no correlation between steps; four standard errors."""
    kernel, steps = make("linear", 0.3, num_steps=3, starts=(2,))

    @jax.jit
    @jax.vmap
    def noise(key):
        rolled = kernel.roll(steps, key=key)
        law: Any = jax.vmap(kernel.cell)(steps.obs, rolled.z)
        return ((rolled.z_next - law.loc) / law.std).ravel()

    number = 4000
    drawn = np.asarray(noise(jr.split(jr.key(0), number)))
    assert np.abs(drawn.mean(0)).max() < 4 / math.sqrt(number)
    error = np.where(np.eye(6), math.sqrt(2), 1.0) / math.sqrt(number)
    assert np.all(np.abs(drawn.T @ drawn / number - np.eye(6)) < 4 * error)


def test_a_roll_of_one_step_is_a_draw_and_opens_where_first():
    for starts in ((), (0,)):
        kernel, steps = make("gru", 0.3, num_steps=1, starts=starts)
        rolled = roll(kernel, steps, jr.key(3))
        z = kernel.z0 if starts else steps.z[0]
        assert np.array_equal(rolled.z[0], z)
        score = jax.jit(lambda obs, z, x, kernel=kernel: kernel.cell(obs, z).log_prob(x))
        assert np.allclose(rolled.log_prob[0], score(steps.obs[0], z, rolled.z_next[0]), rtol=1e-10)


def test_gradients_of_a_computed_roll_reach_back_to_the_opening_of_the_episode():
    """From z' for the head to the observations; from z' for Q nowhere."""
    kernel, steps = make("gru", None, num_steps=5, starts=(2,))
    z_next = lambda obs: kernel.roll(steps._replace(obs=obs), key=None)[1:3]
    jacobians = jax.jit(jax.jacobian(z_next))(steps.obs)  # [5, z, 5, o]
    for_head, for_q = (np.abs(x).max((1, 3)) > 1e-9 for x in jacobians)
    past = np.tril(np.ones((5, 5), bool))
    past[2:, :2] = False
    assert np.array_equal(for_head, past)
    assert not for_q.any()


@pytest.mark.parametrize("key", [None, jr.key(3)])
def test_gradients_of_a_drawn_roll_are_those_of_its_steps_alone(key):
    """z' = location(o, z) + σ n, with constants for z and n in every step."""
    kernel, steps = make("gru", 0.3, num_steps=5, starts=(2,))
    rolled = roll(kernel, steps, key)

    @jax.jit
    def draws():
        law: Any = jax.vmap(kernel.cell)(steps.obs, rolled.z)
        return (rolled.z_next - law.loc) / law.std

    noise = draws()

    def alone(kernel):
        law: Any = jax.vmap(kernel.cell)(steps.obs, rolled.z)
        return law.loc + law.std * noise

    weight = jr.normal(jr.key(4), noise.shape)
    slope = lambda f: eqx.filter_grad(lambda kernel: jnp.vdot(weight, f(kernel)))

    @eqx.filter_jit
    def slopes(kernel):
        part = lambda name: lambda kernel: getattr(kernel.roll(steps, key=key), name)
        return [slope(f)(kernel) for f in (alone, part("z_next"), part("chosen"))]

    truth, *both = slopes(kernel)
    for found in both:
        assert_trees_close(found, truth, rtol=1e-10, atol=1e-13)
    assert np.abs(truth.cell.distribution.location.recurrent).max() > 1e-2


def test_a_roll_agrees_under_vmap():
    kernel, steps = make("gru", 0.3)
    _, other = make("gru", 0.3, starts=(0, 4))
    batch, keys = jax.tree.map(lambda *x: jnp.stack(x), steps, other), jr.split(jr.key(5))
    both = jax.jit(jax.vmap(lambda s, k: kernel.roll(s, key=k)))(batch, keys)
    for i, one in enumerate((steps, other)):
        assert_trees_close(
            jax.tree.map(lambda x, i=i: x[i], both), roll(kernel, one, keys[i]), rtol=1e-12
        )


def test_draw_without_a_key_is_the_mode():
    law = Normal(jnp.array([0.3, -2.0]), jnp.array([0.1, 0.2]))
    x, log_prob = draw(law, None)
    assert np.array_equal(x, law.loc)
    assert log_prob == 0
    x, log_prob = draw(law, jr.key(0))
    assert np.allclose(log_prob, law.log_prob(x))


@pytest.mark.parametrize("make_head", [TanhNormalHead, DeterministicHead])
def test_heads_of_small_gain_start_near_the_middle_with_the_deviation_asked_for(make_head):

    @eqx.filter_jit
    def start_and_far():
        head = make_head([5, 16, 2], std=0.3, gain=0.01, key=jr.key(0))
        law = head(jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, 0.1]))
        far = jitter(head, jr.key(1), 3.0)(5 * jnp.ones(3), jnp.ones(2))
        return head, law.std, law.mode(), far.mode()

    head, std, mode, far = start_and_far()
    assert np.allclose(std, 0.3, rtol=0.05)
    assert np.abs(mode).max() < 0.05
    assert np.all(np.abs(far) <= 1)
    assert np.abs(far).max() > 0.9
    assert trainable(head).log_std == (make_head is TanhNormalHead)


def test_the_tanh_normal_head_has_a_deviation_of_its_own_for_each_input_and_integrates_to_one():
    u, width = np.linspace(-12, 12, 20001, retstep=True)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def of(obs, actions):
        head = jitter(TanhNormalHead([3, 8, 1], std=0.5, key=jr.key(0)), jr.key(1))
        law: Any = head(obs, jnp.array([0.4, -0.3]))
        x, log_prob = law.sample_and_log_prob(key=jr.key(2))
        density = jnp.exp(jax.vmap(law.log_prob)(actions))
        return law.loc, law.std, law.mode(), density, x, log_prob, law.log_prob(x)

    found = of(jnp.array([[-1.0], [2.0]]), jnp.tanh(u)[:, None])
    loc, std, mode, density, x, log_prob, scored = map(np.asarray, found)
    assert not np.allclose(std[0], std[1], rtol=0.1)
    assert np.allclose(mode, np.tanh(loc))
    inside = np.abs(np.tanh(u)) < 1
    mass = np.sum((density / np.cosh(u) ** 2)[:, inside], 1) * width
    assert np.allclose(mass, 1, rtol=1e-8)
    assert np.abs(x).max() < 1
    assert np.allclose(log_prob, scored, rtol=1e-8)


def test_the_deterministic_head_is_explored_with_a_constant_deviation():
    head = jitter(DeterministicHead([3, 8, 2], std=0.1, key=jr.key(0)).mlp, jr.key(1))
    head = eqx.tree_at(lambda h: h.mlp, DeterministicHead([3, 8, 2], std=0.1, key=jr.key(0)), head)
    x = jnp.array([0.5, 1.0, -1.0])
    law = head(x[:1], x[1:])
    hidden = np.maximum(head.mlp.layers[0].weight @ x + head.mlp.layers[0].bias, 0)
    truth = np.tanh(head.mlp.layers[1].weight @ hidden + head.mlp.layers[1].bias)
    assert np.allclose(law.mode(), truth, rtol=1e-12)
    assert np.allclose(law.std, 0.1)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_ensemble_is_that_of_its_members(layer_norm):
    """Each is a perceptron of its own on the critic's view, the action and a feature of z'."""

    @eqx.filter_jit
    def make_critic():
        critic = QCritic(
            3, 2, 4, [8, 6], num_critics=3, layer_norm=layer_norm, key=jr.key(0),
            feature=lambda z: jnp.concatenate([z.real, z.imag]),
        )  # fmt: skip
        seen = Normalizer(3).update(jr.normal(jr.key(1), (9, 3)))
        return eqx.tree_at(lambda c: c.normalizer, critic, seen)

    critic = make_critic()
    obs, action = Observation(jnp.zeros(1), jnp.array([0.2, -1.0, 3.0])), jnp.array([0.5, -0.5])
    z_next = jnp.array([1.0 + 2j, -0.3 - 1j])
    found = eqx.filter_jit(critic)(obs, action, z_next)
    normalizer = critic.normalizer
    seen = (np.asarray(obs.critic) - normalizer.mean) / np.sqrt(normalizer.var)
    inputs = np.concatenate([seen, action, z_next.real, z_next.imag])
    for i in range(3):
        x = inputs
        layers = jax.tree.map(lambda w, i=i: np.asarray(w[i]), critic.mlps).layers
        for layer in layers[:-1]:
            x = layer.weight @ x + layer.bias
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) if layer_norm else x
            x = np.maximum(x, 0)
        assert np.allclose(found[i], layers[-1].weight @ x + layers[-1].bias, rtol=1e-10)
    assert np.unique(np.round(found, 6)).size == 3


def test_a_critic_for_which_z_is_unseen_takes_no_notice_of_it():
    critic = QCritic(2, 1, 0, [4], feature=Unseen(), key=jr.key(0))
    value = lambda z: critic(jnp.ones(2), jnp.ones(1), z).sum()
    assert Unseen()(jnp.ones(3)).shape == (0,)
    assert not np.any(jax.grad(value)(jnp.ones(3)))


def test_layer_norm_leaves_the_output_alone_and_no_parameters():
    sizes = {"sizes": [3, 7, 7, 2], "gain": 1.0, "key": jr.key(0)}
    mlp, plain = MLP(**sizes, layer_norm=True), MLP(**sizes)
    assert_trees_close(mlp, eqx.tree_at(lambda m: m.layers, mlp, plain.layers))
    x = np.array([1.0, -2.0, 0.5])
    for layer in mlp.layers[:-1]:
        x = layer.weight @ x
        x = np.tanh((x - x.mean()) / np.sqrt(x.var() + 1e-5))
    assert np.allclose(mlp(jnp.array([1.0, -2.0, 0.5])), mlp.layers[-1].weight @ x, rtol=1e-12)


@pytest.mark.parametrize("loc", [np.array([1.0, -2.0]), np.array([1.0 + 1j, -2.0 + 0.5j])])
def test_near_is_the_clipped_noise_of_each_part_in_units_of_the_deviation(loc):
    law, keys = Normal(jnp.asarray(loc), jnp.array([0.1, 3.0])), jr.split(jr.key(0), 3000)
    near = lambda share, limit: jax.jit(
        jax.vmap(lambda key: law.near(share=share, limit=limit, key=key))
    )(keys)
    draws = jax.vmap(lambda key: law.sample(key=key))(keys)
    assert np.allclose(near(1.0, 1e9), draws, rtol=1e-12)
    assert np.allclose(near(0.0, 1.0), loc)
    apart = np.asarray((near(0.5, 0.8) - loc) / law.std)
    noise = np.asarray((draws - loc) / law.std)
    parts = (np.real, np.imag) if np.iscomplexobj(loc) else (np.real,)
    for part in parts:
        assert np.allclose(
            part(apart), np.clip(0.5 * part(noise), -0.8, 0.8), rtol=1e-8, atol=1e-12
        )
        assert np.isclose(part(apart).max(), 0.8)
