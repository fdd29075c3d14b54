import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import best_return, make_pomdp

from spg import limits
from spg.exact import discounted_values, graph_kernel, point_based_bounds, sighted_return
from spg.exact.pbvi import fast_informed_bound, opening
from spg.worlds import dense, load_unload, rooms, tiger

pytestmark = pytest.mark.usefixtures("float64")


def follows(world, solved, gamma):
    """The exact value of the controller that the lower bound implies, by a linear solve."""
    return discounted_values(graph_kernel(world, solved.graph), world, gamma=gamma).expected_return


def tree(world, gamma, depth):
    """Least and most that the best policy can earn, by all histories of `depth` steps."""
    transition, observation, reward, _ = (np.asarray(x) for x in world)

    def best(joint, depth, tail):  # [..., S], times the probability of the history
        if depth == 0:
            return tail * joint.sum(-1)
        after = np.einsum("...s,sat,to->...aot", joint, transition, observation)
        return np.max(joint @ reward + gamma * best(after, depth - 1, tail).sum(-1), -1)

    ends = reward.min() / (1 - gamma), reward.max() / (1 - gamma)
    return [best(np.asarray(opening(world)), depth, tail).sum() for tail in ends]


def test_tiger_earns_what_is_known_of_it():
    world = dense(tiger().pomdp)
    solved = point_based_bounds(world, gamma=0.95, num_beliefs=24, num_rounds=3, key=jr.key(0))
    assert np.isclose(solved.lower, 19.3713, atol=1e-4)
    assert np.isclose(solved.upper, 19.3713, atol=1e-4)
    assert np.isclose(follows(world, solved, 0.95), solved.lower, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(load_unload(), id="load"),
        pytest.param(rooms(5, 1, slip=0.0), id="rooms", marks=pytest.mark.slow),
    ],
)
def test_worlds_of_finitely_many_beliefs_are_solved(problem):
    world, gamma = dense(problem.pomdp), problem.discount
    solved = point_based_bounds(
        problem.pomdp, gamma=gamma, num_beliefs=40, num_rounds=3, key=jr.key(0)
    )
    best = best_return(world, gamma)
    np.testing.assert_allclose([solved.lower, solved.upper], best, rtol=1e-6)
    np.testing.assert_allclose(follows(world, solved, gamma), best, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_bounds_enclose_what_all_histories_allow(seed):
    world, gamma = make_pomdp(jr.key(seed)), 0.5
    low, high = tree(world, gamma, 9)
    solved = point_based_bounds(world, gamma=gamma, num_beliefs=16, num_rounds=2, key=jr.key(0))
    assert high - low < 0.02
    assert low - 1e-3 < solved.lower < high
    assert low < solved.upper < high + 1e-3
    assert np.isclose(follows(world, solved, gamma), solved.lower, atol=1e-7)


def test_full_sight_leaves_no_gap():
    world, gamma = make_pomdp(jr.key(1)), 0.5
    world = world._replace(observation=jnp.eye(2))
    solved = point_based_bounds(world, gamma=gamma, num_beliefs=16, num_rounds=2, key=jr.key(0))
    sight = sighted_return(world, gamma=gamma)
    np.testing.assert_allclose([solved.lower, solved.upper], sight, rtol=1e-7)


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_bounds_hold_where_they_are_not_worth_much(shift):
    """One or two backups of beliefs of which most are missing: loose, but never wrong."""
    world, gamma = make_pomdp(jr.key(2)), 0.5
    world = world._replace(reward=world.reward + shift)
    low, high = tree(world, gamma, 9)
    for num_backups in (1, 2):
        solved = point_based_bounds(
            world, gamma=gamma, num_beliefs=16, num_rounds=1, num_backups=num_backups,
            num_runs=1, key=jr.key(0),
        )  # fmt: skip
        assert solved.lower < high
        assert solved.upper > low
        value = follows(world, solved, gamma)
        assert solved.lower <= value + 1e-12 < solved.lower + 1e-7


@pytest.mark.slow
def test_the_upper_bound_is_below_full_sight_and_above_every_controller():
    problem = rooms(5, 1, slip=0.0)
    world, gamma = dense(problem.pomdp), problem.discount
    solved = point_based_bounds(world, gamma=gamma, num_beliefs=40, num_rounds=3, key=jr.key(0))
    informed = fast_informed_bound(world, gamma=gamma)
    transition, reward = np.asarray(world.transition), np.asarray(world.reward)
    q = np.zeros_like(reward)
    for _ in range(600):
        q = reward + gamma * transition @ q.max(1)
    assert (informed.q_value <= q + 1e-9).all()
    beliefs = jr.dirichlet(jr.key(1), 0.3 * jnp.ones(world.start.size), (50,))
    upper, first = (jax.vmap(x)(beliefs) for x in (solved.bound, informed))
    assert (upper <= first + 1e-12).all()
    assert ((beliefs @ solved.graph.alpha.T).max(1) <= upper + 1e-9).all()
    assert (upper < first - 0.1).any()


def test_what_cannot_be_solved_is_refused(monkeypatch):
    world = tiger().pomdp
    for gamma in (0.0, 1.0):
        with pytest.raises(ValueError, match="gamma is"):
            point_based_bounds(world, gamma=gamma, key=jr.key(0))
    with pytest.raises(ValueError, match="num_beliefs is 1; it has to be from 2"):
        point_based_bounds(world, gamma=0.9, num_beliefs=1, key=jr.key(0))
    with pytest.raises(ValueError, match="num_rounds is 0"):
        point_based_bounds(world, gamma=0.9, num_rounds=0, key=jr.key(0))
    monkeypatch.setattr(limits, "_available", lambda on_device: 1e6)
    with pytest.raises(ValueError, match="what follows 50,000 beliefs of 4 states would take"):
        point_based_bounds(world, gamma=0.9, num_beliefs=50_000, key=jr.key(0))
