import gymnax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from spg import envs
from spg.exact import kstep
from spg.worlds import models, traps

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("n", [1, 4])
def test_chain_pays_for_staying_and_for_advancing(n):
    """The two deterministic policies earn reward/(1 - γ) and γⁿ/(1 - γ)."""
    pomdp = models.dense(traps.chain(n, 0.3).pomdp)
    returns = kstep.policy_returns(pomdp, np.array([[0], [1]]), gamma=0.9)
    assert np.allclose(returns, [3, 0.9**n / 0.1])
    assert pomdp.num_obs == 1
    assert np.allclose(pomdp.reward[:, 0], 0.3 * (np.arange(n + 1) == 0))
    assert (pomdp.transition[:, 0, 0] == 1).all()


def test_matching_moves_and_clips_both_counters():
    problem = traps.matching(2, 0.3)
    pomdp = models.dense(problem.pomdp)
    up_down = 2 * 3 + 0
    for state, successor in (("0 0", "1 0"), ("1 1", "2 0"), ("2 2", "2 1")):
        s, t = problem.states.index(state), problem.states.index(successor)
        assert pomdp.transition[s, up_down, t] == 1
    assert problem.actions[up_down] == "up down"
    earned = {problem.states[s]: r for s, r in enumerate(np.asarray(pomdp.reward[:, 0])) if r}
    assert earned == {"0 0": 0.3, "2 2": 1}
    assert np.array_equal(problem.slots[problem.states.index("2 1")], [2, 3 + 1])


def test_random_worlds_are_seen_in_groups():
    problem = traps.random_aggregated(6, 3, seed=1)
    pomdp = models.dense(problem.pomdp)
    assert np.array_equal(pomdp.observation, np.eye(3)[[0, 0, 1, 1, 2, 2]])
    assert np.allclose(pomdp.transition.sum(-1), 1)
    assert not np.allclose(pomdp.reward, models.dense(traps.random_aggregated(seed=2).pomdp).reward)


@pytest.fixture(scope="module")
def cartpole(float64):
    return traps.cartpole(6)


def test_cartpole_keeps_the_mean_of_the_environment(cartpole):
    """Where nothing is clipped: the mean successor of a node is where Gymnax goes from there."""
    env, params = gymnax.make("CartPole-v1")
    pomdp, bins = cartpole.pomdp, 6
    limit = np.array([params.x_threshold, 3.0, params.theta_threshold_radians, 3.5])
    axes = [np.linspace(-b, b, bins + 2)[1:-1] for b in limit]
    nodes = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 4)
    inner = np.ravel_multi_index((2, 3, 2, 3), (bins,) * 4)
    key = jr.key(0)
    for action in range(2):
        state = env.reset_env(key, params)[1].replace(
            **dict(zip(("x", "x_dot", "theta", "theta_dot"), nodes[inner], strict=True))
        )
        for _ in range(2):
            _, state, _, _, _ = env.step_env(key, state, action, params)
        truth = np.array([state.x, state.x_dot, state.theta, state.theta_dot])
        successor, probability = pomdp.successor[inner, action], pomdp.probability[inner, action]
        assert np.allclose(probability @ nodes[np.asarray(successor)], truth, atol=1e-6)


def test_cartpole_that_has_fallen_lies(cartpole):
    pomdp = cartpole.pomdp
    fallen = len(cartpole.states) - 1
    assert cartpole.states[fallen] == "fallen"
    assert (
        np.asarray(pomdp.successor[fallen])[np.asarray(pomdp.probability[fallen]) > 0] == fallen
    ).all()
    assert np.allclose(pomdp.mean_reward()[fallen], 0)
    assert np.allclose(pomdp.mean_reward()[:fallen], 1)
    leaning = 5 * 6**3 + 5 * 6**2 + 5 * 6 + 5  # right of everything, and moving there
    assert pomdp.probability[leaning, 1].max() == 1
    assert int(pomdp.successor[leaning, 1, pomdp.probability[leaning, 1].argmax()]) == fallen


def test_cart_may_leave_the_track(cartpole):
    """From the outermost place, moving out, the mass at the end of the track has fallen."""
    outermost = np.ravel_multi_index((5, 5, 2, 2), (6,) * 4)
    fallen = np.asarray(cartpole.pomdp.successor[outermost]) == len(cartpole.states) - 1
    lost = (np.asarray(cartpole.pomdp.probability[outermost]) * fallen).sum(1)
    assert (lost > 0).all()
    assert (lost < 1).all()


def test_start_of_cartpole_is_in_the_middle(cartpole):
    assert np.isclose(cartpole.pomdp.start.sum(), 1)
    assert np.count_nonzero(cartpole.pomdp.start) == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: traps.chain(0), "n is 0; it has to be at least 1"),
        (lambda: traps.matching(0), "m is 0; it has to be at least 1"),
        (
            lambda: traps.random_aggregated(6, 9),
            "num_obs is 9; it has to be from 1 to",
        ),
        (lambda: traps.cartpole(1), "bins is 1; it has to be at least 2"),
    ],
)
def test_sizes_that_make_no_world_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0, 0, 1], "the aggregation map has 3 entries; there are 5 states"),
        ([0, 0, 2, 2, 2], "no state is in group 1, of 3"),
        ([0, -1, 0, 0, 0], "state 1 is in group -1; groups count from 0"),
    ],
)
def test_aggregation_maps_that_skip_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        models.aggregate(traps.chain(4).pomdp, np.array(groups))


def test_team_sees_an_entry_for_each_agent():
    """Number matching by name: two entries are 1, what each agent sees of its own counter."""
    env, params = envs.make("matching-pomdp", m=3)
    obs, state = env.reset(jr.key(0), params)
    assert np.array_equal(obs, np.eye(8)[0] + np.eye(8)[4])
    obs, *_ = jax.jit(env.step)(jr.key(1), state, jnp.array(2 * 3 + 1), params)
    assert np.array_equal(obs, np.eye(8)[1] + np.eye(8)[4])


@pytest.mark.parametrize("name", traps.TRAPS)
def test_every_trap_is_an_environment(name):
    keywords = {"bins": 2} if name == "cartpole" else {}
    env, params = envs.make(f"{name}-pomdp", **keywords)
    obs, _ = env.reset(jr.key(0), params)
    assert obs.shape == env.observation_space(params).shape
