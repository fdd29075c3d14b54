import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, jitter, make_kernel, make_trajectory

from spg.kernels.cells import GRU, Computed, Drawn, Empty, NormalAround, Window
from spg.kernels.critics import Critic
from spg.kernels.finite import TableMemory
from spg.kernels.heads import NormalHead
from spg.kernels.kernel import Kernel
from spg.kernels.linear import Linear
from spg.kernels.networks import MLP, Normalizer
from spg.types import Observation

pytestmark = pytest.mark.usefixtures("float64")

KERNELS = [
    ("gru", None),
    ("gru", 0.3),
    ("linear", None),
    ("linear", 0.3),
    ("associative", None),
    ("window", None),
    ("window", 0.3),
    ("empty", None),
    ("finite", None),
]
SOME_KERNELS = [("gru", None), ("linear", 0.3), ("associative", None), ("finite", None)]


log_prob = eqx.filter_jit(lambda kernel, traj: kernel.log_prob(traj))
draw = eqx.filter_jit(lambda kernel, obs, z, key: kernel.sample(obs, z, key=key))
mode = eqx.filter_jit(lambda kernel, obs, z: kernel.mode(obs, z))


@pytest.mark.parametrize(("name", "state_std"), KERNELS)
def test_log_prob_scores_what_sample_drew(name, state_std):
    """Step by step, with the internal state reset by hand where episodes open."""
    kernel = make_kernel(name, jr.key(0), state_std=state_std)
    traj = make_trajectory(kernel, jr.key(1))
    z, z_next = np.array(traj.z_next), np.asarray(traj.z_next)
    for t in range(12):
        z[t] = kernel.z0 if traj.first[t] else z_next[t - 1]

    @jax.jit
    @jax.vmap
    def score(obs, z, z_next, action):
        head = kernel.head(obs, z_next)
        return kernel.cell(obs, z).log_prob(z_next), head.log_prob(action), head.entropy()

    scored = log_prob(kernel, traj)
    assert np.allclose(traj.z, z)
    truth = score(traj.obs, z, z_next, traj.action)
    for recorded, true in zip(scored, truth, strict=True):
        assert np.allclose(recorded, true, rtol=1e-10)
    assert np.array_equal(scored.joint, scored.z + scored.action)


@pytest.mark.parametrize(("name", "state_std"), SOME_KERNELS)
def test_a_segment_that_opens_inside_an_episode_carries_on_from_its_z(name, state_std):
    kernel = make_kernel(name, jr.key(0), state_std=state_std)
    traj = make_trajectory(kernel, jr.key(1))
    tail = jax.tree.map(lambda x: np.asarray(x)[7:], traj)
    assert tail.first.tolist() == [False, False, True, False, False]
    whole = jax.tree.map(lambda x: np.asarray(x)[7:], log_prob(kernel, traj))
    assert_trees_close(log_prob(kernel, tail), whole, rtol=1e-10)


@pytest.mark.slow
def test_associative_scoring_equals_sequential_in_value_and_gradient():
    kernel = make_kernel("linear", jr.key(0), z_size=3)
    other = make_kernel("associative", jr.key(0), z_size=3)
    assert kernel.cell.location.method == "auto"
    assert other.cell.location.method == "associative"
    traj = make_trajectory(kernel, jr.key(1), num_steps=7, starts=(0, 3, 4, 6))
    weight = jr.normal(jr.key(2), (7,))
    value = lambda kernel: jnp.vdot(weight, kernel.log_prob(traj).joint)
    value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(value))
    sequential, associative = value_and_grad(kernel), value_and_grad(other)
    for a, b in zip(jax.tree.leaves(sequential), jax.tree.leaves(associative), strict=True):
        assert np.allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["gru", "linear"])
def test_vanishing_noise_recovers_the_computed_kernel(name):
    """The same keys draw the same z' and a up to O(σ), and score the actions alike."""
    computed = make_kernel(name, jr.key(0))
    traj = make_trajectory(computed, jr.key(1))
    start = traj.obs[0], traj.z[0]
    for state_std in (1e-3, 1e-6, 1e-9):
        noisy = make_kernel(name, jr.key(0), state_std=state_std)
        assert_trees_close(mode(noisy, *start), mode(computed, *start))
        drawn = make_trajectory(noisy, jr.key(1))
        assert np.array_equal(drawn.action, traj.action)
        assert np.allclose(drawn.z_next, traj.z_next, rtol=0, atol=20 * state_std)
        scored, truth = log_prob(noisy, drawn).action, log_prob(computed, traj).joint
        assert np.allclose(scored, truth, rtol=0, atol=50 * state_std)


