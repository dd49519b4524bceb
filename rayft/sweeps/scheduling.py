"""Between a sweep and Ray Tune: who proposes trials, who stops them early, who hears of results, and when it ends.

Rows seen are the unit in which trials are compared, so that those with other batch sizes or depths compete fairly.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray.tune
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial as Tried
from ray.tune.schedulers import (
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from rayft.errors import StorageError
from rayft.launch import stopping
from rayft.sweeps.rungs import Rungs
from rayft.sweeps.sampling import within
from rayft.sweeps.trial import ASK_S, number_of
from rayft.sweeps.trials import Known, folder_of

UNIT = "rows"


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
        if self.sweep.asked():
            return Searcher.FINISHED
        found = self.sweep.roster.propose()
        if found is None:  # what runs may yet let another trial go on
            return None if self.sweep.roster.running else Searcher.FINISHED
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
    left = sweep.roster.total - len(sweep.roster.ended)
    if sweep.tune.scheduler == "asha":  # a trial is proposed again whenever it goes on
        return Chosen(Proposals(sweep), None, -1)
    if sweep.tune.scheduler != "pbt":
        return Chosen(Proposals(sweep), None, left)
    found = dict(sweep.roster.propose() for _ in range(left))
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
        self._begun: dict[str, Any] = {}
        self._told: dict[str, dict[str, Any]] = {}  # since a trial has begun, or gone on

    @property
    def running(self) -> list[int]:
        """The numbers of the trials that run now: those that Tune has paused do not."""
        tried = [trial for trial in self._begun.values() if trial.status == Tried.RUNNING]
        return [number_of(trial.config, trial.trial_id) for trial in tried]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._begun[trial.trial_id] = trial
        before = self._told.pop(trial.trial_id, {})
        self.sweep.roster.begin(number_of(trial.config, trial.trial_id), trial.config["fields"], before)
        self._show(trial, "running", {})

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._told[trial.trial_id] = result
        self._show(trial, "running", result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._begun.pop(trial.trial_id, None)
        last = dict(trial.last_result or {})
        if last.get("error"):
            status = "failed"
        elif last.get("finished"):
            status = "finished"
        elif self.sweep.asked():  # ended with the sweep: it goes on when that does
            return
        elif trial.status == Tried.PAUSED:
            number = number_of(trial.config, trial.trial_id)
            self._show(trial, "waiting", last)
            self.sweep.roster.wait(number, last)
            return
        else:
            status = "stopped"
        self._end(trial, status, last)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._begun.pop(trial.trial_id, None)
        lines = str(trial.get_error() or "").strip().splitlines()
        text = lines[-1] if lines else "its process ended"
        self._end(trial, "failed", {**(trial.last_result or {}), "error": text})

    def _end(self, trial: Any, status: str, last: dict[str, Any]) -> None:
        self.sweep.roster.end(number_of(trial.config, trial.trial_id), status, last)
        self._show(trial, status, last)

    def _show(self, trial: Any, status: str, last: dict[str, Any]) -> None:
        self.sweep.roster.tell(number_of(trial.config, trial.trial_id), trial.config["fields"], status, last)


class Asked(_OfThisProcess, Stopper):
    """Ends all trials when the sweep is asked to stop or its budget is used up.

    Those that run are asked first, and have `failure.grace_s` in which to commit a checkpoint and leave. Where another
    process has taken the sweep over they are its trials, and end at once.
    """

    def __init__(self, sweep: Any, watcher: Watcher) -> None:
        self.sweep, self.watcher = sweep, watcher
        self._ends_at: float | None = None
        self._asked_at = -math.inf

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if not self.sweep.asked():
            return False
        now, running = time.monotonic(), self.watcher.running
        self._ends_at = self._ends_at or now + self.sweep.recipe.failure.grace_s
        if not running or now > self._ends_at or self.sweep.record.superseded is not None:
            return True
        if now - self._asked_at > ASK_S:
            self._asked_at = now
            for number in running:
                with contextlib.suppress(StorageError):  # it is asked again, and ends without being asked
                    stopping.request(folder_of(self.sweep.folder, number), "the sweep")
        return False


class Halving(_OfThisProcess, FIFOScheduler):
    """Lets a trial wait at a rung unless it is among the best there.

    For Tune one that waits has ended: the sweep proposes it again when it is to go on, and it does from its checkpoint.
    """

    def __init__(self, sweep: Any) -> None:
        super().__init__()
        self.sweep = sweep

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "value" not in result:  # another process has taken the trial over, and the sweep with it
            return TrialScheduler.CONTINUE
        number = number_of(trial.config, trial.trial_id)
        came = self.sweep.roster.rungs.note(number, result[UNIT], result["value"])
        return (
            TrialScheduler.PAUSE if came and not self.sweep.roster.rungs.promoted(number) else TrialScheduler.CONTINUE
        )

    def choose_trial_to_run(self, controller: Any) -> Any:
        for trial in list(controller.get_live_trials()):
            if trial.status == Tried.PAUSED:  # its checkpoint is written, and its process free
                controller.stop_trial(trial)
        return super().choose_trial_to_run(controller)


class Population(_OfThisProcess, PopulationBasedTraining):
    """Ray's population based training, inside the search space: it would also try what lies beyond."""

    def __init__(self, sweep: Any, between: int, goal: dict[str, Any]) -> None:
        self.sweep = sweep
        spaces = sweep.tune.search
        super().__init__(
            time_attr=UNIT,
            perturbation_interval=between,
            hyperparam_mutations={"fields": {name: _domain(space) for name, space in spaces.items()}},
            custom_explore_fn=self._inside,
            **goal,
        )
        # Ray draws from what the whole process draws from. When trials come to be compared is still a matter of speed.
        random.seed(sweep.tune.seed)
        np.random.seed(sweep.tune.seed % 2**32)

    def _inside(self, config: dict[str, Any]) -> dict[str, Any]:
        spaces = self.sweep.tune.search
        return {**config, "fields": {name: within(spaces[name], value) for name, value in config["fields"].items()}}

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return None if self.sweep.asked() else super().choose_trial_to_run(tune_controller)


