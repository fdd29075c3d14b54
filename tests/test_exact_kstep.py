import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import make_pomdp

from spg.exact import kstep
from spg.worlds import traps
from spg.worlds.models import dense, sparse

pytestmark = pytest.mark.usefixtures("float64")

GAMMA = 0.9
POLICIES = kstep.all_policies(2, 2)
solve = jax.jit(kstep.kstep_values, static_argnames=("k", "gamma"))


def return_of_the_augmented_chain(pomdp, weights, k):
    """J by one dense solve over (s, steps into the window, D)."""
    transition, observation, reward, start = map(np.asarray, pomdp)
    num_states, num_policies = len(start), len(POLICIES)
    shape = (num_states, k, num_policies)
    chain, gain = np.zeros(shape + shape), np.zeros(shape)
    for n, policy in enumerate(POLICIES):
        choice = observation @ np.eye(2)[policy]
        step = np.einsum("sa,sat->st", choice, transition)
        gain[:, :, n] = np.einsum("sa,sa->s", choice, reward)[:, None]
        for i in range(k - 1):
            chain[:, i, n, :, i + 1, n] = step
        chain[:, k - 1, n, :, 0, :] = step[:, :, None] * weights
    first = np.zeros(shape)
    first[:, 0] = start[:, None] * weights
    size = gain.size
    system = np.eye(size) - GAMMA * chain.reshape(size, size)
    return first.ravel() @ np.linalg.solve(system, gain.ravel())


@pytest.mark.parametrize("k", [1, 3])
def test_value_and_gradient_are_those_of_the_augmented_chain(k):
    """Observations are random here; the gradient by central differences, off the simplex too."""
    pomdp = make_pomdp(jr.key(0), num_states=3)
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    solution = solve(pomdp, POLICIES, jnp.asarray(weights), k=k, gamma=GAMMA)
    assert np.allclose(solution.expected_return, return_of_the_augmented_chain(pomdp, weights, k))
    assert np.isclose(solution.window_distribution.sum(), 1)
    assert solution.error < 1e-13
    h = 1e-5
    for n in range(4):
        up, down = (
            return_of_the_augmented_chain(pomdp, weights + s * np.eye(4)[n], k) for s in (h, -h)
        )
        assert np.isclose(solution.gradient[n], (up - down) / (2 * h), rtol=1e-8)


@pytest.mark.parametrize("k", [1, 3])
def test_sparse_worlds_have_the_same_solution(k):
    pomdp = make_pomdp(jr.key(1), num_states=4)
    weights = jnp.array([0.1, 0.2, 0.3, 0.4])
    by_lu = solve(pomdp, POLICIES, weights, k=k, gamma=GAMMA)
    by_krylov = solve(sparse(pomdp), POLICIES, weights, k=k, gamma=GAMMA)
    for x, y in zip(by_lu, by_krylov, strict=True):
        assert np.allclose(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_sparse_worlds_that_show_one_thing_a_state_have_the_same_solution():
    """There the products are those of `policy_chains`; of all k and weights at once."""
    problem = traps.random_aggregated(30, 3, 3, seed=2)
    policies = kstep.all_policies(3, 3)
    weights = jr.dirichlet(jr.key(0), jnp.ones(27), (2,))
    one = lambda p, k, w: kstep.kstep_values(p, policies, w, k=k, gamma=GAMMA)
    every = jax.jit(jax.vmap(jax.vmap(one, (None, 0, None)), (None, None, 0)))
    ks = jnp.array([1, 2, 7])
    for x, y in zip(
        every(dense(problem.pomdp), ks, weights), every(problem.pomdp, ks, weights), strict=True
    ):
        assert np.allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_sparse_worlds_are_solved_at_vertices_too(dtype):
    """Where all mass is on one policy, without reward, and for k so large that γ^k is nothing."""
    for reward, returns in ((0.3, (3.0, 6.561)), (0.0, (0.0, 6.561))):
        pomdp = traps.chain(4, reward).pomdp
        pomdp = jax.tree.map(lambda x: x.astype(dtype) if x.dtype.kind == "f" else x, pomdp)
        for policy, truth in enumerate(returns):
            for k in (1, 400):
                weights = jnp.eye(2, dtype=dtype)[policy]
                solution = solve(pomdp, np.array([[0], [1]]), weights, k=k, gamma=GAMMA)
                assert np.isclose(solution.expected_return, truth, rtol=1e-5)
                assert solution.error < 100 * jnp.finfo(dtype).eps


def test_the_error_in_single_precision_is_within_its_bound():
    """Of V and ν, directly up to γ = .99999 and by iteration; the bound is no idle one."""
    pomdp = make_pomdp(jr.key(1), num_states=4)
    weights = jnp.array([0.1, 0.2, 0.3, 0.4])
    single = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype.kind == "f" else x, tree
    )
    ks = jnp.array([1, 5])

    @jax.jit
    def every(pomdp, weights, gammas):
        one = lambda k, gamma: kstep.kstep_values(pomdp, POLICIES, weights, k=k, gamma=gamma)
        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(ks, gammas)

    for world, longest in ((pomdp, 0.99999), (sparse(pomdp), 0.999)):
        gammas = jnp.array([0.9, longest])
        truth = every(pomdp, weights, gammas)
        found = every(*single((world, weights, gammas)))
        of_value = np.abs(found.value - truth.value).max(-1) / np.abs(truth.value).max(-1)
        of_windows = np.abs(found.window_distribution - truth.window_distribution).sum(-1)
        assert (np.maximum(of_value, of_windows) < found.error).all()
        assert (found.error < 10 * 2**-23 / (1 - gammas)).all()


