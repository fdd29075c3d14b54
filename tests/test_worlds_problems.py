import jax
import numpy as np
import pytest
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import spsolve

from spg.worlds.models import dense
from spg.worlds.problems import (
    PROBLEMS,
    factory,
    heaven_hell,
    load_unload,
    pentagon,
    random_pomdp,
    tiger,
)

pytestmark = pytest.mark.usefixtures("float64")

FACTORY_SHAPE = (2, 13, 4, 2, 13, 4, 2)


def chain(pomdp):
    """P(s' | s, a) as a sparse matrix of S·A rows."""
    successor, probability = np.asarray(pomdp.successor), np.asarray(pomdp.probability)
    size, num_actions, width = successor.shape
    ends = np.arange(0, successor.size + 1, width)
    shape = (size * num_actions, size)
    return sparse.csr_array((probability.ravel(), successor.ravel(), ends), shape)


def mean_over_actions(pomdp):
    """P(s' | s) of the uniform policy, without the padding."""
    size, num_actions = pomdp.successor.shape[:2]
    average = sparse.kron(sparse.eye_array(size), np.full((1, num_actions), 1 / num_actions))
    uniform = (average @ chain(pomdp)).tocsr()
    uniform.eliminate_zeros()
    return uniform


def reachable(pomdp):
    """Indices of the states that can be reached from those of the start."""
    graph, found = mean_over_actions(pomdp), np.asarray(pomdp.start) > 0
    while True:
        more = found | (graph.T @ found > 0)
        if (more == found).all():
            return np.flatnonzero(found)
        found = more


def optimal_average_reward(pomdp):
    """Of the fully observed world from its start: Howard's policy iteration.

    Value iteration leads to a first policy. Of each, (I - P) h + η = r is solved with h(0) = 0. In
    the end max_a r + P h - h = η in all states, which proves that η is the optimum.
    """
    keep, num_actions = reachable(pomdp), pomdp.num_actions
    rows = (keep[:, None] * num_actions + np.arange(num_actions)).ravel()
    matrix, reward = chain(pomdp)[rows][:, keep], np.asarray(pomdp.mean_reward())[keep]
    state = np.arange(len(keep))
    q = lambda value: reward + (matrix @ value).reshape(reward.shape)
    value = np.zeros(len(keep))
    for _ in range(150):
        value = q(value).max(1)
    policy, better = q(value).argmax(1), True
    while np.any(better):
        system = sparse.eye_array(len(keep)) - matrix[state * num_actions + policy]
        system = sparse.hstack([np.ones((len(keep), 1)), system.tocsc()[:, 1:]], format="csc")
        gain, *value = spsolve(system, reward[state, policy])
        value = np.array([0, *value])
        better = q(value).max(1) > q(value)[state, policy] + 1e-9  # ties would go on for ever
        policy = np.where(better, q(value).argmax(1), policy)
    assert np.allclose(q(value).max(1) - value, gain, rtol=0, atol=2e-9)
    return gain


def average_reward(pomdp, cell, head, first=0):
    """Of a controller ω(h | g, o) `[G, O, G]`, μ(a | h, o) `[G, O, A]`, from the start.

    The joint chain made lazy has the same stationary law, and its powers converge.
    """
    world = jax.tree.map(np.asarray, dense(pomdp))
    num_z = len(cell)
    laws = world.observation, cell, head
    joint = np.einsum("so,goh,hoa,sat->sgth", *laws, world.transition, optimize=True)
    joint = joint.reshape(2 * (len(world.start) * num_z,))
    power = (np.eye(len(joint)) + joint) / 2
    for _ in range(40):
        power = power @ power
        power /= power.sum(1, keepdims=True)
    start = np.outer(world.start, np.eye(num_z)[first]).ravel()
    law = (start @ power).reshape(-1, num_z)
    return np.einsum("sg,so,goh,hoa,sa->", law, *laws, world.reward, optimize=True)


def controller(problem, rules, num_z):
    """Deterministic laws from `rules`: I-state, name of the observation -> I-state, action."""
    cell = np.zeros((num_z, len(problem.observations), num_z))
    head = np.zeros((num_z, len(problem.observations), len(problem.actions)))
    for g in range(num_z):
        for o, name in enumerate(problem.observations):
            h, action = rules(g, name)
            cell[g, o, h] = 1
            head[h, o, problem.actions.index(action)] = 1
    assert (head.sum(-1) <= 1).all()  # the action depends on g through h alone
    return cell, head


