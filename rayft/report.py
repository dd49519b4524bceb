"""What runs have left behind, read from their folders: lists, one run, two side by side, and what nothing needs now.

Nothing here asks a running process; whatever writes a run's folder in the agreed form can be read.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rayft import document, storage
from rayft.errors import StorageMissing
from rayft.layout import INSIDE, PREPARED
from rayft.retry import shown
from rayft.snapshots import is_number, plain_object

HEARTBEAT_S = 30.0  # a running run that has been silent for longer is lost
DAY_S = 86_400.0  # what is younger may belong to something that has only just begun
SCRATCH = "ray"  # the folder of a run that an attempt removes at its end
UNREADABLE = "unreadable"  # the status of a run whose run.json or result.json is damaged
_KEY = re.compile(r"[0-9a-f]{12,64}")  # the names of folders in prepared/; anything else there is not rayft's

Json = dict[str, Any]


@dataclass(frozen=True)
class Leftover:
    """Something that can go: its path, why, and its size in bytes."""

    path: str
    why: str
    bytes: int


# --- lists


def runs(where: str) -> list[Json]:
    """A summary of each run under the storage `where`, newest first; those with names of several parts too.

    Each: {"name", "run", "status", "steps", "trials", "metric", "value", "seconds", "started"}; what is not known is
    None. `metric` and `value` are the best checkpoint's or, without a result, the last evaluation's. `started` (seconds
    since 1970) and `seconds` are the last attempt's. A run with a damaged file is `unreadable`; `show` names it. A
    sweep is one of them, with how many `trials` it has so far; where `where` is the sweep's own folder its trials are
    listed too.
    """
    walked = dict(_walk(_existing(where)))
    trials = Counter(sweep for run in walked if (sweep := _sweep_of(run)) in walked)
    base = where.rstrip("/")
    shown = {run: state for run, state in walked.items() if _sweep_of(run) not in walked or _sweep_of(run) == base}
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda pair: _summary(where, *pair) | {"trials": trials.get(pair[0])}, shown.items())
        return sorted(found, key=lambda run: (-(run["started"] or 0), run["name"]))


def _sweep_of(run: str) -> str:
    """The folder of the sweep that a run's folder is a trial of, by its place."""
    folder, _, number = run.rpartition("/")
    return folder.removesuffix("/trials") if folder.endswith("/trials") and number.isdigit() else ""


def show(run: str) -> Json:
    """One run: its summary, and "error", "epochs", "best", "metrics", "evaluations", "export", "checkpoints", "timing",
    "warnings".

    Of a sweep that has ended, `trials` are its numbers by how they ended, `best` has the best trial's fields, and `why`
    says why it has ended with some of them left.
    `evaluations` are the objects that evaluations wrote to metrics.jsonl, `checkpoints` names the committed ones.
    """
    state = _state(run)
    result = _result(run, state)
    last, evaluations = _metrics(run)
    checkpoints = sorted(storage.folders(storage.join(run, "checkpoints")))
    return {
        **_summary(run.rstrip("/").rpartition("/")[0], run, state),
        "error": state.get("error") or result.get("error"),
        "why": result.get("why"),
        "trials": result.get("trials"),
        "epochs": result.get("epochs") or last.get("epoch"),
        "best": result.get("best"),
        "metrics": result.get("metrics") or {},
        "evaluations": evaluations,
        "export": result.get("export"),
        "checkpoints": [path.rpartition("/")[2] for path in checkpoints if storage.committed(path) is not None],
        "timing": result.get("timing") or {},
        "warnings": result.get("warnings") or [],
    }


