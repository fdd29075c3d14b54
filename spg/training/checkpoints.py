"""Checkpoints of a training state, whole or not there at all, for any number of devices."""

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

from spg.training.records import RunError

KEEP = 2  # how many, so that one stays if another is damaged
Tree = TypeVar("Tree")


class Checkpoints:
    """The last checkpoints of a run, a directory each: Orbax's files, and a checksum of these.

    A leaf is called by its path in the tree, so that two of one shape are not exchanged when a
    field is added or renamed. A directory gets its name, the number of updates, when complete.
    """

    def __init__(self, directory: Path):
        self._directory = directory.absolute()
        self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def updates(self) -> list[int]:
        """After how many updates there is a checkpoint, the last one first."""
        names = (p.name for p in self._directory.glob("*"))
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def save(self, update: int, tree: PyTree) -> None:
        """Write a checkpoint; then only the last ones are kept. Raises RunError if it cannot be."""
        path, partial = self._directory / str(update), self._directory / f"{update}.partial"
        bare = jax.tree.map(lambda x: np.asarray(jr.key_data(x) if _is_key(x) else x), tree)
        arrays = _by_path(bare)
        try:
            self.clean()
            with _quietly():
                self._orbax.save(partial, args=ocp.args.StandardSave(arrays))
            (partial / "checksum").write_text(_checksum(partial))
            os.rename(partial, path)
        except (OSError, ValueError) as error:
            self.clean()
            reason = str(error).splitlines()[0].rsplit(": ", 1)[-1].split(" [os_error")[0]
            raise RunError(
                f"checkpoint {path} cannot be written: {reason}; those before it are kept, and "
                "--resume goes on from there"
            ) from error
        for old in self.updates()[KEEP:]:
            self.discard(old)

    def is_whole(self, update: int) -> bool:
        """Whether the files are as they were written."""
        path = self._directory / str(update)
        try:
            return (path / "checksum").read_text() == _checksum(path)
        except (OSError, ValueError):
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
                return self._orbax.restore(path, args=ocp.args.StandardRestore())
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"checkpoint {path} cannot be read by this Orbax: {error}") from error

    def discard(self, update: int) -> None:
        shutil.rmtree(self._directory / str(update))

    def clean(self) -> None:
        """Remove what a killed process left unfinished."""
        for path in self._directory.glob("*.partial*"):
            shutil.rmtree(path, ignore_errors=True)  # a thread of a failed save may still write


def _by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths in the tree, without empty ones, which Orbax cannot write."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in leaves if 0 not in x.shape}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


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