def memoryless(table):
    """The controller with one I-state and the given law of the action `[O, A]`."""
    return np.ones((1, len(table), 1)), np.asarray(table)[None]


@pytest.mark.parametrize("name", PROBLEMS)
def test_rows_sum_to_one_and_every_part_is_named(name):
    problem = PROBLEMS[name]()
    pomdp = problem.pomdp
    for law in (pomdp.probability, pomdp.emission, pomdp.start):
        np.testing.assert_allclose(np.asarray(law).sum(-1), 1, rtol=1e-12)
        assert (np.asarray(law) >= 0).all()
    assert len(problem.states) == len(pomdp.start) == len(set(problem.states))
    assert len(problem.actions) == pomdp.num_actions == len(set(problem.actions))
    assert len(problem.observations) == pomdp.num_obs == len(set(problem.observations))
    assert 0 < problem.discount < 1


@pytest.mark.parametrize("name", PROBLEMS)
def test_stationary_law_from_the_start_is_unique(name):
    """The uniform policy, which reaches what any does, leads from each to each of these states."""
    pomdp = PROBLEMS[name]().pomdp
    keep = reachable(pomdp)
    graph = mean_over_actions(pomdp)[keep][:, keep]
    assert csgraph.connected_components(graph, connection="strong")[0] == 1


@pytest.mark.parametrize(
    ("make", "num_states", "num_reachable", "num_actions", "num_obs"),
    [
        (tiger, 4, 4, 3, 2),
        (load_unload, 10, 10, 2, 3),
        (heaven_hell, 20, 20, 4, 11),
        (pentagon, 212, 209, 4, 28),
        (factory, 21_632, 19_968, 16, 1024),
    ],
)
def test_sizes(make, num_states, num_reachable, num_actions, num_obs):
    pomdp = make().pomdp
    assert (len(pomdp.start), len(reachable(pomdp))) == (num_states, num_reachable)
    assert (pomdp.num_actions, pomdp.num_obs) == (num_actions, num_obs)


@pytest.mark.parametrize(
    ("make", "optimum"),
    [
        (tiger, 10),  # open the other door in every step
        (pentagon, 0.0503430),
        (factory, 0.0741309),  # 13.4897 steps per part
    ],
)
def test_fully_observed_optimum(make, optimum):
    assert np.isclose(optimal_average_reward(make().pomdp), optimum, rtol=0, atol=6e-8)


# Tiger


def test_tiger_by_counting_to_two_earns_what_the_gambler_does():
    """Listening till n observations more name one side: a random walk that ends at ±n.

    It is right with P = .85ⁿ / (.85ⁿ + .15ⁿ), after E = n (2P - 1) / (.85 - .15) steps. A cycle is
    E + 1 steps and earns -E + 10 P - 100 (1 - P).
    """
    problem = tiger()

    def count(limit):
        """The I-state is the surplus of 'tiger-right' plus limit; at 0 and 2 limit it opens."""

        def rules(g, obs):
            opened = g in (0, 2 * limit)  # what is seen then says nothing
            h = limit if opened else g + (1 if obs == "tiger-right" else -1)
            return h, {0: "open-right", 2 * limit: "open-left"}.get(h, "listen")

        return average_reward(problem.pomdp, *controller(problem, rules, 2 * limit + 1))

    earned = []
    for n in (1, 2, 3):
        p = 0.85**n / (0.85**n + 0.15**n)
        steps = n * (2 * p - 1) / 0.7
        earned.append((-steps + 10 * p - 100 * (1 - p)) / (steps + 1))
        assert np.isclose(count(n), earned[-1], rtol=1e-9)
    assert np.argmax(earned) == 1
    assert np.isclose(earned[1], 1.0838, atol=5e-5)


def test_tiger_at_random_and_by_listening():
    problem = tiger()
    reward = lambda action: average_reward(problem.pomdp, *memoryless([action] * 2))
    assert np.isclose(reward([1 / 3, 1 / 3, 1 / 3]), (-1 - 45 - 45) / 3, rtol=1e-9)
    assert np.isclose(reward([1, 0, 0]), -1, rtol=1e-9)
    world = dense(problem.pomdp)
    for s, name in enumerate(problem.states):
        expected = (
            [0.5, 0.5] if "reset" in name else [0.85, 0.15] if "left" in name else [0.15, 0.85]
        )
        assert np.allclose(world.observation[s], expected)
        kept = "heard, tiger left" if "left" in name else "heard, tiger right"
        assert world.transition[s, 0, problem.states.index(kept)] == 1
        tiger_door, other = (1, 2) if "left" in name else (2, 1)
        assert world.reward[s].tolist()[0] == -1
        assert (world.reward[s, tiger_door], world.reward[s, other]) == (-100, 10)


