"""Whether training went on where the validation rows no longer gained from it, and what would help."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from rayft.recipe import Recipe

RISE = 0.1  # how far the validation loss may lie above its lowest value, relative


@dataclass(frozen=True)
class Point:
    """An evaluation at `step`: its loss, and the mean of the training losses since the one before it."""

    step: int
    train: float
    validation: float


def points(lines: Iterable[str]) -> list[Point]:
    """The evaluations in the lines of a run's metrics.jsonl; what follows at the same step is no evaluation."""
    found: list[Point] = []
    total, count = 0.0, 0
    for line in lines:
        row = json.loads(line)
        if "loss" in row:
            total, count = total + row["loss"], count + 1
        elif "eval_loss" in row and count:
            found.append(Point(row["step"], total / count, row["eval_loss"]))
            total, count = 0.0, 0
    return found


def overfit(found: list[Point], best_step: int, smoothed: bool) -> Point | None:
    """The evaluation with the lowest validation loss, where training has overfitted since; else None.

    All of this has to hold at the last evaluation:
    - the validation loss lies more than RISE above its lowest value: the generalization loss of Prechelt (Early
      Stopping - But When?, 1998)
    - the training loss has fallen since then, so that training itself went well
    - the training loss is the lower of the two. With label smoothing it is another quantity, which is never below the
      smoothed labels' entropy: then its fall alone counts
    - the best score, at `best_step`, came earlier: while that still rises, the rows are worth learning from
    """
    if len(found) < 2:
        return None
    last, lowest = found[-1], min(found, key=lambda point: point.validation)
    rose = last.validation - lowest.validation > RISE * abs(lowest.validation)
    fell = last.train < lowest.train
    below = smoothed or last.train < last.validation
    return lowest if rose and fell and below and best_step < last.step else None


def warnings(recipe: Recipe, found: list[Point], best_step: int) -> list[str]:
    """What result.json says under `warnings`: sentences, of which there may be none."""
    lowest = overfit(found, best_step, smoothed=recipe.train.label_smoothing > 0)
    if lowest is None:
        return []
    last = found[-1]
    sentence = (
        f"overfitting: from step {lowest.step} to step {last.step} the training loss fell from {lowest.train:.3g} to "
        f"{last.train:.3g} while the validation loss rose from {lowest.validation:.3g} to {last.validation:.3g}; the "
        f"model of step {best_step} is kept, and more rows or {_help(recipe)} would help"
    )
    return [sentence]


def _help(recipe: Recipe) -> str:
    """The recipe's fields that guard against overfitting, those that are unused first."""
    train, model = recipe.train, recipe.model
    fields = [] if train.early_stopping is not None else ["train.early_stopping"]
    fields += [
        "a lower train.max_steps" if train.epochs is None else "fewer train.epochs",
        "a lower train.learning_rate",
    ]
    fields += ["model.freeze"] if model.freeze is None or model.freeze.layers == 0 else []
    fields += ["train.label_smoothing"] if train.label_smoothing == 0 and recipe.task.smooths else []
    fields += ["a higher train.weight_decay", "a higher model.dropout"]
    return f"{', '.join(fields[:-1])} or {fields[-1]}"
