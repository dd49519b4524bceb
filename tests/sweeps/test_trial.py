"""A trial of one worker, in a process that trains many: what the process keeps, how it is asked to leave, and what it
makes of a damaged checkpoint of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import small
from rayft import storage
from rayft.data.prepare import prepare
from rayft.errors import Damaged, Stopped
from rayft.launch import stopping
from rayft.models import model_identity
from rayft.recipe import Recipe
from rayft.sweeps.trial import Evaluated, Shared, Trial, _here, _identity
from rayft.sweeps.trials import trial_recipe
from rayft.training import checkpoints

RATE = "train.learning_rate"


def alone(function: str, folder: Path) -> Any:
    """What a function of this module gives for `folder`, in a process of its own, whose group of one stays there."""
    found = f"test_trial.{function}(pathlib.Path({str(folder)!r}))"
    text = f"import json, pathlib; from sweeps import test_trial; print(json.dumps({found}))"
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
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


def saved(folder: Path, step: int) -> str:
    path = str(folder / "checkpoints" / checkpoints.folder_name(step, 1))
    storage.commit(path, {"step": step, "best": None})
    return path


def trial(plain: dict[str, Any]) -> Trial:
    made = object.__new__(Trial)
    made.sweep, made.config, made._trial_info = Recipe.parse(plain), {"number": 0, "fields": {}}, None
    made.begun = time.monotonic()
    return made


def test_a_trial_whose_checkpoint_is_damaged_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trial(small.recipe(tmp_path, "nowhere"))
    folder = tmp_path / "runs" / "small" / "trials" / "00000"
    before, newest = saved(folder, 1), saved(folder, 2)

    def work(self: Trial, fields: dict[str, Any]) -> Iterator[Evaluated]:
        start = checkpoints.newest(f"{self.folder}/checkpoints")
        if start == newest:
            raise Damaged(newest, f"{newest}/rank-00000.safetensors", "is missing")
        assert start == before
        yield Evaluated(3, 30, 0.5, 0.5, {})

    monkeypatch.setattr(Trial, "_work", work)
    made._start(made.config)
    assert made.step()["step"] == 3


def test_a_trial_whose_rows_are_damaged_fails_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trial(small.recipe(tmp_path, "nowhere"))

    def work(self: Trial, fields: dict[str, Any]) -> Iterator[Evaluated]:
        raise Damaged("prepared/key", "prepared/key/1.parquet", "is missing")
        yield

    monkeypatch.setattr(Trial, "_work", work)
    made._start(made.config)
    told = made.step()
    assert (told["error"], told["done"]) == ("prepared/key/1.parquet: is missing", True)


def test_trials_of_other_revisions_share_no_identity(tmp_path: Path) -> None:
    """Under which the output of frozen blocks is stored."""
    sweep = Recipe.parse(small.recipe(tmp_path, "some/model"))
    given = Shared(sweep.dump(), {}, "the sweep's own", None)
    fields = [{}, {"model.revision": "v1"}, {"model.revision": "v2"}]
    found = [_identity(trial_recipe(sweep, 0, one), "some/model", given) for one in fields]
    assert found == ["the sweep's own", "hub:some/model@v1", "hub:some/model@v2"]