def compare(first: str, second: str) -> Json:
    """Two runs: {"runs": [summary, summary], "recipe": {field: [a, b]}, "metrics": {name: [a, b]}}.

    `recipe` has the fields that differ. A run that has not finished is compared by its last evaluation.
    """
    pair = [show(first), show(second)]
    recipes = [dict(_flat(_recipe(run))) for run in (first, second)]
    scores = [run["metrics"] or _scores(run["evaluations"]) for run in pair]
    kept = ("name", "run", "status", "steps", "seconds")
    return {
        "runs": [{key: run[key] for key in kept} for run in pair],
        "recipe": {
            field: [recipe.get(field) for recipe in recipes]
            for field in dict.fromkeys([*recipes[0], *recipes[1]])
            if recipes[0].get(field) != recipes[1].get(field)
        },
        "metrics": {name: [score.get(name) for score in scores] for name in dict.fromkeys([*scores[0], *scores[1]])},
    }


# --- what can go


def leftovers(where: str, warn: Callable[[str], None] = lambda sentence: None) -> list[Leftover]:
    """What nothing under the storage `where` needs any more; runs that are running lose nothing.

    Runs that failed, stopped or were lost over a day ago without a checkpoint or a model, but no trials of a sweep;
    checkpoints that were never committed, and other remains of attempts; prepared shards that no remaining run refers
    to, and that nobody has made or found for a day; what preparations have left half-done that ended over a day ago.
    Where a run's file can't be read all shards stay, and `warn` is told why.
    """
    found = list(_walk(_existing(where)))
    dead = {run: state for run, state in found if _fruitless(run, state)}
    kept = [(run, state) for run, state in found if run not in dead]
    barren = [_whole(run, f"{status(state)}, without a checkpoint or a model") for run, state in dead.items()]
    torn = [leftover for run, state in kept for leftover in _torn(run, state)]
    dark = [run for run, state in kept if status(state) == UNREADABLE]
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
    if status(state) not in ("failed", "stopped", "lost") or _age(state.get("heartbeat")) < DAY_S:
        return False
    if storage.exists(storage.join(run, "export")) or any(True for _ in _below(run)):
        return False
    sweep = _sweep_of(run)  # it would take a gap for a trial that was never begun
    if sweep and storage.exists(storage.join(sweep, "run.json")):
        return False
    return not any(storage.committed(path) is not None for path in storage.folders(storage.join(run, "checkpoints")))


def _torn(run: str, state: Json) -> Iterator[Leftover]:
    """What attempts of a run left half-done. A lost run may only be slow: it is given a day."""
    if status(state) in ("running", UNREADABLE) or (status(state) == "lost" and _age(state.get("heartbeat")) < DAY_S):
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
            if _age(_changed(path, entries)) >= DAY_S:
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
            if _age(_changed(attempt, entries)) >= DAY_S:
                yield Leftover(attempt, "a preparation that was never finished", sum(entry.size for entry in entries))


def _changed(path: str, entries: Sequence[storage.Entry]) -> float:
    """When something last changed below a folder, in seconds since 1970; what is only being written is no entry yet."""
    if not entries and storage.is_local(path):
        return max(os.stat(folder).st_mtime for folder, _, _ in os.walk(path))
    return max((entry.modified for entry in entries), default=0.0)


def _whole(path: str, why: str) -> Leftover:
    return Leftover(path, why, sum(entry.size for entry in storage.listing(path)))


# --- the files of a run


def status(state: Json, result: Json | None = None) -> str:
    """The status in a run.json, or `lost` where it says running but nobody has been heard of for HEARTBEAT_S.

    A process of this host that is still there, stopped or suspended perhaps, is not lost. A run whose `result` is
    damaged is UNREADABLE.
    """
    if result and result.get("status") == UNREADABLE:
        return UNREADABLE
    said = str(state.get("status", "unknown"))
    if said != "running" or _age(state.get("heartbeat")) <= HEARTBEAT_S:
        return said
    from rayft.record import alive  # waits until it is needed: it brings the recipe's whole schema along

    return "running" if "pid" in state and alive(state) else "lost"


def _walk(folder: str) -> Iterator[tuple[str, Json]]:
    """Every run at or below `folder` with its run.json."""
    state = _json(folder, "run.json")
    if state:
        yield folder, state
    for below in _below(folder):
        yield from _walk(below)


def _below(folder: str) -> Iterator[str]:
    for path in storage.folders(folder):
        name = path.rpartition("/")[2]
        if name not in INSIDE and name != PREPARED and not name.startswith("."):
            yield path


