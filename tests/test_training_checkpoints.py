"""Checkpoints: named leaves, two kept, large ones in blocks, damage gone round, full disks."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from test_training_loop import assert_same_run, run
from test_training_records import file_size, files
from walk import Config

from spg.training import blocks
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


def test_kernels_that_were_not_written_are_there_after_a_resumption(whole, tmp_path):
    """As where the disk was full between the last checkpoint and its kernels."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    kernels = (out / "kernels.npz").read_bytes()
    (out / "kernels.npz").unlink()
    (out / "summary.json").unlink()
    run(Config(out=str(out), num_seeds=2, resume=True))
    assert (out / "kernels.npz").read_bytes() == kernels


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


SIZE = 512  # bytes of a block in these tests


class Ring(NamedTuple):
    """A replay buffer's leaves: the steps of two seeds are overwritten in order."""

    obs: jax.Array
    action: jax.Array
    first: jax.Array
    half: jax.Array
    keys: jax.Array
    small: jax.Array
    empty: jax.Array


def ring(seed=0):
    keys = jr.split(jr.key(seed), 4)
    return Ring(
        obs=jr.normal(keys[0], (2, 100, 3, 4)).astype(jnp.float32),
        action=jr.randint(keys[1], (2, 301, 3), -9, 9, jnp.int32),  # ends in a shorter block
        first=jr.bernoulli(keys[2], 0.3, (2, 1000)),
        half=jr.normal(keys[3], (2, 999), jnp.bfloat16),
        keys=jr.split(jr.key(seed), (2, 200)),
        small=jnp.arange(3) + seed,
        empty=jnp.zeros((2, 0)),
    )


@pytest.fixture
def cut_small(monkeypatch):
    monkeypatch.setattr("spg.training.blocks.SIZE", SIZE)
    monkeypatch.setattr("spg.training.checkpoints.LARGE", 1500)


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jr.key_data(a), jr.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_holds(checkpoints, update, tree):
    assert checkpoints.is_whole(update)
    assert_same(checkpoints.restore(update, jax.eval_shape(lambda: tree)), tree)


def stored(directory):
    return {p.name for p in (directory / "blocks").iterdir()}


def needed(*trees):
    """How many different blocks the large leaves have."""
    found = set()
    for tree in trees:
        for x in (tree.obs, tree.action, tree.first, tree.half, jr.key_data(tree.keys)):
            data = np.asarray(x).tobytes()
            found |= {data[i : i + SIZE] for i in range(0, len(data), SIZE)}
    return len(found)


def test_large_leaves_of_any_dtype_come_back_to_the_bit(tmp_path, cut_small):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, ring())
    names = json.loads((tmp_path / "1" / "blocks.json").read_text())
    assert names.keys() == {".obs", ".action", ".first", ".half", ".keys"}
    assert len(stored(tmp_path)) == needed(ring())
    assert_holds(checkpoints, 1, ring())
    assert_holds(Checkpoints(tmp_path), 1, jax.tree.map(lambda x: x, ring()))
    with pytest.raises(RunError, match=r"another version of the code, .* \.obs$"):
        checkpoints.restore(1, ring()._replace(obs=jnp.zeros((2, 3))))


def test_where_the_limit_of_large_leaves_moved_checkpoints_are_read(tmp_path, cut_small):
    Checkpoints(tmp_path).save(1, ring())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spg.training.checkpoints.LARGE", 1 << 30)
        patch.setattr("spg.training.blocks.SIZE", 100)
        assert_holds(Checkpoints(tmp_path), 1, ring())
        Checkpoints(tmp_path).save(2, ring())
    assert not (tmp_path / "2" / "blocks.json").exists()
    assert_holds(Checkpoints(tmp_path), 2, ring())


SHARDED = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from spg.training import blocks

blocks.SIZE = 1000
directory = Path(sys.argv[1])
array = np.arange(4000, dtype=np.int32).reshape(4, 1000)
mesh = Mesh(np.array(jax.devices()), ("x",))
for spec in (P("x"), P(None, "x"), P()):
    sharded = jax.device_put(array, NamedSharding(mesh, spec))
    assert len(sharded.addressable_shards) == 2
    np.testing.assert_array_equal(blocks.read(directory, blocks.write(directory, sharded)), array)
"""


def test_a_leaf_on_two_devices_is_read_as_a_whole_one(tmp_path):
    """By its first axis, by the second, where bytes of shards do not follow in order, and twice."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    root = {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-c", SHARDED, str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, env=os.environ | root | flags)
    assert result.returncode == 0, result.stderr


def test_small_leaves_are_not_cut(tmp_path):
    Checkpoints(tmp_path).save(1, ring())
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    assert not (tmp_path / "1" / "blocks.json").exists()


def test_only_blocks_that_changed_are_written_and_those_without_a_name_removed(tmp_path, cut_small):
    """Of the ring, 10 steps a seed of 48 bytes: at most two blocks each."""
    checkpoints, trees, before = Checkpoints(tmp_path), [ring()], set()
    for _ in range(4):
        last, begin = trees[-1], 10 * len(trees)
        new = last.obs.at[:, begin : begin + 10].set(len(trees))
        trees.append(last._replace(obs=new, small=last.small + 1))
    for update, tree in enumerate(trees):
        checkpoints.save(update, tree)
        assert len(stored(tmp_path)) == needed(*trees[max(update - 1, 0) : update + 1])
        written = {p for p in (tmp_path / "blocks").iterdir() if p.stat().st_ino not in before}
        assert len(written) == needed(tree) if update == 0 else 0 < len(written) <= 4
        before = {p.stat().st_ino for p in (tmp_path / "blocks").iterdir()}
    assert_holds(checkpoints, 4, trees[4])
    assert_holds(checkpoints, 3, trees[3])


