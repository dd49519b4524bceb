"""What there is to show of a storage and of one run, as plain data: read from the folders that runs write.

Each function takes the `Files` that it reads through; keep it, and what has not changed is not read again. Numbers are
those of the files. Sweeps are in `overview.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rayft import report, storage
from rayft.errors import StorageMissing
from rayft.layout import INSIDE, PREPARED
from rayft.reports.snapshots import Files, Json, curves, in_parallel, is_number, name_of, scores, text
from rayft.retry import shown

TRIALS = "trials"  # the folder of a sweep that holds its trials
_KEY = re.compile(r"[0-9a-f]{12,64}")
_SPLITS = ("train", "validation", "test")
_MOST_EVALUATIONS = 200


def is_sweep(recipe: Json) -> bool:
    return isinstance(recipe.get("tune"), dict)


def index(files: Files, where: str) -> Json:
    """{"kind": "index", "folder", "runs"}: the runs and sweeps under the storage `where`, newest first.

    Each: {"name", "kind": "run" or "sweep", "status", "steps" (of a sweep: None), "trials" (of a run: None), "metric",
    "value", "seconds", "started"}, as `report.runs` gives them. The trials of a sweep are on its own page.
    """
    if not storage.exists(where):
        raise StorageMissing(
            f"{shown(where)} does not exist; the storage is the recipe's `storage:`, a folder or an URL"
        )
    rows: list[Json] = []
    level = [where]
    while level:
        below: list[str] = []
        for row, inside in in_parallel(lambda folder: _listed(files, where, folder), level):
            rows += [row] if row else []
            below += inside
        level = below
    rows.sort(key=lambda row: (-(row["started"] or 0), row["name"]))
    return {"kind": "index", "name": where, "folder": where, "runs": rows}


def run(files: Files, folder: str, where: str | None = None) -> Json:
    """One run, as plain data (see the keys below); StorageMissing where there is none.

    `where` is its storage, which holds the prepared rows; None: as the run's recipe names it.
    """
    found = files.inside(folder)
    state = state_of(files, folder)
    recipe = files.yaml(found.get("recipe.yaml"))
    result = result_of(files, folder, state)
    last, evaluations, lines = files.read(found.get("metrics.jsonl"), curves)
    attempts = sorted(files.inside(storage.join(folder, "attempts")).items())
    return {
        "kind": "run",
        "name": name(folder, where, recipe),
        "folder": folder,
        **times(state),
        "status": report.status(state, result),
        "error": state.get("error") or result.get("error"),
        "warnings": [str(sentence) for sentence in result.get("warnings") or ()],
        "host": state.get("host"),
        "model": state.get("model"),
        "trial": files.json(found.get("trial.json")) or None,
        "steps": result.get("steps") or last.get("step"),
        "epochs": result.get("epochs") or last.get("epoch"),
        "best": result.get("best") or leading(evaluations),
        "metrics": mapping(result.get("metrics")),
        "timing": mapping(result.get("timing")),
        "export": result.get("export"),
        "curves": {each: transposed(line) for each, line in lines.items()},
        "evaluations": evaluations[-_MOST_EVALUATIONS:],
        "evaluated": len(evaluations),
        "data": _splits(files, state, where or home(folder, recipe)),
        "attempts": [_attempt(number, files.json(entry)) for number, entry in attempts if number.endswith(".json")],
        "recipe": files.read(found.get("recipe.yaml"), text),
    }


def state_of(files: Files, folder: str) -> Json:
    """run.json of what has to be a run."""
    entry = files.inside(folder).get("run.json")
    if entry is None:
        what = "has no run.json, so it is not a run" if storage.exists(folder) else "does not exist"
        raise StorageMissing(f"{shown(folder)} {what}; a run is <storage>/<name>")
    return files.json(entry) or report.damaged(entry.path)


def result_of(files: Files, folder: str, state: Json) -> Json:
    """result.json; {} where there is none, or while the run goes on: what is there then is an earlier one's."""
    entry = files.inside(folder).get("result.json")
    if entry is None or state.get("status") == "running":
        return {}
    return files.json(entry) or report.damaged(entry.path)


