"""Between a sweep and Ray Tune: who proposes trials, who stops them early, who hears of results, and when it ends.

Rows seen are the unit in which trials are compared, so that those with other batch sizes or depths compete fairly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray.tune
from ray.tune import Callback, Stopper
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from rayft import trials
from rayft.trial import number_of
from rayft.trials import Known

UNIT = "rows"
REDUCTION = 3  # ASHA keeps the best third at each rung (Li et al. 2018)


class _OfThisProcess:
    """Tune pickles what it is given, to restore it, which a sweep does by itself: the sweep stays here."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Proposals(_OfThisProcess, Searcher):
    """Gives Tune the sweep's trials."""

    def __init__(self, sweep: Any) -> None:
        super().__init__(metric="value", mode="max" if sweep.maximize else "min")
        self.sweep = sweep

    def suggest(self, trial_id: str) -> Any:
        found = self.sweep.fields()
        if found is None:
            return Searcher.FINISHED
        number, fields = found
        return {"number": number, "fields": fields}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the sweep hears of it by the watcher."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' folders are what is kept."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from its trials' folders")


@dataclass(frozen=True)
class Chosen:
    """How Tune comes to its trials: one after the other by `search`, or all at once from `space`."""

    search: Searcher | None
    space: dict[str, Any] | None
    samples: int


def chosen(sweep: Any) -> Chosen:
    """Population based training has its whole population from the beginning; all else is proposed one by one."""
    left = sweep.total - len(sweep.ended)
    if sweep.tune.scheduler != "pbt":
        return Chosen(Proposals(sweep), None, left)
    found = dict(sweep.fields() for _ in range(left))
    fields = {name: ray.tune.sample_from(_Of(found, name)) for name in sweep.tune.search}
    numbers = sorted(found)
    return Chosen(None, {"place": ray.tune.grid_search(list(range(left))), "numbers": numbers, "fields": fields}, 1)


@dataclass(frozen=True)
class _Of:
    """The value of field `name` in the trial at the place that Tune has chosen."""

    found: dict[int, dict[str, Any]]
    name: str

    def __call__(self, spec: Any) -> Any:
        return self.found[sorted(self.found)[spec.config.place]][self.name]


class Watcher(_OfThisProcess, Callback):
    """Tells the sweep how its trials fare."""

    def __init__(self, sweep: Any) -> None:
        self.sweep = sweep

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.sweep.begin(number_of(trial.config, trial.trial_id), trial.config["fields"])
        self._show(trial, "running", {})

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._show(trial, "running", result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        last = dict(trial.last_result or {})
        if last.get("error"):
            status = "failed"
        elif last.get("finished"):
            status = "finished"
        elif self.sweep.asked():  # ended with the sweep: it goes on when that does
            return
        else:
            status = "stopped"
        self._end(trial, status, last)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        lines = str(trial.get_error() or "").strip().splitlines()
        text = lines[-1] if lines else "its process ended"
        self._end(trial, "failed", {**(trial.last_result or {}), "error": text})

    def _end(self, trial: Any, status: str, last: dict[str, Any]) -> None:
        self.sweep.end(number_of(trial.config, trial.trial_id), status, last)
        self._show(trial, status, last)

    def _show(self, trial: Any, status: str, last: dict[str, Any]) -> None:
        told = {name: last.get(name) for name in ("value", "best", "rows", "seconds", "error")}
        goal = {"metric": self.sweep.metric, "maximize": self.sweep.maximize}
        event = {"event": "trial", "status": status, **goal, **told}
        self.sweep.show({**event, "trial": number_of(trial.config, trial.trial_id), "fields": trial.config["fields"]})


class Asked(_OfThisProcess, Stopper):
    """Ends all trials when the sweep is asked to stop or its budget is used up."""

    def __init__(self, sweep: Any) -> None:
        self.sweep = sweep

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self.sweep.asked())


def scheduler(sweep: Any) -> TrialScheduler:
    """Tune's scheduler for the recipe, which has heard of the trials that ended before."""
    kind, rows = sweep.tune.scheduler, _rows(sweep)
    goal: Any = {"metric": "value", "mode": "max" if sweep.maximize else "min"}
    made: TrialScheduler
    if kind == "asha":
        first = max(1, int(rows["first"]))
        made = AsyncHyperBandScheduler(
            time_attr=UNIT, max_t=max(first, rows["all"]), grace_period=first, reduction_factor=REDUCTION,
            stop_last_trials=False, **goal,
        )  # fmt: skip
    elif kind == "median":
        made = MedianStoppingRule(
            time_attr=UNIT, grace_period=rows["first"], min_samples_required=3, min_time_slice=0, **goal
        )
    elif kind == "pbt":
        made = PopulationBasedTraining(
            time_attr=UNIT,
            perturbation_interval=max(1, rows["first"]),
            hyperparam_mutations={"fields": {name: _domain(space) for name, space in sweep.tune.search.items()}},
            **goal,
        )
    else:
        made = FIFOScheduler()
    if kind in ("asha", "median"):
        for trial in sweep.ended:
            _tell(made, trial, sweep)
    return made


def _tell(made: TrialScheduler, trial: Known, sweep: Any) -> None:
    """Lets the scheduler hear what a trial of an earlier start came to, evaluation by evaluation."""
    controller: Any = SimpleNamespace(get_live_trials=list)
    stub: Any = _Stub(f"before-{trial.number}")
    made.on_trial_add(controller, stub)
    source = sweep.prepared["train"].manifest.source_rows
    result: dict[str, Any] = {}
    for row in trials.evaluations(trial.folder):
        if sweep.metric in row:
            result = {UNIT: round(row["epoch"] * source), "value": row[sweep.metric]}
            made.on_trial_result(controller, stub, result)
    if result:
        made.on_trial_complete(controller, stub, result)


class _Stub:
    """A trial as far as a scheduler asks: an id."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def _rows(sweep: Any) -> dict[str, int]:
    """Source rows seen at the first evaluation, and in all."""
    from rayft.training.schedule import order, total_steps

    recipe, data = sweep.recipe, sweep.prepared["train"]
    per_epoch = order(recipe, data).steps_per_epoch
    epochs = total_steps(recipe.train, per_epoch) / per_epoch
    every = recipe.train.evaluate_every
    between = every.count if every.unit == "epoch" else every.count / per_epoch
    rows = data.manifest.source_rows
    return {"first": int(min(between, epochs) * rows), "all": int(epochs * rows)}


def _domain(space: Any) -> Any:
    if space.choices:
        return list(space.choices)
    if space.int:
        return ray.tune.randint(space.int[0], space.int[1] + 1)
    return ray.tune.loguniform(*space.log_uniform) if space.log_uniform else ray.tune.uniform(*space.uniform)


def loggers(sweep: Any) -> list[Callback]:
    """Tune's callbacks for MLflow and Weights & Biases, where the recipe asks for them."""
    made: list[Callback] = []
    for name in sweep.tune.log_to:
        if name == "mlflow":
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            made.append(MLflowLoggerCallback(experiment_name=sweep.recipe.name))
        else:
            from ray.air.integrations.wandb import WandbLoggerCallback

            # Ray's own choice is a folder that goes with the sweep's end, and runs that are kept offline with it.
            folder = os.environ.get("WANDB_DIR") or os.getcwd()
            made.append(WandbLoggerCallback(project=sweep.recipe.name, dir=folder))
    return made
