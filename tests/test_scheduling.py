"""Between a sweep and Ray Tune: the schedulers hear of trials that ended before, and numbers survive copied configs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from rayft import scheduling, trials
from rayft.search import Tune
from rayft.trial import number_of

METRIC = "eval_accuracy"


def sweep(home: Path, scheduler: str, scores: list[list[float]]) -> Any:
    """A sweep of 100 rows an epoch, whose trials ended with these scores, an epoch after the other."""
    for number, found in enumerate(scores):
        trials.propose(str(home), number, {"train.learning_rate": 10.0**-number})
        folder = Path(trials.folder_of(str(home), number))
        rows = [{"step": epoch + 1, "epoch": epoch + 1.0, METRIC: score} for epoch, score in enumerate(found)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = trials.known(str(home))
    for trial, found in zip(known, scores, strict=True):
        trials.end(trial, "finished", {"best": max(found), "rows": 100 * len(found)}, METRIC)
    chunks = [{"row_groups": [100], "rows": 100, "bytes": 1000, "path": "a"}]
    manifest = SimpleNamespace(source_rows=100, shards=chunks)
    from rayft.recipe import Recipe

    plain = {
        "name": "s",
        "task": {"type": "text-classification"},
        "model": {"path": "m"},
        "data": {"train": "t.csv"},
        "train": {"epochs": 9, "global_batch_size": 10, "micro_batch_size": 10},
    }
    tune = Tune.model_validate(
        {"search": {"train.learning_rate": {"choice": [1.0]}}, "trials": 20, "scheduler": scheduler}
    )
    return SimpleNamespace(
        tune=tune, maximize=True, metric=METRIC, ended=known, recipe=Recipe.parse(plain),
        prepared={"train": SimpleNamespace(manifest=manifest)},
    )  # fmt: skip


def decisions(made: TrialScheduler, scores: list[float]) -> list[str]:
    """What the scheduler says of a new trial with these scores, an epoch after the other."""
    stub: Any = scheduling._Stub("new")
    controller: Any = SimpleNamespace(get_live_trials=list)
    made.on_trial_add(controller, stub)
    return [
        made.on_trial_result(controller, stub, {"rows": 100 * (epoch + 1), "value": score})
        for epoch, score in enumerate(scores)
    ]


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_scheduler_that_starts_again_has_heard_of_the_trials_before(tmp_path: Path, scheduler: str) -> None:
    before = [[0.5, 0.6, 0.7], [0.6, 0.7, 0.8], [0.55, 0.6, 0.65]]
    made = scheduling.scheduler(sweep(tmp_path / "a", scheduler, before))
    assert decisions(made, [0.1])[-1] == TrialScheduler.STOP
    made = scheduling.scheduler(sweep(tmp_path / "b", scheduler, before))
    assert decisions(made, [0.9]) == [TrialScheduler.CONTINUE]
    fresh = scheduling.scheduler(sweep(tmp_path / "c", scheduler, []))
    assert decisions(fresh, [0.1]) == [TrialScheduler.CONTINUE]


def test_a_trials_number_follows_from_tunes_own_where_configs_are_copied() -> None:
    assert number_of({"number": 7, "fields": {}}, "8bc0d_00003") == 7
    assert number_of({"place": 0, "numbers": [4, 5, 9], "fields": {}}, "8bc0d_00002") == 9
