"""The benchmark of scans times every form, and overwrites nothing."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from scripts.benchmarks import scans
from spg.training.records import RunError

TINY = scans.Config(
    lengths=(3,), widths=(4,), batches=(2,), dtypes=("complex64",), repeats=2, min_ms=1e-3
)


def test_every_form_is_timed_forward_and_backward(tmp_path, capsys):
    config = replace(TINY, out=str(tmp_path / "run"))
    rows = scans.main(config)
    assert [(row["pass"], row["form"]) for row in rows] == [
        (which, name) for which in scans.PASSES for name in scans.FORMS
    ]
    assert all(row["microseconds"] > 0 for row in rows)
    with (tmp_path / "run" / "scans.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "run" / "scans.png").stat().st_size > 0
    assert "complex64, backward" in capsys.readouterr().out
    with pytest.raises(RunError, match="holds a run"):
        scans.main(config)


def test_ratios_are_taken_within_repeats_to_the_better_of_jax(monkeypatch):
    load = np.array([1.0, 9.0, 1.0])  # a repeat in which the machine is busy leaves ratios alone
    speed = dict(zip(scans.FORMS, (3.0, 2.0, 5.0, 6.0, 1.0), strict=True))
    timings = {(w, f): scans.Timing(speed[f] * load, 24) for w in scans.PASSES for f in speed}
    monkeypatch.setattr(scans, "measure", lambda config, size: timings)
    rows = scans.tabulate(TINY)
    assert [row["ratio"] for row in rows] == [x / 2 for x in speed.values()] * 2
    assert all(row["memory"] == 24 / (8 * 24) for row in rows)


def test_sizes_beyond_the_limit_are_left_out():
    config = scans.Config(lengths=(2, 64), widths=(2,), batches=(4,), max_numbers=16)
    assert {size.num_steps for size in scans.sizes(config)} == {2}
    with pytest.raises(ValueError, match="more than max_numbers 15"):
        scans.main(replace(config, max_numbers=15))
    with pytest.raises(ValueError, match="widths is"):
        scans.main(replace(config, widths=(0,)))
