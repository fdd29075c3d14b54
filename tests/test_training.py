"""The loop: seeds, devices, checkpoints, resumption, the run directory, and its errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import orbax.checkpoint as ocp
import pytest

from spg.training import cli, loop, options, records
from spg.training.records import RunError, read_metrics

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Config(options.RunConfig):
    checkpoints: int = 2
    rate: float = 0.5


def walk(config: Config, *, num_updates: int = 20, break_at: int = -1) -> loop.Algorithm:
    """A stand-in for learning: a random walk whose seed 1 turns nan at an update."""

    def init(key):
        return {"x": jnp.zeros(3), "empty": jnp.zeros((4, 0)), "t": jnp.int32(0), "key": key}

    def step(state):
        key, noise = jr.split(state["key"])
        x = state["x"] + config.rate * jr.normal(noise, (3,))
        broken = (state["t"] == break_at) & (key_seed(state) == 1)
        x = jnp.where(broken, jnp.nan, x)
        state = state | {"x": x, "t": state["t"] + 1, "key": key}
        nothing_ended = state["t"] % 3 == 0
        metrics = {
            "return": jnp.where(nothing_ended, jnp.nan, x.sum()),
            "episodes": jnp.where(nothing_ended, 0.0, 2.0),
            "loss": x[0] ** 2,
        }
        return state, metrics

    key_seed = lambda state: state.get("seed", jnp.int32(1))
    return loop.Algorithm(
        name="walk",
        title="walk",
        init=init,
        step=step,
        params=lambda state: state["x"],
        evaluate=lambda state, key: {
            "eval_return": state["x"].sum() + jr.normal(key),
            "eval_return_noise_free": state["x"].sum(),
        },
        export=lambda state, out: None,
        num_updates=num_updates,
        steps_per_update=10,
    )


def run(config: Config, algorithm: loop.Algorithm) -> dict:
    return loop.run(config, algorithm, records.open_run(config, algorithm.name))


def saved(out: Path) -> dict:
    """The arrays of the last checkpoint."""
    manager = ocp.CheckpointManager((out / "checkpoints").absolute())
    return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())


def assert_same_run(a: Path, b: Path) -> None:
    one, two = saved(a), saved(b)
    assert one.keys() == two.keys()
    assert len(one) > 2
    for k in one.keys() - {"train_seconds", "evaluate_seconds"}:
        np.testing.assert_array_equal(one[k], two[k])
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()


def test_run_leaves_a_complete_directory(tmp_path):
    config = Config(out=str(tmp_path / "run"), num_seeds=3, seed=5)
    summary = run(config, walk(config))
    out = tmp_path / "run"
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert json.loads((out / "config.json").read_text())["rate"] == 0.5
    assert (out / "curve.png").stat().st_size > 1000
    assert list(out.glob("events.out.tfevents.*"))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["10", "20"]
    data = read_metrics(out)
    assert data["update"].shape == (3, 20)
    assert data["seed"][:, 0].tolist() == [5, 6, 7]
    assert data["env_steps"][0].tolist() == [10 * i for i in range(1, 21)]
    assert np.isnan(data["return"][0, 2])  # no episode ended
    assert np.flatnonzero(~np.isnan(data["eval_return"][0])).tolist() == [9, 19]
    for field in ("final_return_mean", "final_return_iqm", "final_return_noise_free_mean"):
        assert np.isfinite(summary[field])
    assert summary["env_steps"] == 200
    final = data["return"][:, -2:]  # the last tenth, where the 18th update ended nothing
    np.testing.assert_allclose(summary["final_return"], final.mean(1), rtol=1e-5)


def test_seeds_are_independent_of_how_many_run(tmp_path):
    for n, seed in ((1, 2), (3, 0)):
        config = Config(out=str(tmp_path / str(n)), num_seeds=n, seed=seed)
        run(config, walk(config))
    one, three = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "3")
    np.testing.assert_allclose(one["loss"][0], three["loss"][2], rtol=1e-6)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    config = Config(out=str(tmp_path / "whole"))
    run(config, walk(config))
    half = replace(config, out=str(tmp_path / "half"))
    stop = walk(config)._replace(num_updates=10)
    run(replace(half, checkpoints=1), stop)
    path = tmp_path / "half" / "config.json"
    path.write_text(path.read_text().replace('"checkpoints": 1', '"checkpoints": 2'))
    with (tmp_path / "half" / "metrics.csv").open("a") as file:
        file.write("11,0,110,1,2,3\n1")  # beyond the checkpoint, and torn by the kill
    run(replace(half, resume=True), walk(config))
    assert_same_run(tmp_path / "whole", tmp_path / "half")


def test_directory_that_holds_a_run_is_refused_and_untouched(tmp_path):
    config = Config(out=str(tmp_path / "run"), num_seeds=2)
    run(config, walk(config))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=r"holds a run; --resume goes on"):
        run(config, walk(config))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_resumption_names_the_fields_that_differ(tmp_path):
    config = Config(out=str(tmp_path / "run"), num_seeds=2)
    run(config, walk(config))
    other = replace(config, resume=True, rate=0.25)
    with pytest.raises(RunError, match=r"rate \(was 0.5, now 0.25\)$"):
        run(other, walk(other))


def test_resumption_without_a_run_is_refused(tmp_path):
    config = Config(out=str(tmp_path / "nothing"), resume=True)
    with pytest.raises(RunError, match="holds no run"):
        run(config, walk(config))
    with pytest.raises(RunError, match="--resume needs --out"):
        run(replace(config, out=None), walk(config))


def test_nan_stops_with_seed_and_update_and_keeps_the_last_good_checkpoint(tmp_path):
    config = Config(out=str(tmp_path / "run"), num_seeds=2)
    with pytest.raises(RunError, match=r"seed 0, update 14: .* not finite"):
        run(config, walk(config, break_at=13))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["10"]
    assert all(np.isfinite(x).all() for x in saved(tmp_path / "run").values())


def test_a_step_is_traced_once_whatever_the_number_of_chunks(tmp_path):
    config = Config(out=str(tmp_path / "run"), num_seeds=2, checkpoints=7)
    algorithm = walk(config, num_updates=23)
    traces = []

    def step(state):
        traces.append(1)
        return algorithm.step(state)

    run(config, algorithm._replace(step=step))
    assert len(traces) <= 3  # twice for the shapes of the metrics, once to compile


SMALL = [
    "--num-envs=4", "--num-steps=8", "--num-minibatches=2", "--num-epochs=1", "--z-size=4",
    "--num-seeds=2", "--eval-episodes=1", "--env=MemoryChain-bsuite", "--observe=all",
]  # fmt: skip


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    """Starts `scripts/ppo.py` in a process of its own; they share what they compile."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return partial(start_ppo, cache)


