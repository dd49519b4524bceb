"""Files of runs, read again only when they have changed: what pages that follow many runs are made from.

Runs are written while they are read here. A file that is missing, half-written or not what it should be counts as
nothing; a storage that can't be read is an error.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rayft import document, storage
from rayft.errors import StorageMissing
from rayft.storage import Entry

Json = dict[str, Any]
Points = list[tuple[float, float]]
T = TypeVar("T")
R = TypeVar("R")

MOST_POINTS = 200  # of one curve: more than a screen can tell apart
_THREADS = 16


class Files:
    """What was read is kept by path, and read again where size, time or etag differ. Usable from several threads."""

    def __init__(self) -> None:
        self.reads = 0  # files that were read so far
        self._kept: dict[tuple[str, str], tuple[Any, Any]] = {}

    def inside(self, folder: str) -> dict[str, Entry]:
        """The files directly in a folder, by name; {} where there is no such folder."""
        return {name_of(entry.path): entry for entry in storage.listing(folder, recursive=False)}

    def each_inside(self, folder: str) -> dict[str, dict[str, Entry]]:
        """The paths of the folders directly in `folder`, each with the files directly in it, by name."""
        if storage.is_local(folder):
            return {path: self.inside(path) for path in storage.folders(folder)}
        found: dict[str, dict[str, Entry]] = {}
        start = len(folder.rstrip("/")) + 1
        for entry in storage.listing(folder):  # a request for 1,000 objects, instead of one for each folder
            inner, _, name = entry.path[start:].partition("/")
            if name:
                files = found.setdefault(storage.join(folder, inner), {})
                if "/" not in name:
                    files[name] = entry
        return found

    def read(self, entry: Entry | None, parse: Callable[[bytes], T]) -> T:
        """`parse` of the file's content, of b"" where there is no such file."""
        if entry is None:
            return parse(b"")

        def fresh() -> T:
            self.reads += 1
            try:
                return parse(storage.read_bytes(entry.path))
            except StorageMissing:  # deleted since it was listed
                return parse(b"")

        return self.once(entry.path, parse.__name__, (entry.size, entry.modified, entry.etag), fresh)

    def once(self, path: str, what: str, stamp: Any, make: Callable[[], T]) -> T:
        """What `make` gave when it was last called for (path, what), unless `stamp` has changed since."""
        kept = self._kept.get((path, what))
        if kept is not None and kept[0] == stamp:
            found: T = kept[1]
            return found
        made = make()
        self._kept[path, what] = (stamp, made)
        return made

    def json(self, entry: Entry | None) -> Json:
        return self.read(entry, plain_object)

    def yaml(self, entry: Entry | None) -> Json:
        return self.read(entry, yaml_object)

    def settled(self, path: str) -> Json:
        """The JSON object in a file that never changes once it is there."""
        value: Json = self._kept.get((path, "settled"), (None, {}))[1]
        if value:
            return value
        self.reads += 1
        try:
            value = plain_object(storage.read_bytes(path))
        except StorageMissing:
            return {}
        self._kept[path, "settled"] = (None, value)
        return value


def name_of(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def in_parallel(action: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`action` of each item, in their order; the first failure is raised.

    Its threads are daemons, which a process that was told to end doesn't wait for, however long a storage is silent.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(len(items)):
        waiting.put(place)
    found: dict[int, R] = {}
    failures: list[Exception] = []

    def work() -> None:
        while not failures:
            try:
                place = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                found[place] = action(items[place])
            except Exception as error:  # noqa: BLE001 # raised below, by the thread that asked
                failures.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_THREADS, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [found[place] for place in range(len(items))]


# --- what files hold


def plain_object(data: bytes) -> Json:
    """The JSON object in a file or a line; {} where it isn't one. NaN and infinities become None."""
    try:
        value = json.loads(data, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def yaml_object(data: bytes) -> Json:
    value = document.read(text(data)).value
    return value if isinstance(value, dict) else {}


def text(data: bytes) -> str:
    return data.decode(errors="replace")


def metric_lines(data: bytes) -> tuple[list[bytes], list[Json]]:
    """metrics.jsonl: the lines of the steps, and the object of each evaluation.

    The last line counts only with its end. What a run writes last, its best model's scores, repeats a step and is no
    evaluation.
    """
    steps: list[bytes] = []
    evaluations: list[Json] = []
    for line in data.split(b"\n")[:-1]:
        if b'"loss"' in line:
            steps.append(line)
        elif (row := plain_object(line)) and (not evaluations or row.get("step") != evaluations[-1].get("step")):
            evaluations.append(row)
    return steps, evaluations


def scores(data: bytes) -> tuple[Json, list[Json]]:
    """metrics.jsonl: the last step's object ({} without any), and that of each evaluation."""
    steps, evaluations = metric_lines(data)
    return next((row for line in reversed(steps) if (row := plain_object(line))), {}), evaluations


def curves(data: bytes) -> tuple[Json, list[Json], dict[str, Points]]:
    """As `scores`, and by name the thinned curve over the steps of each number that steps and evaluations wrote."""
    steps, evaluations = metric_lines(data)
    rows = [row for line in steps if (row := plain_object(line))]
    names = dict.fromkeys(name for row in [*rows[:1], *rows[-1:], *evaluations] for name in row)
    found = {
        name: thinned(points([*rows, *evaluations] if name not in (rows or [{}])[0] else rows, "step", name))
        for name in names
        if name not in ("step", "epoch")
    }
    return (rows or [{}])[-1], evaluations, {name: curve for name, curve in found.items() if curve}


def points(rows: Sequence[Json], across: str, up: str) -> Points:
    """(row[across], row[up]) of the rows in which both are numbers."""
    return [(row[across], row[up]) for row in rows if is_number(row.get(across)) and is_number(row.get(up))]


def thinned(curve: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points of a curve, none of them made up: both ends, and of each stretch the lowest and highest."""
    if len(curve) <= most:
        return curve
    inner, stretches = curve[1:-1], most // 2 - 1
    kept = [curve[0]]
    for number in range(stretches):
        start, stop = (place * len(inner) // stretches for place in (number, number + 1))
        by_height = sorted(range(start, stop), key=lambda place: inner[place][1])
        kept += [inner[place] for place in sorted({by_height[0], by_height[-1]})]
    return [*kept, curve[-1]]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
