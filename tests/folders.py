"""Folders of runs and sweeps with just the files that runs and sweeps write, for tests of what reads them."""

from __future__ import annotations

import json
import math
import random
import time
from typing import Any

from rayft import document, storage

KEY = "0123456789abcdef0123456789abcdef"
SEARCH: dict[str, Any] = {
    "train.learning_rate": {"log_uniform": [1e-5, 1e-2]},
    "model.freeze.layers": {"choice": [0, 2, 4]},
    "train.optimizer.weight_decay": {"uniform": [0.0, 0.1]},
}


def write_lines(run: str, rows: list[dict[str, Any]]) -> None:
    storage.write_text(storage.join(run, "metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def metric_rows(steps: int, every: int, top: float = 0.9, seed: int = 0) -> list[dict[str, Any]]:
    """What a run of `steps` steps, ten an epoch, that evaluates at each `every`-th writes; its accuracy nears `top`."""
    noise, rows = random.Random(seed), list[dict[str, Any]]()
    for step in range(1, steps + 1):
        place = {"step": step, "epoch": step / 10}
        loss = 2 * math.exp(-step / steps * 3) + noise.random() / 10
        speed = {"rows_per_s": 120 + noise.random() * 9, "tokens_per_s": 5400 + noise.random() * 300}
        rows.append({**place, "loss": loss, "learning_rate": 1e-4 * (1 - step / steps), **speed})
        if step % every == 0:
            accuracy = top * (1 - math.exp(-step / steps * 4)) + noise.random() / 1000
            rows.append(
                {**place, "eval_accuracy": accuracy, "eval_macro_f1": accuracy * 0.97, "eval_loss": loss + 0.05}
            )
    return rows


def write_state(run: str, status: str, silent_s: float = 0.0, started_s: float = 90.0, **fields: Any) -> None:
    now = time.time()
    state = {"status": status, "host": "machine-1", "pid": 7, "pid_started": 0.0, "attempt": 1, "model": "m"}
    times = {"started": now - silent_s - started_s, "heartbeat": now - silent_s}
    storage.write_json(storage.join(run, "run.json"), {**state, **times, "prepared": {"train": KEY}, **fields})


def write_manifest(where: str, key: str = KEY, **fields: Any) -> None:
    lengths = [[16, 120], [32, 400], [64, 210], [128, 41]]
    counts = {"rows": 771, "source_rows": 774, "tokens": 23456, "longest": 117, "truncated": 12}
    lost = {"dropped": {"no label": 2}, "bad": {"count": 1, "examples": ["a.csv:7: not UTF-8"]}}
    manifest = {"key": key, "split": "train", **counts, **lost, "lengths": lengths, "cut": 0, **fields}
    storage.write_json(storage.join(where, "prepared", key, "manifest.json"), manifest)


def write_run(where: str, name: str, status: str = "finished", attempts: int = 1, **fields: Any) -> str:
    """A run of 40 steps that evaluates four times."""
    run, rows = storage.join(where, name), metric_rows(40, 10)
    write_state(run, status, **fields)
    recipe = {"name": name, "train": {"epochs": 4, "learning_rate": 5e-5}, "storage": where, "tune": None}
    storage.write_text(storage.join(run, "recipe.yaml"), document.write(recipe))
    for number in range(1, attempts + 1):
        claim = {"number": number, "host": f"machine-{number}", "pid": 70 + number, "since": 1.8e9 + 60 * number}
        storage.write_json(storage.join(run, "attempts", f"{number:06d}.json"), {**claim, "accepts": [], "token": "t"})
    if status != "running":
        last = rows[-1]
        final = {"eval_accuracy": last["eval_accuracy"], "eval_loss": last["eval_loss"], "test_accuracy": 0.8123456789}
        rows.append({"step": 40, "epoch": 4.0, **final})
        best = {"step": 40, "metric": "eval_accuracy", "value": last["eval_accuracy"]}
        timing = {
            "first_step_s": 3.25,
            "train_s": 61.5,
            "rows_per_s": 123.456,
            "tokens_per_s": 5500.5,
            "data_wait": None,
        }
        result = {
            "run": run,
            "status": status,
            "error": None,
            "steps": 40,
            "epochs": 4.0,
            "metrics": final,
            "best": best,
        }
        storage.write_json(
            storage.join(run, "result.json"), {**result, "export": storage.join(run, "export"), "timing": timing}
        )
    write_lines(run, rows)
    return run


def trial_fields(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    rate = 10 ** draw.uniform(-5, -2)
    decay = draw.uniform(0, 0.1)
    return {
        "train.learning_rate": rate,
        "model.freeze.layers": (0, 2, 4)[number % 3],
        "train.optimizer.weight_decay": decay,
    }


def trial_top(fields: dict[str, Any]) -> float:
    """The accuracy that a trial nears: the rate matters most, then the depth, weight decay nearly nothing."""
    off = math.log10(fields["train.learning_rate"]) + 3.3
    return 0.93 - 0.08 * off**2 - 0.012 * fields["model.freeze.layers"] + 0.02 * fields["train.optimizer.weight_decay"]


def write_trial(sweep: str, number: int, status: str = "finished", steps: int = 40, **fields: Any) -> str:
    """A trial of up to 40 steps, four rows each."""
    trial = storage.join(sweep, "trials", f"{number:05d}")
    chosen = {**trial_fields(number), **fields}
    storage.write_json(storage.join(trial, "trial.json"), {"trial": number, "fields": chosen})
    if status == "waiting":
        return trial
    write_state(trial, "running" if status == "running" else status, started_s=12.5)
    rows = metric_rows(steps, 10, trial_top(chosen), number)
    write_lines(trial, rows)
    if status != "running":
        values = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
        best = {"step": steps, "metric": "eval_accuracy", "value": max(values)} if values else None
        result = {"run": trial, "status": status, "error": "out of memory" if status == "failed" else None}
        more = {"steps": steps, "epochs": steps / 10, "rows": 4 * steps, "seconds": 11.75 + number / 8}
        scores = {"metrics": {"eval_accuracy": max(values)} if values else {}, "best": best}
        timing = {"timing": {"train_s": 10.0, "cache_saved_s": 2.5}}
        storage.write_json(storage.join(trial, "result.json"), {**result, **more, **scores, **timing})
    return trial


def trial_status(number: int) -> tuple[str, int]:
    """(status, steps) of a trial in a sweep whose scheduler stops half of them early and in which few fail."""
    if number % 17 == 16:
        return "failed", 5
    return ("stopped", 10 + 10 * (number % 3)) if number % 2 else ("finished", 40)


def write_sweep(where: str, name: str, trials: int, status: str = "finished") -> str:
    sweep = storage.join(where, name)
    tune = {"search": SEARCH, "trials": trials, "sampler": "random", "scheduler": "asha", "metric": "eval_accuracy"}
    recipe = {"name": name, "train": {"epochs": 4}, "storage": where, "tune": {**tune, "mode": "max", "seed": 0}}
    write_state(sweep, status, started_s=600.0)
    storage.write_text(storage.join(sweep, "recipe.yaml"), document.write(recipe))
    for number in range(trials):
        write_trial(sweep, number, *trial_status(number))
    if status == "finished":
        _write_end(sweep, trials)
    return sweep


def _write_end(sweep: str, trials: int) -> None:
    statuses = [trial_status(number)[0] for number in range(trials)]
    results = [
        (storage.read_json(storage.join(sweep, "trials", f"{number:05d}", "result.json")), number)
        for number in range(trials)
        if statuses[number] != "failed"
    ]
    value, number = max((result["best"]["value"], number) for result, number in results)
    best = {"trial": number, "metric": "eval_accuracy", "value": value, "fields": trial_fields(number)}
    counts = {each: statuses.count(each) for each in ("finished", "stopped", "failed")}
    cache = {"depths": [2, 4], "bytes": 12_345_678, "seconds": 4.5, "saved_s": 2.5 * trials}
    result = {"run": sweep, "status": "finished", "error": None, "trials": counts, "best": best, "seconds": 601.25}
    storage.write_json(storage.join(sweep, "result.json"), {**result, "cache": cache})
    storage.write_text(storage.join(sweep, "best.yaml"), f"name: {sweep.rpartition('/')[2]}-best\n")
