"""What runs have left behind, read from their folders: lists, one run, and two side by side.

Nothing here asks a running process; whatever writes a run's folder in the agreed form can be read.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rayft import document, storage
from rayft.errors import StorageMissing
from rayft.layout import INSIDE, PREPARED
from rayft.reports.snapshots import is_number, plain_object
from rayft.retry import shown

HEARTBEAT_S = 30.0  # a running run that has been silent for longer is lost
UNREADABLE = "unreadable"  # the status of a run whose run.json or result.json is damaged

Json = dict[str, Any]


# --- lists


def runs(where: str) -> list[Json]:
    """A summary of each run under the storage `where`, newest first; those with names of several parts too.

    Each: {"name", "run", "status", "steps", "trials", "metric", "value", "seconds", "started"}; what is not known is
    None. `metric` and `value` are the best checkpoint's or, without a result, the last evaluation's. `started` (seconds
    since 1970) and `seconds` are the last attempt's. A run with a damaged file is `unreadable`; `show` names it. A
    sweep is one of them, with how many `trials` it has so far; where `where` is the sweep's own folder its trials are
    listed too.
    """
    walked = dict(walk(existing(where)))
    trials = Counter(sweep for run in walked if (sweep := sweep_of(run)) in walked)
    base = where.rstrip("/")
    shown = {run: state for run, state in walked.items() if sweep_of(run) not in walked or sweep_of(run) == base}
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda pair: _summary(where, *pair) | {"trials": trials.get(pair[0])}, shown.items())
        return sorted(found, key=lambda run: (-(run["started"] or 0), run["name"]))


def sweep_of(run: str) -> str:
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


# --- the files of a run


def status(state: Json, result: Json | None = None) -> str:
    """The status in a run.json, or `lost` where it says running but nobody has been heard of for HEARTBEAT_S.

    A process of this host that is still there, stopped or suspended perhaps, is not lost. A run whose `result` is
    damaged is UNREADABLE.
    """
    if result and result.get("status") == UNREADABLE:
        return UNREADABLE
    said = str(state.get("status", "unknown"))
    if said != "running" or age(state.get("heartbeat")) <= HEARTBEAT_S:
        return said
    from rayft.record import alive  # waits until it is needed: it brings the recipe's whole schema along

    return "running" if "pid" in state and alive(state) else "lost"


def walk(folder: str) -> Iterator[tuple[str, Json]]:
    """Every run at or below `folder` with its run.json."""
    state = _json(folder, "run.json")
    if state:
        yield folder, state
    for path in folders_below(folder):
        yield from walk(path)


def folders_below(folder: str) -> Iterator[str]:
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


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each field; lists are values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def existing(where: str) -> str:
    if not storage.exists(where):
        raise StorageMissing(
            f"{shown(where)} does not exist; the storage is the recipe's `storage:`, a folder or an URL"
        )
    return where


def age(moment: Any) -> float:
    """Seconds since a time in run.json; endless where there is none."""
    return time.time() - moment if is_number(moment) else float("inf")
