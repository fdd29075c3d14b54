"""Seeds and environments on one mesh: the same numbers on 1, 2 and 4 devices, and what is sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from spg.training.devices import layout, sizes, tell_idle

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("shard", "num_seeds", "num_envs", "count", "found"),
    [
        ("auto", 4, 64, 4, (4, 1)),
        ("auto", 2, 64, 4, (2, 2)),
        ("auto", 1, 64, 4, (1, 4)),
        ("auto", 1, 6, 4, (1, 3)),
        ("auto", 5, 64, 4, (1, 4)),  # no seed waits for another one's device
        ("auto", 6, 64, 4, (3, 1)),
        ("auto", 1, 1, 4, (1, 1)),
        ("seeds", 2, 64, 4, (2, 1)),
        ("seeds", 5, 64, 4, (1, 1)),
        ("envs", 4, 64, 4, (1, 4)),
        ("envs", 4, 64, 1, (1, 1)),
    ],
)
def test_seeds_come_first_and_environments_take_what_is_left(
    shard, num_seeds, num_envs, count, found
):
    assert sizes(shard, num_seeds, num_envs, count) == found


@pytest.mark.parametrize(
    ("num_envs", "message"),
    [
        (6, "6 environments cannot be shared out evenly to 4 devices; --num-envs 8 could"),
        (1, "this training has no environments to share out; --shard seeds would do"),
    ],
)
def test_environments_that_cannot_be_shared_out_are_refused(num_envs, message):
    with pytest.raises(ValueError, match=message):
        sizes("envs", 4, num_envs, 4)


@pytest.mark.parametrize(
    ("num_seeds", "available", "used", "said"),
    [
        (4, 4, 4, ""),
        (8, 4, 4, ""),
        (3, 4, 3, "3 seeds run on 3 of 4 devices, each of which has as much to do; --num-seeds 4 "),
        (
            5,
            4,
            1,
            "5 seeds run on 1 of 4 devices, each of which has as much to do; --num-seeds 4 or 8 ",
        ),
        (
            3,
            2,
            1,
            "3 seeds run on 1 of 2 devices, each of which has as much to do; --num-seeds 2 or 4 ",
        ),
    ],
)
def test_devices_that_stay_idle_are_named(num_seeds, available, used, said, capsys, monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr("jax.devices", lambda: one * available)
    mesh = layout("auto", num_seeds, 1)
    tell_idle(mesh, num_seeds)
    assert mesh.size == used
    err = capsys.readouterr().err
    assert said in err
    assert bool(said) == bool(err)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("ppo", ("1x2", "1x4", "2x2")),
        *((x, ("1x4",)) for x in ("reinforce", "gpomdp", "sac", "td3")),
        *(
            pytest.param(x, ("1x2", "2x2"), marks=pytest.mark.long)
            for x in ("reinforce", "gpomdp", "sac", "td3")
        ),
        *(pytest.param(x, ("1x4",), marks=pytest.mark.long) for x in ("trpo", "reppo")),
    ],
)
def test_a_training_is_the_same_on_1_2_and_4_devices(name, labels):
    """Each has its share of the environments, and none sends a rollout, of 1536 numbers."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    result = subprocess.run(
        [sys.executable, HERE / "shards.py", name, "1", *labels], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "XLA_FLAGS": flags},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["moved"] > 1e-3
    assert not told["1"]["collectives"]
    for label in labels:
        seeds, envs = map(int, label.split("x"))
        assert told[label]["mesh"] == [seeds, envs]
        assert told[label]["apart"] < 1e-6
        assert all(held == [2 // seeds, 8 // envs] for held in told[label]["held"])
        assert "all-reduce" in told[label]["collectives"]
        assert max(told[label]["collectives"].values()) < 1536
        assert name in ("sac", "td3") or "all-gather" not in told[label]["collectives"]
