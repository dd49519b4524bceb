"""A whole run in a worker group of a test, as under Ray Train where each worker reads its rows itself."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist

from rayft import attempts, storage
from rayft.data.prepare import prepare
from rayft.models import fetch_model, model_identity
from rayft.recipe import Recipe
from rayft.training import checkpoint, checkpoints
from rayft.training.attempt import Run, Setting
from rayft.training.watch import Watch


def trained(plain: dict[str, Any], exports: bool = False) -> dict[str, Any]:
    """On a worker: trains what `plain` says, whose rows are prepared, from the newest checkpoint in its run's folder.

    Gives `losses`, `scores` of each evaluation, `notes`, the `result`, the last checkpoint's `steps`, how many rows
    were `served` from stored states. With `exports` the best model is tested and exported.
    """
    recipe = Recipe.parse(plain)
    path = fetch_model(recipe.model.path)
    rank = dist.get_rank()
    prepared = prepare(recipe, path)
    start = checkpoints.newest(f"{recipe.folder}/checkpoints")
    attempt = attempts.newest(recipe.folder) + 1
    dist.barrier()
    if rank == 0:
        attempts.claim(recipe.folder, [os.path.basename(start)] if start else [], attempt - 1)
    dist.barrier()
    config = {
        "model": path,
        "start": start,
        "attempt": attempt,
        "begun": 0.0,
        "identity": model_identity(path, recipe.model.revision, recipe.train.seed),
    }
    told: list[dict[str, Any]] = []
    setting = Setting(exports=exports)
    device = torch.device("cuda" if recipe.cluster.gpus_per_worker else "cpu")
    run = Run(recipe, config, prepared, device, told.append, Watch(None, rank), setting)
    evaluations = [dict(run.progress.scores) for _ in run.go(Run.own_shares)]
    served = run.prefix.rows_served if run.prefix is not None else 0
    run.close()
    rows = [json.loads(line) for line in storage.read_text(f"{recipe.folder}/metrics.jsonl").splitlines()]
    with checkpoint.Checkpoint(checkpoints.newest(f"{recipe.folder}/checkpoints") or "") as saved:
        steps = saved.state["step"]
    return {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "scores": evaluations,
        "served": served,
        "notes": [event["text"] for event in told if event["event"] == "note"],
        "result": storage.read_json(f"{recipe.folder}/result.json"),
        "steps": steps,
    }


def trained_all(cases: list[dict[str, Any]], exports: bool = False) -> list[dict[str, Any]]:
    """On a worker: one run after another."""
    return [trained(case, exports) for case in cases]
