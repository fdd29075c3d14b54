"""What a linear recurrence costs: each form of `linear_scan`, forward and with its backward pass.

    python scripts/benchmarks/scans.py           # real and complex
    python scripts/benchmarks/scans.py --lengths 128 --dtypes float32

`scan` and `associative_scan` are those of JAX, differentiated by JAX; `auto` is what the library
calls. All forms of a size are timed in turn, in random order, and a ratio is the median of the
ratios within the repeats, to the one of JAX's two whose median is less. The batch is a `vmap` over
sequences `[T, width]`, each with its own diagonal decay.
"""

import csv
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from tqdm import tqdm

from spg.limits import Count, NonNegative, check
from spg.scans import linear_scan
from spg.training import cli, records, tables


@dataclass(frozen=True)
class Config:
    out: str | None = None
    """directory of the results; by default a new one under runs/"""
    lengths: tuple[Count, ...] = (16, 128, 1024, 8192)
    """T, steps of a recurrence"""
    widths: tuple[Count, ...] = (16, 64, 256)
    """numbers in x at a step"""
    batches: tuple[Count, ...] = (1, 16, 64)
    """recurrences side by side"""
    max_numbers: Count = 1 << 20
    """sizes with more numbers in x are left out"""
    dtypes: tuple[Literal["float32", "complex64"], ...] = ("float32", "complex64")
    """of the numbers"""
    repeats: Count = 15
    """of each timing"""
    min_ms: NonNegative = 2.0
    """a timing repeats its program for about as long"""


class Size(NamedTuple):
    dtype: str
    num_steps: int
    width: int
    batch: int


class Timing(NamedTuple):
    """Seconds of each repeat, bytes of temporary memory, and seconds of compiling."""

    seconds: Float[np.ndarray, " repeats"]
    memory: int
    compile: float = 0.0


def scan(decay: Array, u: Array) -> Array:
    def step(x, inputs):
        x = inputs[0] * x + inputs[1]
        return x, x

    return lax.scan(step, jnp.zeros_like(u[0]), (decay, u))[1]


def associative_scan(decay: Array, u: Array) -> Array:
    combine = lambda x, y: (y[0] * x[0], y[0] * x[1] + y[1])
    return lax.associative_scan(combine, (decay, u))[1]


FORMS: dict[str, Callable[[Array, Array], Array]] = {
    "scan": scan,
    "associative_scan": associative_scan,
    "associative": partial(linear_scan, method="associative"),
    "chunked": partial(linear_scan, method="chunked"),
    "auto": linear_scan,
}
PLAIN = ("scan", "associative_scan")
PASSES = ("forward", "backward")


def sizes(config: Config) -> list[Size]:
    found = itertools.starmap(
        Size, itertools.product(config.dtypes, config.lengths, config.widths, config.batches)
    )
    return [s for s in found if s.num_steps * s.width * s.batch <= config.max_numbers]


def measure(config: Config, size: Size) -> dict[tuple[str, str], Timing]:
    """Time every form, by (pass, form); "backward" is x and the gradients of Re Σ w x² / 2.

    (A cotangent that did not depend on x would let some backward passes run beside the forward.)
    """
    keys = jr.split(jr.key(0), 3)
    shape = size.batch, size.num_steps, size.width
    u, weight = (jr.normal(key, shape, size.dtype) for key in keys[:2])
    decay = jr.uniform(keys[2], shape, minval=0.5).astype(size.dtype)

    def backward(form, decay, u, weight):
        x, pull = jax.vjp(jax.vmap(form), decay, u)
        return x, pull(weight * x)

    calls, timings = {}, {}
    for name, form in FORMS.items():
        forward = lambda decay, u, _, form=form: jax.vmap(form)(decay, u)
        for which, function in zip(PASSES, (forward, partial(backward, form)), strict=True):
            began = time.perf_counter()
            compiled = jax.jit(function).lower(decay, u, weight).compile()
            compiling = time.perf_counter() - began
            call = partial(compiled, decay, u, weight)
            analysis = compiled.memory_analysis()
            memory = analysis.temp_size_in_bytes if analysis else 0
            calls[which, name] = call, memory, compiling
    for which in PASSES:
        ours = {name: call for (w, name), (call, *_) in calls.items() if w == which}
        truth = jax.tree.leaves(ours["scan"]())
        for name, call in ours.items():
            for x, y in zip(jax.tree.leaves(call()), truth, strict=True):
                if not jnp.allclose(x, y, rtol=1e-3, atol=1e-3 * jnp.abs(y).max()):
                    raise ValueError(f"{name} disagrees with scan at {size}")
        times = interleave(list(ours.values()), config.repeats, config.min_ms / 1e3)
        for name, seconds in zip(ours, times, strict=True):
            timings[which, name] = Timing(seconds, *calls[which, name][1:])
    return timings


def interleave(
    calls: list[Callable[[], Any]], repeats: int, min_seconds: float
) -> Float[np.ndarray, "calls repeats"]:
    """Seconds of one call, each measured once in every repeat, after one call to warm the cache."""
    rng = np.random.default_rng(0)
    counts = [max(1, round(min_seconds / clock(call, 1))) for call in calls]
    seconds = np.empty((len(calls), repeats))
    for repeat in range(repeats):
        for i in rng.permutation(len(calls)):
            jax.block_until_ready(calls[i]())
            seconds[i, repeat] = clock(calls[i], counts[i])
    return seconds