def start_ppo(cache: dict, *arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "ppo.py"), *SMALL, *arguments]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | cache | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("rows_after_checkpoint", [2, 30])
def test_killed_run_resumes_to_the_same_bits(rows_after_checkpoint, tmp_path, whole_run, ppo):
    out = tmp_path / "killed"
    process = ppo("--out", str(out), *LENGTH)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and rows_beyond_checkpoint(out) < rows_after_checkpoint:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "summary.json").exists(), "the run ended before it was killed"
    assert checkpointed(out), "there is no checkpoint to resume from"
    process = ppo("--out", str(out), "--resume", *LENGTH)
    assert process.wait() == 0, process.communicate()[1]
    assert_same_run(whole_run, out)


LENGTH = ["--total-steps=192000", "--checkpoints=12"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, ppo):
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = ppo("--out", str(out), *LENGTH)
    assert process.wait() == 0, process.communicate()[1]
    return out


def checkpointed(out: Path) -> list[int]:
    """The updates of the complete checkpoints."""
    return sorted(int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdigit())


def rows_beyond_checkpoint(out: Path) -> int:
    steps = checkpointed(out)
    if not steps:
        return 0
    rows = (out / "metrics.csv").read_text().splitlines()[1:]
    return sum(int(row.split(",")[0]) > steps[-1] for row in rows if "," in row)


def test_seeds_are_sharded_over_forced_devices(tmp_path, ppo):
    flags = "--xla_force_host_platform_device_count="
    runs = [
        ppo("--num-seeds=4", "--total-steps=640", "--out", str(tmp_path / n), XLA_FLAGS=flags + n)
        for n in ("1", "4")
    ]
    for process in runs:
        _, err = process.communicate()
        assert process.returncode == 0, err
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("1", "4")]
    assert [len(s["devices"]) for s in summaries] == [1, 4]
    one, four = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "4")
    for name in ("return", "policy_loss", "value_loss", "gradient_norm"):
        np.testing.assert_allclose(one[name], four[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env=CartPol-v1"], "did you mean 'CartPole-v1'"),
        (["--env=brax/antt"], "did you mean 'brax/ant'"),
        (["--env-params", "memory_lenght", "9"], "memory_length"),
        (["--observe=positions"], "no velocities to hide"),
        (["--num-minibatches=3"], "num_minibatches 3 does not divide the 32 segments"),
        (["--segment-length=5"], "1, 2, 4, 8 would"),
        (["--state-std=0"], "--memory bptt"),
        (["--cell=gruu"], "gru"),
        (["--backend=sprong"], "spring"),
        (["--total-steps=10"], "less than one update"),
        (["--checkpoints=0"], "checkpoints is 0"),
        (["--action-std=0"], "action_std is 0"),
    ],
)
def test_user_errors_are_one_line_and_status_2(arguments, message, command, tmp_path):
    assert message in command(*arguments, "--out", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command line of `scripts/ppo.py` in this process; its message on status 2."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    from scripts import ppo as script

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ppo.py", *SMALL, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(script.Config, script.make)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err

    return run


def test_running_over_a_run_diverging_and_resuming_otherwise_end_with_status_2(command, tmp_path):
    out = ["--out", str(tmp_path / "run"), "--total-steps=320", "--checkpoints=2"]
    diverges = command(*out, "--learning-rate=1e30", "--max-grad-norm=1e30")
    assert re.search(r"error: seed 0, update \d: a loss or parameter is not finite", diverges)
    assert "holds a run" in command(*out)
    assert "learning_rate (was 1e+30, now 0.001)" in command(*out, "--resume")
