"""What a sweep's folder says of its trials: fields, state, scores; and the table and the best that follow from it.

<sweep>/trials/00003/trial.json     {"trial", "fields"}, written when the trial is proposed
                     result.json    written when it has ended: finished, stopped by the scheduler, or failed
                     (all else is a run's folder)
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rayft import storage
from rayft.recipe import Recipe, set_field
from rayft.sweeps.sampling import Fields
from rayft.training.progress import leading_metric

FOLDER = "trials"
POINTER = "trial.json"
READERS = 8


@dataclass
class Known:
    """A trial as its folder tells it. `status` is None while it has not ended; `value` is its best score."""

    number: int
    fields: Fields
    folder: str
    status: str | None = None
    value: float | None = None
    rows: int = 0
    seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    saved_s: float = 0.0


def folder_of(sweep: str, number: int) -> str:
    return storage.join(sweep, FOLDER, f"{number:05d}")


def trial_recipe(sweep: Recipe, number: int, fields: Fields) -> Recipe:
    """The recipe of a trial, which runs alone: the sweep's with the trial's fields, under `<sweep>/trials/<number>`.

    It says by what its best model is chosen, which is the same in all trials: else early stopping could.
    """
    data = sweep.dump()
    data |= {"name": f"{sweep.name}/{FOLDER}/{number:05d}", "tune": None}
    for name, value in fields.items():
        set_field(data, name, value)
    data["train"]["metric"] = f"eval_{metric_of(sweep)}"
    # A searched batch size may be smaller than what is passed through at once.
    data["train"]["micro_batch_size"] = min(data["train"]["micro_batch_size"], data["train"]["global_batch_size"])
    return Recipe.parse(data, f"trial {number}")


def metric_of(sweep: Recipe) -> str:
    """The metric, without `eval_`, by which the trials of a sweep are compared."""
    return ((sweep.tune.metric if sweep.tune else None) or leading_metric(sweep)).removeprefix("eval_")


def propose(sweep: str, number: int, fields: Fields) -> None:
    """Writes down what a trial is to be, before it begins."""
    storage.write_json(storage.join(folder_of(sweep, number), POINTER), {"trial": number, "fields": fields})


def known(sweep: str) -> list[Known]:
    """Every trial that was proposed, by number."""
    base = storage.join(sweep, FOLDER)
    paths = {entry.path for entry in storage.listing(base) if entry.path.count("/") - base.count("/") == 2}
    folders = sorted(path.rpartition("/")[0] for path in paths if path.endswith("/" + POINTER))
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda folder: _read(folder, f"{folder}/result.json" in paths), folders))


def _read(folder: str, ended: bool) -> Known:
    proposed = storage.read_json(storage.join(folder, POINTER))
    trial = Known(proposed["trial"], proposed["fields"], folder)
    if not ended:
        return trial
    result = storage.read_json(storage.join(folder, "result.json"))
    # One that was stopped with the sweep goes on, and one that failed is tried again.
    if result["status"] == "failed" or (result["status"] == "stopped" and not result.get("by_scheduler")):
        return trial
    _take(trial, result)
    return trial


def _take(trial: Known, result: dict[str, Any]) -> None:
    """What result.json says of a trial that has ended."""
    best = result.get("best") or {}
    trial.status, trial.error = result["status"], result.get("error")
    trial.value, trial.scores = best.get("value"), result.get("metrics") or {}
    trial.rows, trial.seconds = int(result.get("rows") or 0), float(result.get("seconds") or 0.0)
    trial.saved_s = float((result.get("timing") or {}).get("cache_saved_s") or 0.0)


def evaluations(folder: str) -> list[dict[str, Any]]:
    """The objects that a trial's evaluations wrote to metrics.jsonl, oldest first."""
    path = storage.join(folder, "metrics.jsonl")
    lines = storage.read_text(path).splitlines() if storage.exists(path) else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if "loss" not in row]


def end(trial: Known, status: str, last: dict[str, Any], metric: str) -> None:
    """Writes how a trial has ended, there and in `trial`; one that has come to its own end has written its result.

    `last` is what it told last: best, rows, step, seconds, scores, saved_s, error; each may be missing.
    """
    path = storage.join(trial.folder, "result.json")
    result: dict[str, Any] = storage.read_json(path) if storage.exists(path) else {}
    if status != "finished" or result.get("status") != "finished":
        best = {"metric": metric, "value": last["best"]} if last.get("best") is not None else None
        result |= {"run": trial.folder, "status": status, "error": last.get("error"), "export": None}
        result |= {"metrics": last.get("scores") or {}, "best": best, "by_scheduler": status == "stopped"}
        result |= {"steps": last.get("step"), "rows": last.get("rows") or 0}
        result["timing"] = result.get("timing") or {"cache_saved_s": last.get("saved_s") or 0.0}
    result["seconds"] = last.get("seconds") or 0.0
    storage.write_json(path, result)
    _take(trial, result)


def best_of(trials: Iterable[Known], maximize: bool) -> Known | None:
    """The trial with the best score; of equal ones the first."""
    scored = [(trial.value, trial) for trial in trials if trial.value is not None and trial.status != "failed"]
    first = max(scored, key=lambda pair: (merit(pair[0], maximize), -pair[1].number), default=None)
    return first[1] if first is not None else None


def merit(score: float, maximize: bool) -> float:
    """The larger the better; what is not finite is worse than anything."""
    if not math.isfinite(score):
        return -math.inf
    return score if maximize else -score


def write_table(sweep: str, trials: Iterable[Known]) -> None:
    """trials.parquet: trial, status, the dotted fields, scores, rows, seconds, error; a row per trial."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for trial in trials:
        fields = {name: _plain(value) for name, value in trial.fields.items()}
        ends = {"rows": trial.rows, "seconds": trial.seconds, "error": trial.error}
        status = {"trial": trial.number, "status": trial.status or "waiting"}
        rows.append({**status, **fields, "score": trial.value, **trial.scores, **ends})
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    storage.write_bytes(storage.join(sweep, "trials.parquet"), sink.getvalue())


def _plain(value: Any) -> Any:
    """What a column takes: lists and sections as JSON."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def _column(values: list[Any]) -> Any:
    """Values of one type as they are, of several as text: a depth may be 2 or `all`."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or len(kinds) <= 1:
        return pa.array(values)
    return pa.array([None if value is None else str(value) for value in values])


def hparams(trial: Known, metric: str) -> None:
    """Adds the trial's fields and score to its TensorBoard files, for the HParams tab."""
    import tempfile

    from torch.utils.tensorboard.writer import SummaryWriter

    fields = {
        name: value if isinstance(value, int | float | str) else str(value) for name, value in trial.fields.items()
    }
    scores = {f"hparam/{metric}": float(trial.value)} if trial.value is not None else {}
    remote = not storage.is_local(trial.folder)
    with tempfile.TemporaryDirectory(prefix="rayft-hparams-") as scratch:
        target = scratch if remote else storage.join(trial.folder, "tensorboard")
        with SummaryWriter(target, filename_suffix=".hparams") as writer:
            writer.add_hparams(fields, scores, run_name=".")
        if remote:
            storage.upload(scratch, storage.join(trial.folder, "tensorboard"))
