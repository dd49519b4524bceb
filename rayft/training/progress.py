"""Where a run stands, and which of its models is the best so far."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from rayft.recipe import Recipe
from rayft.training import checkpoints


@dataclass
class Progress:
    """Where a run stands and what it remembers: everything a checkpoint's `state.json` holds beside the tensors.

    `step` optimizer steps are done; `waited` counts evaluations without a better score of those that early stopping
    looks at, of which `foremost` is the best so far.
    """

    step: int = 0
    best: dict[str, Any] | None = None  # {"step", "metric", "value", "checkpoint"}
    waited: int = 0
    pending: bool = False  # the evaluation at `step` is still to come
    scores: dict[str, float] = field(default_factory=dict)
    cohorts: dict[str, int] = field(default_factory=dict)  # parameter -> the epoch in which it began to learn
    finished: bool = False
    foremost: float | None = None
    stored: int | None = None  # steps start from the stored states of that depth; 0: from none; None: not decided yet

    def judge(
        self,
        scores: dict[str, float],
        metric: str,
        lower_is_better: Collection[str],
        attempt: int,
        patient_with: str | None = None,
    ) -> bool:
        """Takes in the scores of an evaluation at `step`; whether the model is the best so far, by `metric`.

        Few validation rows often give equal scores: the model with the lower loss is the better one then. Early
        stopping waits for a better `patient_with`, or `metric`. Raises KeyError where the task has no such metric.
        """
        self.pending = False
        self.scores = {f"eval_{name}": value for name, value in scores.items()}
        for name in (metric, patient_with or metric):
            if name not in scores:
                raise KeyError(f"the task has no metric {name!r}; it has {', '.join(sorted(scores))}")
        self._wait(scores[patient_with or metric], (patient_with or metric) in lower_is_better)
        value, lower = scores[metric], metric in lower_is_better
        best, loss = self.best, scores.get("loss", math.inf)
        ahead = best is None or _better(value, best["value"], lower)
        level = best is not None and value == best["value"] and loss < best["scores"].get("eval_loss", math.inf)
        if ahead or level:
            self.best = {
                "step": self.step,
                "metric": f"eval_{metric}",
                "value": value,
                "checkpoint": checkpoints.folder_name(self.step, attempt),
                "scores": self.scores,
            }
        return ahead or level

    def _wait(self, value: float, lower: bool) -> None:
        if self.foremost is None or _better(value, self.foremost, lower):
            self.foremost, self.waited = value, 0
        else:
            self.waited += 1


def _better(value: float, than: float, lower: bool) -> bool:
    return (math.isnan(than) and not math.isnan(value)) or (value < than if lower else value > than)


def patient_metric(recipe: Recipe) -> str:
    """The metric, without `eval_`, that early stopping waits to get better."""
    stopping = recipe.train.early_stopping
    return (stopping.metric if stopping and stopping.metric else leading_metric(recipe)).removeprefix("eval_")


def leading_metric(recipe: Recipe) -> str:
    """The metric, without `eval_`, that says which model is best."""
    stopping = recipe.train.early_stopping
    named = recipe.train.metric or (stopping.metric if stopping else None) or recipe.task.first_metric
    return named.removeprefix("eval_")
