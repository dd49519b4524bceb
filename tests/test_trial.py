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
from rayft.data.prepare import prepare
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
        found.append(threading.active_count())
    return found


@pytest.mark.slow
def test_a_process_that_runs_trial_after_trial_has_no_more_threads_for_it(tmp_path: Path) -> None:
    assert len(set(alone("threads", tmp_path)[1:])) == 1
