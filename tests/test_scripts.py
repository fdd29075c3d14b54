"""Every script runs two updates; its `init` and `step` can be vmapped over hyper-parameters."""

import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from test_training_loop import assert_same_run

from scripts import gamp, gpomdp, ppo, reinforce, trpo
from spg.envs import Tabular
from spg.kernels.factory import make_kernel
from spg.rollout import rollout
from spg.training import loop, options
from spg.training.metrics import read_metrics
from spg.training.records import open_run
from spg.types import Env
from spg.worlds.problems import heaven_hell

ROOT = Path(__file__).parents[1]
slow = partial(pytest.param, marks=pytest.mark.slow)
long = partial(pytest.param, marks=pytest.mark.long)
SMALL = {"num_envs": 4, "num_seeds": 2, "eval_episodes": 2, "hidden": (8,)}
SMALL |= {"cell": "linear", "z_size": 4}
PPO = ppo.Config(
    num_steps=8, num_minibatches=2, num_epochs=2, total_steps=64, checkpoints=1, **SMALL
)
TRPO = trpo.Config(
    num_steps=8, num_minibatches=2, num_epochs=1, cg_steps=2, total_steps=64, checkpoints=1, **SMALL
)
REINFORCE = reinforce.Config(
    env="TMaze-memory", env_params={"length": 5}, total_steps=48, checkpoints=1, **SMALL
)
REPEAT = replace(REINFORCE, env="RepeatFirst-memory", env_params={"delay": 2.0}, total_steps=10_000)
CHAIN = {"env": "MemoryChain-bsuite", "observe": "all"}


def run(script, config):
    algorithm = script.make(config)
    return loop.run(config, algorithm, open_run(config, algorithm.name))


def two_updates(script, config, tmp_path):
    run(script, replace(config, out=str(tmp_path / "run")))
    data = read_metrics(tmp_path / "run")
    assert data["update"].shape == (2, 2)
    return data


