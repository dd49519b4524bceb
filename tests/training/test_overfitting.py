"""Overfitting is told where it happened, with what would help, and nowhere else."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rayft import report
from rayft.recipe import Recipe
from rayft.reports import history
from rayft.reports.snapshots import Files
from rayft.text import result_lines, run_lines
from rayft.training.overfitting import Point, overfit, points, warnings
from small import recipe as small_recipe
from small import small_bert, sms_rows


def curve(*losses: tuple[float, float]) -> list[Point]:
    """(training, validation) losses of the evaluations at steps 10, 20, …"""
    return [Point(10 * (number + 1), *pair) for number, pair in enumerate(losses)]


MEMORISED = curve((0.6, 0.5), (0.3, 0.4), (0.1, 0.6), (0.02, 0.9))


@pytest.mark.parametrize(
    ("found", "best_step", "smoothed", "lowest"),
    [
        (MEMORISED, 20, False, 20),
        (MEMORISED, 10, False, 20),  # the best score came even earlier
        (MEMORISED, 40, False, None),  # the score still rises
        ([], 0, False, None),
        (MEMORISED[-1:], 40, False, None),  # one evaluation, as in jobs/quickstart.yaml
        # As in jobs/text_classification.yaml: both fall.
        (curve((3.6, 2.6), (1.4, 0.9), (0.7, 0.5)), 30, False, None),
        (curve((0.6, 0.50), (0.4, 0.40), (0.3, 0.43)), 20, False, None),  # a wave
        (curve((0.6, 0.50), (0.4, 0.40), (0.3, 0.45)), 20, False, 20),
        # It diverges: the training loss rises as well.
        (curve((0.6, 0.5), (0.5, 0.4), (0.9, 0.8)), 20, False, None),
        # The validation rows are the easier ones, or training drops much out.
        (curve((2.0, 0.5), (1.8, 0.4), (1.7, 0.5)), 20, False, None),
        # The loss of smoothed labels can't fall below their entropy: it may stay the higher one.
        (curve((0.9, 0.5), (0.8, 0.4), (0.7, 0.6)), 20, True, 20),
        (curve((0.9, 0.5), (0.8, 0.4), (0.7, 0.6)), 20, False, None),
        (curve((0.9, 0.5), (0.7, 0.4), (0.7, 0.6)), 20, True, None),
        # A likelihood of numbers may be negative.
        (curve((0.1, -1.0), (-1.5, -2.0), (-3.0, -1.0)), 20, False, 20),
    ],
)
def test_where_the_training_loss_leaves_the_validation_loss_behind(
    found: list[Point], best_step: int, smoothed: bool, lowest: int | None
) -> None:
    told = overfit(found, best_step, smoothed)
    assert (told.step if told else None) == lowest


def test_points_are_means_between_evaluations() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_accuracy": 0.5, "eval_loss": 2.5},
        {"step": 3, "loss": 1.0},
        {"step": 3, "eval_accuracy": 0.6, "eval_loss": 1.5},
        {"step": 3, "eval_accuracy": 0.6, "eval_loss": 1.5, "test_loss": 1.4},  # what a run writes at its end
    ]
    assert points(map(json.dumps, rows)) == [Point(2, 3.0, 2.5), Point(3, 1.0, 1.5)]


def asked(**fields: Any) -> Recipe:
    plain = {
        "name": "x",
        "task": {"type": "text-classification"},
        "model": {"path": "m"},
        "data": {"train": "d.csv"},
        "train": {"epochs": 4},
    }
    return Recipe.parse(plain, overrides=[f"{name.replace('__', '.')}={value}" for name, value in fields.items()])


def test_what_would_help_names_fields_that_are_not_used_yet() -> None:
    (said,) = warnings(asked(), MEMORISED, 20)
    assert said == (
        "overfitting: from step 20 to step 40 the training loss fell from 0.3 to 0.02 while the validation loss rose "
        "from 0.4 to 0.9; the model of step 20 is kept, and more rows or train.early_stopping, fewer train.epochs, a "
        "lower train.learning_rate, model.freeze, train.label_smoothing, a higher train.weight_decay or a higher "
        "model.dropout would help"
    )
    (said,) = warnings(asked(model__freeze="2", train__label_smoothing="0.1"), MEMORISED, 20)
    assert "model.freeze" not in said
    assert "label_smoothing" not in said
    assert warnings(asked(), MEMORISED, 40) == []
    (said,) = warnings(asked(task="{type: sequence-regression}"), MEMORISED, 20)
    assert "label_smoothing" not in said


def test_a_result_tells_its_warnings() -> None:
    result = {"status": "finished", "metrics": {}, "warnings": ["overfitting: …"]}
    assert "warning: overfitting: …" in result_lines(result)
    known = {"run": "r", "status": "finished", "error": None, "steps": 4, "epochs": 1, "started": None, "seconds": 1.0}
    known |= {"checkpoints": [], "export": None, "metrics": {}, "evaluations": [], "timing": {}}
    assert "warning: overfitting: …" in run_lines({**known, "warnings": ["overfitting: …"]})
    assert not any("warning" in line for line in run_lines({**known, "warnings": []}))


@pytest.mark.slow
def test_a_run_that_learns_its_rows_by_heart_is_told_so(tmp_path: Path, ray_local: None) -> None:
    """Labels that follow from nothing, few rows, many epochs, a high rate."""
    from rayft.run import run

    plain = small_recipe(tmp_path, small_bert(tmp_path / "bert"), cluster__workers=1, model__dropout=0.0)
    chance = random.Random(0)
    for split, rows in (("train", 24), ("validation", 41)):
        source = Path(sms_rows(tmp_path / "rows.csv", rows, split))
        with source.open(newline="", encoding="utf-8") as file:
            found = [{**row, "label": chance.choice(["a", "b"])} for row in csv.DictReader(file)]
        plain["data"][split] = str(tmp_path / f"{split}.jsonl")
        Path(plain["data"][split]).write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    del plain["data"]["test"]
    plain["train"] |= {"epochs": 30, "learning_rate": 5e-3, "metric": "eval_loss", "evaluate_every": "12 steps"}
    result = run(Recipe.parse(plain), show=lambda event: None)
    (said,) = result["warnings"]
    assert said.startswith("overfitting: from step ")
    assert f"warning: {said}" in result_lines(result)
    assert f"warning: {said}" in run_lines(report.show(result["run"]))
    assert history.run(Files(), result["run"])["warnings"] == [said]