def test_solution_is_differentiable():
    """By the weights, where it is the gradient formula, and by the rewards, where it is ν held."""
    pomdp = make_pomdp(jr.key(0), num_states=3)
    weights = jnp.array([0.1, 0.2, 0.3, 0.4])
    returns = lambda w, p: kstep.kstep_values(p, POLICIES, w, k=3, gamma=GAMMA).expected_return
    by_weights, by_pomdp = jax.jit(jax.grad(returns, (0, 1)))(weights, pomdp)
    assert np.allclose(by_weights, solve(pomdp, POLICIES, weights, k=3, gamma=GAMMA).gradient)
    assert np.isclose(by_pomdp.reward.sum(), 1 / (1 - GAMMA))


def test_product_law_is_the_memoryless_policy_for_k_1():
    """The pull-back of ∂J/∂w is the derivative of the ordinary policy's J."""
    pomdp = make_pomdp(jr.key(2), num_states=3)
    logits = jr.normal(jr.key(3), (1, 2, 2))

    def ordinary(logits):
        choice = pomdp.observation @ jax.nn.softmax(logits[0])
        step = jnp.einsum("sa,sat->st", choice, pomdp.transition)
        gain = (choice * pomdp.reward).sum(1)
        return pomdp.start @ jnp.linalg.solve(jnp.eye(3) - GAMMA * step, gain)

    law = lambda logits: kstep.product_weights(jnp.asarray(POLICIES), logits, jnp.zeros(1))
    weights, pull = jax.vjp(law, logits)
    solution = solve(pomdp, POLICIES, weights, k=1, gamma=GAMMA)
    assert np.isclose(solution.expected_return, ordinary(logits))
    assert np.allclose(pull(solution.gradient)[0], jax.grad(ordinary)(logits), rtol=1e-10)


@jax.jit
def slopes(pomdp, ks):
    """∂J/∂w of 'advance' less that of 'stay', at 'stay'; it is affine in the reward."""
    stay = jnp.array([1.0, 0.0])
    one = lambda k: kstep.kstep_values(pomdp, np.array([[0], [1]]), stay, k=k, gamma=GAMMA).gradient
    gradient = jax.vmap(one)(ks)
    return gradient[:, 1] - gradient[:, 0]


def first_escape(n, reward):
    """The least k at which the gradient leaves 'stay'."""
    return 1 + int(np.argmax(slopes(dense(traps.chain(n, reward).pomdp), jnp.arange(1, 25)) > 0))