def clock(call: Callable[[], Any], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / count


def bandwidth(num_numbers: int = 1 << 26) -> float:
    """Bytes a second, read and written, of copying an array."""
    x = jnp.ones(num_numbers, jnp.float32)
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    copy(x).block_until_ready()
    return 2 * x.nbytes / float(np.median(interleave([partial(copy, x)], 9, 0.01)))


def tabulate(config: Config) -> list[dict[str, Any]]:
    copy = bandwidth() if jax.default_backend() != "cpu" else np.nan
    return [row for s in tqdm(sizes(config), desc="sizes") for row in measured(config, s, copy)]


def measured(config: Config, size: Size, copy: float) -> list[dict[str, Any]]:
    """A row for each pass and form of one size; `copy` is the `bandwidth`."""
    rows = []
    timings = measure(config, size)
    nbytes = size.num_steps * size.width * size.batch * np.dtype(size.dtype).itemsize
    for (which, name), timing in timings.items():
        plain = [timings[which, form].seconds for form in PLAIN]
        best = min(plain, key=np.median)
        least = 3 if which == "forward" else 7  # arrays that must be read or written
        row = size._asdict() | {"pass": which, "form": name}
        row |= {"microseconds": 1e6 * np.median(timing.seconds)}
        row |= {"ratio": np.median(timing.seconds / best), "memory": timing.memory / nbytes}
        row |= {"of_copy": least * nbytes / np.median(timing.seconds) / copy}
        row |= {"compile_s": timing.compile}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Microseconds of every form, and the ratio of `auto` to the best of JAX's two."""
    lines = []
    for group in groups(rows):
        row = group["auto"]
        size = f"{row['num_steps']} x {row['width']} x {row['batch']}"
        line = {"T x width x batch": f"{row['dtype']} {size}, {row['pass']}"}
        line |= {name: f"{r['microseconds']:,.1f}" for name, r in group.items()}
        line |= {"auto_to_best": row["ratio"]}
        line |= {f"memory_of_{name}": group[name]["memory"] for name in ("scan", "auto")}
        if np.isfinite(row["of_copy"]):
            line |= {"% of copy": 100 * row["of_copy"]}
        lines.append(line)
    machine = f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    return f"{tables.table(lines)}\ntemporary memory in arrays of the size of x; {machine}\n"


def summary(rows: list[dict[str, Any]]) -> str:
    """The geometric means, over sizes, of the ratios to the best of JAX's two."""
    lines = []
    for dtype, which in itertools.product(dict.fromkeys(r["dtype"] for r in rows), PASSES):
        some = [r for r in rows if (r["dtype"], r["pass"]) == (dtype, which)]
        of = lambda name, key, some=some: np.array([r[key] for r in some if r["form"] == name])
        line = {"numbers, pass": f"{dtype}, {which}"}
        line |= {name: float(np.exp(np.mean(np.log(of(name, "ratio"))))) for name in FORMS}
        line |= {"worst_auto": of("auto", "ratio").max()}
        line |= {f"memory_of_{name}": np.median(of(name, "memory")) for name in ("scan", "auto")}
        lines.append(line)
    return tables.table(lines)


def groups(rows: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """The rows of each size and pass, by form."""
    found: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        place = *(row[name] for name in Size._fields), row["pass"]
        found.setdefault(place, {})[row["form"]] = row
    return list(found.values())


def picture(path: Path, rows: list[dict[str, Any]]) -> None:
    """Time per number of x against the ratio to the best of JAX's two, a dot for each size."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(7.5, 2.6 * len(dtypes) + 0.6), layout="constrained")
    axes = figure.subplots(len(dtypes), len(PASSES), squeeze=False, sharex=True, sharey=True)
    for (i, dtype), (j, which) in itertools.product(enumerate(dtypes), enumerate(PASSES)):
        for k, name in enumerate(FORMS):
            some = [r for r in rows if (r["dtype"], r["pass"], r["form"]) == (dtype, which, name)]
            numbers = [r["num_steps"] * r["width"] * r["batch"] for r in some]
            ratios = [r["ratio"] for r in some]
            label = name if i == j == 0 else None
            axes[i, j].scatter(numbers, ratios, s=14, color=f"C{k}", label=label)
        axes[i, j].axhline(1.1, color="gray", linewidth=1, linestyle="--")
        axes[i, j].set(xscale="log", yscale="log", title=f"{dtype}, {which}")
        axes[i, j].grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("numbers in x: T x width x batch")
    figure.supylabel("time to that of the best of JAX's scans")
    figure.legend(loc="outside lower center", ncols=len(FORMS), fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def main(config: Config) -> list[dict[str, Any]]:
    check(config)
    if not sizes(config):
        raise ValueError(f"every size has more than max_numbers {config.max_numbers} numbers")
    out = records.open_run(config, "scans-benchmark", resumable=False)
    rows = tabulate(config)
    with (out / "scans.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture(out / "scans.png", rows)
    print(table(rows))
    print(summary(rows))
    print(f"table and picture: {out}")
    return rows


if __name__ == "__main__":
    cli.once(Config, main)