# Load/Unload


def test_load_unload_at_random_and_memoryless():
    problem = load_unload()
    assert problem.observations == ("loading", "travel", "unloading")
    left = lambda *p: average_reward(problem.pomdp, *memoryless([[x, 1 - x] for x in p]))
    assert np.isclose(left(0.5, 0.5, 0.5), 0.05, rtol=1e-9)
    assert np.isclose(left(0, 0.5, 1), 1 / 16, rtol=1e-9)
    steps = np.linspace(0, 1, 6)
    grid = [left(x, y, z) for x in steps for y in (0.1, 0.3, 0.5, 0.6, 0.9) for z in steps]
    assert max(grid) < 1 / 16 + 1e-9


def test_load_unload_with_two_i_states_earns_two_rewards_in_eight_steps():
    problem = load_unload()

    def rules(g, obs):
        h = {"loading": 1, "unloading": 0}.get(obs, g)
        return h, "right" if h else "left"

    assert np.isclose(
        average_reward(problem.pomdp, *controller(problem, rules, 2)), 1 / 4, rtol=1e-9
    )


def test_load_unload_rewards_arriving_unloaded_at_the_pile_and_loaded_at_the_end():
    problem = load_unload()
    world = dense(problem.pomdp)
    for s, a in np.argwhere(world.reward):
        after = problem.states[int(world.transition[s, a].argmax())]
        assert (after, problem.actions[a]) in {("0 unloaded", "left"), ("4 loaded", "right")}
    assert world.reward.sum() == 2  # from 1 unloaded, and from 3 loaded
    assert np.flatnonzero(world.reward.sum(1)).tolist() == [3, 6]


# Heaven/Hell


def test_heaven_hell_without_memory_earns_nothing():
    problem = heaven_hell()
    rng = np.random.default_rng(0)
    for _ in range(5):
        table = rng.dirichlet(np.ones(4), size=11)
        assert abs(average_reward(problem.pomdp, *memoryless(table))) < 1e-12


def test_heaven_hell_with_three_i_states_earns_a_reward_in_eleven_steps():
    problem = heaven_hell()
    unknown, left, right = range(3)
    ask = {"s0": "S", "s1": "S", "s2": "S", "s3": "E", "s5": "W", "s7": "E", "s8": "E"}
    go = {"s7": "N", "s0": "N", "s1": "N", "s8": "W", "left": "W", "right": "W"}
    west, east = {"s2": "W", "s3": "W", "s5": "W"}, {"s2": "E", "s3": "E", "s5": "E"}

    def rules(g, obs):
        h = {"s4": unknown, "s6": unknown, "left": left, "right": right}.get(obs, g)
        plan = ask if h == unknown else go | (west if h == left else east)
        return h, plan.get(obs, "N")

    assert np.isclose(
        average_reward(problem.pomdp, *controller(problem, rules, 3)), 1 / 11, rtol=1e-9
    )


def test_heaven_hell_worlds_differ_in_the_priest_and_the_rewards_alone():
    world = dense(heaven_hell().pomdp)
    one, two = world.observation[:10], world.observation[10:]
    assert np.array_equal(one[:9], two[:9])
    assert one[9].argmax() == 9
    assert two[9].argmax() == 10
    moves = np.asarray(world.transition)
    inside = [s for s in range(10) if s not in (4, 6)]
    assert np.array_equal(moves[:10, :, :10][inside], moves[10:, :, 10:][inside])
    for s in (4, 6, 14, 16):
        assert np.array_equal(moves[s], np.tile(world.start, (4, 1)))
    assert np.array_equal(world.reward[:10], -world.reward[10:])


# Pentagon


