"""Filters as memory, in rollouts of RingWorld."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import jitter

from spg import envs
from spg.filters.belief import forward_filter
from spg.kernels.filtered import FEATURES, filter_cell
from spg.kernels.heads import CategoricalHead, FeatureHead
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Identity
from spg.rollout import reset, rollout
from spg.worlds.hmm import hmm
from spg.worlds.markov import ringworld, swap_hmm

pytestmark = pytest.mark.usefixtures("float64")

NUM_STEPS = 130  # more than an episode


def play(feature, epsilon):
    """A kernel with this memory, its rollout in RingWorld, and what the head saw."""
    env = envs.make("ringworld-pomdp", previous_action=True, epsilon=epsilon)
    cell, z0, seen = filter_cell(env.spec.model, feature, decay=0.2)
    head = FeatureHead(jitter(CategoricalHead([8 + 12, 4], key=jr.key(0)), jr.key(1)), seen)
    kernel = Kernel(cell, head, Identity(), z0)

    @eqx.filter_jit
    def run(kernel):
        carry = reset(kernel, env, key=jr.key(2))
        traj = rollout(kernel, env, carry, num_steps=NUM_STEPS, key=jr.key(3))[1]
        return traj, seen(traj.z_next)

    return kernel, *run(kernel)


def true_belief(traj, epsilon):
    rule = forward_filter(hmm(ringworld(epsilon=epsilon).pomdp))
    o, a = traj.obs[:, :4].argmax(1), traj.obs[:, 4:].argmax(1)
    return eqx.filter_jit(rule.unroll)(rule.init, o, a, traj.first)


PLAYED = ("belief", "lof", "lof-softmax", "alf")


@pytest.fixture(scope="module")
def played(float64):
    return {feature: play(feature, 0.05) for feature in PLAYED}


@pytest.mark.parametrize("feature", PLAYED)
def test_memory_of_a_rollout_is_the_filter_of_the_whole_sequence(feature, played):
    """Over the end of an episode, from the start and from a state in the middle of one."""
    kernel, traj, _ = played[feature]
    assert np.flatnonzero(traj.first).tolist() == [0, 100]
    o, a = traj.obs[:, :4].argmax(1), traj.obs[:, 4:].argmax(1)
    unroll = eqx.filter_jit(kernel.cell.location.filter.unroll)
    for start in (0, 7):
        part = slice(start, start + NUM_STEPS - 7)
        z = unroll(traj.z[start], o[part], a[part], traj.first[part])
        np.testing.assert_allclose(z, traj.z_next[part], rtol=1e-9, atol=1e-9)
    again = eqx.filter_jit(kernel.cell.log_prob)(*traj[:2], traj.z_next, traj.first, kernel.z0)[1]
    np.testing.assert_allclose(again, traj.z_next, rtol=1e-9, atol=1e-9)


def test_belief_is_that_of_the_model(played):
    _, traj, seen = played["belief"]
    np.testing.assert_allclose(seen, true_belief(traj, 0.05), rtol=0, atol=1e-10)


def test_log_domain_feature_of_permutations_is_the_belief(played):
    """Where nothing slips; where something does it is not."""
    _, traj, seen = play("lof-softmax", 0.0)
    np.testing.assert_allclose(seen, true_belief(traj, 0.0), rtol=0, atol=1e-10)
    _, traj, seen = played["lof-softmax"]
    assert jnp.abs(seen - true_belief(traj, 0.05)).max() > 0.1


def test_what_the_head_sees(played):
    """Raw logits fall without bound, leaky ones do not, and the others are laws."""
    assert played["lof"][2][99].max() < -50
    alf = played["alf"][2]
    assert jnp.abs(alf).max() < 5
    features = {name: filter_cell(ringworld().pomdp, name, decay=0.2)[2] for name in FEATURES}
    laws = {name: features[name](alf) for name in ("alf-softmax", "alf-belief")}
    for law in (*laws.values(), played["belief"][2], played["lof-softmax"][2]):
        np.testing.assert_allclose(law.sum(1), 1, rtol=1e-10)
    np.testing.assert_allclose(laws["alf-belief"], jax.nn.softmax(alf / 0.2), rtol=1e-10)
    np.testing.assert_allclose(laws["alf-softmax"], jax.nn.softmax(alf), rtol=1e-10)
    assert features["belief"](alf) is features["alf"](alf) is features["lof"](alf) is alf


def test_filters_have_no_gradient(played):
    kernel, traj, _ = played["alf"]
    gradient = eqx.filter_jit(eqx.filter_grad(lambda k: k.log_prob(traj).joint.sum()))(kernel)
    assert all((x == 0).all() for x in jax.tree.leaves(gradient.cell))
    assert any((x != 0).any() for x in jax.tree.leaves(gradient.head))


def test_unknown_features_are_refused():
    with pytest.raises(ValueError, match="unknown feature 'lof-raw'; choose from belief, lof"):
        filter_cell(swap_hmm(0.1).pomdp, "lof-raw")
    with pytest.raises(ValueError, match="decay is 2"):
        filter_cell(swap_hmm(0.1).pomdp, "alf", decay=2.0)


def test_observations_without_the_previous_action_are_refused():
    cell, z0, _ = filter_cell(swap_hmm(0.1, controlled=True).pomdp, "alf")
    with pytest.raises(ValueError, match="2 entries of the observation and 2 of the action"):
        cell(jnp.array([1.0, 0.0]), z0)


def test_log_domain_filter_of_slipping_worlds_does_not_rule_out_what_happens():
    """From a certain start, by permutations that hold most of the time: evidence moves it."""
    cell, z, _ = filter_cell(swap_hmm(0.05, controlled=True).pomdp, "lof-softmax")
    for _ in range(10):  # the same side again and again, though it should swap
        z = cell(jnp.array([1.0, 0.0, 1.0, 0.0]), z).mode()
    assert jnp.abs(z).max() < 50
