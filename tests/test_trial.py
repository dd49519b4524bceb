"""A trial of one worker, in a process that trains many: what the process keeps, and how it is asked to leave."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import small
from rayft import stopping, storage
from rayft.data.prepare import prepare
from rayft.errors import Stopped
from rayft.models import model_identity
from rayft.recipe import Recipe
from rayft.trial import Shared, _here
from rayft.trials import trial_recipe

RATE = "train.learning_rate"


def alone(function: str, folder: Path) -> Any:
    """What a function of this module gives for `folder`, in a process of its own, whose group of one stays there."""
    text = f"import json, pathlib, test_trial; print(json.dumps(test_trial.{function}(pathlib.Path({str(folder)!r}))))"
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def shared(folder: Path, **changes: Any) -> tuple[Recipe, Shared]:
    """A sweep over learning rates, with its rows prepared."""
    model = str(folder / "model")
    small.small_bert(folder / "model", blocks=1)
    changes = {"cluster__workers": 1, "deepspeed__zero_stage": 0, "train__micro_batch_size": 16, **changes}
    plain = small.recipe(folder, model, **changes)
    plain["tune"] = {"search": {RATE: {"log_uniform": [1e-5, 1e-2]}}, "trials": 9}
    recipe = Recipe.parse(plain).resolved()
    folders = {split: data.folder for split, data in prepare(recipe, model).items()}
    return recipe, Shared(recipe.dump(), folders, model_identity(model, None, 0), None)


def threads(folder: Path) -> list[int]:
    """How many there are after each of six trials."""
    recipe, given = shared(folder, train__max_steps=2, train__evaluate_every="2 steps")
    found = []
    for number in range(6):
        for _ in _here(trial_recipe(recipe, number, {RATE: 1e-3}), given):
            pass
        # Those that look for requests end by themselves, a moment later.
        found.append(sum(not thread.name.endswith("(_look)") for thread in threading.enumerate()))
    return found


@pytest.mark.slow
def test_a_process_that_runs_trial_after_trial_has_no_more_threads_for_it(tmp_path: Path) -> None:
    assert len(set(alone("threads", tmp_path)[1:])) == 1


def asked_after_three_steps(folder: Path) -> dict[str, Any]:
    """A trial that is asked to stop on its way to its only evaluation, and goes on later."""
    recipe, given = shared(folder, train__max_steps=8, train__evaluate_every="8 steps")
    trial = trial_recipe(recipe, 0, {RATE: 1e-3})
    run, never = Path(trial.folder), stopping.Stop.asked
    stopping.Stop.asked = lambda self: "the sweep" if len(small.metrics(run)) >= 3 else None  # type: ignore[method-assign]
    try:
        for _ in _here(trial, given):
            pass
    except Stopped as error:
        told = str(error)
    stopping.Stop.asked = never  # type: ignore[method-assign]
    stopped = storage.read_json(f"{run}/run.json")["status"]
    scored = [evaluated.step for evaluated in _here(trial, given)]
    return {
        "told": told, "stopped": stopped, "scored": scored, "steps": list(small.losses(run)),
        "ended": storage.read_json(f"{run}/run.json")["status"],
    }  # fmt: skip


@pytest.mark.slow
def test_a_trial_that_is_asked_to_stop_commits_a_checkpoint_and_goes_on_from_there(tmp_path: Path) -> None:
    found = alone("asked_after_three_steps", tmp_path)
    assert found == {
        "told": "stopped by the sweep; the same command goes on from step 4",
        "stopped": "stopped",
        "scored": [8],
        "steps": [1, 2, 3, 4, 5, 6, 7, 8],
        "ended": "finished",
    }