def scheduler(sweep: Any) -> TrialScheduler:
    """Tune's scheduler for the recipe, which has heard of the trials that ended before."""
    kind, rows = sweep.tune.scheduler, lengths(sweep)
    goal: Any = {"metric": "value", "mode": "max" if sweep.maximize else "min"}
    made: TrialScheduler
    if kind == "asha":
        return Halving(sweep)
    if kind == "median":
        made = MedianStoppingRule(
            time_attr=UNIT, grace_period=rows["first"], min_samples_required=3, min_time_slice=0, **goal
        )
    elif kind == "pbt":
        made = Population(sweep, max(1, rows["first"]), goal)
    else:
        made = FIFOScheduler()
    if kind == "median":
        for trial in sweep.roster.ended:
            _tell(made, trial, sweep)
    return made


def _tell(made: TrialScheduler, trial: Known, sweep: Any) -> None:
    """Lets the scheduler hear what a trial of an earlier start came to, evaluation by evaluation."""
    controller: Any = SimpleNamespace(get_live_trials=list)
    stub: Any = _Stub(f"before-{trial.number}")
    made.on_trial_add(controller, stub)
    result: dict[str, Any] = {}
    for rows, score, _ in sweep.roster.evaluations(trial):
        result = {UNIT: rows, "value": score}
        made.on_trial_result(controller, stub, result)
    if result:
        made.on_trial_complete(controller, stub, result)


class _Stub:
    """A trial as far as a scheduler asks: an id."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def rungs(sweep: Any) -> Rungs | None:
    """ASHA's rungs, with the trials that have come to them before; None for other schedulers."""
    if sweep.tune.scheduler != "asha":
        return None
    length = lengths(sweep)
    made = Rungs.below(length["all"], length["first"], sweep.maximize)
    for trial in sweep.roster.every:
        for rows, score, _ in sweep.roster.evaluations(trial):
            made.note(trial.number, rows, score)
    return made


def lengths(sweep: Any) -> dict[str, int]:
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
