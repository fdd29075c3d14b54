"""The directory of a run: opened once, locked, and refused or repaired where it is damaged."""

import json
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
from test_training_loop import assert_same_run, half, run
from walk import Config

from spg.training import events, records
from spg.training.records import RunError


def files(out):
    return {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_directory_that_holds_a_run_is_refused_and_untouched(tmp_path):
    config = Config(out=str(tmp_path / "run"), num_seeds=2)
    run(config)
    before = files(tmp_path / "run")
    with pytest.raises(RunError, match=r"holds a run; --resume goes on"):
        run(config)
    assert before == files(tmp_path / "run")


def test_of_two_processes_that_open_one_directory_one_is_refused(tmp_path, monkeypatch):
    config = Config(out=str(tmp_path / "run"))
    records.open_run(config, "walk")
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)  # looked before it was there
    with pytest.raises(RunError, match="holds a run"):
        records.open_run(replace(config, rate=0.1), "walk")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rate"] == 0.5


def test_resumption_names_the_fields_that_differ(tmp_path):
    config = Config(out=str(tmp_path / "run"))
    records.open_run(config, "walk")
    other = replace(config, resume=True, rate=0.25)
    with pytest.raises(RunError, match=r"rate \(was 0.5, now 0.25\)$"):
        records.open_run(other, "walk")


def test_resumption_without_a_run_is_refused(tmp_path):
    config = Config(out=str(tmp_path / "nothing"), resume=True)
    with pytest.raises(RunError, match="holds no run"):
        records.open_run(config, "walk")
    with pytest.raises(RunError, match="--resume needs --out"):
        records.open_run(replace(config, out=None), "walk")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_unreadable_configuration_is_named(text, tmp_path):
    config = Config(out=str(tmp_path / "run"))
    path = records.open_run(config, "walk") / "config.json"
    path.write_text(text)
    for read in (
        lambda: records.open_run(replace(config, resume=True), "walk"),
        lambda: records.read_config(path.parent, Config),
    ):
        with pytest.raises(RunError, match=f"{path} cannot be read"):
            read()


def test_configuration_is_read_back_as_it_was(tmp_path):
    config = Config(out=str(tmp_path / "run"), sizes=(2, 3), diverge={"1": 2}, seed=3)
    assert replace(records.read_config(records.open_run(config, "walk"), Config), out=config.out)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"rate"', '"ratio"'))
    with pytest.raises(RunError, match=r"written by walk, or by another version .* rate, ratio"):
        records.read_config(path.parent, Config)


def test_a_directory_is_locked_until_the_training_ends(tmp_path):
    def enter():
        with records.locked(tmp_path):
            pass

    with records.locked(tmp_path), pytest.raises(RunError, match="another process is training in"):
        enter()
    enter()


def cut(text):
    return text[: len(text) // 3]


def garble(text):
    return text.replace("0", "O", 5)


FIVE = Config(num_seeds=2, checkpoints=5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that has ended, with checkpoints at 16 and 20."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(replace(FIVE, out=str(out)))
    return out


@pytest.mark.parametrize("damage", [cut, garble, lambda text: text.replace("\n", "\r\n")])
def test_damaged_rows_are_made_again_from_the_checkpoint_before(damage, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "metrics.csv"
    lines = path.read_text().splitlines(keepends=True)
    at = 1 + 2 * 16  # of the checkpoints at 16 and 20
    path.write_bytes("".join([*lines[:at], damage("".join(lines[at:]))]).encode())
    run(replace(FIVE, out=str(tmp_path / "run"), resume=True))
    err = capsys.readouterr().err
    assert "metrics.csv is damaged before update 20; going on from update 16" in err
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("damage", [cut, garble, lambda text: None])
def test_rows_that_cannot_be_made_again_are_refused_before_training(damage, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "metrics.csv"
    text = damage(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    before = files(tmp_path / "run")
    damaged = r"metrics.csv is damaged before update 20, .* update 16; another --out starts"
    with pytest.raises(RunError, match=damaged):
        run(replace(FIVE, out=str(tmp_path / "run"), resume=True))
    assert before == files(tmp_path / "run")


@contextmanager
def file_size(size):
    """No file of this process may grow beyond `size`, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_events_that_cannot_be_written_are_gone_without(tmp_path):
    said = []
    writer = events.Events(tmp_path, first=1, say=said.append)
    with file_size(500):
        for update in range(100):  # a queue would be full
            writer.add(update, {"return": 1.0, "loss": 2.0})
        writer.close()
    assert said == ["warning: no more TensorBoard events: File too large"]


def test_run_goes_on_without_events_on_a_full_disk(tmp_path, capsys, monkeypatch):
    config = Config(out=str(tmp_path / "run"), num_seeds=2)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(events, "EventsWriter", full)
    assert run(config)["seeds"] == [0, 1]
    assert capsys.readouterr().err.count("no more TensorBoard events") == 1


def test_a_full_disk_is_one_line_and_loses_nothing(whole, tmp_path):
    """Where there is room again, resumption goes on."""
    resumed = half(FIVE, tmp_path / "run", checkpoints=5)
    before = files(tmp_path / "run")
    path = tmp_path / "run" / "metrics.csv"
    refused = pytest.raises(RunError, match=f"{path} cannot be written: File too large")
    with file_size(path.stat().st_size + 50), refused:
        run(resumed)
    assert path.read_bytes().startswith(before[path])
    checkpoint = tmp_path / "run" / "checkpoints" / "4"
    assert {p for p in before if checkpoint in p.parents} <= files(tmp_path / "run").keys()
    run(resumed)
    assert_same_run(whole, tmp_path / "run")
