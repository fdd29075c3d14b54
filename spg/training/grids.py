"""Grids of options: the points, the programs that train them, and what they come to.

Each point is a run directory of its own, `points/learning_rate=0.001,gamma=0.99`, as its script
would leave it. Points that differ in floats alone are trained in one program, their seeds side by
side, and programs follow one another.
"""

import csv
import dataclasses
import difflib
import io
import itertools
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
from tyro.conf import UseAppendAction

from spg import limits
from spg.training import loop, records
from spg.training.options import RunConfig, flag, integer, words

SHARED = [f.name for f in dataclasses.fields(RunConfig)]


@dataclass(frozen=True)
class Grid:
    """The grid, e.g. --grid learning-rate 1e-4 1e-3 --grid memory s2pg bptt"""

    grid: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """an option and two values or more; with several --grid every combination is trained. Floats
    are vmapped in one program, other options are trained one after another"""


class Axis(NamedTuple):
    """An option, and the values that it takes."""

    name: str
    values: tuple[Any, ...]


class Point(NamedTuple):
    """A configuration of the grid."""

    config: Any
    values: dict[str, Any]
    out: Path

    @property
    def done(self) -> bool:
        return (self.out / "summary.json").exists() or self.diverged

    @property
    def diverged(self) -> bool:
        """Whether no seed was left."""
        return (self.out / "diverged").exists()


def axes(grid: Sequence[Sequence[str]], config_type: type) -> list[Axis]:
    """The axes that a command line tells. Raises ValueError for what cannot be one."""
    hints = get_type_hints(config_type, include_extras=True)
    kinds = {f.name: limits.kind(hints[f.name]) for f in dataclasses.fields(config_type)}
    found = []
    for word, *values in grid:
        name = word.lstrip("-").replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--grid: unknown option {name!r}{hint}")
        if name in SHARED:
            raise ValueError(f"--grid {word}: {name} is an option that all points share")
        read = [_value(name, kinds[name], value) for value in values]
        if len(set(read)) < 2 or len(set(read)) < len(read):
            some = f"has {len(read)} value" if len(read) < 2 else "has one value twice"
            raise ValueError(f"--grid {word} {some}; it takes two or more that differ")
        found.append(Axis(name, tuple(read)))
    if not found:
        raise ValueError("a sweep needs --grid, with an option and two values or more")
    if len({axis.name for axis in found}) < len(found):
        raise ValueError(
            "--grid: an option is there twice; all its values belong behind one --grid"
        )
    return found


def points(config: Any, found: list[Axis], out: Path) -> list[Point]:
    """Every combination of the values. Raises ValueError for a value out of its range."""
    every = []
    for values in itertools.product(*(axis.values for axis in found)):
        changes = dict(zip((axis.name for axis in found), values, strict=True))
        name = ",".join(f"{k}={_word(v)}" for k, v in changes.items()).replace("/", "-")
        point = replace(config, **changes)
        limits.check(point)
        every.append(Point(point, changes, out / "points" / name))
    return every


def programs(every: list[Point], algorithm: loop.Algorithm) -> list[list[Point]]:
    """The points by the program that trains them: those of one differ in floats alone.

    `algorithm` is that of any point.
    """
    traced = limits.floats(every[0].config).keys() & algorithm.floats.keys()
    groups: dict[tuple, list[Point]] = {}
    for point in every:
        key = tuple((k, v) for k, v in point.values.items() if k not in traced)
        groups.setdefault(key, []).append(point)
    return list(groups.values())


def make(
    group: list[Point], make_one: Callable[[Any], loop.Algorithm]
) -> tuple[loop.Algorithm, list[loop.Floats]]:
    """The algorithm of a program, checked for the memory that all take, and each point's floats."""
    config = group[0].config
    algorithm = make_one(replace(config, num_seeds=len(group) * config.num_seeds))
    traced = limits.floats(config).keys() & algorithm.floats.keys()  # total_steps is told already
    own = [algorithm.floats | {k: x for k, x in p.values.items() if k in traced} for p in group]
    return algorithm, own