@pytest.mark.parametrize(("name", "state_std"), SOME_KERNELS)
def test_a_draw_with_its_log_prob_is_the_draw_and_its_log_prob(name, state_std):
    kernel = make_kernel(name, jr.key(0), state_std=state_std)
    traj = make_trajectory(kernel, jr.key(1), num_steps=1, starts=(0,))
    obs, z = traj.obs[0], traj.z[0]

    @jax.jit
    def both(key):
        action, z_next = kernel.sample(obs, z, key=key)
        one = traj._replace(action=action[None], z_next=z_next[None])
        return (action, z_next, kernel.log_prob(one)), kernel.sample_and_log_prob(obs, z, key=key)

    (action, z_next, scored), drawn = both(jr.key(2))
    assert np.array_equal(drawn[0], action)
    assert np.array_equal(drawn[1], z_next)
    assert_trees_close(drawn[2], jax.tree.map(lambda x: x[0], scored), rtol=1e-10)


def test_a_drawn_internal_state_is_differentiable_in_the_kernel():
    kernel = make_kernel("gru", jr.key(0), state_std=0.3)
    traj = make_trajectory(kernel, jr.key(1), num_steps=1, starts=(0,))

    @eqx.filter_jit
    @eqx.filter_grad
    def slope(kernel):
        return kernel.sample_and_log_prob(traj.obs[0], traj.z[0], key=jr.key(2))[1].sum()

    drawn = slope(kernel).cell.distribution
    location = kernel.cell.distribution.location(kernel.normalizer(traj.obs[0]), traj.z[0])
    noise = kernel.sample(traj.obs[0], traj.z[0], key=jr.key(2))[1] - location
    assert np.allclose(drawn.log_std, noise, rtol=1e-10)  # z' = location + σ n
    assert np.any(drawn.location.recurrent)


def test_a_kernel_runs_without_jit():
    kernel = make_kernel("gru", jr.key(0))
    traj = make_trajectory(kernel, jr.key(1))
    assert_trees_close(kernel.log_prob(traj), log_prob(kernel, traj), rtol=1e-10)
    plain = kernel.sample(traj.obs[3], traj.z[3], key=jr.key(2))
    drawn = draw(kernel, traj.obs[3], traj.z[3], jr.key(2))
    for a, b in zip(drawn, plain, strict=True):
        assert np.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize(("name", "state_std"), SOME_KERNELS)
def test_kernels_agree_under_vmap(name, state_std):
    kernel = make_kernel(name, jr.key(0), state_std=state_std)
    keys = jr.split(jr.key(1), 3)
    trajs = [make_trajectory(kernel, key) for key in keys]
    batch = jax.tree.map(lambda *x: np.stack(x), *trajs)
    obs, z = batch.obs[:, 3], batch.z[:, 3]

    @jax.jit
    @jax.vmap
    def both(traj, obs, z, key):
        return kernel.log_prob(traj), kernel.sample(obs, z, key=key)

    scored, drawn = both(batch, obs, z, keys)
    plain = jax.tree.map(lambda *x: np.stack(x), *(log_prob(kernel, traj) for traj in trajs))
    assert_trees_close(scored, plain, rtol=1e-10)
    plain = [draw(kernel, *x) for x in zip(obs, z, keys, strict=True)]
    for a, b in zip(drawn, zip(*plain, strict=True), strict=True):
        assert np.allclose(a, np.stack(b), rtol=1e-12)


def test_scoring_is_traced_once():
    once = eqx.filter_jit(eqx.debug.assert_max_traces(lambda k, t: k.log_prob(t), max_traces=1))
    for seed in range(3):
        kernel = make_kernel("gru", jr.key(seed), state_std=0.1)
        once(kernel, make_trajectory(kernel, jr.key(seed)))


