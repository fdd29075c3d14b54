"""GAIL, LS-IQ and cloning run, learn nothing from rewards, and refuse what they cannot imitate."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, largest_difference
from test_scripts import two_updates
from test_training_demonstrations import PENDULUM, WORLD, make

import spg
from scripts import clone, demonstrate, gail, lsiq
from spg.training import demonstrations, options, policies
from spg.types import Env

long = partial(pytest.param, marks=pytest.mark.long)
RUN: dict[str, Any] = {"num_seeds": 2, "eval_episodes": 2, "checkpoints": 1}
GAIL = gail.Config(
    num_steps=4, num_minibatches=2, num_epochs=1, total_steps=16, discriminator_batch=8,
    discriminator_steps=2, discriminator_hidden=(4,), **PENDULUM, **RUN,
)  # fmt: skip
LSIQ = lsiq.Config(
    num_steps=4, total_steps=16, learning_starts=8, buffer_size=16, batch_size=4,
    updates_per_step=0.5, **PENDULUM, **RUN,
)  # fmt: skip
CLONE = clone.Config(
    env_params=PENDULUM["env_params"], hidden=(4,), cell="linear", z_size=4, num_updates=2,
    num_gradients=2, batch_episodes=2, score_episodes=2, **RUN,
)  # fmt: skip
BPTT: dict[str, Any] = {"memory": "bptt", "segment_length": 2}


@pytest.fixture
def expert(tmp_path):
    path = tmp_path / "demonstrations.npz"
    demonstrations.save(path, make())
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "config", "words"),
    [
        (gail, GAIL, {"memory": "none"}),
        (lsiq, LSIQ, {}),
        (clone, CLONE, {}),
        long(gail, GAIL, {"loss": "least-squares", "memory": "oracle", "soft_labels": True}),
        long(gail, GAIL, {"privileged": False, **BPTT}),
        long(lsiq, LSIQ, {"expert_target": "bootstrapped", "critic_state": True, **BPTT}),
        long(lsiq, LSIQ, {"loss_steps": "last", "batch_size": 2, "num_episodes": 2, **BPTT}),
        long(lsiq, LSIQ, {"memory": "oracle"}),
        long(clone, CLONE, {"memory": "bptt"}),
        long(clone, CLONE, {"memory": "oracle", "actions": "tanh-normal"}),
        long(clone, CLONE, {"memory": "none", "num_episodes": 2}),
    ],
)
def test_two_updates(script, config, words, expert, tmp_path):
    config = replace(config, demonstrations=expert, **words)
    data = two_updates(script, config, tmp_path)
    np.testing.assert_allclose(data["fraction_of_expert"], data["return"] / 4 + 2, rtol=1e-5)
    assert np.isfinite(data["eval_fraction_of_expert"][:, -1]).all()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["measure"] == "fraction_of_expert"


@pytest.mark.parametrize(
    "name", [pytest.param("gail", marks=pytest.mark.slow), long("lsiq"), long("clone")]
)
def test_two_devices_share_the_seeds(name, expert, tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, here / "imitators.py", name, expert, tmp_path], text=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(here.parent), "XLA_FLAGS": flags},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    one, two = json.loads(result.stdout.splitlines()[-1]).values()
    for column in one:
        np.testing.assert_allclose(one[column], two[column], rtol=1e-3, atol=1e-4, err_msg=column)


class Bribed:
    """An environment that pays otherwise."""

    def __init__(self, env):
        self.environment = env.environment

    def reset(self, key, params):
        return self.environment.reset(key, params)

    def step(self, key, state, action, params):
        obs, state, reward, *rest = self.environment.step(key, state, action, params)
        return obs, state, 7 - 3 * reward, *rest

    def spec(self, params):
        return self.environment.spec(params)


@pytest.mark.parametrize(
    ("script", "config"),
    [pytest.param(gail, GAIL, marks=pytest.mark.slow), long(lsiq, LSIQ)],
)
def test_the_reward_of_the_environment_is_not_learned_from(script, config):
    env = options.make_env(config)

    def train(env):
        state = script.init(config, env, jr.key(0), expert=make())
        return script.step(config, env, state)

    (state, report), (bribed, paid) = (
        jax.jit(partial(train, e))() for e in (env, Env(Bribed(env), env.params))
    )
    assert abs(report.score - paid.score) > 1
    assert_trees_close(state.learned.kernel, bribed.learned.kernel, rtol=1e-6)
    critics = [getattr(x.learned, "critic", x.learned) for x in (state, bribed)]
    assert_trees_close(*critics, rtol=1e-6)
    start = jax.jit(partial(script.init, config, env, expert=make()))(jr.key(0))
    assert largest_difference(start.learned.kernel.head, state.learned.kernel.head) > 1e-5


@pytest.mark.slow
def test_both_buffers_are_refreshed():
    """z' of the demonstrations is the policy's own: sampled at the start, and after updates."""
    env = options.make_env(LSIQ)
    state = jax.jit(partial(lsiq.init, LSIQ, env, expert=make()))(jr.key(0))
    z, after = state.learned.expert.steps.z[:, 0], state.learned.expert.steps.z_next[:, 0]
    first = np.asarray(state.learned.expert.steps.first[:, 0])
    assert (z[first] == 0).all()
    assert np.allclose(z[~first], after[np.roll(~first, -1)], rtol=1e-5, atol=1e-7)
    moved = jax.jit(partial(lsiq.step, LSIQ, env))(state)[0]
    apart = np.abs(moved.learned.expert.steps.z_next[:, 0] - after).max(1)
    assert (apart > 0).sum() >= 4
    kept = lambda s: (s.obs, s.action, s.first, s.final_obs)
    assert_trees_close(kept(state.learned.expert.steps), kept(moved.learned.expert.steps))


@pytest.mark.slow
def test_slopes_of_the_discriminator_are_those_in_standardised_states():
    env = options.make_env(GAIL)
    state = jax.jit(partial(gail.init, GAIL, env, expert=make()))(jr.key(0))
    discriminator, steps = state.learned.discriminator, state.world.expert
    action = np.clip(steps.action, -1.0, 1.0)
    logit = lambda obs, a: discriminator(obs, a, None)[0]
    slope = jax.vmap(jax.grad(logit, (0, 1)))(steps.obs.critic, action)
    deviation = np.sqrt(np.asarray(discriminator.normalizer.var))
    want = np.sum((slope[0] * deviation) ** 2, 1) + np.sum(slope[1] ** 2, 1)
    found = gail.slopes(env.spec, discriminator, steps)
    assert want.min() > 0
    np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.slow
def test_learning_rates_fall_linearly():
    """After n of N gradient steps 1 - (1 - final) n / N of each is left."""
    config = replace(LSIQ, final_rate=0.2, total_steps=16)  # 2 updates of 2 gradient steps
    state = jax.jit(partial(lsiq.init, config, env := options.make_env(config), expert=make()))
    learned = jax.jit(partial(lsiq.step, config, env))(state(jr.key(0)))[0].learned
    for opt_state in learned.opt_states:
        slower = lsiq.slower(config, opt_state)
        for name in ("learning_rate", "actor_learning_rate", "state_learning_rate"):
            assert np.isclose(vars(slower)[name], 0.6 * vars(config)[name])


@pytest.mark.parametrize(
    ("script", "config", "words", "message"),
    [
        (gail, GAIL, {"env": "PointMass-memory"}, "env Pendulum-v1, and the training has PointMa"),
        (lsiq, LSIQ, {"observe": "all"}, "observe positions, and the training has all"),
        (lsiq, LSIQ, {"batch_size": 16}, "hold 12 steps, and a gradient takes 16"),
        (gail, GAIL, {"discriminator_batch": 13}, "hold 12 steps, and a gradient takes 13"),
        (clone, CLONE, {"batch_episodes": 4}, "batch_episodes 4 are more than the 3 of"),
        (gail, GAIL, {"soft_labels": True}, "do the same; discriminator_entropy 0 would do"),
        (lsiq, LSIQ, {"gamma": 1.0}, "gamma is 1.0"),
        (clone, CLONE, {"demonstrations": "none.npz"}, "none.npz is not there"),
    ],
)
def test_what_cannot_be_imitated_is_refused(script, config, words, message, expert):
    config = replace(config, **{"demonstrations": expert} | words)
    with pytest.raises(ValueError, match=re.escape(message)):
        script.make(config)


def test_an_expert_that_is_worse_than_random_is_told(tmp_path, capsys):
    path = tmp_path / "x.npz"
    worse = WORLD | {"expert_return": -9.0, "random_return": -8.0}
    demonstrations.save(path, make(made=worse))
    clone.make(replace(CLONE, demonstrations=str(path)))
    assert "warning: the expert's return -9 is no better than -8" in capsys.readouterr().err


@pytest.mark.slow
def test_demonstrations_of_a_run_are_made_and_imitated(tmp_path, monkeypatch, capsys):
    """The command without arguments trains its expert once; clone.py takes what it leaves."""
    monkeypatch.chdir(tmp_path)
    tiny = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "total_steps": 16, "hidden": (4,)}
    params = {"env_params": {"max_steps_in_episode": 4.0}}
    config = replace(demonstrate.DEFAULT, checkpoints=1, eval_episodes=1, **tiny, **params)
    monkeypatch.setattr(demonstrate, "DEFAULT", config)
    for sampled in (False, True):
        demonstrate.main(demonstrate.Config(episodes=3, sampled=sampled))
    out = capsys.readouterr().out
    assert out.count("3 episodes, 12 steps, of seed 0") == 2
    path = f"{demonstrate.RUN}/demonstrations.npz"
    found = demonstrations.load(path)
    assert found.made | WORLD == found.made
    assert found.made["sampled"]
    monkeypatch.setattr(clone.demonstrate, "DEFAULT", config)
    Path(path).unlink()
    two_updates(clone, replace(CLONE, demonstrations=path), tmp_path)
    assert (
        f"{path} is not there: an expert is trained and recorded first" in capsys.readouterr().err
    )
    assert len(demonstrations.load(path).returns) == 20


def test_episodes_are_told_by_what_they_hide():
    found = make(hidden=np.array([[1.0], [0.5], [1.0]]))
    rows = demonstrate._by_hidden(found)
    assert rows == [
        {"hidden": "0.5", "episodes": "1", "return": "-4"},
        {"hidden": "1", "episodes": "2", "return": "-4"},
    ]
    assert demonstrate._by_hidden(make()) == []


def untrained(directory, config):
    """A run as a script leaves it, with zeros for its weights."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"name": "ppo"} | asdict(config)))
    env = options.make_env(config, oracle=config.memory == "oracle")
    shapes = jax.eval_shape(lambda key: spg.make_kernel(config, env.spec, key=key), jr.key(0))
    kernels = jax.tree.map(lambda x: np.zeros((config.num_seeds, *x.shape), x.dtype), shapes)
    policies.save(directory, kernels)
    return str(directory)


