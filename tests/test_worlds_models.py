import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spg.worlds.models import DensePOMDP, dense, sparse, sparse_pomdp

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def world():
    """A dense world with many zeros: 5 states, 2 actions, 4 observations, the last never seen."""
    rng = np.random.default_rng(0)

    def law(*shape):
        p = rng.exponential(size=shape) * (rng.random(shape) < 0.4)
        p[..., rng.integers(shape[-1])] += 0.1  # no empty row
        return p / p.sum(-1, keepdims=True)

    observation = np.hstack([law(5, 3), np.zeros((5, 1))])
    arrays = law(5, 2, 5), observation, rng.normal(size=(5, 2)), law(5)
    return DensePOMDP(*map(jnp.asarray, arrays))


def lists(**changes):
    """Two states that alternate, each with its own observation: arguments of `sparse_pomdp`."""
    x = {"s": [0, 1], "a": [0, 0], "t": [1, 0], "p": [1.0, 1.0], "r": [0.5, -0.5]}
    x |= {"u": [0, 1], "o": [0, 1], "q": [1.0, 1.0], "start": [1.0, 0.0]}
    x = {name: np.array(value) for name, value in (x | changes).items()}
    return tuple(x[i] for i in "satpr"), tuple(x[i] for i in "uoq"), x["start"]


def build(*, names=False, unemitted=False, num_obs=2, **changes):
    named = {"states": ("left", "right"), "actions": ("go",), "observations": ("dark", "light")}
    settings = {"num_actions": 1, "num_obs": num_obs, "unemitted": unemitted}
    return sparse_pomdp(*lists(**changes), **settings, **(named if names else {}))


def test_lists_made_dense_again_are_the_same_world(world):
    again = dense(sparse(world))
    for x, y in zip(world, again, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-14)
        assert np.array_equal(x == 0, y == 0)
    assert (again.num_obs, again.num_actions) == (world.num_obs, world.num_actions) == (4, 2)


def test_lists_are_as_long_as_the_longest_row(world):
    pomdp = sparse(world)
    assert pomdp.successor.shape[-1] == (world.transition > 0).sum(-1).max() < 5
    assert pomdp.observation.shape[-1] == (world.observation > 0).sum(-1).max() < 4
    padding = pomdp.probability == 0
    assert padding.any()
    assert not pomdp.successor[padding].any()
    assert not pomdp.reward[padding].any()


def test_lists_have_the_transitions_rewards_and_emissions_of_the_world(world):
    pomdp = sparse(world)
    np.testing.assert_allclose(pomdp.mean_reward(), world.mean_reward(), rtol=1e-14)
    for s, a, i in np.ndindex(pomdp.successor.shape):
        p, t = pomdp.probability[s, a, i], pomdp.successor[s, a, i]
        assert p == 0 or np.isclose(p, world.transition[s, a, t], rtol=1e-14)
        assert p == 0 or np.isclose(pomdp.reward[s, a, i], world.reward[s, a], rtol=1e-14)
    for model in (world, pomdp):
        observation, emission = map(np.asarray, model.emissions())
        law = np.zeros((5, 4))
        np.add.at(law, (np.arange(5)[:, None], observation), emission)
        np.testing.assert_allclose(law, world.observation, rtol=1e-14)


def test_expect_and_push_agree_with_loops_in_both_forms(world):
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(5, 3)), rng.normal(size=(5, 2, 3))
    expected, pushed = np.zeros((5, 2, 3)), np.zeros((5, 3))
    for s, a, t in np.ndindex(5, 2, 5):
        expected[s, a] += float(world.transition[s, a, t]) * x[t]
        pushed[t] += float(world.transition[s, a, t]) * w[s, a]
    for model in (world, sparse(world)):
        np.testing.assert_allclose(model.expect(jnp.asarray(x)), expected, rtol=1e-12)
        np.testing.assert_allclose(model.push(jnp.asarray(w)), pushed, rtol=1e-12)


def test_push_is_the_transpose_of_expect(world):
    for model in (world, sparse(world)):
        matrix = model.expect(jnp.eye(5))  # [S, A, S]
        (transposed,) = jax.linear_transpose(model.expect, jnp.zeros((5, 1)))(jnp.ones((5, 2, 1)))
        np.testing.assert_allclose(model.push(jnp.ones((5, 2, 1))), transposed, rtol=1e-12)
        pushed = [model.push(w.reshape(5, 2, 1))[:, 0] for w in jnp.eye(10)]
        np.testing.assert_allclose(pushed, matrix.reshape(10, 5), rtol=1e-14)


