"""How numbers, tables and results read as plain text: plain values in, strings or lines out."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.cells import cell_len

from rayft.filesystems import is_local

Json = dict[str, Any]

_LEADING = {"test": 0, "eval": 1}  # the groups of scores, in the order of a user's interest


def number(value: Any) -> str:
    """A score, rate or count as a person reads it: 0.9312, 1,240, 4.2e-05; '-' for None."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 0.001:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def amount(value: float) -> str:
    """A number of parameters: 22.7 M, 384, 1.2 B."""
    for size_of, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size_of:
            return f"{value / (1e3 if unit == 'k' else size_of):.1f} {unit}"
    return f"{value:,.0f}"


def size(count: float) -> str:
    """Bytes: 3.1 GB, 12.0 MB, 312 B."""
    for size_of, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size_of:
            return f"{count / size_of:.1f} {unit}"
    return f"{count:.0f} B"


def counted(value: int, noun: str, plural: str = "s") -> str:
    """`1 step`, `2,300 steps`; `plural` is what the noun takes."""
    return f"{value:,} {noun}" + ("" if value == 1 else plural)


def duration(seconds: float | None) -> str:
    """Seconds as 0:03:20, or as 2.4 s below a minute; '-' for None."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def moment(seconds: float | None) -> str:
    """A time, in seconds since 1970, on this machine's clock; '-' for None."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds is not None else "-"


def ordered(metrics: Iterable[str]) -> list[str]:
    """Metric names with test scores first, then validation; within a group the loss last, else as given."""

    def place(name: str) -> tuple[int, bool]:
        return _LEADING.get(name.partition("_")[0], 2), name.endswith("loss")

    return sorted(metrics, key=place)


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows of as many cells each as lines with their columns under each other; those in `right` end at their right."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]

    def cell(place: int, value: str) -> str:
        gap = " " * (widths[place] - cell_len(value))
        return gap + value if place in right else value + gap

    return ["  " + "  ".join(cell(place, value) for place, value in enumerate(row)).rstrip() for row in rows]


def scores_lines(scores: Json) -> list[str]:
    """Scores under each other, the test's first."""
    return aligned([(name, number(scores[name])) for name in ordered(scores)], right={1})


def verified_lines(found: Json) -> list[str]:
    """Whether a run that was killed and went on is the same as one that was left alone, and where it first was not."""
    losses, weights = found["losses"], found["weights"]
    head = f"killed after step {found['killed_at']} and gone on to step {found['steps']}"
    if found["exact"]:
        return [f"{head}: resumes exactly, {found['steps']} losses and {weights['tensors']} tensors are bit-equal"]
    lines = [f"{head}: does not resume exactly"]
    if losses["first_difference"]:
        step, straight, gone_on = losses["first_difference"]
        lines.append(f"losses differ from step {step} on: {straight} straight, {gone_on} after the kill")
        lines.append(f"the largest difference of a loss is {losses['largest']:.1e}, relative")
    if weights["different"]:
        lines.append(f"{weights['different']} of {weights['tensors']} exported tensors differ")
    if found.get("gpus"):
        lines.append(
            "a few operations of GPUs never repeat their sums to the bit: a difference of rounding may be theirs"
        )
    return lines


def result_lines(result: Json) -> list[str]:
    """The end of a run: its state and cost, its scores with the test's first, and how to load the model."""
    timing = result.get("timing") or {}
    head = [result["status"] + (f" after {counted(result['steps'], 'step')}" if result.get("steps") else "")]
    head += [f"{duration(timing['train_s'])} of training"] if timing.get("train_s") is not None else []
    head += [f"{timing['rows_per_s']:,.0f} rows/s"] if timing.get("rows_per_s") is not None else []
    lines = ["", ", ".join(head)]
    if result.get("error"):
        lines.append(f"  {result['error']}")
    lines += scores_lines(result.get("metrics") or {})
    best = result.get("best")
    if best:
        lines.append(f"best: step {best['step']:,}, {best['metric']} {number(best['value'])}")
    lines += [f"warning: {sentence}" for sentence in result.get("warnings") or ()]
    if result.get("export"):
        lines.append(f"model: {result['export']}")
    if result.get("export") and result.get("pipeline"):
        here = is_local(result["export"])  # transformers loads from no other place
        copied = "" if here else f"rayft export {shlex.quote(result['run'])} FOLDER, then "
        folder = result["export"] if here else "FOLDER"
        lines.append(f'use it: {copied}transformers.pipeline("{result["pipeline"]}", "{folder}")')
    return lines


def fields_text(fields: Json) -> str:
    """`learning_rate 0.0002, layers 4`: the fields of a trial by their last names."""
    return ", ".join(f"{name.rpartition('.')[2]} {_field(value)}" for name, value in fields.items())


def sweep_lines(result: Json) -> list[str]:
    """What a sweep has found, and where it is."""
    counts, best = result["trials"], result["best"]
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    lines = ["", f"{counted(sum(counts.values()), 'trial')} in {duration(result['seconds'])}: {told}"]
    if best:
        lines.append(
            f"best: trial {best['trial']}, {best['metric']} {number(best['value'])} with {fields_text(best['fields'])}"
        )
    metrics = result["metrics"]
    lines += aligned([(f"  {name}", number(metrics[name])) for name in ordered(metrics)])
    if result["cache"]:
        cache = result["cache"]
        lines.append(
            f"frozen blocks: {size(cache['bytes'])} at depth {', '.join(map(str, cache['depths']))}, "
            f"computed in {duration(cache['seconds'])}, saved {duration(cache['saved_s'])}"
        )
    if result["export"]:
        lines.append(f"model: {result['export']}")
    if result.get("why"):
        lines.append(f"{result['why']}; the same command goes on")
    return [*lines, f"recipe of the best trial: {result['run'].rstrip('/')}/best.yaml"]