def test_action_and_state_are_drawn_with_different_randomness():
    """Both Gaussian of the same size: one key used twice would give correlation 1."""
    kernel = Kernel(
        Drawn(NormalAround(Linear(1, 1, key=jr.key(0)), jnp.zeros(1))),
        NormalHead([2, 1], std=1.0, key=jr.key(1)),
        Normalizer(1),
        jnp.zeros(1),
    )

    @jax.jit
    @jax.vmap
    def drawn(key):
        action, z = kernel.sample(jnp.zeros(1), jnp.zeros(1), key=key)
        return action, z, kernel.head(jnp.zeros(1), z).loc

    action, z, mean = drawn(jr.split(jr.key(2), 4000))
    noise = np.stack([action - mean, z - z.mean(0)])[..., 0]
    assert abs(np.corrcoef(noise)[0, 1]) < 4 / 4000**0.5


def test_an_empty_memory_does_not_break_the_state_law():
    kernel = make_kernel("empty", jr.key(0))
    traj = make_trajectory(kernel, jr.key(1))
    assert traj.z.shape == (12, 0)
    assert not np.any(log_prob(kernel, traj).z)


def test_window_holds_the_last_observations_oldest_first():
    kernel = make_kernel("window", jr.key(0))
    traj = make_trajectory(kernel, jr.key(1), starts=(0, 5))
    assert np.array_equal(traj.z_next[0], jnp.concatenate([kernel.z0[2:], traj.obs[0]]))
    assert np.array_equal(traj.z_next[4], traj.obs[3:5].reshape(-1))
    assert np.array_equal(traj.z_next[5], jnp.concatenate([kernel.z0[2:], traj.obs[5]]))


def test_linear_unit_is_its_recurrence_with_decays_in_range():
    location = Linear(2, 50, min_decay=0.4, max_decay=0.99, key=jr.key(0))
    assert 0.4 < location.decay.min() < 0.6
    assert 0.9 < location.decay.max() < 0.99
    obs, z = jr.normal(jr.key(1), (2,)), jr.normal(jr.key(2), (50,))
    inputs = location.inputs.weight @ obs + location.inputs.bias
    truth = location.decay * z + np.sqrt(1 - location.decay**2) * inputs
    assert np.allclose(location(obs, z), truth, rtol=1e-12)


def test_gru_is_the_unit_of_cho():
    """z' = (1 - u) n + u z, written out from the weights, gates in the order r, u, n."""
    location = GRU(2, 3, key=jr.key(0))
    obs, z = jr.normal(jr.key(1), (2,)), jr.normal(jr.key(2), (3,))
    from_obs = np.split(obs @ location.inputs + location.bias, 3)
    from_z = np.split(z @ location.recurrent, 3)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    r, u = (sigmoid(from_obs[i] + from_z[i]) for i in (0, 1))
    n = np.tanh(from_obs[2] + r * (from_z[2] + location.recurrent_bias))
    assert np.allclose(location(obs, z), (1 - u) * n + u * z, rtol=1e-12)


def test_gru_is_that_of_equinox():
    location, theirs = GRU(2, 3, key=jr.key(0)), eqx.nn.GRUCell(2, 3, key=jr.key(1))
    weights = theirs.weight_ih.T, theirs.weight_hh.T, theirs.bias, theirs.bias_n
    parts = lambda l: (l.inputs, l.recurrent, l.bias, l.recurrent_bias)
    location = eqx.tree_at(parts, location, weights)
    obs, z = jr.normal(jr.key(2), (2,)), jr.normal(jr.key(3), (3,))
    assert np.allclose(location(obs, z), theirs(obs, z), rtol=1e-12)


def test_cells_lie_where_their_location_does():
    obs, z = jr.normal(jr.key(1), (2,)), jr.normal(jr.key(2), (3,))
    location = GRU(2, 3, key=jr.key(0))
    assert np.array_equal(Computed(location)(obs, z).loc, location(obs, z))
    law = Drawn(NormalAround(location, jnp.log(jnp.array([0.1, 0.2, 0.3]))))(obs, z)
    assert np.array_equal(law.loc, location(obs, z))
    assert np.allclose(law.std, [0.1, 0.2, 0.3])
    assert Computed(Empty())(obs, z[:0]).loc.shape == (0,)
    assert np.array_equal(Computed(Window())(obs, z).loc, [z[2], *obs])


def test_a_finite_cell_reads_integers_and_one_hot_observations():
    logits, successors = jr.normal(jr.key(0), (2, 3, 2)), jnp.array([1, 0]) * jnp.ones((2, 3, 2))
    cell = TableMemory(logits, successors.astype(int))
    for o, g in np.ndindex(3, 2):
        for obs in (jnp.array(o), jnp.eye(3)[o]):
            law = cell(obs, jnp.array(g))
            assert np.array_equal(law.logits, logits[g, o])
            assert np.array_equal(law.support, [1, 0])


