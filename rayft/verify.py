"""Does this recipe, on this cluster, resume exactly? Trains it twice, once killed half-way, and compares.

Both runs are processes of their own, as a user starts them, and the kill is SIGKILL: nothing of the killed one is left
but what lies in storage. With GPUs both take algorithms that give equal sums (`training/repeatable.py`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayft import storage
from rayft.errors import RunRefused, TrainingError
from rayft.recipe import Every, Recipe
from rayft.training import checkpoints, repeatable

Show = Callable[[dict[str, Any]], None]

STEPS = 8  # before the kill, and after it
TRIES = 3  # each with twice the steps, where the run had ended before it could be killed
LOOK_S = 0.05


def verify(recipe: Recipe, steps: int, *, show: Show, keep: bool = False) -> dict[str, Any]:
    """Trains 2 x `steps` optimizer steps straight, and again with a SIGKILL after the checkpoint at `steps`.

    {"exact", "gpus", "steps", "killed_at", "losses": {"equal", "first_difference", "largest"}, "weights": {"equal",
    "different"}}: `killed_at` is the step that the run went on from, `largest` the largest relative difference of a
    loss, `gpus` whether they were computed on GPUs, a few of whose operations know no algorithm that repeats its sums.
    Raises TrainingError where one of the runs fails. With `keep` both runs stay in `<storage>/<name>-verify`.
    """
    recipe = recipe.resolved()
    home = f"{recipe.folder}-verify"
    if storage.listing(home):
        storage.delete(home)
    with tempfile.TemporaryDirectory(prefix="rayft-verify-") as files:
        for number in range(TRIES):
            count = steps * 2**number
            killed = _short(recipe, f"killed-{count}", count)
            show({"event": "stage", "name": f"training {count} steps, to be killed"})
            reached = _killed(killed, count, Path(files))
            if reached is not None:
                break
        else:
            raise TrainingError(f"the run ended before it could be killed; name more steps than {steps} with --steps")
        show({"event": "stage", "name": f"going on from step {reached}"})
        _run(killed, Path(files))
        straight = _short(recipe, f"straight-{count}", count)
        show({"event": "stage", "name": f"training {2 * count} steps straight"})
        _run(straight, Path(files))
    result = {"steps": 2 * count, "killed_at": reached, **compared(straight.folder, killed.folder)}
    if not keep:
        storage.delete(home)
    exact = result["losses"]["equal"] and result["weights"]["equal"]
    return {"exact": exact, "gpus": recipe.cluster.gpus_per_worker > 0, **result}


def _short(recipe: Recipe, name: str, steps: int) -> Recipe:
    """The recipe as a run of its own of 2 x `steps` steps, with a checkpoint half-way."""
    train = recipe.train.model_copy(
        update={
            "epochs": None,
            "max_steps": 2 * steps,
            "save_every": Every(count=steps, unit="steps"),
            "evaluate_every": Every(count=2 * steps, unit="steps"),
            "early_stopping": None,
        }
    )
    return recipe.model_copy(update={"name": f"{recipe.name}-verify/{name}", "train": train, "tune": None})


def _start(recipe: Recipe, files: Path) -> subprocess.Popen[str]:
    file = files / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    # A session of its own, so that Ctrl-C in this terminal reaches this process alone, which then ends that one.
    return subprocess.Popen(
        [sys.executable, "-m", "rayft", "run", "--json", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | (repeatable.ENVIRONMENT if recipe.cluster.gpus_per_worker else {}),
        start_new_session=True,
    )


def _run(recipe: Recipe, files: Path) -> None:
    process = _start(recipe, files)
    try:
        _ended(process)
    finally:
        _kill(process)


def _ended(process: subprocess.Popen[str]) -> None:
    """Waits; raises where the run did not finish."""
    output, _ = process.communicate()
    if process.returncode == 0:
        return
    try:
        told = json.loads(output)["error"]
    except (ValueError, KeyError):
        told = f"exit code {process.returncode}"
    raise (RunRefused if process.returncode == RunRefused.exit_code else TrainingError)(told)


def _killed(recipe: Recipe, steps: int, files: Path) -> int | None:
    """Kills a run once it has committed step `steps`; the step that it will go on from. None where it had ended."""
    folder = storage.join(recipe.folder, "checkpoints")
    process = _start(recipe, files)
    try:
        while checkpoints.newest(folder) is None:
            if process.poll() is not None:
                _ended(process)
                return None
            time.sleep(LOOK_S)
    finally:
        _kill(process)
    newest = checkpoints.newest(folder)
    reached = checkpoints.step_of(newest) if newest else 0
    return reached if reached < 2 * steps else None


def _kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the driver, and for the Ray and the workers that it started on this machine."""
    import psutil

    try:
        victims = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for victim in victims:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.communicate()
    psutil.wait_procs(victims)


def compared(straight: str, killed: str) -> dict[str, Any]:
    """How the losses and the exported weights of two runs differ; see `verify`."""
    ours, theirs = _losses(straight), _losses(killed)
    different = [step for step in sorted(ours | theirs) if ours.get(step) != theirs.get(step)]
    both = [step for step in ours if step in theirs]
    first = different[0] if different else None
    weights = {run: _weights(run) for run in (straight, killed)}
    names = sorted(weights[straight].keys() | weights[killed].keys())
    unlike = [name for name in names if not _same(weights[straight].get(name), weights[killed].get(name))]
    return {
        "losses": {
            "equal": not different,
            "first_difference": None if first is None else [first, ours.get(first), theirs.get(first)],
            "largest": max((abs(theirs[step] / ours[step] - 1) for step in both if ours[step]), default=0.0),
        },
        "weights": {"equal": not unlike, "tensors": len(names), "different": len(unlike)},
    }


def _losses(run: str) -> dict[int, float]:
    rows = [json.loads(line) for line in storage.read_text(storage.join(run, "metrics.jsonl")).splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _weights(run: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rayft-verify-") as local:
        storage.download(storage.join(run, "export"), local)
        for file in sorted(Path(local).rglob("*.safetensors")):
            found |= {f"{os.path.relpath(file, local)}/{name}": value for name, value in load_file(file).items()}
    return found


def _same(one: Any, other: Any) -> bool:
    """Are both there, of one kind, and equal to the last bit?"""
    import torch

    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
