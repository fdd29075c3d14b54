"""The benchmark of POPGym's tasks times the original beside ours, and overwrites nothing."""

import csv

import numpy as np
import pytest

from scripts.benchmarks import popgym_speed
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