def test_pentagon_declares_with_and_without_restart():
    for restart in (True, False):
        world = jax.tree.map(np.asarray, dense(pentagon(restart=restart).pomdp))
        goal = slice(36, 40)
        assert (world.reward[goal, 3] == 1).all()
        assert (world.transition[goal, 3, 211] == 1).all()
        others = np.delete(np.arange(208), goal)
        assert (world.reward[others, 3] == -1).all()
        assert (world.transition[others, 3, others] == 1).all()
        assert not world.reward[:, :3].any()
        assert not world.reward[208:].any()
        assert (world.transition[211, :, 21 if restart else 211] == 1).all()
        assert all((world.transition[s, :, s] == 1).all() for s in (208, 209, 210))
        assert world.start[21] == 1


def test_pentagon_moves_and_sees_by_its_map():
    problem = pentagon()
    world = jax.tree.map(np.asarray, dense(problem.pomdp))
    law = np.round(world.transition, 12)
    moves = lambda s, a: {int(t): law[s, a, t] for t in np.flatnonzero(law[s, a])}
    up, right, down, left = range(4)
    state = lambda cell, heading: 4 * cell + heading
    see = lambda cell, heading: problem.observations[
        int(world.observation[state(cell, heading)].argmax())
    ]
    assert moves(21, 0) == {21: 0.11, state(6, right): 0.88, state(22, right): 0.01}
    assert moves(state(7, left), 0)[state(37, left)] == 0.01
    assert moves(state(8, right), 0) == {state(8, right): 0.11, state(7, right): 0.89}
    for cell, heading in ((0, down), (26, up), (9, down), (38, up), (5, left)):
        assert moves(state(cell, heading), 0) == {state(cell, heading): 1}
    assert moves(state(3, up), 1) == {state(3, h): p for h, p in ((0, 0.05), (3, 0.9), (2, 0.05))}
    assert moves(state(3, up), 2) == {state(3, h): p for h, p in ((0, 0.05), (1, 0.9), (2, 0.05))}
    assert see(5, right) == "wall, doorway, wall"
    assert see(10, right) == "open, doorway, wall"  # 36 below, the goal ahead
    assert see(10, up) == "doorway, wall, open"  # 43 to the left
    assert see(9, left) == "wall, doorway, wall"
    assert see(3, up) == "wall, open, wall"
    noise = {"wall": (0.9, 0.05, 0.05), "open": (0.03, 0.9, 0.07), "doorway": (0.15, 0.15, 0.7)}
    laws = [noise[kind] for kind in ("open", "doorway", "wall")]
    expected = np.einsum("r,f,l->rfl", *laws).ravel()
    assert np.allclose(world.observation[state(10, right), :27], expected, rtol=1e-12)
    assert not world.observation[:, 27].any()
    assert np.allclose(world.observation[211, 0], 0.9**3)


# The factory


def test_factory_starts_in_the_upper_corners():
    problem = factory()
    (start,) = np.flatnonzero(problem.pomdp.start)
    assert problem.name == "factory-stand-in"
    assert problem.states[start] == "empty 02E, empty 42W, no part"
    assert problem.observations[problem.pomdp.observation[start, 0]] == "00111, 01101"


