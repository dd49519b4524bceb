"""A sweep: Ray Tune runs trials of one recipe, each a run in a folder of its own, and the best one is the answer.

All that a sweep knows lies in its trials' folders: started again, it takes those that have ended as they are, goes on
with those that had begun, and proposes the rest.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rayft import storage
from rayft.errors import RayftError, RunRefused, Stopped, SweepStopped, TrainingError
from rayft.fields.search import Tune, prepares
from rayft.launch import ahead, placement
from rayft.launch.stopping import Stop
from rayft.models import fetch_model, model_identity
from rayft.recipe import Recipe
from rayft.record import Record
from rayft.run import decided, length, prepared_for, shown_plan
from rayft.sweeps import depths, room, trials
from rayft.sweeps.roster import Roster
from rayft.sweeps.trials import Known
from rayft.tasks.stacked import Blocks
from rayft.text import counted

Show = Callable[[dict[str, Any]], None]

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no score
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # what has to be kept lies in the trials' folders
    "RAY_AIR_NEW_OUTPUT": "0",
}


CHANGED = (
    "# Population based training changed these fields on the way, and let trials go on from each other's weights.\n"
    "# This recipe trains with the last ones from the beginning, and gives another model; the best one is in export/.\n"
)


def tune(recipe: Recipe, *, show: Show, restart: bool = False, take_over: bool = False) -> dict[str, Any]:
    """Runs the sweep of `recipe`, or goes on with it; returns what its result.json holds.

    Raises a RayftError: before anything is started where the sweep is refused; Stopped where it was asked to stop, with
    the best so far in its folder.
    """
    begun = time.time()
    recipe = recipe.resolved()
    if recipe.tune is None:
        raise RunRefused(f"{recipe.name}: the recipe has no `tune` section; `rayft run` trains it")
    _refuse_missing_loggers(recipe.tune)
    record = Record(recipe.folder)
    record.refuse_second_writer(take_over, show)
    done = None if restart else _settle(recipe, record, show)
    if done is not None:
        return done
    storage.check_writable(recipe.storage)
    if text := placement.passing(recipe):
        show({"event": "warning", "text": text})
    model_path = fetch_model(recipe.model.path)
    identity = model_identity(model_path, recipe.model.revision, recipe.train.seed)
    if not restart:
        record.refuse_other_model(identity)
    from rayft.launch.session import cluster, quiet

    quiet()
    os.environ.update(ENVIRONMENT)
    placed = recipe.cluster
    with ahead.importing(*ahead.DRIVER), cluster(room.local(recipe) * placed.max_workers, placed.cpus_per_worker):
        show({"event": "stage", "name": "preparing"})
        room.refuse(recipe)
        prepared = prepared_for(recipe, model_path, show)
        parameters = shown_plan(recipe, model_path, prepared, show)
        if restart:
            record.forget()
        keys = {split: data.manifest.key for split, data in prepared.items()}
        record.refuse_other_data(keys["train"], keys.get("validation"))
        stop = Stop(recipe.folder)
        with record.writing(recipe, identity, keys), stop.listening():
            record.claim()
            sweep = Sweep(
                decided(recipe, placed.max_workers, parameters), prepared, identity, record, stop, begun, show
            )
            try:
                result = sweep.run()
            except (KeyboardInterrupt, Stopped, SweepStopped):
                record.status = "stopped"
                raise
            except Exception as error:
                told = str(error) if isinstance(error, RayftError) else f"{type(error).__name__}: {error}"
                record.end("failed", told)
                raise
            record.status = "finished"
    return result


def _refuse_missing_loggers(tune: Tune) -> None:
    import importlib.util

    for name in tune.log_to:
        if importlib.util.find_spec(name) is None:
            raise RunRefused(f"tune.log_to: the package {name} is not installed; `pip install {name}`")


def _settle(recipe: Recipe, record: Record, show: Show) -> dict[str, Any] | None:
    """The result of a sweep that has ended and asks for no more; RunRefused where its trials would be others."""
    before = record.recipe()
    if before is None or before.tune is None or recipe.tune is None:
        if before is not None:
            raise RunRefused(f"{recipe.folder} is a run, not a sweep; give the sweep another `name=`")
        return None
    if record.standing(recipe) == "longer":
        raise RunRefused(
            f"{recipe.folder} was swept with trials of {length(before)}, and would be with {length(recipe)}, whose "
            "scores say something else; give it another `name=`, or start over with --restart"
        )
    for name in ("search", "sampler", "seed", "metric", "mode"):
        if getattr(before.tune, name) != getattr(recipe.tune, name):
            raise RunRefused(
                f"{recipe.folder} was swept with another tune.{name}; give it another `name=`, or start over with "
                "--restart"
            )
    from rayft.sweeps.sampling import trials as count

    result = record.result()
    if result is None or result["status"] != "finished" or _ended(result) < count(recipe.tune):
        return None
    record.settle()
    show({"event": "note", "text": f"{recipe.folder} is finished; this is its result"})
    return result


def _ended(result: dict[str, Any]) -> int:
    return sum(count for kind, count in result["trials"].items() if kind != "waiting")


@dataclass
class Sweep:
    """One start of a sweep. `recipe` has its ZeRO stage and its number of workers decided."""

    recipe: Recipe
    prepared: dict[str, Any]
    identity: str
    record: Record
    stop: Stop
    begun: float
    show: Show

    def __post_init__(self) -> None:
        assert self.recipe.tune is not None
        self.tune: Tune = self.recipe.tune
        metric = trials.metric_of(self.recipe)
        natural = "min" if metric in self.recipe.task.lower_is_better else "max"
        if self.tune.mode not in (None, natural):
            raise RunRefused(f"tune.mode: {self.tune.mode} is the worse end of eval_{metric}; null or {natural} fits")
        self.metric, self.maximize = f"eval_{metric}", natural == "max"
        self.folder, source_rows = self.recipe.folder, self.prepared["train"].manifest.source_rows
        self.roster = Roster(self.folder, self.tune, self.metric, self.maximize, source_rows, self.show)
        self.cache: depths.Stored | None = None
        self.over_at = self.begun + 60 * self.tune.budget.minutes if self.tune.budget else None

    def run(self) -> dict[str, Any]:
        """Runs what is left of the trials; the result, with the best one tested and exported."""
        roster = self.roster
        self.run_trials()
        roster.read()  # one may have come to its end and not been heard of
        if self.record.superseded is not None:
            raise self.record.superseded
        roster.delete_unwanted(again=True)
        asked = self.stop.asked()
        best = self.write()
        if asked is not None:
            result = self._result("stopped", best, None, {})
            storage.write_json(storage.join(self.folder, "result.json"), result)
            so_far = (
                f"the best so far is trial {best.number} ({self.metric} {best.value:.4g})" if best else "no scores yet"
            )
            raise SweepStopped(asked, so_far)
        if best is None and self._late() and not roster.ended:
            minutes = self.tune.budget.minutes if self.tune.budget else 0
            raise TrainingError(
                f"no trial was evaluated within tune.budget of {minutes:g} minutes; a larger one fits, or a smaller "
                "train.evaluate_every; the same command goes on"
            )
        if best is None:
            reasons = sorted({trial.error or "no score" for trial in roster.ended})
            raise TrainingError(f"none of {len(roster.ended)} trials has a score: {'; '.join(reasons[:3])}")
        from rayft.sweeps.finish import finish

        self.show({"event": "stage", "name": "testing and exporting the best trial"})
        target, answer = storage.join(self.folder, "export"), self._recipe_of(best)
        scores = finish(answer, self._rows_of(answer), target)
        result = self._result("finished", best, target, scores)
        storage.write_json(storage.join(self.folder, "result.json"), result)
        return result

    # -- trials

    def run_trials(self) -> None:
        """Runs what is left of the trials, until all have ended or the sweep is asked to."""
        roster = self.roster
        if len(roster.ended) < roster.total:
            self._run_trials()
            roster.running.clear()
            if roster.rungs is not None and not self.asked():
                roster.end_waiting()

    def _run_trials(self) -> None:
        import ray.tune

        from rayft.sweeps import scheduling
        from rayft.sweeps.trial import Shared, Trial

        running = min(room.at_once(self.recipe), self.roster.total - len(self.roster.ended))
        single = self.recipe.cluster.max_workers == 1
        warm = self._warm() if single else None
        if warm is not None and not depths_vary_with_rows(self.tune):
            total, blocks = self.roster.total, self._blocks(warm)
            self.cache = depths.store(
                self.recipe, self.prepared, self.identity, warm, blocks, total, running, self.show
            )
        folders = {split: data.folder for split, data in self.prepared.items()}
        shared = Shared(self.recipe.dump(), folders, self.identity, warm)
        cluster = self.recipe.cluster
        bundle = (
            {"CPU": float(cluster.cpus_per_worker), "GPU": float(cluster.gpus_per_worker)} if single else {"CPU": 0.01}
        )
        trainable = ray.tune.with_resources(
            ray.tune.with_parameters(Trial, shared=shared), ray.tune.PlacementGroupFactory([bundle])
        )
        self.roster.rungs = scheduling.rungs(self)
        self.roster.progress()
        with tempfile.TemporaryDirectory(prefix="rayft-tune-") as scratch:
            chosen, watcher = scheduling.chosen(self), scheduling.Watcher(self)
            tuner = ray.tune.Tuner(
                trainable,
                param_space=chosen.space,
                tune_config=ray.tune.TuneConfig(
                    search_alg=chosen.search,
                    scheduler=scheduling.scheduler(self),
                    num_samples=chosen.samples,
                    max_concurrent_trials=running,
                    reuse_actors=single,
                ),
                run_config=ray.tune.RunConfig(
                    name="tune",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[watcher, *scheduling.loggers(self)],
                    stop=scheduling.Asked(self, watcher),
                    failure_config=ray.tune.FailureConfig(max_failures=self.recipe.failure.max_retries),
                ),
            )
            tuner.fit()

    def _warm(self) -> Any:
        """The pretrained network, in the object store; None where each trial loads it: flash attention takes a GPU."""
        import ray

        from rayft.sweeps.warm import Warm, packed
        from rayft.training.assembly import pretrained

        if "flash" in (self.recipe.model.attention or ""):
            return None
        base = pretrained(self.recipe, fetch_model(self.recipe.model.path))
        task = self.recipe.task
        facts = self.prepared["train"].manifest.facts
        return Warm(base, task, facts, ray.put(packed(task.load(base, facts, task.processor(base)))))

    def _blocks(self, warm: Any) -> Blocks:
        return self.recipe.task.blocks(depths.network(warm))

    def asked(self) -> bool:
        """Is it time to end: a request, another process's take-over, or the budget's end?"""
        return self._late() or self.stop.asked() is not None or self.record.superseded is not None

    def _late(self) -> bool:
        return self.over_at is not None and time.time() > self.over_at

    # -- the answer

    def _left(self) -> str | None:
        """Why a sweep has ended that is not at its end."""
        roster, budget = self.roster, self.tune.budget
        if budget is None or not self._late() or len(roster.ended) == roster.total:
            return None
        waiting, absent = len(roster.waiting), roster.total - len(roster.known)
        left = [f"{counted(waiting, 'trial')} {'waits' if waiting == 1 else 'wait'}"] if waiting else []
        left += [f"{counted(absent, 'trial')} {'was' if absent == 1 else 'were'} not begun"] if absent else []
        return f"tune.budget of {budget.minutes:g} minutes is used up: {', '.join(left)}"

    def _recipe_of(self, trial: Known) -> Recipe:
        return trials.trial_recipe(self.recipe, trial.number, trial.fields)

    def _rows_of(self, trial: Recipe) -> dict[str, Any]:
        """Every split as that trial had it: its own rows where trials differ in how rows are prepared."""
        if not any(map(prepares, self.tune.search)):
            return self.prepared
        return prepared_for(trial, fetch_model(trial.model.path), self.show)

    def write(self) -> Known | None:
        """best.yaml and trials.parquet; the best trial, None where none has a score."""
        trials.write_table(self.folder, self.roster.every)
        best = self.roster.best
        if best is not None:
            alone = self._recipe_of(best).model_copy(update={"name": f"{self.recipe.name}-best"})
            told = CHANGED if self.tune.scheduler == "pbt" else ""
            storage.write_text(storage.join(self.folder, "best.yaml"), told + alone.to_yaml())
        return best

    def _result(self, status: str, best: Known | None, export: str | None, scores: dict[str, float]) -> dict[str, Any]:
        ended = self.roster.ended
        cache = None
        if self.cache is not None:
            saved = round(sum(trial.saved_s for trial in ended), 3)
            found = self.cache
            cache = {"depths": found.depths, "bytes": found.bytes, "seconds": round(found.seconds, 3), "saved_s": saved}
        return {
            "run": self.folder,
            "status": status,
            "error": None,
            "why": self._left(),
            "trials": {
                **{kind: sum(trial.status == kind for trial in ended) for kind in ("finished", "stopped", "failed")},
                "waiting": len(self.roster.waiting),
            },
            "best": {"trial": best.number, "metric": self.metric, "value": best.value, "fields": best.fields}
            if best is not None
            else None,
            "metrics": scores,
            "export": export,
            "pipeline": self.recipe.task.pipeline(),
            "cache": cache,
            "seconds": round(self.record.before_s + time.time() - self.begun, 3),
        }


def depths_vary_with_rows(tune: Tune) -> bool:
    """Do trials differ in how rows are prepared, or in the model, so that each has states of its own?"""
    return any(map(prepares, tune.search)) or "model.dtype" in tune.search or "model.attention" in tune.search
