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

    `step` optimizer steps are done; `waited` counts evaluations without a better score (early stopping).
    """

    step: int = 0
    best: dict[str, Any] | None = None  # {"step", "metric", "value", "checkpoint"}
    waited: int = 0
    pending: bool = False  # the evaluation at `step` is still to come
    scores: dict[str, float] = field(default_factory=dict)
    cohorts: dict[str, int] = field(default_factory=dict)  # parameter -> the epoch in which it began to learn
    finished: bool = False

    def judge(self, scores: dict[str, float], metric: str, lower_is_better: Collection[str], attempt: int) -> bool:
        """Takes in the scores of an evaluation at `step`; whether the model is the best so far, by `metric`.

        Few validation rows often give equal scores: the model with the lower loss is the better one then. Raises
        KeyError where the task has no such metric.
        """
        self.pending = False
        self.scores = {f"eval_{name}": value for name, value in scores.items()}
        if metric not in scores:
            raise KeyError(f"the task has no metric {metric!r}; it has {', '.join(sorted(scores))}")
        value, sign = scores[metric], -1.0 if metric in lower_is_better else 1.0
        best, loss = self.best, scores.get("loss", math.inf)
        ahead = best is None or sign * value > sign * best["value"]
        level = best is not None and value == best["value"] and loss < best["scores"].get("eval_loss", math.inf)
        if ahead or level:
            self.best = {
                "step": self.step,
                "metric": f"eval_{metric}",
                "value": value,
                "checkpoint": checkpoints.folder_name(self.step, attempt),
                "scores": self.scores,
            }
        self.waited = 0 if ahead else self.waited + 1
        return ahead or level


def leading_metric(recipe: Recipe) -> str:
    """The metric, without `eval_`, that says which model is best."""
    stopping = recipe.train.early_stopping
    named = recipe.train.metric or (stopping.metric if stopping else None) or recipe.task.first_metric
    return named.removeprefix("eval_")
