"""Large arrays in blocks of bytes; each block is one file, named by the hash of its content.

A block that has not changed since an array was last written is not written again. A replay ring
fills in the order of time, so most of its blocks are the same as before.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 1 << 20  # bytes of a block


class Cut(NamedTuple):
    """An array by its blocks."""

    shape: tuple[int, ...]
    dtype: str
    names: list[str]  # of the blocks, in the order of their bytes


def write(directory: Path, array: Any) -> Cut:
    """Write the blocks of an array, of NumPy or JAX, but for those that are there undamaged."""
    directory.mkdir(parents=True, exist_ok=True)
    names = []
    for block in _blocks(array):
        path = directory / _name(block)
        if not (path.exists() and np.array_equal(np.fromfile(path, np.uint8), block)):
            partial = path.with_suffix(".partial")
            partial.write_bytes(block.data)
            os.replace(partial, path)
        names.append(path.name)
    return Cut(array.shape, array.dtype.name, names)


def read(directory: Path, cut: Cut) -> np.ndarray:
    """The array whose blocks are whole."""
    array = np.empty(cut.shape, jnp.dtype(cut.dtype))
    flat, end = _bytes(array), 0
    for name in cut.names:
        block = np.fromfile(directory / name, np.uint8)
        begin, end = end, end + block.size
        flat[begin:end] = block
    return array


def are_whole(directory: Path, names: set[str]) -> bool:
    """Whether the blocks are as they were written. Raises OSError if one is missing."""
    return all(_name(np.fromfile(directory / name, np.uint8)) == name for name in names)


def keep(directory: Path, names: set[str]) -> None:
    """Remove all other blocks, and what a killed process left unfinished."""
    for path in directory.glob("*"):
        if path.name not in names:
            with suppress(OSError):  # the next time, then
                path.unlink()


def _name(block: np.ndarray) -> str:
    return blake2b(block.data, digest_size=16).hexdigest()


def _blocks(array: Any) -> Iterator[np.ndarray]:
    for part in _parts(array):
        flat = _bytes(np.ascontiguousarray(part))
        yield from (flat[begin : begin + SIZE] for begin in range(0, flat.size, SIZE))


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _parts(array: Any) -> list[np.ndarray]:
    """An array in parts along its first axis: its shards, since their whole would be a copy."""
    if isinstance(array, jax.Array):
        shards = {s.index[0].start or 0: s.data for s in array.addressable_shards}
        if all(x.shape[1:] == array.shape[1:] for x in shards.values()):
            return [np.asarray(shards[begin]) for begin in sorted(shards)]
    return [np.asarray(array)]