@pytest.mark.slow
def test_chains_are_left_from_the_least_window_on():
    """The table of thresholds; the formula is reward < (γⁿ - γ^k) / (1 - γ^{k+1})."""
    table = {(1, 0.3): 2, (1, 0.5): 4, (2, 0.3): 4, (2, 0.5): 6, (3, 0.3): 6, (3, 0.5): 9}
    table |= {(4, 0.3): 7, (4, 0.5): 12, (5, 0.3): 9, (5, 0.5): 18}
    assert {key: first_escape(*key) for key in table} == table


@pytest.mark.parametrize(
    ("n", "k", "threshold"),
    [
        (1, 2, 0.3321),
        (1, 3, 0.4972),
        (1, 5, 0.6606),
        (1, 10, 0.8035),
        (1, 20, 0.8741),
        (4, 7, None),
    ],
)
def test_threshold_rewards_to_the_digit(n, k, threshold):
    formula = (GAMMA**n - GAMMA**k) / (1 - GAMMA ** (k + 1))
    assert threshold is None or round(formula, 4) == threshold
    ks = jnp.arange(1, 25)
    low, high = (float(slopes(dense(traps.chain(n, r).pomdp), ks)[k - 1]) for r in (0.0, 1.0))
    assert np.isclose(low / (low - high), formula, rtol=1e-12)


def test_two_states_return_is_the_convex_quadratic():
    pomdp = dense(traps.chain(1, 0.5).pomdp)
    one = lambda p: kstep.kstep_values(
        pomdp, np.array([[0], [1]]), jnp.stack([1 - p, p]), k=1, gamma=GAMMA
    )
    solutions = jax.jit(jax.vmap(one))(jnp.array([0.0, 0.35, 1.0, 0.3518518518518519]))
    assert np.allclose(solutions.expected_return[:3], [5, 3.32875, 9])
    slope = solutions.gradient[:, 1] - solutions.gradient[:, 0]
    assert np.isclose(slope[0], -0.5 * 1.9 / 0.1)
    assert abs(slope[3]) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("m", "k"), [(2, 2), (2, 3), (3, 5), (3, 10)])
def test_a_shared_draw_matches_numbers_below_the_threshold(m, k):
    golden = {(2, 2): 0.3321033, (2, 3): 0.4972376, (3, 5): 0.4207566, (3, 10): 0.6428937}
    formula = (GAMMA**m - GAMMA ** (k + 1)) / (GAMMA - GAMMA ** (k + m))
    assert np.isclose(formula, golden[m, k], atol=5e-8)
    down, up = np.zeros(2 * (m + 1), int), np.full(2 * (m + 1), 2)
    gains = []
    for reward in (0.0, 1.0):
        problem = traps.matching(m, reward)
        policies = kstep.joint_policies(np.stack([down, up]), problem.slots, 3)
        pomdp = dense(problem.pomdp)
        solution = kstep.kstep_values(pomdp, policies, jnp.array([1.0, 0.0]), k=k, gamma=GAMMA)
        gains.append(float(solution.gradient[1] - solution.gradient[0]))
    assert np.isclose(gains[0] / (gains[0] - gains[1]), formula, rtol=1e-10)


def test_only_a_shared_draw_reaches_the_good_match():
    """Each agent goes up, or returns to 0, for k steps; at first it hardly ever goes up.

    Below the threshold the ascent of a shared draw ends at the good match and above it at the
    poor one; that of independent draws ends at the poor one on both sides.
    """
    m, k = 2, 3
    threshold = 0.4972376
    own = np.stack([np.zeros(3, int), np.full(3, 2)])  # return, up
    each = np.array([np.concatenate([own[i], own[j]]) for i in range(2) for j in range(2)])
    start = jnp.array([[0.999, 0.001]] * 2)

    def climb(pomdp, policies, shared):
        def law(logits):
            if shared:
                return jax.nn.softmax(logits[0])
            return jnp.outer(*jax.nn.softmax(logits)).reshape(-1)

        def step(logits, _):
            weights, pull = jax.vjp(law, logits)
            solution = kstep.kstep_values(pomdp, policies, weights, k=k, gamma=GAMMA)
            return logits + 0.5 * pull(solution.gradient)[0], solution.expected_return

        return jax.lax.scan(step, jnp.log(start), length=5000)[1][-1]

    climb = jax.jit(climb, static_argnames="shared")
    for reward, good in ((threshold - 0.02, True), (threshold + 0.02, False)):
        problem = traps.matching(m, reward)
        pomdp = dense(problem.pomdp)
        joint = jnp.asarray(kstep.joint_policies(each, problem.slots, 3))
        poor, best = reward / (1 - GAMMA), reward + GAMMA**m / (1 - GAMMA)
        assert np.isclose(climb(pomdp, joint, False), poor, rtol=0.05)
        ends = climb(pomdp, joint[jnp.array([0, 3])], True)
        assert np.isclose(ends, best if good else poor, rtol=0.05)