@pytest.mark.slow
def test_an_expert_is_compared_with_a_memoryless_policy(tmp_path, capsys):
    """Two that do the same, so the expert is no better."""
    params = {"max_steps_in_episode": 4.0}
    config = replace(demonstrate.DEFAULT, hidden=(2,), out=None, env_params=params)
    expert = untrained(tmp_path / "expert", config)
    none = replace(config, memory="none")
    memoryless = untrained(tmp_path / "none", none)
    demonstrate.main(demonstrate.Config(expert, episodes=2, memoryless=memoryless))
    found = demonstrations.load(tmp_path / "expert" / "demonstrations.npz")
    told = capsys.readouterr()
    line = f"of the memoryless policy {found.made['memoryless_return']:.4g}"
    assert line in told.out
    for words, message in (
        ({"observe": "all"}, "observe all, and the expert's run has positions"),
        ({"memory": "s2pg"}, "memory s2pg; --memoryless is for a run with none"),
    ):
        other = untrained(tmp_path / "-".join(words), replace(none, **words))
        with pytest.raises(ValueError, match=message):
            demonstrate.main(demonstrate.Config(expert, memoryless=other))


@pytest.mark.slow
def test_the_best_seed_is_recorded(tmp_path, monkeypatch):
    config = replace(demonstrate.DEFAULT, num_seeds=2, hidden=(2,), seed=3, out=None)
    run = spg.load(untrained(tmp_path / "run", config))
    run = run._replace(kernels=jax.tree.map(lambda x: x.at[1].add(1.0), run.kernels))

    def evaluation(kernel, env, **words):
        size = kernel.head.log_std.sum()
        return spg.Evaluation(-size, size)

    monkeypatch.setattr(spg, "evaluation", evaluation)
    best = [demonstrate._best(run, demonstrate.Config(sampled=s))[0] for s in (True, False)]
    assert best == [0, 1]
