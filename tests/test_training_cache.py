"""Programs are compiled once: for other floats, seeds and lengths of a run, and other starts."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import pytest
import walk
from jax.experimental.compilation_cache import compilation_cache
from test_scripts import PPO, REINFORCE, TRPO
from test_scripts_off_policy import SAC, TD3
from test_scripts_slac import SLAC

from scripts import gamp, gpomdp, ppo, reinforce, sac, slac, td3, trpo
from spg import limits
from spg.training import cli

slow = partial(pytest.param, marks=pytest.mark.slow)
long = partial(pytest.param, marks=pytest.mark.long)
MISS = "/jax/compilation_cache/cache_misses"
SETTINGS = (
    "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
)  # fmt: skip


@pytest.fixture(autouse=True)
def settings():
    """JAX's are as they were, afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def misses():
    """The programs that were not in the cache, which keeps every one."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    found = []
    listen = lambda event, **_: found.append(event) if event == MISS else None
    jax.monitoring.register_event_listener(listen)
    yield found
    jax.monitoring.unregister_event_listener(listen)


def test_another_start_and_other_floats_and_lengths_compile_nothing(misses, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))  # an empty one
    compilation_cache.reset_cache()

    def run(name, **changes):
        before = len(misses)
        cli.train(walk.make, replace(walk.Config(num_seeds=1), **changes), tmp_path / name)
        return len(misses) - before

    assert run("first") >= 3  # to start, to train, to evaluate
    assert run("others", rate=0.25, num_updates=49) == 0


GAMP = gamp.Config(num_updates=4, num_seeds=2, checkpoints=1, solver="damped", precision="single")
GPOMDP = gpomdp.Config(
    num_seeds=2, checkpoints=1, num_envs=3, num_steps=8, total_steps=48, eval_episodes=2,
    eval_steps=5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("script", "config"),
    [
        slow(ppo, replace(PPO, env="Pendulum-v1")), long(trpo, TRPO), long(reinforce, REINFORCE),
        slow(sac, SAC), long(td3, TD3), long(slac, SLAC), long(gpomdp, GPOMDP),
        long(gamp, replace(GAMP, optimiser="adam")),
    ],
)  # fmt: skip
def test_no_script_compiles_for_other_floats_and_seeds_and_lengths(
    script, config, misses, tmp_path
):
    cli.train(script.make, config, tmp_path / "first")
    del misses[:]
    share = random.uniform(0.9, 0.99)  # new every time, so that the cache cannot know a constant
    nearer = {k: share * v for k, v in limits.floats(config).items()}
    length = "num_updates" if script is gamp else "total_steps"
    others = {"seed": config.seed + 7, length: 3 * getattr(config, length)}
    cli.train(script.make, replace(config, **nearer, **others), tmp_path / "others")
    assert not misses


@pytest.mark.slow
def test_what_one_process_compiled_another_one_finds(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    kept = []
    for name in ("first", "second"):
        command = [sys.executable, Path(walk.__file__), "--out", str(tmp_path / name)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        kept.append({path.name for path in (tmp_path / "cache" / "spg" / "jax").iterdir()})
    assert len(kept[0]) > 3
    assert kept[0] == kept[1]


def test_the_cache_is_where_the_user_wants_it(tmp_path, monkeypatch, capsys):
    directory = lambda: jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    cli.keep_programs()
    assert directory() == str(tmp_path / "mine")
    jax.config.update("jax_compilation_cache_dir", None)
    cli.keep_programs()
    assert directory() == str(tmp_path / "spg/jax")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    cli.keep_programs()
    assert directory() is None
    assert capsys.readouterr().err == ""


def test_a_run_goes_on_where_no_programs_can_be_kept(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "cache"))
    cli.keep_programs()
    assert capsys.readouterr().err.startswith("warning: no compiled programs are kept: ")
    cli.train(walk.make, walk.Config(num_seeds=1, num_updates=2), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").exists()