def list_lines(runs: list[Json]) -> list[str]:
    """The summaries of report.runs as a table."""
    heads = ("run", "status", "steps", "metric", "value", "time", "started")
    rows = []
    for run in runs:
        steps = counted(run["trials"], "trial") if run["trials"] else number(run["steps"])
        score = (run["metric"] or "-", number(run["value"]))
        rows.append((run["name"], run["status"], steps, *score, duration(run["seconds"]), moment(run["started"])))
    return aligned([heads, *rows], right={2, 4, 5})


def run_lines(run: Json) -> list[str]:
    """What report.show says of one run."""
    steps = ("steps", f"{number(run['steps'])} ({number(run['epochs'])} epochs)")
    if run.get("trials"):
        best = run["best"] or {"trial": None, "fields": {}}
        ended = ", ".join(f"{count} {how}" for how, count in run["trials"].items() if count)
        steps = ("trials", f"{ended}; the best is {number(best['trial'])}: {fields_text(best['fields'])}")
    why = run["error"] or run.get("why")
    facts = [
        ("status", run["status"] + (f": {why}" if why else "")),
        steps,
        ("started", f"{moment(run['started'])}, {duration(run['seconds'])} in the last attempt"),
        ("checkpoints", ", ".join(run["checkpoints"]) or "-"),
        ("model", run["export"] or "-"),
    ]
    lines = [run["run"], *aligned(facts), *(f"warning: {sentence}" for sentence in run["warnings"])]
    if run["metrics"]:
        lines += ["", "scores of the model", *scores_lines(run["metrics"])]
    if run["evaluations"]:
        names = ordered(
            dict.fromkeys(name for row in run["evaluations"] for name in row if name not in ("step", "epoch"))
        )
        rows = [("step", "epoch", *names)]
        rows += [
            (number(row["step"]), f"{row['epoch']:.2f}", *(number(row.get(name)) for name in names))
            for row in run["evaluations"]
        ]
        lines += ["", "evaluations", *aligned(rows, right=range(len(rows[0])))]
    if run["timing"]:
        lines += ["", "timing", *aligned([(name, number(value)) for name, value in run["timing"].items()], right={1})]
    return lines


def compare_lines(found: Json) -> list[str]:
    """What report.compare says of two runs."""
    runs = found["runs"]
    lines = aligned(
        [
            ("", *(run["name"] for run in runs)),
            ("status", *(run["status"] for run in runs)),
            ("steps", *(number(run["steps"]) for run in runs)),
            ("time", *(duration(run["seconds"]) for run in runs)),
        ],
    )
    fields = [(name, *map(_field, pair)) for name, pair in found["recipe"].items()]
    lines += ["", "recipe", *aligned(fields)] if fields else ["", "their recipes are the same"]
    scores = [(name, *map(number, found["metrics"][name])) for name in ordered(found["metrics"])]
    return lines + (["", "scores", *aligned(scores, right={1, 2})] if scores else [])


def _field(value: Any) -> str:
    """A recipe's value on one line, as YAML takes it."""
    if isinstance(value, list):
        return f"[{', '.join(_field(one['path'] if _is_plain_source(one) else one) for one in value)}]"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_plain_source(value: Any) -> bool:
    return isinstance(value, dict) and "path" in value and not value.get("where") and value.get("weight", 1.0) == 1.0


def submitted_lines(sent: Json, options: str) -> list[str]:
    """What `rayft submit` did, and how to look after it; `options` lead `rayft jobs` there."""
    did = f"attached to the job that is there ({sent['status'].lower()})" if sent["attached"] else "submitted"
    job = sent["job"]
    rows = [("job", job), ("run", sent["run"]), ("follow", f"rayft jobs logs {job} --follow{options}")]
    return [f"submission {sent['attempt']}: {did}", *aligned([*rows, ("stop", f"rayft jobs stop {job}{options}")])]


def jobs_lines(jobs: list[Json]) -> list[str]:
    """The jobs of a cluster as a table."""
    heads = ("job", "status", "attempt", "step", "loss", "score", "time", "left", "started")
    rows = []
    for job in jobs:
        score = f"{job['metric']} {number(job['value'])}" if job["metric"] else "-"
        work = (number(job["attempt"]), number(job["step"]), number(job["loss"]), score)
        times = (duration(job["seconds"]), duration(job["left_s"]), moment(job["started"]))
        rows.append((job["job"], job["status"], *work, *times))
    return aligned([heads, *rows], right={2, 3, 4, 6, 7})


def job_lines(job: Json) -> list[str]:
    """One job and its run."""
    took = f"{duration(job['seconds'])} so far, {duration(job['left_s'])} left"
    if job["status"] in ("succeeded", "failed", "stopped"):
        took = f"it took {duration(job['seconds'])}"
    score = f"{job['metric']} {number(job['value'])}" if job["metric"] else "-"
    facts = [
        ("status", job["status"] + (f": {why}" if (why := last_line(job["message"])) else "")),
        ("run", job["run"] or "-"),
        ("attempt", number(job["attempt"])),
        ("step", f"{number(job['step'])} ({number(job['epoch'])} epochs), loss {number(job['loss'])}"),
        ("score", score),
        ("started", f"{moment(job['started'])}, {took}"),
    ]
    return [job["job"], *aligned(facts)]


def last_line(message: str | None) -> str:
    """Of what a server says of a job: where that is the end of the job's output, its error."""
    lines = [line.strip() for line in (message or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
