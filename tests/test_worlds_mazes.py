import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import best_return

from spg.exact import discounted_values, sighted_return, stationary_distribution
from spg.exact.enumeration import joint_policy
from spg.kernels.finite import finite_kernel
from spg.worlds import dense, interrupted, rooms, tiger

pytestmark = pytest.mark.usefixtures("float64")


def cycles(gamma, mean):
    """γ to get inside, γ^d to the middle, 1 for digging, one step out; and again."""
    return gamma * mean / (1 - gamma**2 * mean)


@pytest.mark.parametrize(("width", "height", "slip"), [(5, 3, 0.1), (4, 2, 0.0), (7, 1, 0.3)])
def test_full_sight_walks_the_distance(width, height, slip):
    gamma = 0.95
    step = (1 - slip) * gamma / (1 - slip * gamma)
    far = [abs(x - width // 2) + abs(y - height // 2) for x in range(width) for y in range(height)]
    mean = np.mean(step ** np.array(far))
    found = sighted_return(rooms(width, height, slip=slip).pomdp, gamma=gamma)
    np.testing.assert_allclose(found, cycles(gamma, mean), rtol=1e-9)


@pytest.mark.parametrize(("m", "gamma"), [(2, 0.95), (3, 0.95), (4, 0.9)])
def test_in_a_corridor_the_best_policy_counts_from_the_west_wall(m, gamma):
    mean = 2 * gamma**m + sum(gamma ** (m + x) for x in range(1, 2 * m - 1)) + gamma ** (3 * m - 3)
    world = dense(rooms(2 * m + 1, 1, slip=0.0, cost=1.0).pomdp)
    found = best_return(world, gamma)
    np.testing.assert_allclose(found, cycles(gamma, mean / (2 * m + 1)), rtol=1e-9)


def test_rooms_follow_their_rules_and_inner_ones_look_alike():
    problem = rooms(4, 3, slip=0.25, cost=2.0)
    world = jax.tree.map(np.asarray, dense(problem.pomdp))
    step = {"N": (0, -1), "E": (1, 0), "S": (0, 1), "W": (-1, 0)}
    for s, name in enumerate(problem.states[:-1]):
        x, y = map(int, name.split())
        walls = "".join(d for d, (i, j) in step.items() if not (0 <= x + i < 4 and 0 <= y + j < 3))
        seen = problem.observations[int(world.observation[s].argmax())]
        assert seen == f"{walls or 'no'} wall"
        for a, action in enumerate(problem.actions):
            expected = np.zeros(13)
            if action == "dig":
                expected[12] = 1
                assert world.reward[s, a] == (1 if (x, y) == (2, 1) else -2)
            else:
                i, j = step[action] if action not in walls else (0, 0)
                expected[s] += 0.25
                expected[problem.states.index(f"{x + i} {y + j}")] += 0.75
                assert world.reward[s, a] == 0
            np.testing.assert_allclose(world.transition[s, a], expected)
    np.testing.assert_allclose(world.transition[12], [[1 / 12] * 12 + [0.0]] * 5)
    assert world.start[12] == 1
    assert problem.observations[int(world.observation[12].argmax())] == "outside"
    assert len(problem.observations) == 10
    assert (world.observation.sum(0)[problem.observations.index("no wall")]) == 2


def long_run_reward(kernel, pomdp):
    d = stationary_distribution(kernel, pomdp)
    return jnp.einsum("sg,sgha,sa->", d, joint_policy(kernel, pomdp), pomdp.reward)


@pytest.mark.slow
def test_average_reward_of_an_interrupted_world_is_a_discounted_return():
    """Of a controller that returns to its first I-state where the world begins; of others not."""
    problem, gamma = rooms(3, 2), 0.8
    num_obs = problem.pomdp.num_obs
    cell, head = (jr.normal(jr.key(n), (2, num_obs, n)) for n in (2, 5))
    knows = finite_kernel(cell.at[:, -1].set(jnp.array([0.0, -60.0])), head)
    world, endless = dense(problem.pomdp), dense(interrupted(problem.pomdp, gamma))
    for controller, same in ((knows, True), (finite_kernel(cell, head), False)):
        earned = (1 - gamma) * discounted_values(controller, world, gamma=gamma).expected_return
        found = long_run_reward(controller, endless)
        assert np.isclose(found, earned, rtol=1e-9) == same


def test_interruption_keeps_rewards_emissions_and_a_random_start():
    problem, gamma = tiger(), 0.6
    before, after = dense(problem.pomdp), dense(interrupted(problem.pomdp, gamma))
    np.testing.assert_allclose(after.reward, before.reward)
    np.testing.assert_array_equal(after.observation, before.observation)
    expected = gamma * before.transition + (1 - gamma) * before.start
    np.testing.assert_allclose(after.transition, expected)
    with pytest.raises(ValueError, match=r"gamma is 1\.0; it has to be inside \(0, 1\)"):
        interrupted(problem.pomdp, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1, 1), "the number of rooms is 1"), ((0, 3), "width is 0")],
)
def test_what_is_no_maze_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rooms(*arguments)
    with pytest.raises(ValueError, match="slip is 1"):
        rooms(slip=1.0)
    with pytest.raises(ValueError, match="cost is -1"):
        rooms(cost=-1.0)
