"""What a training tells its terminal, or a file in its place: progress, and an interruption."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

INTERVAL = 30.0  # seconds between two lines in a file, unless a tenth is done sooner


class Progress:
    """On a terminal one bar, in a file a line every so often."""

    def __init__(self, name: str, *, total: int, unit: str, shown: bool = True):
        self._name, self._total, self._unit, self._shown = name, total, unit, shown
        self._bar = tqdm(
            total=total, unit=unit, unit_scale=True, desc=f"{name}: compiling", smoothing=0.1,
            disable=not (shown and sys.stderr.isatty()),
        )  # fmt: skip
        self._done = self._began_at = 0
        self._began = self._told = time.monotonic()

    def start(self, done: int) -> None:
        """Count from here: what an earlier process has done is not this one's speed."""
        self._done = self._began_at = done
        self._began = self._told = time.monotonic()
        self._bar.set_description(self._name)
        self._bar.reset()
        self._bar.update(done)

    def advance(self, count: int, note: str = "") -> None:
        """`count` more are done."""
        self._bar.update(count)
        self._bar.set_postfix_str(note)
        tenth = lambda done: 10 * done // self._total
        before, self._done, now = self._done, self._done + count, time.monotonic()
        if not self._bar.disable or (
            tenth(before) == tenth(self._done) and now - self._told < INTERVAL
        ):
            return
        self._told = now
        speed = (self._done - self._began_at) / max(now - self._began, 1e-9)
        self.say(
            f"{self._name}: {100 * self._done // self._total} % of {self._total:,} {self._unit}s, "
            f"{speed:,.0f} {self._unit}s/s{note and ', ' + note}"
        )

    def say(self, line: str) -> None:
        """A line of its own."""
        if self._shown:
            self._bar.clear()
            print(line, file=sys.stderr, flush=True)
            self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class Interruption:
    """What Ctrl-C will say; a script that knows more by and by changes `line`."""

    line = "interrupted"


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Ctrl-C ends the process at once, with one line and status 130, whatever it is doing.

    A KeyboardInterrupt waits until a compilation ends, and may be raised where no one expects an
    exception, as in a callback of XLA, which aborts. So a thread waits for the signal here. It
    needs no cleaning up: a run's files are whole at any time.
    """
    said = Interruption()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        if os.read(reader, 1):
            start = "\n" if sys.stderr.isatty() else ""
            os.write(2, f"{start}{said.line}\n".encode())
            os._exit(130)

    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    old = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield said
    finally:
        signal.set_wakeup_fd(old)
        signal.signal(signal.SIGINT, before)
        os.close(writer)
        thread.join()
        os.close(reader)
