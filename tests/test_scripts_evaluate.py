"""`scripts/evaluate.py` measures and shows the policies that a run saved."""

import csv
import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import spg
from scripts import evaluate, gamp, reinforce
from spg.training import films, policies

ROOT = Path(__file__).parents[1]


def leave(out, config, kernel):
    """A run of a script that has trained two seeds; nothing is trained or compiled here."""
    (out / "config.json").write_text(json.dumps({"name": "x"} | asdict(config)))
    shapes = jax.eval_shape(kernel, jr.key(0))
    fill = lambda x: jnp.zeros((2, *x.shape), x.dtype)
    policies.save(out, jax.tree.map(fill, shapes))
    return out


@pytest.fixture
def tmaze(tmp_path):
    config = reinforce.Config(
        env="TMaze-memory", env_params={"length": 3.0}, num_seeds=2, seed=5, hidden=(2,),
        cell="linear", z_size=2,
    )  # fmt: skip
    env = spg.envs.make("TMaze-memory", length=3)
    return leave(tmp_path, config, lambda key: spg.make_kernel(config, env.spec, key=key))


def test_table_and_csv_tell_the_returns_of_each_seed(tmaze, capsys, monkeypatch):
    monkeypatch.setattr(films, "save", lambda *a, **k: [tmaze / "rollout.html"])
    evaluate.main(evaluate.Config(run=str(tmaze), episodes=20))
    head, *rows = capsys.readouterr().out.splitlines()
    assert all(len(row) <= 80 for row in (head, *rows[:4]))
    with (tmaze / "evaluation.csv").open(newline="") as file:
        data = list(csv.DictReader(file))
    assert [(row["seed"], row["episode"]) for row in data] == [
        (str(seed), str(i)) for seed in (5, 6) for i in range(20)
    ]
    sampled, noise_free = (
        np.array([float(row[k]) for row in data]).reshape(2, 20) for k in ("sampled", "noise_free")
    )
    assert (noise_free == -1).all()  # always up, and so behind schedule in each of three steps
    assert -1 <= sampled.min() < sampled.max() <= 1
    for i, row in enumerate(rows[:2]):
        assert row.split()[:2] == [str(5 + i), f"{sampled[i].mean():.4g}"]
    assert rows[2].split()[0] == "mean"
    assert rows[-1].endswith("rollout.html; its viewer comes from the network")


@pytest.mark.slow
def test_a_world_without_end_is_measured_by_its_average_reward(tmp_path, capsys):
    config = gamp.Config(problem="loadunload", num_z=2, out_degree=2, num_seeds=2)
    problem = spg.worlds.WORLDS["loadunload"]()
    make = lambda key: spg.training.controllers.make(config, problem, key=key)
    leave(tmp_path, config, make)
    evaluate.main(evaluate.Config(run=str(tmp_path), episodes=3, steps=10))
    assert "reward" in capsys.readouterr().out.splitlines()[0]
    with (tmp_path / "evaluation.csv").open(newline="") as file:
        rewards = [float(row["sampled"]) for row in csv.DictReader(file)]
    assert all(0 <= x <= 0.5 for x in rewards)
    assert np.allclose(np.array(rewards) * 10 % 1, 0, atol=1e-5)
    assert (tmp_path / "rollout.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: nowhere holds no run: there is no config.json"),
        (["nowhere", "--episodes", "0"], "error: episodes is 0"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1
