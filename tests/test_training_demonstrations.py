"""Demonstrations are what the expert saw and did, survive the file, and bad ones are refused."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import spg
from scripts import gail
from spg import envs
from spg.kernels.factory import PolicyConfig
from spg.training import demonstrations, experts
from spg.training.demonstrations import Demonstrations, load, save
from spg.types import Observation, Spec

PENDULUM: dict[str, Any] = {
    "env_params": {"max_steps_in_episode": 4},
    "num_envs": 2,
    "hidden": (4,),
    "cell": "linear",
    "z_size": 4,
}
CONFIG = gail.Config(**PENDULUM)
SPEC = Spec(obs_size=2, critic_size=3, num_actions=1, discrete=False)
WORLD = {
    "env": "Pendulum-v1", "backend": None, "env_params": {"max_steps_in_episode": 4},
    "observe": "positions", "previous_action": False,
}  # fmt: skip


def make(**changes) -> Demonstrations:
    """Three episodes of four steps on Pendulum; nothing is simulated."""
    rng = np.random.default_rng(0)
    critic, last = (rng.normal(size=(n, 3)).astype(np.float32) for n in (12, 3))
    ends = np.arange(12) % 4 == 3
    found = Demonstrations(
        critic[:, :2], critic, np.tanh(critic[:, :1]), ends & False, ends, last[:, :2], last,
        np.zeros((3, 0)), np.array([-3.0, -4.0, -5.0]),
        WORLD | {"expert_return": -4.0, "random_return": -8.0},
    )  # fmt: skip
    return found._replace(**changes)


def same(a, b):
    pairs = {k: (x, getattr(b, k)) for k, x in a._asdict().items() if k != "made"}
    return a.made == b.made and all(np.array_equal(x, y) for x, y in pairs.values())


def test_a_file_holds_what_was_saved_also_when_it_is_mapped(tmp_path, monkeypatch):
    path, found = tmp_path / "x.npz", make()
    save(path, found)
    assert same(load(path), found)
    monkeypatch.setattr(demonstrations, "LARGE", 0)
    mapped = load(path)
    assert same(mapped, found)
    assert isinstance(mapped.critic, np.memmap)
    two = load(path, episodes=2)
    assert len(two.returns) == len(two.last_obs) == 2
    assert np.array_equal(two.obs, found.obs[:8])


def test_steps_are_linked_within_episodes():
    found = make()
    kernel = spg.make_kernel(
        PolicyConfig(cell="linear", z_size=4, hidden=(4,)), SPEC, key=jr.key(0)
    )
    steps = found.steps(kernel, oracle=False, privileged=True)
    assert steps.first.tolist() == [True, False, False, False] * 3
    after = steps.final_obs.critic
    assert np.array_equal(after[3::4], found.last_critic)
    inside = np.arange(12) % 4 < 3
    assert np.array_equal(after[inside], steps.obs.critic[1:][inside[:-1]])
    assert np.array_equal(steps.obs.policy, found.obs)
    assert (steps.reward == 0).all()
    assert steps.z.shape == (12, 4)
    oracle = found.steps(kernel, oracle=True, privileged=False)
    assert np.array_equal(oracle.obs, found.critic)


def test_episodes_are_padded_to_the_longest():
    ends = np.array([False, True, True, False, False, True])
    found = make(terminated=ends, truncated=ends & False)
    rows, own = found.episodes
    assert rows.tolist() == [[0, 1, 1], [2, 2, 2], [3, 4, 5]]
    assert own.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


def test_fraction_is_0_for_random_actions_and_1_for_the_expert():
    assert make().fraction(np.array([-8.0, -4.0, -5.0])).tolist() == [0, 1, 0.75]
    worse = make(made=WORLD | {"expert_return": -9.0, "random_return": -8.0})
    assert worse.fraction(np.array([-9.0, -8.0, -7.0])).tolist() == [-1, 0, 1]
    assert demonstrations.weakness(make()) is None
    weak = make(made=WORLD | {"expert_return": -9.0, "random_return": -8.0})
    line = demonstrations.weakness(weak) or ""
    assert "-9" in line
    assert "-8" in line
    between = make(made=make().made | {"memoryless_return": -3.0})
    line = demonstrations.weakness(between) or ""
    assert "-4 is no better than -3, that of the memoryless policy" in line


def test_what_an_episode_draws_is_found_among_the_state():
    """Constant in each episode, and not the same in all: the third entry alone."""
    critic = np.array([[0, 5, 1, 1], [1, 5, 1, 1], [2, 5, 3, 4], [3, 5, 3, 0]], np.float32)
    ends = np.array([False, True, False, True])
    assert experts.hidden(critic, ends).tolist() == [[1], [3]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs": np.zeros((11, 2))}, "lengths have to be the same: obs 11, critic 12"),
        ({"last_obs": np.zeros((3, 4))}, r"obs \(12, 2\) and last_obs \(3, 4\) differ"),
        ({"truncated": np.zeros(12, bool)}, "no end of an episode at its last step: 0 ends in 12"),
        ({"terminated": np.ones(12, bool)}, "12 ends of episodes and 3 returns"),
        ({"critic": np.full((12, 3), np.nan)}, "row 0 of critic is not finite"),
        ({"action": np.full((12, 1), np.inf)}, r"row 0 of action is not within \[-1, 1\]"),
        ({"action": np.full((12, 1), 1.5)}, r"row 0 of action is not within \[-1, 1\]"),
        ({"action": np.full(12, "left")}, "action is <U4 with 1 axes"),
        ({"terminated": np.zeros(12)}, "terminated is float64 with 1 axes"),
        ({"truncated": np.zeros((12, 1), bool)}, "truncated is bool with 2 axes"),
        ({"returns": np.float64(1)}, "returns is float64 with 0 axes"),
        ({"made": [1]}, "does not tell how it was made"),
        (
            {"made": WORLD | {"expert_return": None, "random_return": 0.0}},
            "two numbers that differ",
        ),
        ({"made": WORLD | {"expert_return": 1.0, "random_return": 1.0}}, "two numbers that differ"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(changes, message, tmp_path):
    path = tmp_path / "x.npz"
    save(path, make(**changes))
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_files_that_are_no_demonstrations_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(ValueError, match=r"is not there; scripts/demonstrate\.py records"):
        load(path)
    path.write_bytes(b"none")
    with pytest.raises(ValueError, match="holds no demonstrations"):
        load(path)
    np.savez(path, made=np.array(json.dumps({})), obs=np.zeros(3))
    with pytest.raises(ValueError, match="holds no demonstrations"):
        load(path)
    save(path, make(made={"env": "Pendulum-v1"}))
    with pytest.raises(ValueError, match="does not tell backend, env_params, expert_return"):
        load(path)
    save(path, make())
    with pytest.raises(ValueError, match="4 episodes are asked for, and 3 are there"):
        load(path, episodes=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"env": "PointMass-memory"}, "env Pendulum-v1, and the training has PointMass-memory"),
        ({"env_params": {}}, "env_params {.*}, and the training has {}"),
        ({"observe": "all"}, "observe positions, and the training has all"),
    ],
)
def test_demonstrations_of_another_world_are_refused_by_both_names(words, message):
    view = vars(replace(CONFIG, **words))
    with pytest.raises(ValueError, match=f"x.npz has {message}") as error:
        demonstrations.check_world("x.npz", make().made, "the training", view)
    assert "\n" not in str(error.value)


def test_an_oracle_may_observe_what_it_likes():
    view = vars(replace(CONFIG, observe="all"))
    demonstrations.check_world("x", make().made, "the training", view, oracle=True)


SIZES = {"oracle": False, "privileged": True, "least": 12}


@pytest.mark.parametrize(
    ("changes", "least", "message"),
    [
        (
            {"obs": np.zeros((12, 5))},
            12,
            "of the policy have size 5 in x.npz, and 2 in the tra",
        ),
        ({"critic": np.zeros((12, 4))}, 12, "of the critic have size 4 in x.npz, and 3 in the tra"),
        ({"action": np.zeros((12, 6))}, 12, "actions have size 6 in x.npz, and 1 in the training"),
        ({"action": np.zeros(12, int)}, 12, "actions have size discrete in x.npz, and 1 in the t"),
        ({}, 13, "x.npz hold 12 steps, and a gradient takes 13"),
    ],
)
def test_demonstrations_of_other_sizes_are_refused_by_both(changes, least, message):
    with pytest.raises(ValueError, match=message) as error:
        demonstrations.check_sizes("x.npz", make(**changes), SPEC, **SIZES | {"least": least})
    assert "\n" not in str(error.value)


def test_choices_that_the_training_does_not_have_are_refused():
    spec = SPEC._replace(num_actions=3, discrete=True)
    demonstrations.check_sizes("x.npz", make(action=np.arange(12) % 3), spec, **SIZES)
    with pytest.raises(ValueError, match=r"x\.npz go from 0 to 3, and those of the training fr"):
        demonstrations.check_sizes("x.npz", make(action=np.arange(12) % 4), spec, **SIZES)


def test_sizes_are_those_of_what_is_shown():
    """An oracle sees what the critic does, and a critic without privilege what the policy does."""
    for oracle, privileged, size in [
        (0, 1, (2, 3)),
        (1, 1, (3, 3)),
        (0, 0, (2, 2)),
        (1, 0, (3, 3)),
    ]:
        spec = SPEC._replace(obs_size=size[0], critic_size=size[1])
        words = {"oracle": bool(oracle), "privileged": bool(privileged), "least": 12}
        demonstrations.check_sizes("x", make(), spec, **words)


@pytest.mark.slow
def test_recorded_episodes_are_the_experts(monkeypatch):
    """On CartPole, where episodes end at different times and return their length."""
    monkeypatch.setattr(experts, "EPISODES", 3)
    env = envs.make("CartPole-v1", observe="positions", privileged=True)
    state = env.spec._replace(obs_size=env.spec.critic_size)
    config = PolicyConfig(memory="oracle", hidden=(4,))
    kernel = jax.jit(lambda key: spg.make_kernel(config, state, key=key))(jr.key(0))
    expert = experts.Expert(kernel, True, True)
    found = experts.record(expert, env, num_episodes=5, made={"a": 1}, key=jr.key(1))
    last = np.flatnonzero(found.ends)
    lengths = np.diff(np.concatenate([[-1], last]))
    assert len(last) == 5
    assert len(set(lengths.tolist())) > 1
    assert found.returns.tolist() == lengths.tolist()
    assert last[-1] == len(found.obs) - 1
    assert np.array_equal(found.critic[:, [0, 2]], found.obs)
    assert not np.allclose(found.last_critic, found.critic[last])
    moved = np.abs(found.last_critic[:, 0] - found.critic[last, 0])
    assert moved.max() < 0.1  # a step from the last one, and no reset
    assert found.action.dtype.kind == "i"
    assert found.made["a"] == 1
    assert 5 < found.made["random_return"] < 60
    noise_free = experts.Expert(kernel, False, True)
    obs = Observation(jnp.zeros(2), jnp.ones(4))
    assert (
        noise_free.sample(obs, kernel.z0, key=jr.key(0))[0]
        == kernel.mode(jnp.ones(4), kernel.z0)[0]
    )