def test_the_first_state_of_an_episode_is_not_learned():
    kernel = make_kernel("gru", jr.key(0))
    traj = make_trajectory(kernel, jr.key(1))
    total = lambda kernel: kernel.log_prob(traj).joint.sum()
    grad = eqx.filter_jit(eqx.filter_grad(total))(kernel)
    assert not np.any(grad.z0)
    assert np.any(grad.cell.location.recurrent)


def test_normaliser_merges_moments_like_numpy_on_all_data():
    batches = [
        3 + 2 * jr.normal(jr.key(i), shape) for i, shape in enumerate([(4, 2), (1, 2), (5, 3, 2)])
    ]
    normalizer = Normalizer(2)
    for batch in batches:
        normalizer = eqx.filter_jit(Normalizer.update)(normalizer, batch)
    data = np.concatenate([batch.reshape(-1, 2) for batch in batches])
    assert normalizer.count == len(data)
    assert np.allclose(normalizer.mean, data.mean(0), rtol=1e-12)
    assert np.allclose(normalizer.var, data.var(0), rtol=1e-12)
    truth = (data - data.mean(0)) / data.std(0)
    assert np.allclose(jax.vmap(normalizer)(jnp.asarray(data)), truth, rtol=1e-6)


def test_normaliser_is_the_identity_before_data_and_clips_at_ten():
    x = jnp.array([0.3, -2.0, 50.0, -50.0])
    assert np.array_equal(Normalizer(4)(x), [0.3, -2.0, 10.0, -10.0])


def test_normaliser_survives_a_constant_observation():
    normalizer = Normalizer(1).update(jnp.full((7, 1), 3.0))
    assert np.array_equal(normalizer(jnp.array([3.0])), [0.0])


def test_normaliser_is_constant_to_gradients():
    grad = eqx.filter_grad(lambda n: n(jnp.array([1.0, 2.0])).sum())(Normalizer(2))
    assert not any(np.any(x) for x in jax.tree.leaves(grad))


def test_mlp_is_its_layers_with_orthogonal_weights():
    mlp = MLP([3, 4, 2], gain=0.01, key=jr.key(0))
    first, last = mlp.layers
    assert np.allclose(first.weight.T @ first.weight, 2 * np.eye(3), atol=1e-12)
    assert np.allclose(last.weight @ last.weight.T, 1e-4 * np.eye(2), atol=1e-12)
    mlp = jitter(mlp, jr.key(1))
    first, last = mlp.layers
    x = jr.normal(jr.key(2), (3,))
    truth = last.weight @ np.tanh(first.weight @ x + first.bias) + last.bias
    assert np.allclose(mlp(x), truth, rtol=1e-12)


def test_policy_and_critic_see_their_own_part_of_an_observation():
    kernel = make_kernel("gru", jr.key(0))
    critic = Critic(3, 2, [4], key=jr.key(1))
    obs, z = Observation(jnp.ones(2), jnp.arange(3.0)), jnp.zeros(2)
    drawn = lambda obs: draw(kernel, obs, z, jr.key(2))
    assert_trees_close(drawn(obs), drawn(obs.policy), rtol=0)
    value = eqx.filter_jit(critic)
    assert value(obs, z) == value(obs.critic, z)
    assert value(obs, z) != value(obs._replace(critic=jnp.zeros(3)), z)


def products(jaxpr):
    """The shapes of what is multiplied, in all matrix products of a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield from (x.aval.shape for x in eqn.invars)
        for inner in jax.core.jaxprs_in_params(eqn.params):
            yield from products(inner)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gru", "linear"])
def test_many_single_steps_are_scored_by_products_of_matrices(name):
    """`[N, 1, n] @ [n, m]` would become a sum of products, which is several times slower."""
    kernel = make_kernel(name, jr.key(0), state_std=0.3)
    traj = make_trajectory(kernel, jr.key(1))
    steps = jax.tree.map(lambda x: x[:, None], traj)

    def total(kernel):
        return jax.vmap(kernel.log_prob)(steps).joint.sum()

    shapes = list(products(jax.make_jaxpr(eqx.filter_grad(total))(kernel).jaxpr))
    assert shapes
    assert all(len(shape) == 2 for shape in shapes)
