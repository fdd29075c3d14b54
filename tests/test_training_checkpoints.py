"""Checkpoints: named leaves, two kept, damage found and gone round, full disks."""

import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from test_training_loop import assert_same_run, run
from test_training_records import file_size, files
from walk import Config

from spg.training.checkpoints import Checkpoints
from spg.training.records import RunError


class Pair(NamedTuple):
    a: jax.Array
    b: jax.Array
    key: jax.Array
    empty: jax.Array


class Swapped(NamedTuple):
    b: jax.Array
    a: jax.Array
    key: jax.Array
    empty: jax.Array


class Renamed(NamedTuple):
    a: jax.Array
    c: jax.Array
    key: jax.Array
    empty: jax.Array


PAIR = Pair(jnp.zeros(2), jnp.ones(2), jr.split(jr.key(1), 3), jnp.zeros((0, 2)))


def test_leaves_are_found_by_their_paths(tmp_path):
    """A checkpoint with leaves by number would give b for a, since they have one shape."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, PAIR)
    like = jax.eval_shape(lambda: Swapped(PAIR.b, PAIR.a, PAIR.key, PAIR.empty))
    found = checkpoints.restore(1, like)
    assert (found.a == 0).all()
    assert (found.b == 1).all()
    assert (jr.key_data(found.key) == jr.key_data(PAIR.key)).all()
    assert found.empty.shape == (0, 2)


@pytest.mark.parametrize(
    ("like", "differs"),
    [
        (Renamed(*PAIR), r"\.b, \.c$"),
        (PAIR._replace(b=jnp.ones(3)), r"\.b$"),
        (PAIR._replace(b=jnp.ones(2, int)), r"\.b$"),
    ],
)
def test_another_tree_is_called_another_version(like, differs, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, PAIR)
    assert checkpoints.is_whole(1)
    with pytest.raises(RunError, match=f"another version of the code, .* {differs}"):
        checkpoints.restore(1, like)


def test_two_are_kept_and_what_is_left_unfinished_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "7.partial.orbax-checkpoint-tmp").mkdir()
    for update in (5, 10, 15):
        checkpoints.save(update, PAIR)
    assert checkpoints.updates() == [15, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "15"]


def test_any_damage_to_any_file_is_found(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, PAIR)
    shutil.copytree(tmp_path / "1", tmp_path / "copy")
    paths = [p for p in (tmp_path / "1").rglob("*") if p.is_file()]
    assert len(paths) > 4
    for path in paths:
        data = path.read_bytes()
        flipped = bytes([*data[: len(data) // 2], data[len(data) // 2] ^ 1])
        for damaged in (data[:-1], b"", flipped + data[len(flipped) :], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert not checkpoints.is_whole(1), path
            path.write_bytes(data)
    assert checkpoints.is_whole(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that has ended, with checkpoints at 10 and 20."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(Config(out=str(out), num_seeds=2))
    return out


def break_file(checkpoint):
    path = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-7])


def test_from_a_damaged_checkpoint_the_run_goes_back_to_the_one_before(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    break_file(out / "checkpoints" / "20")
    run(Config(out=str(out), num_seeds=2, resume=True))
    assert "checkpoint 20 is damaged; going on from update 10" in capsys.readouterr().err
    assert_same_run(whole, out)


def test_when_every_checkpoint_is_damaged_the_run_is_refused(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for update in ("10", "20"):
        break_file(out / "checkpoints" / update)
    before = files(out)
    both = "checkpoint 20 is damaged, checkpoint 10 is damaged; another --out starts afresh"
    with pytest.raises(RunError, match=both):
        run(Config(out=str(out), num_seeds=2, resume=True))
    assert files(out) == before


def test_a_checkpoint_that_cannot_be_written_leaves_those_before_it(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, PAIR)
    big = PAIR._replace(a=np.random.default_rng(0).normal(size=(100, 100)))
    refused = pytest.raises(RunError, match=r"checkpoint .*/2 cannot be written: File too large")
    with file_size(20_000), refused:
        checkpoints.save(2, big)
    assert checkpoints.updates() == [1]
    assert checkpoints.is_whole(1)
    assert capfd.readouterr().err == ""
    checkpoints.save(3, big)
    np.testing.assert_array_equal(checkpoints.restore(3, big).a, big.a)