def test_one_agent_alone_cannot_leave_the_poor_match():
    """No policy of its own helps the first agent, whatever k: a Nash point."""
    problem = traps.matching(2, 0.3)
    down = np.zeros(6, int)
    one_agent = [p for p in kstep.all_policies(6, 3) if (p[3:] == 0).all() and p.any()]
    policies = kstep.joint_policies(np.stack([down, *one_agent]), problem.slots, 3)
    start = jnp.eye(len(policies))[0]
    run = lambda k: (
        kstep.kstep_values(dense(problem.pomdp), policies, start, k=k, gamma=GAMMA).gradient
    )
    gradient = jax.jit(jax.vmap(run))(jnp.array([1, 4, 16]))
    assert (gradient <= gradient[:, :1] + 1e-12).all()


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_many_worlds_at_once_are_solved_as_each_alone():
    """Of a batch this large, XLA on a CPU got products with broadcast vectors wrong, once."""
    policies, weights = kstep.all_policies(3, 2), jnp.full(8, 1 / 8)
    one = lambda pomdp: kstep.kstep_values(pomdp, policies, weights, k=1, gamma=GAMMA)
    worlds = [dense(traps.random_aggregated(seed=seed).pomdp) for seed in range(40)]
    batch = jax.tree.map(lambda *x: jnp.concatenate([jnp.stack(x)] * 25), *worlds)
    solutions = jax.jit(jax.vmap(one))(batch)
    assert solutions.error.shape == (1000,)
    assert solutions.error.max() < 1e-12
    alone = jax.jit(one)(worlds[7])
    assert np.allclose(solutions.gradient[7], alone.gradient, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0; a window has at least 1 step"),
        ({"gamma": 1.0}, "gamma is 1.0; it has to be between 0 and 1"),
        ({"weights": jnp.array([0.5, 0.6])}, "off the simplex: min 0.5, sum 1.1"),
        ({"weights": jnp.array([-0.5, 1.5])}, "off the simplex: min -0.5, sum 1"),
        ({"weights": jnp.ones(1)}, "1 weights for 2 policies"),
        ({"policies": np.zeros((0, 2), int)}, "the list of policies is empty"),
        ({"policies": np.array([[0, 1], [0, 1]])}, r"policy \[0, 1\] repeats"),
        ({"policies": np.array([[0, 1], [0, 2]])}, "action 2 is out of range: there are 2"),
        ({"policies": np.array([[0], [1]])}, "actions for 1 observations; there are 2"),
    ],
)
def test_bad_input_is_refused_with_its_value(change, message):
    arguments = {
        "policies": np.array([[0, 0], [0, 1]]),
        "weights": jnp.array([0.5, 0.5]),
        "k": 2,
        "gamma": 0.9,
    } | change
    pomdp = make_pomdp(jr.key(0))
    policies, weights = arguments.pop("policies"), arguments.pop("weights")
    with pytest.raises(ValueError, match=message):
        kstep.kstep_values(pomdp, policies, weights, **arguments)


def test_full_sight_earns_what_the_best_policy_of_states_earns():
    """Of all deterministic policies in a world that shows its state."""
    pomdp = make_pomdp(jr.key(3), num_states=3, num_obs=3)
    pomdp = pomdp._replace(observation=jnp.eye(3))
    best = kstep.policy_returns(pomdp, kstep.all_policies(3, 2), gamma=GAMMA).max()
    for world in (pomdp, sparse(pomdp)):
        assert np.isclose(kstep.sighted_return(world, gamma=GAMMA), best, rtol=1e-12)
