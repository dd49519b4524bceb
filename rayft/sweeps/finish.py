"""The end of a sweep: its best trial's model, scored on the test rows and exported."""

from __future__ import annotations

import os
from typing import Any

from rayft import storage
from rayft.data.prepared import Prepared
from rayft.errors import CheckpointError
from rayft.models import fetch_model
from rayft.recipe import Recipe
from rayft.training import checkpoints


def finish(recipe: Recipe, prepared: dict[str, Prepared], target: str) -> dict[str, float]:
    """Scores the best model of a trial's run on the test rows, exports it to `target`; its scores.

    Where trials have several workers, or a GPU, that takes the same resources; else it happens in this process.
    """
    if recipe.cluster.max_workers > 1:
        return _by_run(recipe, target)
    folders = {split: data.folder for split, data in prepared.items()}
    if not recipe.cluster.gpus_per_worker:
        return scored(recipe.dump(), folders, target)
    import ray

    task = ray.remote(num_cpus=recipe.cluster.cpus_per_worker, num_gpus=recipe.cluster.gpus_per_worker)(scored)
    found: dict[str, float] = ray.get(task.remote(recipe.dump(), folders, target))
    return found


def _by_run(recipe: Recipe, target: str) -> dict[str, float]:
    """Its workers test and export what the trial has come to. What its folder says of the trial stays as it is."""
    import tempfile

    from rayft.run import run

    paths = [storage.join(recipe.folder, name) for name in ("run.json", "result.json")]
    own = {path: storage.read_json(path) if storage.exists(path) else None for path in paths}
    try:
        result = run(recipe, show=lambda event: None, trains=False)
    finally:
        for path, said in own.items():
            if said is None:
                storage.delete(path)
            else:
                storage.write_json(path, said)
    with tempfile.TemporaryDirectory(prefix="rayft-export-") as local:
        storage.download(result["export"], local)
        storage.delete(target)
        storage.upload(local, target, marker="rayft.json")
    storage.delete(result["export"])
    scores: dict[str, float] = result["metrics"]
    return scores


def scored(plain: dict[str, Any], folders: dict[str, str], target: str) -> dict[str, float]:
    """In one process: builds the best model, scores it, exports it."""
    import torch

    from rayft.sweeps.trial import alone
    from rayft.training import checkpoint, export, freeze, pictures
    from rayft.training.assembly import pretrained
    from rayft.training.evaluate import Network, evaluate
    from rayft.training.first_token import read_first
    from rayft.training.watch import Watch

    recipe = Recipe.parse(plain)
    task, gpu = recipe.task, recipe.cluster.gpus_per_worker > 0
    alone(max(recipe.cluster.cpus_per_worker, os.cpu_count() or 1), gpu, trains=False)
    prepared = {split: Prepared.open(folder) for split, folder in folders.items()}
    facts = prepared["train"].manifest.facts
    base = pretrained(recipe, fetch_model(recipe.model.path))
    processor = task.processor(base)
    best, step, scores = _best(recipe.folder)
    if "test" in prepared:
        network = task.load(base, facts, processor)
        if recipe.model.lora is not None:
            network = freeze.adapted(network, recipe, task.blocks(network), export.new_parameters(network))
        read_first(task, network, task.blocks(network))
        with checkpoint.Checkpoint(best) as saved:
            saved.load_weights(network)
        device = torch.device("cuda" if gpu else "cpu")
        model = Network(network.to(device), task, processor, facts, device)
        size = 2 * recipe.train.micro_batch_size
        narrow = recipe.model.dtype != "float32"
        with torch.autocast(device.type, getattr(torch, recipe.model.dtype), enabled=narrow):
            drawn = pictures.keep(recipe.folder, step, "test")
            tested = evaluate(model, prepared["test"], size, Watch(None, 0), keep=drawn)
        scores |= {f"test_{name}": value for name, value in (tested or {}).items()}
    data = {split: one.manifest.key for split, one in prepared.items()}
    export.export(recipe, base, facts, best, scores, data, target)
    return scores


def _best(run: str) -> tuple[str, int, dict[str, float]]:
    """The checkpoint of a run's best model, its step and its validation scores."""
    folder = storage.join(run, "checkpoints")
    best = checkpoints.best(folder)
    if best is None:
        raise CheckpointError(f"{run} has no checkpoint of its best model")
    return storage.join(folder, best["checkpoint"]), int(best["step"]), dict(best["scores"])