def times(state: Json) -> Json:
    """When the last attempt began (seconds since 1970), and how long it has been heard of."""
    started, heartbeat = state.get("started"), state.get("heartbeat")
    known = is_number(started) and is_number(heartbeat)
    return {
        "started": started if is_number(started) else None,
        "seconds": heartbeat - started if known else None,  # type: ignore[operator]
        "attempt": state.get("attempt"),
    }


def leading(evaluations: list[Json]) -> Json | None:
    """The last evaluation's first score but the loss, as {"step", "metric", "value"}; None without any."""
    last = evaluations[-1] if evaluations else {}
    names = sorted((each for each in last if each.startswith("eval_")), key=lambda each: each == "eval_loss")
    return {"step": last.get("step"), "metric": names[0], "value": last[names[0]]} if names else None


def name(folder: str, where: str | None, recipe: Json) -> str:
    """A run's name: its path below the storage or, where that is not known, as its recipe says."""
    base = (where or "").rstrip("/") + "/"
    if where and folder.startswith(base):
        return folder[len(base) :]
    said = str(recipe.get("name") or "")
    return said if said and folder.rstrip("/").endswith("/" + said) else name_of(folder)


def home(folder: str, recipe: Json) -> str:
    """The storage of a run, from its folder and the name in its recipe."""
    return folder.rstrip("/").removesuffix(name(folder, None, recipe)).rstrip("/")


def mapping(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def transposed(points: Iterable[tuple[float, float]]) -> dict[str, list[float]]:
    """Points as {"x": [...], "y": [...]}, as plots take them."""
    pairs = list(points)
    return {"x": [x for x, _ in pairs], "y": [y for _, y in pairs]}


def _listed(files: Files, where: str, folder: str) -> tuple[Json | None, list[str]]:
    """The index's row of a folder, None where it is no run, and the folders in it that may be runs."""
    found = files.inside(folder)
    recipe = files.yaml(found.get("recipe.yaml")) if "run.json" in found else {}
    closed = {*INSIDE, PREPARED} | ({TRIALS} if is_sweep(recipe) else set())
    inner = storage.folders(folder)
    below = [path for path in inner if name_of(path) not in closed and not name_of(path).startswith(".")]
    if "run.json" not in found or folder == where:
        return None, below
    state = state_of(files, folder)
    result = result_of(files, folder, state)
    last, evaluations = files.read(found.get("metrics.jsonl"), scores)
    best = mapping(result.get("best")) or leading(evaluations) or {}
    trials = len(storage.folders(storage.join(folder, TRIALS))) if is_sweep(recipe) else None
    row = {
        "name": name(folder, where, recipe),
        "kind": "run" if trials is None else "sweep",
        "status": report.status(state, result),
        "trials": trials,
        "steps": result.get("steps") or last.get("step"),
        "metric": best.get("metric"),
        "value": best.get("value"),
        **times(state),
    }
    return row, below


def _splits(files: Files, state: Json, where: str) -> list[Json]:
    """What preparation counted in each split of a run, without the shards."""
    keys = mapping(state.get("prepared"))
    wanted = ("rows", "source_rows", "tokens", "longest", "truncated", "dropped", "bad", "cut", "lengths")
    found = []
    for split in sorted(keys, key=lambda each: (_SPLITS.index(each) if each in _SPLITS else len(_SPLITS), each)):
        key = str(keys[split])
        if _KEY.fullmatch(key):
            manifest = files.settled(storage.join(where, PREPARED, key, "manifest.json"))
            found += [{"split": split, **{field: manifest.get(field) for field in wanted}}] if manifest else []
    return found


def _attempt(file: str, claim: Json) -> Json:
    return {
        "number": claim.get("number", file.removesuffix(".json").lstrip("0")),
        "host": claim.get("host"),
        "pid": claim.get("pid"),
        "since": claim.get("since"),
    }
