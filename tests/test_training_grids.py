"""A sweep: what can be a grid, points as they would be alone, the table, resumption."""

import csv
import shlex
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import walk
from test_scripts import CHAIN, PPO, REINFORCE, TRPO
from test_scripts_off_policy import SAC, TD3
from test_scripts_slac import SLAC
from test_training_loop import assert_same_run

from scripts import gamp, ppo, reinforce, sac, slac, sweep, td3, trpo
from spg.training import cli, grids, options, records, summaries
from spg.training.metrics import read_metrics
from spg.training.terminal import Interruption

slow = partial(pytest.param, marks=pytest.mark.slow)
long = partial(pytest.param, marks=pytest.mark.long)


def grid(script, config, out, *words, resume=False):
    """Runs a sweep; its rows."""
    fields = vars(config) | {"out": str(out), "resume": resume}
    every = sweep.config_of(script)(**fields, grid=tuple(tuple(x.split()) for x in words))
    sweep.sweep("walk", script, every, Interruption())
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(cli, "use_cores", lambda num_seeds: None)


WALK = walk.Config(num_seeds=2, num_updates=8, eval_episodes=1)


@pytest.mark.slow
def test_points_are_ranked_and_the_best_is_a_command_line(tmp_path, capsys):
    rows = grid(walk, WALK, tmp_path, "rate 0.25 inf", "unrolled 1 0")
    said = capsys.readouterr()
    assert "program 2 of 2, 2 points x 2 seeds" in said.err
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert [row["rank"] for row in rows] == list("1234")
    assert [row["rate"] for row in rows] == ["0.25", "0.25", "inf", "inf"]
    assert [row["diverged"] for row in rows] == list("0022")
    for row in rows[:2]:
        summary = summaries.read_summary(tmp_path / "points" / row["run"])
        assert float(row["mean"]) == summary["final_return_mean"]
        assert min(summary["final_return"]) <= float(row["low"]) <= float(row["mean"])
    assert float(rows[0]["mean"]) >= float(rows[1]["mean"])
    best = said.out.splitlines()[-1].removeprefix("the best: python scripts/walk.py ")
    point = replace(WALK, rate=0.25, unrolled=int(rows[0]["unrolled"]))
    assert options.parse(walk.Config, shlex.split(best)) == point


@pytest.mark.slow
def test_a_sweep_that_was_cut_short_goes_on_to_the_same_bits(tmp_path):
    whole, half, words = (
        tmp_path / "whole",
        tmp_path / "half",
        ("rate 0.25 0.5 inf", "unrolled 1 0"),
    )
    rows = grid(walk, WALK, whole, *words)
    shutil.copytree(whole, half)
    for cut in (half / "points").glob("*,unrolled=0"):  # killed while it saved one after another
        (cut / "summary.json").unlink(missing_ok=True)
        (cut / "diverged").unlink(missing_ok=True)
        if "0.25" not in cut.name:
            shutil.rmtree(cut / "checkpoints" / "8")
    done = [(p, p.stat().st_mtime_ns) for p in (half / "points").glob("*,unrolled=1/metrics.csv")]
    assert grid(walk, WALK, half, *words, resume=True) == rows
    assert len(done) == 3
    assert all(path.stat().st_mtime_ns == before for path, before in done)
    for rate in ("0.25", "0.5"):
        name = f"points/rate={rate},unrolled=0"
        assert_same_run(whole / name, half / name)
        alone = replace(WALK, rate=float(rate))
        cli.train(walk.make, alone, tmp_path / rate)
        np.testing.assert_equal(read_metrics(tmp_path / rate), read_metrics(whole / name))