def test_factory_follows_a_slow_simulation_of_its_rules():
    problem = factory()
    pomdp = jax.tree.map(np.asarray, problem.pomdp)
    where = [(x, y) for y in (2, 0) for x in range(5)] + [(0, 1), (2, 1), (4, 1)]
    pile, machine, store = where[10:]
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    rng = np.random.default_rng(0)

    def ahead(agent, turn=0):
        dx, dy = steps[(agent[2] + turn) % 4]
        return agent[1][0] + dx, agent[1][1] + dy

    def walk(agent, act, other):
        """Loaded, place and heading afterwards, and the place that was left, if any."""
        loaded, place, heading = agent
        to = ahead(agent)
        if act == 2 and to in where and to != other[1]:
            return [loaded, to, heading], place
        return [loaded, place, (heading + {0: -1, 1: 1}.get(act, 0)) % 4], None

    def after(one, two, part, acts):
        reward = 0
        one, left = walk(one, acts[0], two)
        if left == pile:
            one[0] = 1
        if left == machine and one[0]:
            one[0], part = 0, 1
        two, left = walk(two, acts[1], one)
        if left == machine and part and not two[0]:
            two[0], part = 1, 0
        if left == store and two[0]:
            two[0], reward = 0, 1
        return one, two, part, reward

    def bits(agent, other):
        to = [ahead(agent, k) for k in range(4)]
        return "".join(str(int(x not in where or x == other[1])) for x in to) + str(
            int(agent[1][1] == 2)
        )

    busy = np.flatnonzero(pomdp.reward.any((1, 2)))  # agent 2 may leave the store loaded
    for s in (*rng.choice(reachable(problem.pomdp), 300), *rng.choice(busy, 30)):
        l1, c1, h1, l2, c2, h2, part = map(int, np.unravel_index(s, FACTORY_SHAPE))
        one, two = [l1, where[c1], h1], [l2, where[c2], h2]
        seen = f"{bits(one, two)}, {bits(two, one)}"
        assert problem.observations[pomdp.observation[s, 0]] == seen
        a = rng.integers(16)
        expected = {}
        for act1, p1 in ((a // 4, 0.9), (3, 0.1)):
            for act2, p2 in ((a % 4, 0.9), (3, 0.1)):
                x, y, full, reward = after(one, two, part, (act1, act2))
                to = (x[0], where.index(x[1]), x[2], y[0], where.index(y[1]), y[2], full)
                to = int(np.ravel_multi_index(to, FACTORY_SHAPE)), reward
                expected[to] = expected.get(to, 0) + p1 * p2
        lists = pomdp.successor[s, a], pomdp.reward[s, a], pomdp.probability[s, a]
        found = {(int(t), round(float(r))): p for t, r, p in zip(*lists, strict=True) if p > 0}
        assert found.keys() == expected.keys()
        assert all(np.isclose(found[x], expected[x], rtol=1e-12) for x in found)


# Random worlds


@pytest.mark.parametrize(
    ("num_states", "arguments"),
    [
        (2, {"num_obs": 2, "num_successors": 2, "num_actions": 1}),
        (5, {"num_obs": 1, "num_successors": 5}),
        (8, {}),
        (30_000, {"num_obs": 100}),
    ],
)
def test_random_world_is_what_it_says(num_states, arguments):
    problem = random_pomdp(num_states, **arguments)
    pomdp = jax.tree.map(np.asarray, problem.pomdp)
    num_actions, num_obs, num_successors = (
        arguments.get(name, default)
        for name, default in (("num_actions", 4), ("num_obs", 8), ("num_successors", 3))
    )
    assert pomdp.successor.shape == (num_states, num_actions, num_successors)
    assert pomdp.observation.shape == (num_states, min(2, num_obs))
    assert (pomdp.probability > 0).all()  # no padding: successors and observations are distinct
    assert (pomdp.emission > 0).all()
    for law in (pomdp.probability, pomdp.emission, pomdp.start):
        np.testing.assert_allclose(law.sum(-1), 1, rtol=1e-12)
    following = (np.arange(num_states) + 1) % num_states
    assert (pomdp.successor == following[:, None, None]).any(-1).all()  # irreducible
    assert (pomdp.successor[0] == 0).any(-1).all()  # aperiodic
    assert len(np.unique(pomdp.observation)) == num_obs
    assert np.allclose(pomdp.reward, pomdp.reward[..., :1], rtol=1e-12)
    assert len(problem.states) == num_states
    if num_states > 1000:
        reward = pomdp.reward[..., 0]
        error = 1 / np.sqrt(reward.size)
        assert abs(reward.mean()) < 4 * error
        assert abs(reward.std() - 1) < 4 * error / np.sqrt(2)
        # Any state but s and s + 1 is as likely as another to follow s.
        offset = (pomdp.successor - following[:, None, None]) % num_states
        offset = offset[offset > 0] / num_states
        assert abs(offset.mean() - 0.5) < 4 / np.sqrt(12 * offset.size)


def test_random_world_depends_on_its_seed_alone():
    one, same, other = (random_pomdp(10, seed=seed).pomdp for seed in (1, 1, 2))
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(same)))
    assert not np.array_equal(one.probability, other.probability)


@pytest.mark.parametrize(
    ("num_states", "arguments", "message"),
    [
        (1, {}, "num_states is 1"),
        (10, {"num_actions": 0}, "num_actions is 0"),
        (10, {"num_obs": 11}, r"num_obs is 11; it has to be from 1 to 10"),
        (10, {"num_obs": 0}, "num_obs is 0"),
        (10, {"num_successors": 11}, r"num_successors is 11; it has to be from 2 to 10"),
        (10, {"num_successors": 1}, "num_successors is 1"),
    ],
)
def test_random_world_refuses_impossible_sizes(num_states, arguments, message):
    with pytest.raises(ValueError, match=message):
        random_pomdp(num_states, **arguments)
