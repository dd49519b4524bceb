"""What a sweep's folder says of its trials: their recipes, and which of them is the best."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rayft.recipe import Recipe
from rayft.sweeps import trials
from rayft.training.progress import leading_metric, patient_metric

SWEEP: dict[str, Any] = {
    "name": "n",
    "task": {"type": "text-classification"},
    "model": {"path": "m"},
    "data": {"train": "a.csv"},
    "train": {"epochs": 1},
    "storage": "/runs",
}


@pytest.mark.parametrize(
    ("own", "asked", "metric"),
    [
        ({}, None, "accuracy"),
        ({"metric": "eval_matthews"}, None, "matthews"),
        ({"metric": "eval_matthews"}, "loss", "loss"),
        ({"early_stopping": {"patience": 2, "metric": "f1_macro"}}, None, "f1_macro"),
    ],
)
def test_trials_that_stop_early_by_other_metrics_are_compared_by_one(
    own: dict[str, Any], asked: str | None, metric: str
) -> None:
    stopping = [{"patience": 3}, {"patience": 3, "metric": "loss"}]
    search = {"train.early_stopping": {"grid": stopping}}
    tune = {"search": search, "sampler": "grid", "metric": asked}
    sweep = Recipe.parse({**SWEEP, "train": {"epochs": 1, **own}, "tune": tune})
    assert trials.metric_of(sweep) == metric
    found = [trials.trial_recipe(sweep, number, {"train.early_stopping": one}) for number, one in enumerate(stopping)]
    assert [leading_metric(trial) for trial in found] == [metric] * 2
    assert [patient_metric(trial) for trial in found] == [metric, "loss"]


@pytest.mark.parametrize(("maximize", "best"), [(True, 3), (False, 2)])
def test_a_trial_whose_score_is_no_number_is_behind_all_others(maximize: bool, best: int) -> None:
    scores = [math.nan, None, 0.2, 0.9, math.inf, -math.inf, math.nan]
    known = [trials.Known(number, {}, "", "finished", value) for number, value in enumerate(scores)]
    for order in (known, known[::-1]):
        found = trials.best_of(order, maximize)
        assert found is not None
        assert found.number == best
    nothing = trials.best_of(known[::6], maximize)
    assert nothing is not None
    assert nothing.number == 0
