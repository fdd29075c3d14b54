"""POPGym's benchmarks: the original is timed beside ours; the table takes the best epochs."""

import csv
import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from scripts.benchmarks import popgym, popgym_speed
from spg.training.records import RunError


def config(tmp_path, **changes):
    sizes = {"num_envs": (2,), "num_steps": 4, "original_steps": 8, "repeats": 2}
    words = sizes | {"tasks": ("HigherLower",)} | changes
    return popgym_speed.Config(out=str(tmp_path / "run"), **words)


@pytest.mark.slow
def test_the_original_is_timed_beside_ours(tmp_path, capsys):
    pytest.importorskip("popgym.core.maze")
    rows = popgym_speed.main(config(tmp_path))
    assert [(row["task"], row["num_envs"]) for row in rows] == [
        ("HigherLowerEasy", 0),
        ("HigherLowerEasy", 2),
    ]
    assert all(row["steps_per_second"] > 0 for row in rows)
    with (tmp_path / "run" / "popgym_speed.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert "HigherLowerEasy" in capsys.readouterr().out
    with pytest.raises(RunError, match="holds a run"):
        popgym_speed.main(config(tmp_path))


@pytest.mark.slow
def test_the_command_finds_the_original_beside_the_script_of_its_name(tmp_path):
    pytest.importorskip("popgym.core.maze")
    out, sizes = f"--out={tmp_path / 'run'}", ["--num-envs=1", "--num-steps=2", "--repeats=1"]
    command = [sys.executable, popgym_speed.__file__, out, "--tasks=HigherLower", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "popgym_speed.csv").exists()


def test_ratios_are_taken_within_repeats(tmp_path):
    load = np.array([1.0, 9.0, 1.0])  # a repeat in which the machine is busy leaves ratios alone
    seconds = np.stack([2 * load, 4 * load])
    rows = popgym_speed.rates(config(tmp_path), "HigherLowerEasy", seconds, [10, 80])
    assert [row["steps_per_second"] for row in rows] == [5, 20]
    assert [row["to_original"] for row in rows] == [1, 4]
    assert rows[1]["to_original_q25"] == rows[1]["to_original_q75"] == 4
    assert "20 (4×)" in popgym_speed.table(rows)


def test_a_task_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'HigherEasy'; choose from RepeatFirst"):
        popgym_speed.main(config(tmp_path, tasks=("Higher",)))


def metrics_of(directory, returns, episodes):
    """`metrics.csv` of two seeds, with a row for every 8,192 steps after as many first ones."""
    directory.mkdir()
    lines = ["update,seed,env_steps,return,episodes"]
    for update, cells in enumerate(zip(*returns, *episodes, strict=True), 1):
        for seed in range(2):
            score = "" if cells[2 + seed] == 0 else cells[seed]
            lines.append(f"{update},{seed},{8192 * (update + 1)},{score},{cells[2 + seed]}")
    (directory / "metrics.csv").write_text("\n".join(lines) + "\n")
    return directory


def test_the_score_is_the_best_epoch_of_65_536_steps(tmp_path):
    first = [0.1] * 6 + [0.9] + [0.4] * 8 + [0.8]  # epochs of 7, 8 and 1 updates
    second = [0.5] * 7 + [-0.5] * 9
    episodes = [[3] * 6 + [6] + [1] * 9, [1] * 7 + [0] * 9]
    run = metrics_of(tmp_path / "run", [first, second], episodes)
    assert popgym.mmer(run) == pytest.approx([0.8, 0.5])
    run = metrics_of(tmp_path / "cut", [first[:15], second[:15]], [x[:15] for x in episodes])
    assert popgym.mmer(run) == pytest.approx([0.4, 0.5])  # the first epoch has .3


def test_seeds_that_agree_are_drawn_though_their_mean_is_rounded(tmp_path):
    row = {
        "task": "HigherLowerEasy",
        "method": "none",
        "mmer": 0.9999999,
        "least": 1.0,
        "most": 1.0,
    }
    popgym.picture(tmp_path / "popgym.png", [row])
    assert (tmp_path / "popgym.png").stat().st_size > 0


@pytest.mark.long
def test_the_table_is_of_runs_that_are_not_trained_again(tmp_path, capsys, monkeypatch):
    small = dataclasses.replace(popgym.ppo.Config(), num_steps=64, num_minibatches=2)
    monkeypatch.setattr(popgym.ppo, "Config", lambda: small)
    monkeypatch.setattr(popgym, "NUM_ENVS", 8)
    words = {"tasks": ("HigherLowerEasy",), "methods": ("S2PG", "none"), "num_seeds": 1}
    config = popgym.Config(**words, total_steps=2048, out=str(tmp_path / "run"))
    rows = popgym.main(config)
    assert [row["method"] for row in rows] == ["S2PG", "none"]
    assert all(-1 < row["mmer"] < 1 for row in rows)
    shown = capsys.readouterr().out
    monkeypatch.setattr(popgym.cli.loop, "run", None)
    assert popgym.main(config) == rows
    assert capsys.readouterr().out == shown
    one = dataclasses.replace(config, methods=("none",))
    assert popgym.main(one) == rows  # the table keeps the other row
    assert (tmp_path / "run" / "popgym.png").exists()


@pytest.mark.parametrize("words", [{"tasks": ("HigherLower",)}, {"methods": ("oracle",)}])
def test_names_that_are_not_there_are_refused(tmp_path, words):
    with pytest.raises(ValueError, match=r"unknown (task|method) '.*; choose from (S2PG|RepeatF)"):
        popgym.main(popgym.Config(out=str(tmp_path), **words))
