import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from spg import PolicyConfig, envs, make_kernel, reset, rollout
from spg.envs import Tabular
from spg.kernels.held import HeldState, held_kernel
from spg.kernels.seeds import SeedState
from spg.types import Env
from spg.worlds import traps

pytestmark = pytest.mark.usefixtures("float64")

K = 4


@pytest.fixture(scope="module")
def recorded(float64):
    """Two agents in number matching, three components."""
    problem = traps.matching(2)
    kernel = held_kernel(
        jr.normal(jr.key(0), (3, 6, 3)), jnp.array([0.0, 1.0, 0.5]), k=K, slots=problem.slots
    )
    tabular = Tabular(problem.pomdp, max_steps_in_episode=10)
    env = Env(tabular, tabular.default_params)

    @jax.jit
    def run(key):
        carry = reset(kernel, env, key=key)
        return rollout(kernel, env, carry, num_steps=60, key=key)[1]

    traj = jax.vmap(run)(jr.split(jr.key(1), 50))
    return problem, kernel, jax.tree.map(np.asarray, traj)


@pytest.mark.slow
def test_each_agent_holds_its_actions_for_a_window(recorded):
    """The joint action is (a_1, a_2) row-major; windows restart with the episode."""
    problem, _, traj = recorded
    actions = np.stack(np.divmod(traj.action, 3), -1)
    slots = problem.slots[traj.obs]
    for n in range(50):
        held = {}
        for t in range(60):
            since = t % 10
            assert traj.first[n, t] == (since == 0)
            held = {} if since % K == 0 else held
            for slot, action in zip(slots[n, t], actions[n, t], strict=True):
                assert held.setdefault(int(slot), action) == action
            if since % K:
                assert traj.z_next.component[n, t] == traj.z.component[n, t]


def test_a_draw_is_scored_once(recorded):
    problem, kernel, traj = recorded
    log_prob = jax.jit(jax.vmap(kernel.log_prob))(traj).joint
    cell = kernel.cell.distribution
    log_w, log_p = jax.nn.log_softmax(cell.mixture), jax.nn.log_softmax(cell.logits)
    actions = np.stack(np.divmod(traj.action, 3), -1)
    slots = problem.slots[traj.obs]
    for n in range(5):
        for t in range(60):
            c = traj.z_next.component[n, t]
            opens = t % 10 % K == 0
            if opens:
                seen = set()
            new = [i for i in range(2) if slots[n, t, i] not in seen]
            seen.update(slots[n, t])
            truth = opens * log_w[c] + sum(log_p[c, slots[n, t, i], actions[n, t, i]] for i in new)
            assert np.isclose(log_prob[n, t], truth)


@pytest.mark.slow
def test_draws_have_the_probabilities_of_the_cell(recorded):
    """And the entropy is the mean of -log ω."""
    _, kernel, _ = recorded
    obs = jnp.array(5)
    one, two = jnp.array(1), jnp.array(2)
    z = HeldState(one, two, jnp.array([-1, 0, -1, -1, -1, -1]))  # slot 1 holds 'down'
    for state in (kernel.z0, z):
        law = kernel.cell(obs, state)
        draw = jax.jit(jax.vmap(lambda key: law.sample(key=key)))  # noqa: B023
        z_next = draw(jr.split(jr.key(0), 20_000))
        log_prob = jax.vmap(law.log_prob)(z_next)
        columns = np.column_stack(jax.tree.leaves(z_next))
        unique, count = np.unique(columns, axis=0, return_counts=True)
        unique = HeldState(*map(jnp.asarray, (unique[:, 0], unique[:, 1], unique[:, 2:])))
        prob = jnp.exp(jax.vmap(law.log_prob)(unique))
        assert np.isclose(prob.sum(), 1)
        assert np.allclose(count / 20_000, prob, atol=0.015)
        assert np.isclose(law.entropy(), -log_prob.mean(), atol=0.02)
        assert np.isclose(law.entropy(), -(prob * jnp.log(prob)).sum())
    assert (z_next.actions[:, 1] == 0).all()