def _json(run: str, name: str) -> Json:
    """The object in a file of a run's folder; {} where there is no such file, and UNREADABLE where it is damaged."""
    path = storage.join(run, name)
    try:
        value = plain_object(storage.read_bytes(path))
    except StorageMissing:
        return {}
    return value or damaged(path)


def damaged(path: str) -> Json:
    """What stands for the object of a file that holds none."""
    return {"status": UNREADABLE, "error": f"{shown(path)} is damaged: it holds no JSON object"}


def _state(run: str) -> Json:
    """run.json of what has to be a run."""
    state = _json(run, "run.json")
    if not state:
        what = "has no run.json, so it is not a run" if storage.exists(run) else "does not exist"
        raise StorageMissing(
            f"{shown(run)} {what}; RUN is <storage>/<name>, and `rayft runs list <storage>` names them"
        )
    return state


def _result(run: str, state: Json) -> Json:
    """result.json; {} while the run is running, since what is there then is an earlier attempt's."""
    return {} if state.get("status") == "running" else _json(run, "result.json")


def _recipe(run: str) -> Any:
    try:
        return document.read(storage.read_text(storage.join(run, "recipe.yaml"))).value or {}
    except StorageMissing:
        return {}


def _metrics(run: str) -> tuple[Json, list[Json]]:
    """The last step's object of metrics.jsonl ({} if none) and that of each evaluation.

    A line half-written counts for nothing. What a run writes at its end, the best model's scores, is no evaluation.
    """
    step, evaluations = b"", list[Json]()
    try:
        with storage.open_read(storage.join(run, "metrics.jsonl")) as file:
            for line in file:
                if b'"loss"' in line:
                    step = line if line.endswith(b"\n") else step
                elif (row := _row(line)) and (not evaluations or row.get("step") != evaluations[-1].get("step")):
                    evaluations.append(row)
    except StorageMissing:
        pass
    return _row(step), evaluations


def _row(line: bytes) -> Json:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _summary(where: str, run: str, state: Json) -> Json:
    result = _result(run, state)
    best = result["best"] if isinstance(result.get("best"), dict) else {}
    last: Json = {}
    if not best:
        last, evaluations = _metrics(run)
        best = _leading(evaluations)
    started, heartbeat = (state[key] if is_number(state.get(key)) else None for key in ("started", "heartbeat"))
    base = where.rstrip("/")
    return {
        "name": run[len(base) + 1 :] if run.startswith(base + "/") else run.rstrip("/").rpartition("/")[2],
        "run": run,
        "status": status(state, result),
        "steps": result.get("steps") or last.get("step"),
        "metric": best.get("metric"),
        "value": best.get("value"),
        "seconds": heartbeat - started if started is not None and heartbeat is not None else None,
        "started": started,
    }


def _scores(evaluations: list[Json]) -> Json:
    """The scores of the last evaluation."""
    return {name: value for name, value in (evaluations or [{}])[-1].items() if name not in ("step", "epoch")}


def _leading(evaluations: list[Json]) -> Json:
    """{"metric", "value"} of the last evaluation: its first score but the loss, else the loss; {} without any."""
    scores = _scores(evaluations)
    name = next((name for name in scores if name != "eval_loss"), next(iter(scores), None))
    return {} if name is None else {"metric": name, "value": scores[name]}


def _keys(state: Json) -> set[str]:
    """The names of the prepared folders that a run.json refers to."""
    found: set[str] = set()
    for field in ("prepared", "facts"):
        value = state.get(field) or []
        found.update([value] if isinstance(value, str) else value.values() if isinstance(value, dict) else value)
    return found


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each field; lists are values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _existing(where: str) -> str:
    if not storage.exists(where):
        raise StorageMissing(
            f"{shown(where)} does not exist; the storage is the recipe's `storage:`, a folder or an URL"
        )
    return where


def _age(moment: Any) -> float:
    """Seconds since a time in run.json; endless where there is none."""
    return time.time() - moment if is_number(moment) else float("inf")