def test_zeros_are_one_block(tmp_path, cut_small):
    tree = {"ring": jnp.zeros((100, SIZE // 4), jnp.int32), "n": jnp.ones(1)}
    Checkpoints(tmp_path).save(1, tree)
    assert len(stored(tmp_path)) == 1
    assert_holds(Checkpoints(tmp_path), 1, tree)


def test_damage_to_any_block_is_found_and_mended_by_the_next_save(tmp_path, cut_small):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, ring())
    for path in sorted((tmp_path / "blocks").iterdir())[::8]:
        data = path.read_bytes()
        for damaged in (data[:-1], b"", data + b"0", data[:-1] + bytes([data[-1] ^ 1]), None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert not checkpoints.is_whole(1), path
            path.write_bytes(data)
        path.write_bytes(data[1:])
    assert not checkpoints.is_whole(1)
    checkpoints.save(2, ring())
    assert_holds(checkpoints, 1, ring())
    assert_holds(checkpoints, 2, ring())


def test_while_a_list_of_blocks_is_damaged_none_is_removed(tmp_path, cut_small):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, ring(1))
    path = tmp_path / "1" / "blocks.json"
    text = path.read_text()
    path.write_text("[]")
    assert not checkpoints.is_whole(1)
    checkpoints.save(2, ring(2))
    path.write_text(text)
    assert_holds(checkpoints, 1, ring(1))
    path.write_text("[]")
    checkpoints.save(3, ring(3))
    assert len(stored(tmp_path)) == needed(ring(2), ring(3))


class Killed(BaseException):
    """The end of a process: nothing is tidied up."""


@contextmanager
def broken(name, after, error):
    """`os.replace` or `os.rename` to a final name works `after` times, then raises the error."""
    work, calls = getattr(os, name), []

    def fail(source, target):
        calls.extend([target] if "partial" not in Path(target).name else [])
        if len(calls) > after:
            raise error
        return work(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"os.{name}", fail)
        yield


MOMENTS = [("replace", 0), ("replace", 5), ("rename", 0)]


@pytest.mark.parametrize(("name", "after"), MOMENTS)
def test_a_kill_at_any_moment_leaves_the_checkpoints_before(name, after, tmp_path, cut_small):
    """In the first block, in a later one, and when all is written but the checkpoint's name."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, ring(1))
    with broken(name, after, Killed()), pytest.raises(Killed):
        checkpoints.save(2, ring(2))
    assert len(stored(tmp_path)) > needed(ring(1))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.updates() == [1]
    assert_holds(checkpoints, 1, ring(1))
    checkpoints.save(3, ring(3))
    assert_holds(checkpoints, 1, ring(1))
    assert_holds(checkpoints, 3, ring(3))
    assert len(stored(tmp_path)) == needed(ring(1), ring(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3", "blocks"]


def test_a_block_gets_its_name_when_it_is_complete(tmp_path, monkeypatch):
    def torn(path, data):
        with path.open("wb") as file:
            file.write(data[:7])
        raise Killed

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(Killed):
        blocks.write(tmp_path, np.ones(100))
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]


@pytest.mark.parametrize(("name", "after"), MOMENTS)
def test_blocks_that_cannot_be_written_leave_nothing(name, after, tmp_path, cut_small):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, ring(1))
    before = files(tmp_path)
    refused = pytest.raises(RunError, match="/2 cannot be written: No space left on device; those")
    full = OSError(28, "No space left on device", "/a/path")
    with broken(name, after, full), refused:
        checkpoints.save(2, ring(2))
    assert files(tmp_path) == before
    assert_holds(checkpoints, 1, ring(1))
    checkpoints.save(2, ring(2))
    assert_holds(checkpoints, 2, ring(2))


def test_a_full_disk_in_the_middle_of_a_block_leaves_nothing(tmp_path, cut_small):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, ring(1))
    before = files(tmp_path)
    refused = pytest.raises(RunError, match="/2 cannot be written: File too large; those")
    with file_size(SIZE - 1), refused:
        checkpoints.save(2, ring(2))
    assert files(tmp_path) == before


def test_from_a_damaged_block_the_run_goes_back_to_the_one_before(tmp_path, cut_small, capsys):
    config = Config(out=str(tmp_path / "whole"), num_seeds=2, sizes=(300,))
    run(config)
    out = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", out)
    shared = json.loads((out / "checkpoints" / "10" / "blocks.json").read_text())
    ((leaf, (_, _, names)),) = shared.items()
    assert leaf.endswith(".learned.kernel['x']")
    path = next(p for p in (out / "checkpoints" / "blocks").iterdir() if p.name not in names)
    path.write_bytes(b"")
    run(replace(config, out=str(out), resume=True))
    assert "checkpoint 20 is damaged; going on from update 10" in capsys.readouterr().err
    assert_same_run(tmp_path / "whole", out)
    assert Checkpoints(out / "checkpoints").is_whole(20)
    assert stored(out / "checkpoints") == stored(tmp_path / "whole" / "checkpoints")
