"""The seeds of a training, shared out to devices."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

SPLIT, WHOLE = PartitionSpec("seed"), PartitionSpec()


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to `limit`."""
    return max(i for i in range(1, limit + 1) if n % i == 0)


def devices(num_seeds: int, points: int = 1) -> list[Any]:
    """The devices to train on, each with as many seeds; says where some stay idle.

    The seeds are those of all `points` of a grid.
    """
    count = len(jax.devices())
    used = largest_divisor(num_seeds, count)
    if points > 1 and used < min(num_seeds, count):
        print(
            f"{points} points x {num_seeds // points} seeds run on {used} of {count} devices, "
            "each with as many seeds",
            file=sys.stderr,
        )
        return jax.devices()[:used]
    if used < min(num_seeds, count):
        fits = [n for n in (num_seeds // count * count, -(-num_seeds // count) * count) if n]
        print(
            f"{num_seeds} seeds run on {used} of {count} devices, each with as many seeds; "
            f"--num-seeds {' or '.join(map(str, fits))} would use all",
            file=sys.stderr,
        )
    return jax.devices()[:used]


def program(on: list[Any], f: Callable, in_specs: Any = SPLIT, **options: Any) -> Any:
    """`f`, whose arguments are stacked over seeds where `in_specs` says so, on these devices."""
    if len(on) > 1:
        mesh = Mesh(np.array(on), ("seed",))
        f = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=SPLIT, check_vma=False)
    return jax.jit(f, **options)
