"""Which lines of a pod's output are new: connections end, and each begins with what another has brought already."""

from __future__ import annotations

import re
from collections.abc import Callable

_TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|[-+]\d\d:\d\d)")


class Lines:
    """What several pods have printed, each line of it passed on once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.whole: set[str] = set()  # pods that have nothing more to say
        self._pods: dict[str, _Output] = {}

    def of(self, pod: str) -> _Output:
        return self._pods.setdefault(pod, _Output(self.write))

    def once(self, text: str) -> None:
        if text not in self.whole:
            self.whole.add(text)
            self.write(text)


class _Output:
    """A pod's output over several connections, each of which begins at the oldest line that its machine still has.

    Lines come with the nanosecond in which they were written, always with nine digits, so that what is known is passed
    over by its time: counting lines would go wrong where the machine has thrown old ones away. Those of one nanosecond
    are counted.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._last, self._count = "", 0  # the newest time of all that was written, and how many lines have it
        self._again = 0  # lines of that time that this connection has brought
        self._rest = b""

    def take(self, chunk: bytes) -> None:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._line(line.decode("utf-8", "replace"))

    def over(self, whole: bool) -> None:
        """The connection has ended. A line without its end comes again whole, unless the pod has ended too."""
        if whole and self._rest:
            self._line(self._rest.decode("utf-8", "replace"))
        self._rest, self._again = b"", 0

    def _line(self, line: str) -> None:
        at, _, text = line.partition(" ")
        if at < self._last or not _TIME.fullmatch(at):  # without a time it is the machine's word, not the pod's
            return
        if at == self._last:
            self._again += 1
            if self._again <= self._count:
                return
        else:
            self._last, self._count, self._again = at, 0, 1
        self._count += 1
        self._write(text + "\n")