def whole_and_half(script, config, tmp_path):
    """A run, and what is left of it after a kill before the last checkpoint, to be resumed."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    run(script, replace(config, checkpoints=2, out=str(whole)))
    shutil.copytree(whole, half)
    checkpoints = sorted((half / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    (half / "summary.json").unlink()
    return replace(config, checkpoints=2, out=str(half), resume=True)


@pytest.mark.parametrize(
    "memory", ["s2pg", slow("bptt"), *map(long, ("window", "kstep", "none", "oracle"))]
)
def test_ppo_runs_with_every_memory(memory, tmp_path):
    data = two_updates(ppo, replace(PPO, memory=memory, **CHAIN), tmp_path)
    assert np.isfinite(data["gradient_norm"]).all()
    assert ((data["kl_z"] > 0).all()) == (memory in ("s2pg", "kstep"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory", ["s2pg", slow("bptt"), *map(long, ("window", "kstep", "none", "oracle"))]
)
def test_trpo_runs_with_every_memory(memory, tmp_path):
    """Also seeds side by side: each stays within the limit, and their last digits are their own."""
    data = two_updates(trpo, replace(TRPO, memory=memory, **CHAIN), tmp_path)
    assert (data["kl"] <= TRPO.max_kl).all()
    assert ((data["step_share"] > 0) == (data["gain"] > 0)).all()
    assert data["step_share"].any()
    assert ((data["kl_z"] > 0).any()) == (memory in ("s2pg", "kstep"))


@pytest.mark.long
def test_a_seed_of_trpo_is_the_same_alone_and_resumed(tmp_path):
    """Among others it is itself, and a run that was cut short ends as the whole one."""
    config = replace(TRPO, total_steps=128, **CHAIN)
    run(trpo, whole_and_half(trpo, config, tmp_path))
    assert_same_run(tmp_path / "whole", tmp_path / "half")
    run(trpo, replace(config, seed=1, num_seeds=1, checkpoints=2, out=str(tmp_path / "alone")))
    whole, alone = (read_metrics(tmp_path / name) for name in ("whole", "alone"))
    for column in alone:
        np.testing.assert_allclose(whole[column][1], alone[column][0], rtol=1e-2, atol=1e-4)


@pytest.mark.long
def test_trpo_runs_by_the_score_alone_with_continuous_actions(tmp_path):
    config = replace(TRPO, env="Pendulum-v1", memory_gradient="score", actions="tanh-normal")
    data = two_updates(trpo, config, tmp_path)
    assert (data["kl"] <= TRPO.max_kl).all()


@pytest.mark.slow
def test_ppo_runs_by_the_score_alone(tmp_path):
    data = two_updates(ppo, replace(PPO, memory_gradient="score", **CHAIN), tmp_path)
    assert np.isfinite(data["gradient_norm"]).all()


@pytest.mark.slow
def test_ppo_runs_with_continuous_actions_and_a_privileged_critic(tmp_path):
    config = replace(PPO, env="Pendulum-v1", privileged=True, previous_action=True, cell="linear")
    two_updates(ppo, config, tmp_path)


@pytest.mark.parametrize("cell", ["linear", "lru"])
def test_the_noise_on_z_falls_by_its_factor_from_the_first_to_the_last_update(cell):
    config = replace(PPO, total_steps=8 * 32, noise_fall=4.0, cell=cell)
    make = partial(make_kernel, spec=options.make_env(config).spec, key=jr.key(0))
    first = last = make(config)
    for _ in range(config.num_updates):
        last = ppo.quieter(config, last)
    where = lambda kernel: kernel.cell.distribution.log_std
    before, after = where(first), where(last)
    np.testing.assert_allclose(jnp.exp(after - before), 0.25, rtol=1e-5)
    assert eqx.tree_equal(first, eqx.tree_at(where, last, before))  # nothing else has moved
    for memory in ("bptt", "none"):
        kernel = make(replace(config, memory=memory))
        assert ppo.quieter(config, kernel) is kernel


@pytest.mark.slow
def test_resumed_ppo_equals_the_uninterrupted_one(tmp_path):
    """Environments, statistics, optimiser and keys are in the checkpoint."""
    run(ppo, whole_and_half(ppo, replace(PPO, total_steps=128, **CHAIN), tmp_path))
    assert (tmp_path / "half" / "summary.json").exists()
    assert_same_run(tmp_path / "whole", tmp_path / "half")


BRAX = {"env": "brax/inverted_pendulum", "env_params": {"max_steps_in_episode": 20}}


@pytest.mark.long
def test_ppo_runs_on_brax_and_leaves_the_page(tmp_path):
    two_updates(ppo, replace(PPO, backend="positional", **BRAX), tmp_path)
    assert (tmp_path / "run" / "rollout.html").exists()


@pytest.mark.parametrize(
    ("estimator", "memory", "segment_length"),
    [
        slow("reinforce", "s2pg", 0),
        long("gpomdp", "s2pg", 3),
        long("gpomdp", "bptt", 0),
        long("reinforce", "kstep", 0),
    ],
)
def test_reinforce_runs(estimator, memory, segment_length, tmp_path):
    words = {"estimator": estimator, "memory": memory, "segment_length": segment_length}
    two_updates(reinforce, replace(REINFORCE, **words), tmp_path)


@pytest.mark.parametrize("optimiser", [long("adam"), long("conjugate")])
def test_gamp_runs(optimiser, tmp_path):
    config = gamp.Config(
        num_updates=2, num_seeds=2, checkpoints=1, solver="damped", precision="single",
        optimiser=optimiser,
    )  # fmt: skip
    data = two_updates(gamp, config, tmp_path)
    assert data["converged"].all()
    np.testing.assert_allclose(data["average_reward"][:, 0], 0.05, rtol=1e-3)
    assert (data["env_steps"] == 0).all()
    for file in ("controller.npz", "controller.png", "curve.png"):
        assert (tmp_path / "run" / file).exists()


def test_costs_rise_in_stages():
    config = gamp.Config(num_updates=4, costs=(0.0, 0.5))
    world = heaven_hell().pomdp
    stages = [gamp.at_stage(config, world, jnp.asarray(turn)) for turn in range(4)]
    assert [bool(opens) for _, opens in stages] == [True, False, True, False]
    for (pomdp, _), cost in zip(stages, (0, 0, 0.5, 0.5), strict=True):
        np.testing.assert_allclose(pomdp.reward, np.where(world.reward < 0, -cost, world.reward))


@pytest.mark.slow
def test_gamp_follows_natural_gradients(tmp_path):
    config = gamp.Config(
        num_updates=2, num_seeds=2, checkpoints=1, solver="direct", precision="single",
        optimiser="natural",
    )  # fmt: skip
    data = two_updates(gamp, config, tmp_path)
    assert data["converged"].all()
    assert (data["average_reward"][:, 1] > data["average_reward"][:, 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "optimiser", "baseline"),
    [
        long("istate", "adam", "value"),
        ("exp", "adam", "value"),
        long("exp", "conjugate", "none"),
        long("exp-observations", "adam", "reward"),
    ],
)
def test_gpomdp_runs(estimator, optimiser, baseline, tmp_path):
    config = gpomdp.Config(
        estimator=estimator, optimiser=optimiser, baseline=baseline, num_seeds=2, checkpoints=1,
        num_envs=3, num_steps=8, total_steps=48, eval_episodes=2, eval_steps=5,
    )  # fmt: skip
    data = two_updates(gpomdp, config, tmp_path)
    assert (data["gradient_norm"] >= 0).all()
    assert np.isfinite(data["eval_average_reward"][:, -1]).all()


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (gamp, {"problem": "lodunload"}, "unknown problem 'lodunload'; choose from tiger"),
        (gamp, {"problem": "no.POMDP"}, "no.POMDP"),
        (gamp, {"out_degree": 5}, "out_degree 5 is more than num_z 4"),
        (gamp, {"bound": -1.0}, "bound is -1.0"),
        (gamp, {"start_std": -1.0}, "start_std is -1.0"),
        (gamp, {"start_hold": 1.0, "out_degree": 1}, "start_hold with out_degree 1"),
        (gamp, {"costs": ()}, "costs has 0 numbers; 600 gradients are shared by 1 to 600"),
        (gpomdp, {"beta": 1.0}, "beta is 1.0"),
        (gpomdp, {"gae_lambda": 2.0}, "gae_lambda is 2.0"),
        (gpomdp, {"gae_lambda": 0.5, "baseline": "none"}, "gae_lambda 0.5 needs --baseline"),
        (gpomdp, {"num_steps": 1}, "num_steps is 1"),
        (gpomdp, {"total_steps": 10}, "less than one update"),
    ],
)
def test_controller_scripts_refuse_what_cannot_run(script, words, message):
    config = replace(
        gamp.Config(precision="single") if script is gamp else gpomdp.Config(), **words
    )
    with pytest.raises((ValueError, OSError), match=message):
        script.make(config)


@pytest.mark.slow
def test_line_searches_begin_with_the_step_asked_for():
    config = gpomdp.Config(
        optimiser="conjugate", baseline="none", first_step=64.0, num_envs=2, num_steps=4,
        total_steps=80,
    )  # fmt: skip
    algorithm = gpomdp.make(config)
    state = algorithm.init(algorithm.floats, jr.key(0))
    state, _ = jax.jit(algorithm.step)(algorithm.floats, state)
    assert state.learned.optimiser.step == 64


@pytest.mark.slow
def test_gpomdp_takes_the_mean_over_segments_that_go_on_where_the_last_one_stopped():
    config = gpomdp.Config(
        estimator="istate", optimiser="conjugate", baseline="reward", num_envs=2, num_steps=4,
        num_segments=3, total_steps=48, start_std=1.0,
    )  # fmt: skip
    algorithm = gpomdp.make(config)
    assert (algorithm.num_updates, algorithm.steps_per_update) == (2, 24)
    before = algorithm.init(algorithm.floats, jr.key(0))
    after, report = jax.jit(algorithm.step)(algorithm.floats, before)
    kernel, problem = before.learned.kernel, options.open_problem(config)
    env = Tabular(problem.pomdp)
    one = lambda carry, key: rollout(
        kernel, Env(env, env.default_params), carry, num_steps=4, key=key
    )
    (carry, baseline), found = before.world, []
    for keys in jr.split(jr.split(before.key)[1], (3, 2)):
        carry, trajs, _ = jax.vmap(one)(carry, keys)
        gradient, baseline = gpomdp.estimate(config, problem, kernel, baseline, trajs)
        head: Any = gradient.head
        found.append((head.logits, trajs.reward.mean()))
    logits, reward = (np.mean(x, 0) for x in zip(*found, strict=True))
    np.testing.assert_allclose(report.score, reward)
    np.testing.assert_allclose(after.learned.optimiser.gradient.head.logits, logits, atol=1e-6)
    np.testing.assert_allclose(after.world.baseline.reward, baseline.reward, rtol=1e-6)
    np.testing.assert_array_equal(after.world.carry.obs, carry.obs)


ONE_GRADIENT = replace(PPO, num_epochs=1, num_minibatches=1)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "config"), [(ppo, ONE_GRADIENT), (reinforce, REPEAT)])
def test_training_vmaps_over_learning_rate_and_gamma(script, config):
    config = replace(config, **CHAIN) if script is ppo else config
    env = options.make_env(config)

    def train(learning_rate, gamma, key):
        swept = replace(config, learning_rate=learning_rate, gamma=gamma)
        state = script.init(swept, env, key)
        step = lambda state, _: script.step(swept, env, state)
        return lax.scan(step, state, length=2)[1].metrics["gradient_norm"]

    rates, gammas = jnp.array([1e-2, 1e-3, 1e-2]), jnp.array([0.9, 0.9, 0.5])
    key = jr.key(0)
    norms = jax.jit(jax.vmap(train, (0, 0, None)))(rates, gammas, key)
    single = jax.jit(partial(train, float(rates[2]), float(gammas[2])))(key)
    np.testing.assert_allclose(norms[2], single, rtol=1e-3)
    assert norms[0, 0] == pytest.approx(norms[1, 0])  # same gamma: the same first gradient
    assert norms[0, 1] != pytest.approx(norms[1, 1])  # another step size: not the second
    assert norms[0, 0] != pytest.approx(norms[2, 0])  # another gamma: not even the first


def test_first_ppo_ratio_is_one_also_after_updates():
    """Observation statistics move between updates only, so each update starts at π = π_old."""
    config = replace(ONE_GRADIENT, **CHAIN)
    env = options.make_env(config)
    state = ppo.init(config, env, jr.key(0))
    step = jax.jit(partial(ppo.step, config, env))
    for _ in range(3):
        state, report = step(state)
        assert report.metrics["kl"] < 1e-9
        assert report.metrics["clipped"] == 0


def test_readme_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
