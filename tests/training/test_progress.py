"""Which of a run's models is the best so far."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.training.progress import Progress

Evaluation = tuple[dict[str, float], bool, int]  # the scores, whether the model is the best so far, evaluations waited


@pytest.mark.parametrize(
    ("metric", "evaluations"),
    [
        ("accuracy", [({"accuracy": 0.5}, True, 0), ({"accuracy": 0.4}, False, 1), ({"accuracy": 0.6}, True, 0)]),
        ("loss", [({"loss": 0.5}, True, 0), ({"loss": 0.6}, False, 1), ({"loss": 0.4}, True, 0)]),
        # Of equal scores the lower loss is the better; to be patient with, it has brought nothing.
        (
            "accuracy",
            [
                ({"accuracy": 0.5, "loss": 2.0}, True, 0),
                ({"accuracy": 0.5, "loss": 1.0}, True, 1),
                ({"accuracy": 0.5, "loss": 1.0}, False, 2),
                ({"accuracy": 0.5}, False, 3),
            ],
        ),
    ],
)
def test_the_best_model_is_that_of_the_best_score(metric: str, evaluations: list[Evaluation]) -> None:
    progress = Progress(pending=True)
    for number, (scores, better, waited) in enumerate(evaluations, 1):
        progress.step = 10 * number
        before: dict[str, Any] | None = progress.best
        assert progress.judge(scores, metric, ("loss",), attempt=2) is better
        assert (progress.waited, progress.pending) == (waited, False)
        assert progress.scores == {f"eval_{name}": value for name, value in scores.items()}
        expected = {
            "step": progress.step, "metric": f"eval_{metric}", "value": scores[metric],
            "checkpoint": f"step-0000{progress.step}-a2", "scores": progress.scores,
        }  # fmt: skip
        assert progress.best == (expected if better else before)


def test_a_metric_that_the_task_has_not_is_named() -> None:
    with pytest.raises(KeyError, match="the task has no metric 'f1'; it has accuracy, loss"):
        Progress().judge({"loss": 1.0, "accuracy": 0.5}, "f1", (), 1)


def test_early_stopping_waits_for_its_own_metric() -> None:
    """Whichever of the two chooses the best model."""
    progress, waited, better = Progress(), [], []
    for step, (accuracy, loss) in enumerate([(0.5, 3.0), (0.5, 2.0), (0.6, 2.5), (0.5, 1.0)], 1):
        progress.step = step
        scores = {"accuracy": accuracy, "loss": loss}
        better.append(progress.judge(scores, "loss", ("loss",), 1, patient_with="accuracy"))
        waited.append(progress.waited)
    assert better == [True, True, False, True]
    assert waited == [0, 1, 0, 1]


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    progress = Progress()
    assert progress.judge({"loss": float("nan")}, "loss", ("loss",), 1)
    assert progress.judge({"loss": 2.0}, "loss", ("loss",), 1)
    assert not progress.judge({"loss": float("nan")}, "loss", ("loss",), 1)
    assert progress.best is not None
    assert progress.best["value"] == progress.foremost == 2.0