def test_the_noise_free_policy_takes_the_likeliest(recorded):
    _, kernel, _ = recorded
    action, z_next = kernel.mode(jnp.array(0), kernel.z0)
    best = np.argmax(np.asarray(kernel.cell.distribution.logits[1, [0, 3]]), -1)
    assert z_next.component == 1
    assert action == best[0] * 3 + best[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0; a window has at least 1 step"),
        ({"slots": np.array([[0, 0]])}, "two agents share slot 0"),
        ({"slots": np.array([[0, 1], [1, 0]])}, "two agents share slot 0"),
        ({"slots": np.array([[-1, 1]])}, "slot -1 is out of range: there are 2"),
        ({"mixture": jnp.zeros(3)}, "mixture has 3 logits for 1 components"),
        ({"slots": np.array([[0, 2]])}, "slot 2 is out of range: there are 2"),
    ],
)
def test_bad_input_is_refused_with_its_value(change, message):
    with pytest.raises(ValueError, match=message):
        held_kernel(jnp.zeros((1, 2, 2)), **{"k": 2} | change)


def seeded(slots=None, **config):
    env = envs.make("matching-pomdp" if slots else "chain-pomdp", max_steps_in_episode=10)
    policy = PolicyConfig(memory="kstep", k=K, z_size=3, hidden=(4,), **config)
    return make_kernel(policy, env.spec, key=jr.key(0)), env


@pytest.mark.slow
@pytest.mark.parametrize("slots", [False, True])
def test_seeds_are_held_for_a_window_and_scored_once(slots):
    kernel, env = seeded(slots)
    kernel = eqx.tree_at(lambda k: k.cell.distribution.logits, kernel, jnp.array([0.0, 1.0, -1.0]))

    @jax.jit
    def run(key):
        carry = reset(kernel, env, key=key)
        traj = rollout(kernel, env, carry, num_steps=40, key=key)[1]
        return traj, kernel.log_prob(traj)

    traj, scored = jax.tree.map(np.asarray, jax.vmap(run)(jr.split(jr.key(1), 200)))
    seed = traj.z_next.seed
    since = np.arange(40) % 10 % K
    opens = since == 0
    assert (seed[:, 1:] == seed[:, :-1])[:, ~opens[1:]].all()
    assert np.array_equal(traj.z.step, np.broadcast_to(since, seed.shape))
    log_w = jax.nn.log_softmax(kernel.cell.distribution.logits)
    assert np.allclose(scored.z, np.where(opens, np.asarray(log_w)[seed], 0))
    share = np.bincount(seed[:, opens].ravel(), minlength=3) / seed[:, opens].size
    assert np.allclose(share, np.exp(log_w), atol=0.03)


def test_actions_depend_on_the_seed_and_not_on_the_phase():
    kernel, env = seeded()
    obs, _ = env.reset(jr.key(0))
    logits = lambda step, seed: kernel.head(obs, SeedState(*map(jnp.array, (step, seed)))).logits
    assert np.allclose(logits(0, 1), logits(2, 1))
    assert np.abs(logits(0, 1) - logits(0, 2)).max() > 0.1


def test_a_critic_sees_the_step_of_the_window_and_the_seed():
    kernel, _ = seeded()
    z = SeedState(jnp.array(2), jnp.array(1))
    assert np.array_equal(kernel.feature(z), [2 / K, 0, 1, 0])


def test_agents_of_a_team_act_on_what_each_sees():
    """Given the seed they are independent, and the second ignores what the first one sees."""
    kernel, _ = seeded(slots=True)
    z = SeedState(jnp.array(0), jnp.array(0))
    view = lambda i, j: jnp.eye(6)[i] + jnp.eye(6)[3 + j]
    joint = lambda obs: np.exp(jax.nn.log_softmax(kernel.head(obs, z).logits)).reshape(3, 3)
    here, there = joint(view(0, 1)), joint(view(2, 1))
    assert np.allclose(here, np.outer(here.sum(1), here.sum(0)))
    assert np.allclose(here.sum(0), there.sum(0))
    assert np.abs(here.sum(1) - there.sum(1)).max() > 1e-3


def test_memory_that_agents_would_share_is_refused():
    env = envs.make("matching-pomdp")
    with pytest.raises(ValueError, match="the 2 agents would share what they see"):
        make_kernel(PolicyConfig(memory="s2pg"), env.spec, key=jr.key(0))


@pytest.mark.parametrize("words", [{"previous_action": True}, {"observe": "state"}])
def test_a_team_is_shown_what_its_agents_see_and_no_more(words):
    env = envs.make("matching-pomdp", **words)
    with pytest.raises(ValueError, match="the agents see 6 entries, and"):
        make_kernel(PolicyConfig(memory="none"), env.spec, key=jr.key(0))
