"""What lies in a storage that nothing needs any more: dead runs, remains of attempts, prepared rows without a run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rayft import report, storage
from rayft.layout import PREPARED
from rayft.report import Json
from rayft.retry import shown

DAY_S = 86_400.0  # what is younger may belong to something that has only just begun
SCRATCH = "ray"  # the folder of a run that an attempt removes at its end
_KEY = re.compile(r"[0-9a-f]{12,64}")  # the names of folders in prepared/; anything else there is not rayft's


@dataclass(frozen=True)
class Leftover:
    """Something that can go: its path, why, and its size in bytes."""

    path: str
    why: str
    bytes: int


def leftovers(where: str, warn: Callable[[str], None] = lambda sentence: None) -> list[Leftover]:
    """What nothing under the storage `where` needs any more; see `survey`."""
    return survey(where, warn)[0]


def survey(where: str, warn: Callable[[str], None] = lambda sentence: None) -> tuple[list[Leftover], list[Leftover]]:
    """What nothing needs any more, and what would be that but is younger than a day; running runs lose nothing.

    Runs that failed, stopped or were lost over a day ago without a checkpoint or a model, but no trials of a sweep;
    checkpoints that were never committed, and other remains of attempts; prepared shards that no remaining run refers
    to, and that nobody has made or found for a day; what preparations have left half-done that ended over a day ago.
    Where a run's file can't be read all shards stay, and `warn` is told why.
    """
    found = list(report.walk(report.existing(where)))
    barren = {run: state for run, state in found if _fruitless(run, state)}
    kept = [(run, state) for run, state in found if run not in barren or report.age(state.get("heartbeat")) < DAY_S]
    aged = [
        (_whole(run, f"{report.status(state)}, without a checkpoint or a model"), report.age(state.get("heartbeat")))
        for run, state in barren.items()
    ]
    # Of a young run that goes whole, no part counts a second time.
    aged += [one for run, state in kept for one in _torn(run, state) if one[1] >= DAY_S or run not in barren]
    dark = [run for run, state in kept if report.status(state) == report.UNREADABLE]
    for run in dark:
        warn(
            f"{shown(storage.join(run, 'run.json'))} is damaged, and may refer to any of the prepared shards: all stay"
        )
    aged += [] if dark else _unused(where, [state for _, state in kept])
    return [one for one, age in aged if age >= DAY_S], [one for one, age in aged if age < DAY_S]


def remove(where: str, agreed: list[Leftover]) -> list[Leftover]:
    """Deletes what was agreed on, less what has come into use since; returns what went."""
    still = {leftover.path for leftover in leftovers(where)}
    gone = [leftover for leftover in agreed if leftover.path in still]
    for leftover in gone:
        storage.delete(leftover.path)
    return gone


def _fruitless(run: str, state: Json) -> bool:
    """Whether a run has ended and holds nothing to resume from or to use."""
    if report.status(state) not in ("failed", "stopped", "lost"):
        return False
    if storage.exists(storage.join(run, "export")) or any(True for _ in report.folders_below(run)):
        return False
    sweep = report.sweep_of(run)  # it would take a gap for a trial that was never begun
    if sweep and storage.exists(storage.join(sweep, "run.json")):
        return False
    return not any(storage.committed(path) is not None for path in storage.folders(storage.join(run, "checkpoints")))


def _torn(run: str, state: Json) -> Iterator[tuple[Leftover, float]]:
    """What attempts of a run left half-done, with an age. A lost run may only be slow: others are old at once."""
    said = report.status(state)
    if said in ("running", report.UNREADABLE):
        return
    age = report.age(state.get("heartbeat")) if said == "lost" else float("inf")
    for path in storage.folders(storage.join(run, "checkpoints")):
        if storage.committed(path) is None:
            yield _whole(path, "a checkpoint that was never committed"), age
    if storage.listing(storage.join(run, SCRATCH)):
        yield _whole(storage.join(run, SCRATCH), "what Ray Train keeps while an attempt lasts"), age


def _unused(where: str, states: list[Json]) -> Iterator[tuple[Leftover, float]]:
    """Prepared folders that no run refers to, and in others attempts whose shards are not the used ones; with ages."""
    used = {key for state in states for key in _keys(state)}
    for path in storage.folders(storage.join(where, PREPARED)):
        key = path.rpartition("/")[2]
        if _KEY.fullmatch(key) and key not in used:
            yield _aged(path, "prepared shards that no run refers to")
        elif key in used:
            yield from _half_prepared(path)


def _half_prepared(path: str) -> Iterator[tuple[Leftover, float]]:
    """What was left by preparations of the same rows that were killed, or that another was ahead of."""
    yield from _unnamed(path, "shards", "path", but="frozen")
    for states in storage.folders(storage.join(path, "frozen")):
        yield from _unnamed(states, "parts", "data")


def _unnamed(path: str, listed: str, file: str, but: str = "") -> Iterator[tuple[Leftover, float]]:
    """The attempts in a folder whose files its manifest does not name, with how long nobody has written to them."""
    manifest = storage.read_object(storage.join(path, "manifest.json")) or {}
    named = {entry[file].partition("/")[0] for entry in manifest.get(listed) or ()}
    for attempt in storage.folders(path):
        if attempt.rpartition("/")[2] not in {*named, but}:
            yield _aged(attempt, "a preparation that was never finished")


def _aged(path: str, why: str) -> tuple[Leftover, float]:
    """A folder that can go, and the seconds since something changed below it."""
    entries = storage.listing(path)
    return Leftover(path, why, sum(entry.size for entry in entries)), report.age(_changed(path, entries))


def _changed(path: str, entries: Sequence[storage.Entry]) -> float:
    """When something last changed below a folder, in seconds since 1970; what is only being written is no entry yet."""
    if not entries and storage.is_local(path):
        return max(os.stat(folder).st_mtime for folder, _, _ in os.walk(path))
    return max((entry.modified for entry in entries), default=0.0)


def _whole(path: str, why: str) -> Leftover:
    return Leftover(path, why, sum(entry.size for entry in storage.listing(path)))


def _keys(state: Json) -> set[str]:
    """The names of the prepared folders that a run.json refers to."""
    found: set[str] = set()
    for field in ("prepared", "facts"):
        value = state.get(field) or []
        found.update([value] if isinstance(value, str) else value.values() if isinstance(value, dict) else value)
    return found
