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
    """What nothing under the storage `where` needs any more; runs that are running lose nothing.

    Runs that failed, stopped or were lost over a day ago without a checkpoint or a model, but no trials of a sweep;
    checkpoints that were never committed, and other remains of attempts; prepared shards that no remaining run refers
    to, and that nobody has made or found for a day; what preparations have left half-done that ended over a day ago.
    Where a run's file can't be read all shards stay, and `warn` is told why.
    """
    found = list(report.walk(report.existing(where)))
    dead = {run: state for run, state in found if _fruitless(run, state)}
    kept = [(run, state) for run, state in found if run not in dead]
    barren = [_whole(run, f"{report.status(state)}, without a checkpoint or a model") for run, state in dead.items()]
    torn = [leftover for run, state in kept for leftover in _torn(run, state)]
    dark = [run for run, state in kept if report.status(state) == report.UNREADABLE]
    for run in dark:
        warn(
            f"{shown(storage.join(run, 'run.json'))} is damaged, and may refer to any of the prepared shards: all stay"
        )
    return [*barren, *torn, *([] if dark else _unused(where, [state for _, state in kept]))]


def remove(where: str, agreed: list[Leftover]) -> list[Leftover]:
    """Deletes what was agreed on, less what has come into use since; returns what went."""
    still = {leftover.path for leftover in leftovers(where)}
    gone = [leftover for leftover in agreed if leftover.path in still]
    for leftover in gone:
        storage.delete(leftover.path)
    return gone


def _fruitless(run: str, state: Json) -> bool:
    """Whether a run ended over a day ago and holds nothing to resume from or to use."""
    if report.status(state) not in ("failed", "stopped", "lost") or report.age(state.get("heartbeat")) < DAY_S:
        return False
    if storage.exists(storage.join(run, "export")) or any(True for _ in report.folders_below(run)):
        return False
    sweep = report.sweep_of(run)  # it would take a gap for a trial that was never begun
    if sweep and storage.exists(storage.join(sweep, "run.json")):
        return False
    return not any(storage.committed(path) is not None for path in storage.folders(storage.join(run, "checkpoints")))


def _torn(run: str, state: Json) -> Iterator[Leftover]:
    """What attempts of a run left half-done. A lost run may only be slow: it is given a day."""
    said = report.status(state)
    if said in ("running", report.UNREADABLE) or (said == "lost" and report.age(state.get("heartbeat")) < DAY_S):
        return
    for path in storage.folders(storage.join(run, "checkpoints")):
        if storage.committed(path) is None:
            yield _whole(path, "a checkpoint that was never committed")
    if storage.listing(storage.join(run, SCRATCH)):
        yield _whole(storage.join(run, SCRATCH), "what Ray Train keeps while an attempt lasts")


def _unused(where: str, states: list[Json]) -> Iterator[Leftover]:
    """Prepared folders that none of the runs refers to; in the others, attempts whose shards are not the ones used."""
    used = {key for state in states for key in _keys(state)}
    for path in storage.folders(storage.join(where, PREPARED)):
        key = path.rpartition("/")[2]
        if _KEY.fullmatch(key) and key not in used:
            entries = storage.listing(path)
            if report.age(_changed(path, entries)) >= DAY_S:
                yield Leftover(path, "prepared shards that no run refers to", sum(entry.size for entry in entries))
        elif key in used:
            yield from _half_prepared(path)


def _half_prepared(path: str) -> Iterator[Leftover]:
    """What was left by preparations of the same rows that were killed, or that another was ahead of."""
    yield from _unnamed(path, "shards", "path", but="frozen")
    for states in storage.folders(storage.join(path, "frozen")):
        yield from _unnamed(states, "parts", "data")


def _unnamed(path: str, listed: str, file: str, but: str = "") -> Iterator[Leftover]:
    """The attempts in a folder whose files its manifest does not name, and that nobody has written to for a day."""
    manifest = storage.read_object(storage.join(path, "manifest.json")) or {}
    named = {entry[file].partition("/")[0] for entry in manifest.get(listed) or ()}
    for attempt in storage.folders(path):
        if attempt.rpartition("/")[2] not in {*named, but}:
            entries = storage.listing(attempt)
            if report.age(_changed(attempt, entries)) >= DAY_S:
                yield Leftover(attempt, "a preparation that was never finished", sum(entry.size for entry in entries))


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
