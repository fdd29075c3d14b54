"""Checkpoints of a training state, whole or not there at all, for any number of devices."""

import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from spg.training import blocks
from spg.training.records import RunError

KEEP = 2  # how many, so that one stays if another is damaged
LARGE = 4 << 20  # bytes beyond which a leaf is written in blocks
Tree = TypeVar("Tree")


class Checkpoints:
    """The last checkpoints of a run, a directory each: Orbax's files, and a checksum of these.

    A leaf is called by its path in the tree, so that two of one shape are not exchanged when a
    field is added or renamed. A directory gets its name, the number of updates, when complete.

    The bytes of a large leaf are in `blocks/`, which the checkpoints share, and `blocks.json` in
    the directory of a checkpoint names them: of a leaf that changes little, little is written.
    """

    def __init__(self, directory: Path):
        self._directory = directory.absolute()
        self._blocks = self._directory / "blocks"
        # of several processes one alone writes and reads, and waits for no other
        alone = ocp.options.MultiprocessingOptions(active_processes={0})
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        self._orbax = ocp.Checkpointer(handler, multiprocessing_options=alone)

    def updates(self) -> list[int]:
        """After how many updates there is a checkpoint, the last one first."""
        names = (p.name for p in self._directory.glob("*"))
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def save(self, update: int, tree: PyTree) -> None:
        """Write a checkpoint; then only the last ones are kept. Raises RunError if it cannot be."""
        path, partial = self._directory / str(update), self._directory / f"{update}.partial"
        arrays = _by_path(jax.tree.map(lambda x: jr.key_data(x) if _is_key(x) else x, tree))
        large = {k: x for k, x in arrays.items() if x.nbytes > LARGE}
        small = {k: np.asarray(x) for k, x in arrays.items() if k not in large}
        try:
            self.clean()
            cuts = {k: blocks.write(self._blocks, x) for k, x in large.items()}
            with _quietly():
                self._orbax.save(partial, args=ocp.args.StandardSave(small))
            if cuts:
                (partial / "blocks.json").write_text(json.dumps(cuts))
            (partial / "checksum").write_text(_checksum(partial))
            os.rename(partial, path)
        except (OSError, ValueError) as error:
            self.clean()
            self._sweep()
            reason = str(error).splitlines()[0].rsplit(": ", 1)[-1].split(" [os_error")[0]
            reason = error.strerror or reason if isinstance(error, OSError) else reason
            raise RunError(
                f"checkpoint {path} cannot be written: {reason}; those before it are kept, and "
                "--resume goes on from there"
            ) from error
        for old in self.updates()[KEEP:]:
            self.discard(old)
        self._sweep()

    def is_whole(self, update: int) -> bool:
        """Whether the files are as they were written."""
        path = self._directory / str(update)
        try:
            return _is_unchanged(path) and blocks.are_whole(self._blocks, _names(path))
        except OSError:
            return False

    def restore(self, update: int, like: Tree) -> Tree:
        """A whole checkpoint, as arrays of NumPy and as keys.

        `like` gives the structure, the shapes and the dtypes (of arrays, or by `jax.eval_shape`).
        Raises RunError if the checkpoint has others.
        """
        saved = self.read(update)
        bare = jax.tree.map(lambda x: jax.eval_shape(jr.key_data, x) if _is_key(x) else x, like)
        kind = lambda x: (tuple(x.shape), np.dtype(x.dtype))
        now, then = ({k: kind(x) for k, x in t.items()} for t in (_by_path(bare), saved))
        if differ := sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k)):
            raise RunError(
                f"checkpoint {update} is of another version of the code, which differs in "
                f"{', '.join(differ[:3])}{' and others' if len(differ) > 3 else ''}"
            )

        def leaf(path: Any, x: Any) -> Any:
            if 0 in x.shape:
                return np.zeros(x.shape, x.dtype)
            value = saved[jax.tree_util.keystr(path)]
            return jr.wrap_key_data(jnp.asarray(value)) if _is_key(x) else value

        return jax.tree_util.tree_map_with_path(leaf, like)

    def read(self, update: int) -> dict[str, np.ndarray]:
        """The arrays of a whole checkpoint, by their paths."""
        path = self._directory / str(update)
        try:
            with _quietly():
                small = self._orbax.restore(path, args=ocp.args.StandardRestore())
            return small | {k: blocks.read(self._blocks, x) for k, x in _cuts(path).items()}
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"checkpoint {path} cannot be read by this Orbax: {error}") from error

    def discard(self, update: int) -> None:
        shutil.rmtree(self._directory / str(update))

    def clean(self) -> None:
        """Remove what a killed process left unfinished."""
        for path in self._directory.glob("*.partial*"):
            shutil.rmtree(path, ignore_errors=True)  # a thread of a failed save may still write

    def _sweep(self) -> None:
        """Remove the blocks that no checkpoint names; if one is damaged, its names are unknown."""
        paths = [self._directory / str(update) for update in self.updates()]
        if self._blocks.exists() and all(map(_is_unchanged, paths)):
            blocks.keep(self._blocks, set().union(*map(_names, paths)))


def _by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths in the tree, without empty ones, which Orbax cannot write."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in leaves if 0 not in x.shape}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _cuts(path: Path) -> dict[str, blocks.Cut]:
    """The large leaves of a checkpoint."""
    path = path / "blocks.json"
    cuts = json.loads(path.read_text()) if path.exists() else {}
    return {k: blocks.Cut(*cut) for k, cut in cuts.items()}


def _names(path: Path) -> set[str]:
    """The blocks that a checkpoint needs."""
    return {name for cut in _cuts(path).values() for name in cut.names}


def _is_unchanged(path: Path) -> bool:
    """Whether the files of a directory are as they were written."""
    try:
        return (path / "checksum").read_text() == _checksum(path)
    except (OSError, ValueError):
        return False


def _checksum(directory: Path) -> str:
    """CRC-32 of the files' names and bytes, in order."""
    crc = 0
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        if path.name != "checksum":
            crc = zlib.crc32(str(path.relative_to(directory)).encode(), crc)
            crc = zlib.crc32(path.read_bytes(), crc)
    return f"{crc:08x}"


@contextmanager
def _quietly() -> Iterator[None]:
    """Orbax logs the tracebacks of its threads, of errors that it raises too; some go unraised."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        sys.unraisablehook = hook
