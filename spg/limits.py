"""What an option may be: its range, the others that it needs, and the memory that sizes take.

    @dataclass(frozen=True)
    class Config:
        memory: Literal["gru", "window"] = "gru"
        window: Annotated[Count, Needs(memory="window")] = 5
        gamma: Annotated[float, Range(0, 1)] = 0.99

`check(config)` refuses what is out of its range, `without_effect(config)` lists what was set in
vain. A range stands beside its field and nowhere else.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import jax
import numpy as np
from jax import core


class Range(NamedTuple):
    """The finite numbers from `low` to `high`; without the ends that are `open`."""

    low: float = -inf
    high: float = inf
    open: Literal["", "low", "high", "both"] = ""
    whole: bool = False
    usual: str = ""  # what would do, for the message

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError, naming `name` and `value`. Traced numbers pass unchecked."""
        if isinstance(value, core.Tracer):
            return
        if isinstance(value, int) and not isinstance(value, bool):
            value = min(max(value, -(10**30)), 10**30)  # beyond: no room in an array
        x = np.asarray(value, float if isinstance(value, int) else None)
        if isinstance(value, bool) or x.dtype.kind not in "iuf" or not x.size:
            raise ValueError(f"{name} is {value!r}; it has to be a number")
        x = x.astype(float)
        above = x > self.low if self.open in ("low", "both") else x >= self.low
        below = x < self.high if self.open in ("high", "both") else x <= self.high
        whole = x == np.floor(x) if self.whole else True
        if not np.all(above & below & whole & np.isfinite(x)):
            kind = "" if np.all(whole) else "a whole number, "
            usual = f"; {self.usual}" if self.usual else ""
            raise ValueError(f"{name} is {value}; it has to be {kind}{self._words(x)}{usual}")

    def _words(self, x: np.ndarray) -> str:
        low = f"above {self.low:g}" if self.open in ("low", "both") else f"at least {self.low:g}"
        high = "below" if self.open in ("high", "both") else "at most"
        high = f"{high} {_number(self.high)}"
        if self.low == -inf:
            return "finite" if self.high == inf else high
        if self.high == inf:
            return low if np.all(np.isfinite(x)) else f"finite, {low}"
        if self.high > 1e5:  # there to protect the machine
            return high if np.any(x > self.high) else low
        closed = {"": f"from {self.low:g} to {self.high:g}"}
        closed["both"] = f"inside ({self.low:g}, {self.high:g})"
        return closed.get(self.open, f"{low} and {high}")


Count = Annotated[int, Range(1, 2**31 - 1, whole=True)]
Total = Annotated[int, Range(1, 10**15, whole=True)]  # of steps
Size = Annotated[int, Range(1, 10**6, whole=True)]  # of a layer
Positive = Annotated[float, Range(0, open="low")]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Seed = Annotated[int, Range(0, 2**31 - 1, whole=True)]
"""A seed of `jax.random.key`, which keeps 32 bits where x64 is off."""


class Needs:
    """An option has an effect only where all of these others are so; nowhere if none is named.

    A word, or several, may be patterns: `Needs(env="brax/*")`. An option with several `Needs` takes
    any of them.
    """

    def __init__(self, **others: str | tuple[str, ...]):
        self.others = {k: (v,) if isinstance(v, str) else v for k, v in others.items()}

    def missing(self, config: Any) -> str | None:
        """Why the option has no effect in `config`; None if it has."""
        for name, words in self.others.items():
            actual = str(getattr(config, name))
            if not any(fnmatchcase(actual, word) for word in words):
                return f"{name} is {actual}, not {' or '.join(words)}"
        return None if self.others else "nothing here reads it"


def check(config: Any) -> None:
    """Raise ValueError for the first field of a dataclass that is out of its range.

    Ranges are read from the annotations, those of a tuple's entries and of a dictionary's values
    too; a `Literal` is a range of words.
    """
    for name, value, hint in _fields(config):
        _check(name, value, hint)


def same_shape(**arrays: Any) -> None:
    """Raise ValueError for arrays of different shapes, which would broadcast."""
    if len({x.shape for x in arrays.values()}) > 1:
        listed = ", ".join(f"{name} {x.shape}" for name, x in arrays.items())
        raise ValueError(f"shapes have to be the same: {listed}")


def without_effect(config: Any) -> list[str]:
    """A line for each field that was changed from its default and needs what `config` lacks."""
    lines = []
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name, value, hint in _fields(config):
        reasons = [n.missing(config) for n in _notes(hint) if isinstance(n, Needs)]
        if reasons and all(reasons) and value != defaults[name]:
            why = "; ".join(str(reason) for reason in reasons)
            lines.append(f"{name} {value} has no effect: {why}")
    return lines


class Constant:
    """A note on an option of type float: programs are compiled for its value, see `floats`."""


def floats(config: Any) -> dict[str, float]:
    """The options of type float without the note `Constant`, which a program takes as arguments."""
    return {
        name: float(value)
        for name, value, hint in _fields(config)
        if kind(hint) is float and Constant not in _notes(hint)
    }


def fits(size: int | float, what: str, *, on_device: bool = False) -> None:
    """Raise ValueError if `size` bytes, a lower bound of what `what` takes, are not available.

    `on_device` looks at the accelerator, where JAX has one.
    """
    if size > (available := _available(on_device)):
        gigabytes = [f"{float(f'{x / 2**30:.3g}'):,g}" for x in (size, available)]
        raise ValueError(
            f"{what} would take {gigabytes[0]} GiB of memory at least; {gigabytes[1]} are available"
        )


def _available(on_device: bool) -> float:
    """Bytes; infinite where the system does not tell."""
    if on_device:
        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"]
    limits = [inf]
    if (path := Path("/proc/meminfo")).exists():
        lines = dict(line.split(":") for line in path.read_text().splitlines())
        limits.append(1024 * float(lines["MemAvailable"].split()[0]))
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if (path := Path("/sys/fs/cgroup/memory.max")).exists() and path.read_text().strip().isdigit():
        limits.append(float(path.read_text()))
    return min(limits)


def kind(hint: Any) -> Any:
    """A type without its notes."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _fields(config: Any) -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        yield field.name, getattr(config, field.name), hints[field.name]


def _notes(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def _check(name: str, value: Any, hint: Any) -> None:
    bare = kind(hint)
    parts = get_args(bare)
    if type(None) in parts and value is None:
        return
    for note in _notes(hint):
        if isinstance(note, Range):
            note.check(name, value)
    if get_origin(bare) in (Union, UnionType):
        for part in parts:
            _check(name, value, part)
    if get_origin(bare) is Literal and value not in parts:
        near = difflib.get_close_matches(str(value), map(str, parts), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(map(str, parts))}"
        raise ValueError(f"unknown {name} {value!r}; {hint}")
    if get_origin(bare) is tuple:
        for entry in value:
            _check(name, entry, parts[0])
    if get_origin(bare) is dict:
        for key, entry in value.items():
            _check(key, entry, parts[1])


def _number(x: int | float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:g}"
