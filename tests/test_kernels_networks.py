"""What an optimiser may move, and statistics that move no further than they may."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from spg.kernels.critics import Critic
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.finite import expected_kernel, random_controller
from spg.kernels.held import held_kernel
from spg.kernels.networks import Identity, Normalizer, trainable
from spg.types import Spec
from spg.worlds.markov import ringworld

RING = ringworld()
SPEC = Spec(
    obs_size=RING.pomdp.num_obs + RING.pomdp.num_actions,
    critic_size=3,
    num_actions=RING.pomdp.num_actions,
    discrete=True,
    previous_action=True,
    model=RING.pomdp,
)
POLICIES = {
    "s2pg": {},
    "s2pg, continuous": {"discrete": False},
    **{f"s2pg, {cell}": {"cell": cell} for cell in ("linear", "lru", "gated", "leaky")},
    "s2pg, two layers": {"cell": "lru", "num_layers": 2},
    "s2pg, delta": {"cell": "delta", "num_heads": 1},
    "s2pg, hybrid": {"cell": "hybrid", "num_heads": 1, "key_size": 2},
    "bptt": {"memory": "bptt"},
    "bptt, leaky": {"memory": "bptt", "cell": "leaky"},
    **{m: {"memory": m} for m in ("window", "kstep", "none", "oracle")},
    **{f"filter, {f}": {"memory": "filter", "filter": f} for f in ("belief", "lof", "alf-belief")},
}


def policy(words):
    """Zeros in the place of weights, which need not be drawn."""
    discrete = words.get("discrete", True)
    words = {k: v for k, v in words.items() if k != "discrete"}
    config = PolicyConfig(z_size=4, window=2, hidden=(3,), **{"cell": "linear"} | words)
    spec = SPEC._replace(discrete=discrete)
    shapes = jax.eval_shape(lambda key: make_kernel(config, spec, key=key), jr.key(0))
    return jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)


def controller():
    return random_controller(3, 2, 2, out_degree=2, key=jr.key(0))


FINITE = {
    "controller": controller,
    "expected": lambda: expected_kernel(controller()),
    "held": lambda: held_kernel(jnp.ones((2, 2, 2)), k=3),
}
KERNELS = {name: lambda words=words: policy(words) for name, words in POLICIES.items()} | FINITE


def is_fixed(path):
    """By name: statistics, the start, the model."""
    names = [getattr(key, "name", None) for key in path]
    return not {"normalizer", "z0", "mean_square", "count", "filter"}.isdisjoint(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_floats_are_learned_but_for_statistics_starts_and_models(name):
    kernel = KERNELS[name]()
    marks = jax.tree.leaves(trainable(kernel))
    for (path, leaf), mark in zip(jax.tree.leaves_with_path(kernel), marks, strict=True):
        assert mark == (eqx.is_inexact_array(leaf) and not is_fixed(path)), path
    assert any(marks)


@pytest.mark.parametrize("name", ["s2pg", "bptt, leaky", "filter, alf-belief", "controller"])
def test_weight_decay_moves_what_is_learned_and_nothing_else(name):
    """AdamW on gradients of one: every other leaf, of the critic too, stays to the bit."""
    kernel = KERNELS[name]()
    agent = kernel, Critic(3, 2, [3], key=jr.key(1))

    @jax.jit
    def step(agent):
        params = eqx.filter(agent, trainable(agent))
        optimiser = optax.adamw(0.1, weight_decay=0.5)
        gradient = jax.tree.map(jnp.ones_like, params)
        updates, _ = optimiser.update(gradient, optimiser.init(params), params)
        return eqx.apply_updates(agent, updates)

    after = jax.tree.leaves(step(agent))
    for (path, old), new in zip(jax.tree.leaves_with_path(agent), after, strict=True):
        if is_fixed(path) or not eqx.is_inexact_array(old):
            assert np.array_equal(old, new), path
        else:
            assert not np.any(np.asarray(old) == np.asarray(new)), path


def test_trainable_marks_by_type_in_any_container():
    tree = {"a": [Normalizer(2), jnp.ones(2)], "b": (None, jnp.arange(2), 3.0, Identity())}
    marks = trainable(tree)
    assert jax.tree.structure(marks) == jax.tree.structure(tree)
    assert jax.tree.leaves(marks) == [False] * 3 + [True, False, False]
    assert trainable(jnp.ones(2))
    assert not trainable(jnp.arange(2))


# --- statistics


def advance(data, limit):
    """From mean 0 and variance 1 after 8 data; a change is the squared move of the mean."""
    normalizer = Normalizer(1).update(jnp.array([[1.0], [-1.0]] * 4))
    change = lambda n: jnp.sum((n.mean - normalizer.mean) ** 2)
    return normalizer, normalizer.advance(data, change=change, limit=jnp.float32(limit))


@pytest.mark.parametrize(
    ("limit", "share"), [(1.0, 1), (0.2, 0.25), (0.02, 0.125), (1e-9, 0), (0, 0), (np.nan, 0)]
)
def test_statistics_go_as_far_as_they_may(limit, share):
    """The whole way moves the mean by 1, a share of it by that share."""
    start, moved = advance(jnp.full((8, 1), 2.0), limit)
    goal = start.update(jnp.full((8, 1), 2.0))
    assert np.allclose(goal.mean, 1)
    for a, b, c in zip(*map(jax.tree.leaves, (start, goal, moved)), strict=True):
        assert np.allclose(c, a + share * (b - a))


def test_statistics_that_change_nothing_go_all_the_way():
    start, moved = advance(jnp.array([[3.0], [-3.0]]), 0.0)
    goal = start.update(jnp.array([[3.0], [-3.0]]))
    for a, b in zip(jax.tree.leaves(goal), jax.tree.leaves(moved), strict=True):
        assert np.allclose(a, b)
