"""How a run is asked to stop: Ctrl-C, SIGTERM, or a request in its folder. Each is heard between two steps.

The first asks for a checkpoint; a second Ctrl-C ends at once. A request is a file, because whoever asks may be on
another machine, and Ray gives a job that is stopped only three seconds.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rayft import storage
from rayft.errors import StorageError

LOOK_S = 2.0


class Stop:
    """Whether and why the run in `folder` should stop."""

    def __init__(self, folder: str) -> None:
        self.file = storage.join(folder, "stop.json")
        self.by: str | None = None
        self._over = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, a request and the signals SIGINT and SIGTERM ask this run to stop.

        Signals are heard in the main thread alone; elsewhere they stay what they were.
        """
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        with self.looking():
            before = {number: signal.signal(number, self._heard) for number in signals}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """While open, a request asks this run to stop."""
        storage.delete(self.file)  # a request is for the run that it found
        threading.Thread(target=self._look, daemon=True).start()
        try:
            yield
        finally:
            self._over.set()

    def _heard(self, number: int, _: Any) -> None:
        if self.by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.by = self.by or {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[signal.Signals(number)]

    def _look(self) -> None:
        """Apart from the driver's thread, which must not wait for a storage that does not answer."""
        while self.by is None and not self._over.wait(LOOK_S):
            try:
                if storage.exists(self.file):
                    asked = storage.read_json(self.file).get("by", "somebody")
                    self.by = self.by or f"a request from {asked}"
            except StorageError:  # an outage is not a request, and is told where something has to be written
                continue

    def asked(self) -> str | None:
        """Who asked for a stop, or None."""
        return self.by


def request(folder: str, by: str) -> None:
    """Asks the run in `folder` to write a checkpoint and stop."""
    storage.write_json(storage.join(folder, "stop.json"), {"by": by, "at": time.time()})
