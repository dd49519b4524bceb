"""Where a step's time goes: seconds of its parts, each from where it begins to where the next one does."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

PARTS = ("wait", "batch", "forward", "backward", "collective", "optimizer", "logging")


class Laps:
    """A clock that is told which of PARTS begins.

    `collective` says how many seconds exchanges with other workers have taken so far, inside whatever part; those are
    taken out of the part and counted as `collective`. Exchanges that it does not know of stay in their part. With a GPU
    these are the host's seconds: what one part launches, a later one may wait for.
    """

    def __init__(self, collective: Callable[[], float] = lambda: 0.0) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._collective = collective
        self._part: str | None = None
        self._begun = self._exchanged = 0.0

    def to(self, part: str | None) -> None:
        """The part that ran so far is over; None: nothing that belongs to a step begins."""
        now, exchanged = time.perf_counter(), self._collective()
        if self._part is not None:
            inside = exchanged - self._exchanged if self._part != "collective" else 0.0
            self.seconds[self._part] += now - self._begun - inside
            self.seconds["collective"] += inside
        self._part, self._begun, self._exchanged = part, now, exchanged

    def shares(self) -> dict[str, float]:
        """`step_<part>` for each part: its share of all their seconds."""
        whole = sum(self.seconds.values())
        return {f"step_{part}": round(self.seconds[part] / whole, 4) if whole else 0.0 for part in PARTS}