def train(group: list[Point], algorithm: loop.Algorithm, floats: list[loop.Floats]) -> None:
    """Train the points of a program; those that an earlier process has begun go on."""
    begun = any((point.out / "config.json").exists() for point in group)
    for point in group:
        there = (point.out / "config.json").exists()
        records.open_run(replace(point.config, out=str(point.out), resume=there), algorithm.name)
    config = replace(group[0].config, resume=begun)
    try:
        found = loop.run_all(
            config, algorithm, {p.out: x for p, x in zip(group, floats, strict=True)}
        )
    except loop.Diverged as error:
        print(f"warning: {error}", file=sys.stderr)
        found = [None] * len(group)
    for point, summary in zip(group, found, strict=True):
        if summary is None:
            (point.out / "diverged").touch()


def results(every: list[Point]) -> list[dict[str, Any]]:
    """A row for each trained point, the best first: values, final return and what it is certain by.

    `mean` is over seeds, of the last tenth of training; `low` and `high` are a 95 % bootstrap
    interval of it. Where a seed diverged, a point ranks behind those where none did.
    """
    from spg.training import plots, summaries  # here and below: matplotlib takes a second to load

    rows = []
    for point in every:
        if not point.done:
            continue
        row = point.values | dict.fromkeys(("mean", "low", "high", "noise_free"), np.nan)
        row |= {"diverged": point.config.num_seeds}
        if not point.diverged:
            summary = summaries.read_summary(point.out)
            final = np.array(summary[f"final_{summary['measure']}"])
            low, high = plots.interval(final, statistic=np.mean)
            row |= {"mean": float(final.mean()), "low": float(low), "high": float(high)}
            row |= {"noise_free": summary[f"final_{summary['measure']}_noise_free_mean"]}
            row |= {"diverged": len(summary["diverged"])}
        rows.append(row | {"run": point.out.name})
    rows.sort(key=lambda row: (row["diverged"] > 0, -np.nan_to_num(row["mean"], nan=-np.inf)))
    return [{"rank": i} | row for i, row in enumerate(rows, 1)]


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """`results.csv`, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    records.write(out / "results.csv", text.getvalue())


def draw(path: Path, found: list[Axis], rows: list[dict[str, Any]], *, measure: str, title: str):
    """A heat map of two axes, dots of one; of more, every point with its interval.

    Points of which a seed diverged are left out.
    """
    from spg.training import plots

    rows = [row for row in rows if not row["diverged"]]
    if len(found) == 2:
        place = {tuple(row[axis.name] for axis in found): row["mean"] for row in rows}
        means = [[place.get((x, y), np.nan) for y in found[1].values] for x in found[0].values]
        labels = [(axis.name, [_word(x) for x in axis.values]) for axis in found]
        return plots.heat_map(path, np.array(means), *labels, measure=measure, title=title)
    shown = [
        plots.Final(
            ", ".join(f"{axis.name} {_word(row[axis.name])}" for axis in found),
            *(row[k] for k in ("mean", "low", "high", "noise_free")),
        )
        for row in rows
    ]
    if len(found) == 1:  # in the order of the axis, from below
        order = {value: i for i, value in enumerate(found[0].values)}
        shown = [shown[i] for i in np.argsort([order[row[found[0].name]] for row in rows])]
    plots.final_returns(path, shown, measure=measure, title=title, by_rank=len(found) > 1)


def command(script: str, point: Point) -> str:
    """The command line that trains a point alone."""
    plain = replace(point.config, out=None, resume=False)
    return shlex.join(["python", script, *words(plain, said=point.values)])


def _word(value: Any) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _value(name: str, kind: Any, word: str) -> Any:
    """What a word on the command line says."""
    if get_origin(kind) is Literal:
        return {str(x): x for x in get_args(kind)}.get(word, word)  # `limits.check` refuses others
    if kind is bool:
        if word.lower() not in ("true", "false"):
            raise ValueError(f"--grid {flag(name)[2:]}: {word!r} is neither true nor false")
        return word.lower() == "true"
    if kind in (int, float):
        try:
            return float(word) if kind is float else integer(word)
        except ValueError:
            raise ValueError(f"--grid {flag(name)[2:]}: {word!r} is not a number") from None
    if kind is str:
        return word
    raise ValueError(f"--grid: {name} takes several values at once, and cannot be a grid")
