"""The driver's board: an actor to which workers send events and where they stand, and which passes on an order.

`standstill` reads from it who holds the others up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where a rank stands. `silent_s` since it was heard of; `still_s` how long it had then not come to anything else.

    Both in seconds. What a silent rank has come to since is not known, so its silence does not make it still.
    `count` grows with all that it comes to; `doing` is where it is in optimizer step `step` (1-based; None: before).
    """

    rank: int
    node: str
    node_id: str
    pid: int
    step: int | None
    doing: str
    count: int
    silent_s: float
    still_s: float

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node} (process {self.pid})"

    @property
    def last(self) -> str:
        return f"at step {self.step}" if self.step is not None else "before its first step"


class Board:
    """An actor without a CPU of its own, on the driver's machine."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.places: dict[int, dict[str, Any]] = {}
        self.order: str | None = None

    def push(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def pulse(self, rank: int, place: dict[str, Any]) -> str | None:
        """A worker's place, with how often it was seen to work (`worked`) while it came to nothing else; the answer is
        the driver's order."""
        now, before = time.monotonic(), self.places.get(rank)
        moved = before is None or any(before[name] != place[name] for name in ("count", "worked"))
        self.places[rank] = {**place, "heard": now, "moved": now if before is None or moved else before["moved"]}
        return self.order

    def tell(self, order: str) -> None:
        self.order = order

    def drain(self) -> tuple[list[dict[str, Any]], list[Place]]:
        """The events since the last call, and every rank's place."""
        events, self.events = self.events, []
        now, places = time.monotonic(), []
        for rank, entry in sorted(self.places.items()):
            place = dict(entry)
            heard, moved, _ = (place.pop(name) for name in ("heard", "moved", "worked"))
            places.append(Place(rank=rank, silent_s=now - heard, still_s=heard - moved, **place))
        return events, places


def standstill(places: list[Place], timeout_s: float) -> str | None:
    """One sentence on who has stood still for `timeout_s`, or None while somebody moves or all is well.

    A rank that is silent is at fault before one that is heard; among those that are heard, the one that has come least
    far, since the others wait for it.
    """
    if not places:
        return None
    silent = [place for place in places if place.silent_s > timeout_s]
    if silent:
        worst = max(silent, key=lambda place: place.silent_s)
        return f"{worst} has not been heard of for {worst.silent_s:.0f} s; it was last seen {worst.last}, {worst.doing}"
    if min(place.still_s for place in places) <= timeout_s:
        return None
    behind = min(places, key=lambda place: (place.step or 0, place.count))
    waited = f"for {behind.still_s:.0f} s (failure.timeout_s is {timeout_s:g})"
    if all((place.step, place.doing) == (behind.step, behind.doing) for place in places):
        if len(places) == 1:
            return f"{behind} stands still {behind.last}, {behind.doing}, {waited}"
        where = behind.last.replace("its", "their")
        return f"all ranks stand still {where}, {behind.doing}, {waited}; first of them is {behind}"
    return f"{behind} stands still {behind.last}, {behind.doing}, {waited}; the others wait for it"
