"""The directory of a run: opened once, locked while a process trains there; its `config.json`."""

import dataclasses
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

PROCESSES = "distributed", "coordinator_address", "num_processes", "process_id"
UNSAVED = ("out", "resume", *PROCESSES)  # fields of a configuration that may differ on resumption
C = TypeVar("C")


class RunError(Exception):
    """A run cannot start or go on, for a reason that the user can mend."""


def open_run(config: Any, name: str, *, resumable: bool = True) -> Path:
    """The directory of a run, with its `config.json`: a new one, or on resumption the old one.

    A configuration without the field `resume` is not `resumable`.

    Raises RunError if the directory holds a run already (without `resume`), or if it holds none
    or one of another configuration (with it).
    """
    resume = resumable and config.resume
    if resume and config.out is None:
        raise RunError("--resume needs --out, the directory of the run to go on with")
    out = Path(config.out or time.strftime(f"runs/{name}-%Y%m%d-%H%M%S"))
    path = out / "config.json"
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in UNSAVED}
    now = json.loads(json.dumps({"name": name} | fields))
    if resume:
        then = _read(path)
        differ = [k for k in {**then, **now} if then.get(k) != now.get(k)]
        if differ:
            listed = ", ".join(f"{k} (was {then.get(k)}, now {now.get(k)})" for k in differ)
            raise RunError(f"--resume: {out} was run with another configuration: {listed}")
        return out
    goes_on = "--resume goes on with it, " if resumable else ""
    taken = RunError(f"{out} holds a run; {goes_on}another --out starts afresh")
    if path.exists():
        raise taken
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not an empty directory; name another one with --out")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x") as file:  # of two processes at once, one finds it there
            file.write(json.dumps(now, indent=2) + "\n")
    except FileExistsError:
        raise taken from None
    except OSError as error:
        path.unlink()
        raise RunError(f"{path} cannot be written: {error.strerror}") from error
    return out


def read_config(out: Path, config_type: type[C]) -> C:
    """The configuration of the run in a directory, without `UNSAVED`.

    Raises RunError if the directory holds no run, or one with other options.
    """
    path = out / "config.json"
    saved = _read(path)
    name = saved.pop("name", "another script")
    known = {f.name for f in dataclasses.fields(config_type)} - set(UNSAVED)  # type: ignore
    if other := sorted(known ^ saved.keys()):
        raise RunError(
            f"{path} was written by {name}, or by another version of the code: it differs in the "
            f"options {', '.join(other)}"
        )
    return config_type(**{k: _tuples(v) for k, v in saved.items()})


def _tuples(value: Any) -> Any:
    """Lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read(path: Path) -> dict[str, Any]:
    """A `config.json`."""
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(
            f"--resume: {path.parent} holds no run; without --resume one would start there"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(saved, dict):
        raise RunError(f"{path} cannot be read: it holds no options")
    return saved


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other processes from training in a directory; the end of this one, however, lets go.

    Raises RunError if another process trains there.
    """
    with (out / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is training in {out}") from None
        except OSError as error:  # some network file systems have no locks
            print(f"warning: {out} cannot be locked: {error.strerror}", file=sys.stderr)
        yield


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file, and what to do, where a disk is full."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}; what was there is kept, and --resume "
            "goes on from the last checkpoint"
        ) from error


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write an `.npz` whole or not at all; its arrays are not compressed, so they can be mapped."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)