@pytest.mark.parametrize(
    ("script", "config", "words"),
    [
        slow(ppo, replace(PPO, **CHAIN), ("learning-rate 1e-3 1e-2", "clip 0.1 0.3")),
        long(trpo, replace(TRPO, **CHAIN), ("max-kl 0.01 0.1", "damping 0.1 1")),
        long(reinforce, REINFORCE, ("learning-rate 1e-3 1e-2", "gamma 0.9 1")),
        long(sac, SAC, ("gamma 0.9 0.99", "temperature 0.01 0.1")),
        long(td3, TD3, ("gamma 0.9 0.99", "target-noise 0 0.3")),
        long(slac, SLAC, ("gamma 0.9 0.99", "model-learning-rate 1e-4 1e-3")),
    ],
)
def test_a_vmapped_point_is_what_it_is_alone(script, config, words, tmp_path):
    rows = grid(script, config, tmp_path / "sweep", *words)
    assert len(rows) == 4
    runs = sorted((tmp_path / "sweep" / "points").iterdir())
    point = dict(zip(rows[0], rows[0].values(), strict=True)) | dict(
        x.split("=") for x in runs[-1].name.split(",")
    )
    names = [x.split()[0].replace("-", "_") for x in words]
    cli.train(
        script.make, replace(config, **{k: float(point[k]) for k in names}), tmp_path / "alone"
    )
    alone, found, other = (read_metrics(x) for x in (tmp_path / "alone", runs[-1], runs[0]))
    for column in alone:
        np.testing.assert_allclose(found[column], alone[column], rtol=1e-2, atol=1e-4)
    loss = "gradient_norm" if "gradient_norm" in alone else "critic_loss"
    assert not np.isclose(other[loss][:, -1], alone[loss][:, -1], rtol=1e-3).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "learnin-rate", "1", "2"], "unknown option 'learnin_rate'; did you mean"),
        (["--grid", "gamma", "0.9", "x"], "--grid gamma: 'x' is not a number"),
        (["--grid", "gamma", "0.9"], "--grid gamma has 1 value; it takes two or more"),
        (["--grid", "gamma", "0.9", "0.90"], "--grid gamma has one value twice"),
        (["--grid", "gamma", "0.9", "1.5"], "gamma is 1.5; it has to be from 0 to 1"),
        (["--grid", "memory", "s2pg", "btt"], "unknown memory 'btt'; did you mean 'bptt'?"),
        (["--grid", "privileged", "true", "2"], "'2' is neither true nor false"),
        (["--grid", "num-seeds", "1", "2"], "num_seeds is an option that all points share"),
        (["--grid", "hidden", "8", "16"], "hidden takes several values at once, and cannot be"),
        (["--grid", "gamma", "0", "1", "--grid", "gamma", "0", "1"], "is there twice"),
        ([], "a sweep needs --grid"),
        (["--resume"], "--resume needs --out"),
        (["--num-processes", "2"], "a sweep runs in one process"),
        (["--process-id", "0"], "a sweep runs in one process"),
        (
            ["--shard", "envs", "--num-envs", "1", "--grid", "gamma", "0.9", "1"],
            "this training has no environments to share out",
        ),
        (
            ["--baseline", "none", "--grid", "gae-lambda", "1", "0.9"],
            "gae_lambda 0.9 needs --baseline value or state",
        ),
    ],
)
def test_what_cannot_be_a_grid_is_one_line_and_status_2(words, message, monkeypatch, capsys):
    script = "gpomdp" if "gae-lambda" in words else "ppo"
    monkeypatch.setattr(sys, "argv", ["sweep.py", script, *words])
    monkeypatch.setattr(cli, "keep_programs", lambda: None)
    with pytest.raises(SystemExit) as stop:
        sweep.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_sweep_goes_on_by_its_command_line_as_it_was(tmp_path):
    config_type = sweep.config_of(walk)
    words = ["--out", str(tmp_path), "--grid", "rate", "0.25", "0.5"]
    before = cli.parse(config_type, words)
    records.open_run(before, "sweep-walk")
    for more in ([], ["--grid", "rate", "0.25", "0.5"]):
        after = cli.parse(config_type, ["--out", str(tmp_path), "--resume", *more])
        assert after == replace(before, resume=True)


def test_a_grid_over_the_length_of_a_run_keeps_it_a_float():
    """An int of 5e9 would wrap in single precision; half an update more makes it exact."""
    config = ppo.Config(total_steps=5_000_000_000, num_seeds=1)
    points = [grids.Point(config, {"total_steps": config.total_steps}, Path())]
    _, (floats,) = grids.make(points, ppo.make)
    assert floats["total_steps"] == (config.total_steps // 8192 + 0.5) * 8192


def test_values_that_differ_have_directories_of_their_own(tmp_path):
    axes = grids.axes([["rate", "0.12345671", "0.12345672"]], walk.Config)
    assert len({point.out for point in grids.points(WALK, axes, tmp_path)}) == 2


@pytest.mark.slow
def test_a_sweep_over_precision_trains_each_in_its_own(tmp_path):
    config = gamp.Config(num_updates=2, num_seeds=1, checkpoints=1)
    fields = vars(config) | {"out": str(tmp_path), "grid": (("precision", "double", "single"),)}
    sweep.sweep("gamp", gamp, sweep.config_of(gamp)(**fields), Interruption())
    error = {
        word: read_metrics(tmp_path / "points" / f"precision={word}")["bias_error"].max()
        for word in ("double", "single")
    }
    assert error["double"] < 1e-9 < 1e-7 < error["single"]


def test_the_help_page_has_the_grid_and_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    with pytest.raises(SystemExit):
        options.parse(sweep.config_of(ppo), ["--help"])
    page = capsys.readouterr().out
    assert "grid options" in page
    assert max(map(len, page.splitlines())) <= 80


@pytest.mark.parametrize("number", [1, 3])
def test_one_axis_or_three_are_drawn_as_dots(number, tmp_path):
    found = [grids.Axis(name, (0.0, 1.0)) for name in "abc"[:number]]
    row = {"mean": 1.0, "low": 0.5, "high": 1.5, "noise_free": 1.0, "diverged": 0}
    rows = [dict.fromkeys("abc"[:number], x) | row for x in (0.0, 1.0)]
    grids.draw(tmp_path / "grid.png", found, rows, measure="return", title="dots")
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_words_are_what_the_command_line_reads():
    config = ppo.Config(
        env_params={"length": 5.0}, hidden=(8, 16), privileged=True, backend="mjx", gamma=0.5
    )
    assert options.parse(ppo.Config, options.words(config)) == config
    changed = sac.Config(learn_temperature=False, layer_norm=False)
    assert options.parse(sac.Config, options.words(changed)) == changed
    assert options.words(sac.Config(), said=("gamma",)) == ["--gamma", "0.99"]
