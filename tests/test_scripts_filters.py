"""The decoding-error experiment: its files, its numbers, and what it refuses."""

import csv
import runpy
import sys

import numpy as np
import pytest

from scripts import filters
from spg.training.records import RunError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("filters") / "run"
    filters.main(filters.Config(trajectories=4000, steps=400, points=2, out=str(out)))
    with (out / "filters.csv").open(newline="") as file:
        return out, list(csv.DictReader(file))


@pytest.mark.long
def test_the_run_leaves_table_and_picture_and_is_not_overwritten(run):
    out, rows = run
    assert len(rows) == 2 * 2 * len(filters.FILTERS)
    assert (out / "filters.png").stat().st_size > 0
    with pytest.raises(RunError, match="holds a run"):
        filters.main(filters.Config(out=str(out)))


# Long-run errors at 1/ε = 30 and 250 of an independent simulation with 20,000 trajectories of
# 1000 steps. δ = 1 guesses from one observation, δ = 0 from none.
REFERENCE = {
    "δ = λ/log(1/ε)": (0.0718, 0.0182),
    "δ = √ε": (0.0830, 0.0369),
    "δ = 0": (0.5, 0.5),
    "δ = 1": (0.1, 0.1),
    "belief": (0.0520, 0.0115),
}


@pytest.mark.parametrize("world", ["swap", "actions"])
def test_long_run_errors_are_those_of_an_independent_simulation(run, world):
    """With and without actions, within four standard errors."""
    for row in run[1]:
        if row["world"] != world or row["filter"] not in REFERENCE:
            continue
        expected = REFERENCE[row["filter"]][float(row["inverse_epsilon"]) > 100]
        error, se = float(row["long_run_error"]), float(row["standard_error"])
        assert abs(error - expected) < 4 * np.hypot(se, 0.0003), row
        assert float(row["final_error"]) == pytest.approx(expected, abs=4 * 0.5 / 4000**0.5)


def test_admitted_decays_are_best_but_for_the_belief(run):
    error = {
        (row["filter"], float(row["inverse_epsilon"])): float(row["long_run_error"])
        for row in run[1]
        if row["world"] == "swap"
    }
    names = ("belief", "δ = λ/log(1/ε)", "δ = √ε", "δ = 1", "δ = ε²", "δ = 0")
    for x in (30.0, 250.0):
        each = [error[name, x] for name in names]
        assert each == sorted(each)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"trajectories": 0}, "trajectories is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"points": 0}, "points is 0"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": 4.0}, "scale is 4.0"),
    ],
)
def test_what_cannot_run_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        filters.main(filters.Config(**words))


def test_command_ends_with_status_2_and_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["filters.py", "--steps", "0"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(filters.__file__, run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: steps is 0; it has to be at least 1\n"
