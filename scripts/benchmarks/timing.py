"""What the benchmarks of training share: interleaved timings, quartiles, rows in a file."""

import csv
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm


def interleave(
    calls: Sequence[Callable[[], Any]],
    *,
    repeats: int,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Float[np.ndarray, "calls repeats"]:
    """Seconds of each call, once in every repeat, in random order, after a repeat to warm up.

    Noise that lasts longer than one repeat cancels in ratios within the repeats.
    """
    seconds = np.empty((len(calls), repeats + 1))
    order = np.random.default_rng(seed)
    for i in tqdm(range(repeats + 1), desc="repeat"):
        for j in order.permutation(len(calls)):
            began = clock()
            jax.block_until_ready(calls[j]())
            seconds[j, i] = clock() - began
    return seconds[:, 1:]


def spread(name: str, values: Float[np.ndarray, " repeats"]) -> dict[str, float]:
    """The median under `name`, and the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {name: middle, f"{name}_q25": low, f"{name}_q75": high}


def with_quartiles(row: dict[str, Any], name: str) -> str:
    """What `spread` gave, for a table in a terminal."""
    return f"{row[name]:.2f} [{row[name + '_q25']:.2f}, {row[name + '_q75']:.2f}]"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of the same columns as a csv file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def merge(
    path: Path, rows: list[dict[str, Any]], *, columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Write new rows into a file, in place of those that agree in `columns`, and return all."""
    old = []
    if path.exists():
        with path.open(newline="") as file:
            old = [{k: _number(x) for k, x in row.items()} for row in csv.DictReader(file)]
    found = {tuple(str(row[name]) for name in columns): row for row in (*old, *rows)}
    write(path, list(found.values()))
    return list(found.values())


def machine() -> str:
    device = jax.devices()[0].device_kind
    return f"{os.cpu_count()} cores, {platform.machine()}, {device}, jax {jax.__version__}"


def _number(text: str) -> Any:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text
