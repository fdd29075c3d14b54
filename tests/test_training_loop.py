"""The loop: what a run leaves, resumption to the same bits, seeds that diverge, what is said."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from walk import Config, make

from spg.training import loop, records, summaries
from spg.training.checkpoints import Checkpoints
from spg.training.metrics import read_metrics
from spg.training.records import RunError


def run(config: Config, algorithm: loop.Algorithm | None = None) -> dict:
    algorithm = algorithm or make(config)
    return loop.run(config, algorithm, records.open_run(config, algorithm.name))


def saved(out: Path) -> dict:
    """The arrays of the last checkpoint, but for the clock."""
    checkpoints = Checkpoints(out / "checkpoints")
    arrays = checkpoints.read(checkpoints.updates()[0])
    return {k: v for k, v in arrays.items() if "clock" not in k}


def assert_same_run(a: Path, b: Path) -> None:
    one, two = saved(a), saved(b)
    assert one.keys() == two.keys()
    assert len(one) > 2
    for k in one:
        np.testing.assert_array_equal(one[k], two[k])
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()


def test_run_leaves_a_complete_directory(tmp_path):
    summary = run(Config(out=str(tmp_path / "run"), num_seeds=3, seed=5))
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
    assert data["episodes"][0, :4].tolist() == [2, 2, 0, 2]
    assert np.flatnonzero(~np.isnan(data["eval_return"][0])).tolist() == [9, 19]
    for field in ("final_return_mean", "final_return_iqm", "final_return_noise_free_mean"):
        assert np.isfinite(summary[field])
    assert summary["env_steps"] == 200
    assert summary["diverged"] == {}
    final = data["return"][:, -2:]  # the last tenth
    np.testing.assert_allclose(summary["final_return"], final.mean(1), rtol=1e-5)


def test_seeds_are_independent_of_how_many_run(tmp_path):
    for n, seed in ((1, 2), (3, 0)):
        run(Config(out=str(tmp_path / str(n)), num_seeds=n, seed=seed))
    one, three = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "3")
    np.testing.assert_allclose(one["loss"][0], three["loss"][2], rtol=1e-6)


def half(config: Config, out: Path, *, checkpoints: int = 2) -> Config:
    """The run of a process that was killed after the first checkpoint, to be resumed."""
    config = replace(config, out=str(out), checkpoints=checkpoints)
    first = replace(config, num_updates=config.num_updates // checkpoints, checkpoints=1)
    run(first)
    path = out / "config.json"
    text = path.read_text().replace(f'"num_updates": {first.num_updates}', '"num_updates": 20')
    path.write_text(text.replace('"checkpoints": 1', f'"checkpoints": {checkpoints}'))
    return replace(config, resume=True)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """With a seed that diverged before, one that does so after, and a torn row between."""
    config = Config(diverge={"1": 4, "2": 13})
    run(replace(config, out=str(tmp_path / "whole")))
    resumed = half(config, tmp_path / "half")
    with (tmp_path / "half" / "metrics.csv").open("a") as file:
        file.write("11,0,110,1,2,3\n1")
    assert run(resumed)["diverged"] == {"1": 4, "2": 13}
    assert_same_run(tmp_path / "whole", tmp_path / "half")


def test_a_step_is_traced_once_whatever_the_number_of_chunks(tmp_path):
    config = Config(out=str(tmp_path / "run"), num_seeds=2, checkpoints=7, num_updates=23)
    algorithm = make(config)
    traces = []

    def step(floats, state):
        traces.append(1)
        return algorithm.step(floats, state)

    run(config, algorithm._replace(step=step))
    assert len(traces) == 1  # for the names of the columns and to compile


def test_a_seed_that_diverges_ends_alone(tmp_path, capsys):
    config = Config(diverge={"1": 14})
    whole = run(replace(config, out=str(tmp_path / "whole"), diverge={}))
    summary = run(replace(config, out=str(tmp_path / "run")))
    assert "diverged: seed 1 at update 14; a smaller --learning-rate" in capsys.readouterr().err
    assert summary["diverged"] == {"1": 14}
    assert summary["seeds"] == [0, 2, 3]
    assert summary["final_return"] == [whole["final_return"][i] for i in (0, 2, 3)]
    assert np.isfinite([summary["final_return_mean"], *summary["final_return_ci95"]]).all()
    assert "diverged at update 14" in summaries.table(tmp_path, summary)
    assert len(summaries.read_curve(tmp_path / "run", "").returns) == 3
    without, data = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "run")
    for k in data.keys() - {"update", "seed", "env_steps"}:
        np.testing.assert_array_equal(data[k][[0, 2, 3]], without[k][[0, 2, 3]])
        np.testing.assert_array_equal(data[k][1, :13], without[k][1, :13])
        assert np.isnan(data[k][1, 13:]).all()
    arrays = saved(tmp_path / "run")
    x = next(v for k, v in arrays.items() if k.endswith(".learned.kernel['x']"))
    assert np.isfinite(x).all()  # as it was before the update
    np.testing.assert_allclose(x[1, 0] ** 2, data["loss"][1, 12], rtol=1e-5)


def test_when_every_seed_diverges_the_run_ends_and_its_advice_can_be_followed(tmp_path):
    config = Config(out=str(tmp_path / "run"), num_seeds=2, diverge={"0": 14, "1": 3})
    advice = "every seed diverged: seed 0 at update 14, seed 1 at update 3; a smaller"
    with pytest.raises(RunError, match=f"{advice} --learning-rate, in another --out"):
        run(config)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["10"]
    with pytest.raises(RunError, match=advice):
        run(replace(config, resume=True))
    run(replace(config, out=str(tmp_path / "other"), rate=0.1, diverge={}))


@pytest.mark.parametrize(
    ("broken", "update"),
    [
        ({"score": jnp.nan}, 1),  # although two episodes ended
        ({"metrics": {"loss": jnp.inf, "count": jnp.int32(0)}}, 1),
        ({"score": jnp.nan, "weight": jnp.zeros(())}, None),  # none did
        ({"of_episodes": {"episode_length": jnp.nan}, "weight": jnp.zeros(())}, None),
    ],
)
def test_nan_is_allowed_without_episodes_only(broken, update, tmp_path):
    config = Config(out=str(tmp_path / "run"), num_seeds=1, num_updates=2, checkpoints=1)
    algorithm = make(config)

    def step(floats, state):
        state, report = algorithm.step(floats, state)
        return state, report._replace(**broken)

    if update is None:
        assert run(config, algorithm._replace(step=step))["diverged"] == {}
    else:
        with pytest.raises(RunError, match=f"seed 0 at update {update}"):
            run(config, algorithm._replace(step=step))


def test_summary_is_valid_json_whatever_is_nan(tmp_path):
    config = Config(out=str(tmp_path / "run"), num_seeds=1, num_updates=2)
    algorithm = make(config)
    nowhere = lambda state, key: algorithm.evaluate(state, key)._replace(noise_free=jnp.nan)
    summary = run(config, algorithm._replace(evaluate=nowhere))
    refuse = lambda name: pytest.fail(f"{name} is no JSON")
    text = (tmp_path / "run" / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse)["final_return_noise_free"] == [None]
    again = summaries.read_summary(tmp_path / "run")
    np.testing.assert_equal(again, summary)
    assert "nan" in summaries.table(tmp_path, again)


def test_into_a_file_progress_is_a_few_plain_lines(tmp_path, capsys):
    config = Config(out=str(tmp_path / "run"), num_updates=200, checkpoints=20)
    summary = run(config)
    err = capsys.readouterr().err
    assert "\r" not in err
    lines = err.splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[-1].startswith("walk: 100 % of 8,000 steps, ")
    assert "return" in lines[-1]
    table = summaries.table(Path("runs/walk"), summary | {"env_steps": 10**12})
    assert max(map(len, table.splitlines())) <= 80


def test_on_a_terminal_progress_is_one_bar_and_lines_stand_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run(Config(out=str(tmp_path / "run"), num_updates=200, checkpoints=20, diverge={"2": 30}))
    err = capsys.readouterr().err
    *lines, rest = [line.split("\r")[-1] for line in err.split("\n")]
    assert rest == ""
    assert len(lines) == 2
    assert lines[0].startswith("diverged: seed 2 at update 30")
    assert lines[1].startswith("walk: 100%")
