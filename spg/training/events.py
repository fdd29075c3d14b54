"""TensorBoard's events, written at once by this thread: a queue to another one may hang."""

import os
from collections.abc import Callable
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.summary import scalar


class Events:
    """The events of a run. Where they cannot be written, say so once and go on without them."""

    def __init__(self, out: Path, *, first: int, say: Callable[[str], None]):
        """What an earlier process wrote from the update `first` on is overruled."""
        self._say = say
        self._writer: EventsWriter | None = None

        def start() -> None:
            self._writer = EventsWriter(str(out / "events"), f".{os.getpid()}.{first}")
            self._writer.write_event(
                Event(step=first, session_log=SessionLog(status=SessionLog.START))
            )

        self._attempt(start)

    def add(self, update: int, values: dict[str, float]) -> None:
        """Scalars at an update."""

        def write() -> None:
            assert self._writer is not None
            for name, value in values.items():
                self._writer.write_event(Event(step=update, summary=scalar(name, value)))
            self._writer.flush()

        if self._writer is not None:
            self._attempt(write)

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._writer = None
            self._say(f"warning: no more TensorBoard events: {error.strerror}")

    def close(self) -> None:
        if self._writer is not None:
            self._attempt(self._writer.close)  # type: ignore[arg-type]
