"""Two processes train as one does; the death of one is told by the other, and can be mended."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_training_loop import assert_same_run, saved
from test_training_processes import PPO, ROOT, SLOW, WALK, checkpointed, forced, wait_for

from spg.training.metrics import read_metrics

pytestmark = pytest.mark.slow


def start(*words: str, devices: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, *words]
    environment = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": forced(devices)} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True
    )


def start_two(*words: str, **environment: str) -> list[subprocess.Popen]:
    """Two processes with two devices each; the first one leads."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator-address=localhost:{free.getsockname()[1]}"
    return [
        start(*words, address, "--num-processes=2", f"--process-id={i}", devices="2", **environment)
        for i in range(2)
    ]


def finish(*processes: subprocess.Popen) -> list[str]:
    """What they said on stderr, when all have ended well."""
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def test_two_processes_train_as_one_with_as_many_devices(tmp_path):
    """A seed in each, whose environments its two devices share; one directory."""
    double = {"JAX_ENABLE_X64": "1"}
    one, two = ([*PPO, "--out", str(tmp_path / name)] for name in ("one", "two"))
    finish(start(*one, devices="4", **double))
    leader, other = finish(*start_two(*two, **double))
    assert "run directory" in leader
    assert other == ""
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert one.keys() == two.keys()
    for k in one.keys() - {".mark.crc", ".mark.size"}:
        np.testing.assert_allclose(one[k], two[k], rtol=1e-6, atol=1e-6, err_msg=k)
    metrics = [read_metrics(tmp_path / name) for name in ("one", "two")]
    for k, column in metrics[0].items():
        np.testing.assert_allclose(column, metrics[1][k], rtol=1e-5, atol=1e-6, err_msg=k)
    assert (tmp_path / "two" / "summary.json").exists()
    assert (tmp_path / "two" / "kernels.npz").exists()


def test_when_one_process_is_killed_the_other_says_so_and_both_can_resume(tmp_path):
    """First the one that writes nothing, then the one that leads."""
    finish(*start_two(*SLOW, "--out", str(tmp_path / "whole")))
    out, words = tmp_path / "killed", SLOW
    for dead in (1, 0):
        processes = start_two(*words, "--out", str(out))
        done = checkpointed(out)[-1:] if out.exists() else []
        wait_for(lambda: checkpointed(out)[-1:] > done, processes[dead], 600)  # noqa: B023
        processes[dead].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, err = processes[1 - dead].communicate(timeout=300)
        processes[dead].communicate()
        assert time.monotonic() - killed < 60
        if processes[1 - dead].returncode == 2:
            assert f"error: process {1 - dead} of 2 cannot go on, another one may have ended" in err
            assert "Traceback" not in err
        else:  # JAX's runtime has noticed first, and aborts
            assert processes[1 - dead].returncode == -signal.SIGABRT, err
            assert "distributed service detected fatal errors" in err
        words = (WALK[0], "--resume")
    finish(*start_two(*words, "--out", str(out)))
    assert_same_run(tmp_path / "whole", out)


FAILING = """
import runpy, sys
from spg.training import loop, processes
before = loop.run
def run(*arguments):
    if processes.jax.process_index() == %d:
        raise ValueError("two lines\\nof an error")
    return before(*arguments)
loop.run = run
sys.argv[0] = %r
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_of_one_process_is_told_by_all_in_one_line(bad, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING % (bad, WALK[0]))
    words = (str(tmp_path / "failing.py"), *WALK[1:], "--out", str(tmp_path / "run"))
    processes = start_two(*words, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[1 - bad].returncode == 2, said
    assert said[1 - bad].splitlines()[-1] == f"error: process {bad} has ended: two lines"
    assert "Traceback" not in said[1 - bad]
    assert processes[bad].returncode == 1  # a bug: its own process shows all of it
    assert "two lines\nof an error" in said[bad]


@pytest.mark.parametrize("own", ["0", "1"])
def test_a_process_that_waits_in_vain_ends_with_one_line(own):
    """Neither the first, nor one that waits for the first."""
    code = (
        "from spg.training import processes as p; from scripts import ppo; p.ARRIVAL = 1; "
        "p.join(ppo.Config(coordinator_address='localhost:1', num_processes=2, process_id=%s))"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        code = code.replace(":1'", f":{free.getsockname()[1]}'")
    process = start("-c", code % own, devices="1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: not all processes have come in 1 s (coordinator_address localhost:" in err
    assert "Traceback" not in err
