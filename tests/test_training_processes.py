"""What takes a process of its own: kills, interruptions, locks, full disks, devices."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_training_loop import assert_same_run

from spg.training import records
from spg.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a script in a process of its own; they share what they compile."""
    return partial(begin, str(tmp_path_factory.mktemp("cache")))


def begin(cache: str, *words: str, file_size: int | str = "unlimited", **environment: str):
    caches = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        ["bash", "-c", f"ulimit -f {file_size}; exec $0 $@", sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | caches | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


WALK = (str(ROOT / "tests" / "walk.py"), "--num-seeds=2")
SLOW = (*WALK, "--num-updates=400", "--checkpoints=20", "--pause=0.005")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start):
    out = tmp_path_factory.mktemp("runs") / "whole"
    _, err = (process := start(*SLOW, "--out", str(out))).communicate()
    assert process.returncode == 0, err
    return out


def wait_for(condition, process, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def checkpointed(out: Path) -> list[int]:
    """The updates of the complete checkpoints."""
    return sorted(int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdigit())


def rows_beyond_checkpoint(out: Path) -> int:
    steps = checkpointed(out)
    rows = (out / "metrics.csv").read_text().splitlines()[1:] if steps else []
    return sum(int(row.split(",")[0]) > steps[-1] for row in rows if "," in row)


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(tmp_path, whole, start):
    """Killed twice: after a checkpoint, and on the way from one to the next."""
    out = tmp_path / "killed"
    words: tuple[str, ...] = (*SLOW, "--out", str(out))
    for rows in (0, 16):
        process = start(*words)
        done = checkpointed(out)[-1:]
        wait_for(lambda: checkpointed(out)[-1:] > done, process)  # noqa: B023
        wait_for(lambda: rows_beyond_checkpoint(out) >= rows, process)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (out / "summary.json").exists(), "the run ended before it was killed"
        words = (WALK[0], "--resume", "--out", str(out))  # the lock of the dead is no lock
    _, err = (process := start(*words)).communicate()
    assert process.returncode == 0, err
    assert_same_run(whole, out)


@pytest.mark.slow
def test_a_second_process_is_refused_in_one_line(tmp_path, whole, start):
    shutil.copytree(whole, tmp_path / "run")
    with records.locked(tmp_path / "run"):
        process = start(WALK[0], "--resume", "--out", str(tmp_path / "run"))
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.splitlines()[-1] == f"error: another process is training in {tmp_path / 'run'}"
    assert "Traceback" not in err


@pytest.mark.slow
def test_interruption_is_one_line_and_status_130_at_any_time(tmp_path, start):
    """While importing, while XLA compiles for long, and while training."""
    long = (*WALK, "--unrolled=3000", "--sizes=40", "--out")
    moments = {
        "import": (WALK, lambda out: True, 0.5, "interrupted\n"),
        "compile": ((*long, str(tmp_path / "compile")), lambda out: (out / "lock").exists(), 2, ""),
        "train": ((*SLOW, "--out", str(tmp_path / "train")), checkpointed, 0.1, ""),
    }
    for name, (words, reached, pause, line) in moments.items():
        process = start(*words)
        wait_for(lambda: reached(tmp_path / name), process)  # noqa: B023
        time.sleep(pause)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert time.monotonic() - began < 2, name
        assert process.returncode == 130, (name, err)
        assert out == ""
        assert "Traceback" not in err
        said = line or f"interrupted; --out {tmp_path / name} --resume goes on from the last"
        assert err.splitlines()[-1].startswith(said.strip()), (name, err)
        assert err.count("interrupted") == 1
    assert not (tmp_path / "compile" / "checkpoints").exists()


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_and_does_not_hang_it(tmp_path, start):
    out = tmp_path / "run"
    process = start(*WALK, "--num-updates=2000", "--out", str(out), file_size=20)  # KiB
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert f"error: {out / 'metrics.csv'} cannot be written: File too large" in err


def forced(num_devices: str) -> str:
    flags = os.environ.get("XLA_FLAGS", "")
    return f"{flags} --xla_force_host_platform_device_count={num_devices}"


@pytest.mark.slow
def test_seeds_are_shared_out_to_devices(tmp_path, start):
    processes = [
        start(WALK[0], "--num-seeds=6", "--out", str(tmp_path / n), XLA_FLAGS=forced(n))
        for n in ("1", "4")
    ]
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert "6 seeds run on 3 of 4 devices" in err
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("1", "4")]
    assert [len(s["devices"]) for s in summaries] == [1, 3]
    one, four = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "4")
    np.testing.assert_allclose(one["loss"], four["loss"], rtol=1e-5)


PPO = (
    str(ROOT / "scripts" / "ppo.py"), "--num-seeds=2", "--num-envs=2", "--num-steps=8",
    "--num-minibatches=2", "--num-epochs=1", "--cell=linear", "--z-size=4", "--hidden=4",
    "--eval-episodes=1", "--env=MemoryChain-bsuite", "--observe=all", "--total-steps=96",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [2, 3])
def test_ppo_on_forced_devices_is_the_same(num_seeds, tmp_path, start):
    """Two devices take a seed each; three seeds they train in turn, sharing the environments."""
    words = (PPO[0], f"--num-seeds={num_seeds}", *PPO[2:])
    for n in ("1", "2"):
        process = start(*words, "--out", str(tmp_path / n), XLA_FLAGS=forced(n))
        _, err = process.communicate()
        assert process.returncode == 0, err
        summary = json.loads((tmp_path / n / "summary.json").read_text())
        assert len(summary["devices"]) == int(n)
    one, two = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2")
    for name in ("return", "policy_loss", "value_loss", "gradient_norm"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-4)