def test_expect_and_push_work_under_jit_and_vmap(world):
    x = jnp.arange(20.0).reshape(2, 5, 2)
    for model in (world, sparse(world)):
        batched = jax.jit(jax.vmap(lambda model, x: model.push(model.expect(x)), (None, 0)))
        one = [model.push(model.expect(y)) for y in x]
        np.testing.assert_allclose(batched(model, x), jnp.stack(one), rtol=1e-12)


def test_repeated_entries_add_up_and_rewards_are_averaged():
    pomdp = build(
        s=[1, 0, 0, 0, 1, 1], a=[0] * 6, t=[0, 1, 0, 1, 1, 0],
        p=[0.5, 0.2, 0.2, 0.6, 0.2, 0.3], r=[1.0, 4.0, 7.0, 0.0, 2.0, 9.0],
        u=[0, 1, 0], o=[0, 1, 0], q=[0.25, 1.0, 0.75],
    )  # fmt: skip
    assert pomdp.successor.tolist() == [[[0, 1]], [[0, 1]]]
    np.testing.assert_allclose(pomdp.probability[:, 0], [[0.2, 0.8], [0.8, 0.2]], rtol=1e-14)
    np.testing.assert_allclose(pomdp.reward[:, 0], [[7, 1], [4, 2]], rtol=1e-14)
    np.testing.assert_allclose(pomdp.mean_reward(), [[2.2], [3.6]], rtol=1e-14)
    assert pomdp.emission.tolist() == [[1], [1]]
    assert pomdp.observation.tolist() == [[0], [1]]


def test_entries_of_probability_zero_are_left_out():
    pomdp = build(s=[0, 0, 1], a=[0] * 3, t=[0, 1, 0], p=[0.0, 1.0, 1.0], r=[5.0, 0.5, -0.5])
    assert pomdp.successor.tolist() == [[[1]], [[0]]]
    assert pomdp.reward.tolist() == [[[0.5]], [[-0.5]]]


def test_rows_that_round_badly_are_normalised():
    off = 1 + 9e-6
    pomdp = build(p=[off, 1 / off], q=[1 / off, off], start=[off / 2, off / 2])
    for law in (pomdp.probability, pomdp.emission, pomdp.start):
        np.testing.assert_allclose(law.sum(-1), 1, rtol=1e-15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s": [0, 2]}, "state 2 is out of range: there are 2"),
        ({"t": [1, -1]}, "state -1 is out of range: there are 2"),
        ({"a": [1, 0]}, "action 1 is out of range: there are 1"),
        ({"u": [0, 3]}, "state 3 is out of range: there are 2"),
        ({"o": [0, 2]}, "observation 2 is out of range: there are 2"),
        ({"r": [0.0, np.nan]}, "the reward of state 1 under action 0 is nan"),
        (
            {"r": [np.inf, 0.0], "names": True},
            "the reward of state 'left' under action 'go' is inf",
        ),
        (
            {"s": [0, 1, 1], "a": [0, 0, 0], "t": [1, 0, 1], "p": [1, 1.5, -0.5], "r": [0, 0, 0]},
            "the transitions of state 1 under action 0 have probability -0.5",
        ),
        (
            {"s": [0, 0, 1], "a": [0, 0, 0], "t": [1, 1, 0], "p": [1.5, -0.5, 1], "r": [0, 0, 0]},
            "the transitions of state 0 under action 0 have probability -0.5",
        ),
        (
            {"p": [np.nan, 1.0], "names": True},
            "the transitions of state 'left' under action 'go' have probability nan",
        ),
        ({"p": [1.0, np.inf]}, "the transitions of state 1 under action 0 have probability inf"),
        (
            {"p": [1.0, 0.9]},
            "the transitions of state 1 under action 0 sum to 0.9, not to 1",
        ),
        (
            {"p": [0.5, 0.9], "names": True},
            "the transitions of state 'left' under action 'go' sum to 0.5, not to 1 "
            "(and 1 rows more)",
        ),
        (
            {"s": [0], "a": [0], "t": [1], "p": [1.0], "r": [0.0]},
            "the transitions of state 1 under action 0 sum to 0, not to 1",
        ),
        (
            {"q": [1.0, 1.1], "names": True},
            "the observations of state 'right' sum to 1.1, not to 1",
        ),
        ({"q": [-1.0, 1.0]}, "the observations of state 0 have probability -1"),
        ({"start": [0.5, 0.4]}, "the start probabilities sum to 0.9, not to 1"),
        ({"start": [-0.5, 1.5]}, "the start probabilities have probability -0.5"),
        ({"o": [0, 0]}, "no state emits observation 1; leave it out"),
        ({"o": [1, 1], "names": True}, "no state emits observation 'dark'; leave it out"),
    ],
)
def test_a_world_that_is_none_is_refused_by_name(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build(**changes)
    assert str(error.value) == message


def test_unemitted_observations_may_be_allowed():
    assert build(num_obs=5, unemitted=True).num_obs == 5
