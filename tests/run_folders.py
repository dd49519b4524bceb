"""Folders as runs and preparations leave them, as old as a test wants them."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from rayft import leftovers, storage

KEY = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba98" * 4
THIRD = "89abcdef" * 4
RECIPE = "name: {name}\ntrain:\n  epochs: 2\n  learning_rate: {rate}\ndata:\n  train:\n  - path: /data/a.csv\n"


def write_run(
    where: str, name: str, status: str = "finished", silent_s: float = 0.0, rate: str = "5e-05", **fields: Any
) -> str:
    """A run's folder as a run leaves it; one that is not running has a result."""
    run, now = storage.join(where, name), time.time()
    state = {"status": status, "attempt": 1, "host": "elsewhere", "pid": 1, "pid_started": 0.0, "model": "m"}
    times = {"started": now - silent_s - 60, "heartbeat": now - silent_s}
    storage.write_json(storage.join(run, "run.json"), {**state, **times, "prepared": {"train": KEY}, **fields})
    storage.write_text(storage.join(run, "recipe.yaml"), RECIPE.format(name=name, rate=rate))
    rows: list[dict[str, Any]] = []
    for step in range(1, 5):
        rows.append({"step": step, "epoch": step / 2, "loss": 1 / step, "learning_rate": 1e-4})
        rows += (
            [{"step": step, "epoch": step / 2, "eval_loss": 1 / step, "eval_accuracy": step / 8}]
            if step % 2 == 0
            else []
        )
    if status == "finished":
        rows.append({"step": 4, "epoch": 2.0, "eval_loss": 0.25, "eval_accuracy": 0.5, "test_accuracy": 0.4})
        metrics = {"eval_accuracy": 0.5, "eval_loss": 0.25, "test_accuracy": 0.4}
        best = {"step": 4, "metric": "eval_accuracy", "value": 0.5}
        result = {
            "run": run,
            "status": status,
            "error": None,
            "steps": 4,
            "epochs": 2.0,
            "metrics": metrics,
            "best": best,
        }
        more = {"export": storage.join(run, "export"), "timing": {"train_s": 12.0, "data_wait": None}}
        storage.write_json(storage.join(run, "result.json"), {**result, **more})
    elif status == "failed":
        result = {
            "run": run,
            "status": status,
            "error": "a worker was lost",
            "steps": None,
            "epochs": None,
            "metrics": {},
        }
        storage.write_json(storage.join(run, "result.json"), {**result, "best": None, "export": None, "timing": {}})
    storage.write_text(storage.join(run, "metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    storage.write_json(storage.join(run, "attempts", "000001.json"), {"number": 1, "accepts": []})
    return run


def age(folder: str, days: float) -> None:
    for entry in storage.listing(folder):
        then = time.time() - days * leftovers.DAY_S
        os.utime(entry.path, (then, then))


def shards(where: str, key: str, days: float, size: int = 100) -> str:
    folder = storage.join(where, "prepared", key)
    storage.write_bytes(storage.join(folder, "part-00000.parquet"), b"x" * size)
    age(folder, days)
    return folder
