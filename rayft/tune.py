"""A sweep: Ray Tune runs trials of one recipe, each a run in a folder of its own, and the best one is the answer.

All that a sweep knows lies in its trials' folders: started again, it takes those that have ended as they are, goes on
with those that had begun, and proposes the rest.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rayft import depths, placement, storage, trials
from rayft.errors import RayftError, RunRefused, Stopped, StorageError, SweepStopped, TrainingError
from rayft.models import fetch_model, model_identity
from rayft.recipe import Recipe
from rayft.record import Record
from rayft.run import decided, prepared_for, shown_plan
from rayft.rungs import Rungs
from rayft.sampling import Sampler
from rayft.search import Tune
from rayft.stopping import Stop
from rayft.tasks.task import Blocks
from rayft.trials import Known

Show = Callable[[dict[str, Any]], None]

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no score
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # what has to be kept lies in the trials' folders
    "RAY_AIR_NEW_OUTPUT": "0",
}


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
    from rayft.session import cluster, quiet

    quiet()
    os.environ.update(ENVIRONMENT)
    placed = recipe.cluster
    with cluster(_local(recipe) * placed.max_workers, placed.cpus_per_worker, placed.gpus_per_worker):
        show({"event": "stage", "name": "preparing"})
        placement.refuse(recipe)
        prepared = prepared_for(recipe, model_path, show)
        parameters = shown_plan(recipe, model_path, prepared, show)
        if restart:
            record.forget()
        record.refuse_other_data(prepared["train"].manifest.key)
        keys = {split: data.manifest.key for split, data in prepared.items()}
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


def _local(recipe: Recipe) -> int:
    """How many trials this machine's processors run at a time."""
    cluster = recipe.cluster
    return max(1, (os.cpu_count() or 1) // cluster.cpus_per_worker) if cluster.max_workers == 1 else 1


def at_once(recipe: Recipe) -> int:
    """How many trials run at a time: as many as the cluster holds, those of a local one by its real processors."""
    cluster = recipe.cluster
    room = placement.room(cluster) // cluster.max_workers
    if os.environ.get("RAY_ADDRESS") is None and cluster.max_workers == 1 and not cluster.gpus_per_worker:
        room = min(room, _local(recipe))
    return max(1, room)


def _settle(recipe: Recipe, record: Record, show: Show) -> dict[str, Any] | None:
    """The result of a sweep that has ended and asks for no more; RunRefused where its trials would be others."""
    before = record.recipe()
    if before is None or before.tune is None or recipe.tune is None:
        if before is not None:
            raise RunRefused(f"{recipe.folder} is a run, not a sweep; give the sweep another `name=`")
        return None
    record.standing(recipe)
    for name in ("search", "sampler", "seed", "metric", "mode"):
        if getattr(before.tune, name) != getattr(recipe.tune, name):
            raise RunRefused(
                f"{recipe.folder} was swept with another tune.{name}; give it another `name=`, or start over with "
                "--restart"
            )
    from rayft.sampling import trials as count

    result = record.result()
    if result is None or result["status"] != "finished" or sum(result["trials"].values()) < count(recipe.tune):
        return None
    show({"event": "note", "text": f"{recipe.folder} is finished; this is its result"})
    return result


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
    known: dict[int, Known] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    _spent: dict[int, tuple[float, float]] = field(default_factory=dict)
    _deleted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        from rayft.sampling import trials as count
        from rayft.training.loop import leading_metric

        assert self.recipe.tune is not None
        self.tune: Tune = self.recipe.tune
        metric = (self.tune.metric or f"eval_{leading_metric(self.recipe)}").removeprefix("eval_")
        natural = "min" if metric in self.recipe.task.lower_is_better else "max"
        if self.tune.mode not in (None, natural):
            raise RunRefused(f"tune.mode: {self.tune.mode} is the worse end of eval_{metric}; null or {natural} fits")
        self.metric, self.maximize = f"eval_{metric}", natural == "max"
        self.folder, self.total = self.recipe.folder, count(self.tune)
        self.known = {trial.number: trial for trial in trials.known(self.folder)}
        self.sampler = Sampler(self.tune, self.maximize)
        self.cache: depths.Stored | None = None
        self.rungs: Rungs | None = None
        self.over_at = self.begun + 60 * self.tune.budget.minutes if self.tune.budget else None
        for trial in self.ended:
            self.sampler.tell(trial.number, trial.fields, trial.value if trial.status != "failed" else None)

    @property
    def ended(self) -> list[Known]:
        return [trial for _, trial in sorted(self.known.items()) if trial.status is not None]

    def run(self) -> dict[str, Any]:
        """Runs what is left of the trials; the result, with the best one tested and exported."""
        if len(self.ended) < self.total:
            self._trials()
            if not self.asked():
                self._end_waiting()
        # One may have come to its end and not been heard of.
        self.known |= {trial.number: trial for trial in trials.known(self.folder) if trial.status is not None}
        if self.record.superseded is not None:
            raise self.record.superseded
        self._deleted.clear()
        self._delete_unwanted()
        asked = self.stop.asked()
        best = self.write()
        if asked is not None:
            result = self._result("stopped", best, None, {})
            storage.write_json(storage.join(self.folder, "result.json"), result)
            so_far = (
                f"the best so far is trial {best.number} ({self.metric} {best.value:.4g})" if best else "no scores yet"
            )
            raise SweepStopped(asked, so_far)
        if best is None:
            reasons = sorted({trial.error or "no score" for trial in self.ended})
            raise TrainingError(f"none of {len(self.ended)} trials has a score: {'; '.join(reasons[:3])}")
        from rayft.finish import finish

        self.show({"event": "stage", "name": "testing and exporting the best trial"})
        target = storage.join(self.folder, "export")
        scores = finish(self._recipe_of(best), self.prepared, target)
        result = self._result("finished", best, target, scores)
        storage.write_json(storage.join(self.folder, "result.json"), result)
        return result

    # -- trials

    def _trials(self) -> None:
        import ray.tune

        from rayft import scheduling
        from rayft.trial import Shared, Trial

        running = min(at_once(self.recipe), self.total - len(self.ended))
        single = self.recipe.cluster.max_workers == 1
        warm = self._warm() if single else None
        if warm is not None and not depths_vary_with_rows(self.tune):
            self.cache = depths.store(
                self.recipe, self.prepared, self.identity, warm, self._blocks(warm), self.total, running, self.show
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
        self._progress()
        self.rungs = scheduling.rungs(self)
        with tempfile.TemporaryDirectory(prefix="rayft-tune-") as scratch:
            chosen = scheduling.chosen(self)
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
                    callbacks=[scheduling.Watcher(self), *scheduling.loggers(self)],
                    stop=scheduling.Asked(self),
                    failure_config=ray.tune.FailureConfig(max_failures=self.recipe.failure.max_retries),
                ),
            )
            tuner.fit()

    def _warm(self) -> Any:
        """The pretrained network, in the object store."""
        import ray

        from rayft.training.worker import pretrained
        from rayft.warm import Warm, packed

        base = pretrained(self.recipe, fetch_model(self.recipe.model.path))
        task = self.recipe.task
        network = task.load(base, self.prepared["train"].manifest.facts, task.processor(base))
        return Warm(base, ray.put(packed(network)))

    def _blocks(self, warm: Any) -> Blocks:
        return self.recipe.task.blocks(depths.network(warm))

    def asked(self) -> bool:
        """Is it time to end: a request, another process's take-over, or the budget's end?"""
        late = self.over_at is not None and time.time() > self.over_at
        return late or self.stop.asked() is not None or self.record.superseded is not None

    def fields(self) -> tuple[int, dict[str, Any]] | None:
        """The number and fields of the trial to run next: one that goes on, or a new one; None where there is none."""
        number = self._next()
        if number is None:
            return None
        if number not in self.known:
            fields = self.sampler.propose(number)
            trials.propose(self.folder, number, fields)
            self.known[number] = Known(number, fields, trials.folder_of(self.folder, number))
        self.running.add(number)
        return number, self.known[number].fields

    @property
    def waiting(self) -> list[int]:
        """Trials that have begun and neither ended nor run now."""
        return [n for n, trial in sorted(self.known.items()) if trial.status is None and n not in self.running]

    def _next(self) -> int | None:
        waiting, new = self.waiting, len(self.known) if len(self.known) < self.total else None
        if self.rungs is None:
            return waiting[0] if waiting else new
        for number in waiting:  # interrupted before they came to a rung
            if self.rungs.height(number) < 0:
                return number
        chosen = self.rungs.next(waiting)
        chosen = new if chosen is None else chosen
        whole = any(trial.status == "finished" for trial in self.ended)
        if chosen is None and waiting and not self.running and not whole:  # one has to come to its end
            return self.rungs.foremost(waiting)
        return chosen

    def begin(self, number: int, fields: dict[str, Any]) -> None:
        """A trial starts, or goes on, maybe with the fields that population based training now gives it."""
        trial = self.known[number]
        if trial.fields != fields:
            trial.fields = dict(fields)
            trials.propose(self.folder, number, trial.fields)

    def end(self, number: int, status: str, last: dict[str, Any]) -> None:
        """A trial has ended: its result, what the sampler learns from it, and which checkpoints are still wanted."""
        trial = self.known[number]
        self.running.discard(number)
        trials.end(trial, status, self._summed(number, last), self.metric)
        self.sampler.tell(number, trial.fields, trial.value if status != "failed" else None)
        trials.hparams(trial, self.metric)
        if self.tune.scheduler != "pbt":  # there another trial may go on from any of them
            with contextlib.suppress(StorageError):  # all of it is tried again when no trial writes any more
                self._delete_unwanted()
        self._progress()

    def wait(self, number: int, last: dict[str, Any]) -> None:
        """A trial waits until others have come as far; the sampler learns from what it has come to so far."""
        self.running.discard(number)
        summed = self._summed(number, last)
        self._spent[number] = summed["seconds"], summed["saved_s"]
        self.sampler.tell(number, self.known[number].fields, last["best"])
        self._progress()

    def _progress(self) -> None:
        done = len(self.ended) + len(self.waiting if self.rungs is not None else ())
        self.show({"event": "stage", "name": "trials", "done": done, "total": self.total})

    def _end_waiting(self) -> None:
        """What still waits when no trial may go on any more, was stopped there."""
        for number in self.waiting:
            trial = self.known[number]
            found = [row for row in trials.evaluations(trial.folder) if self.metric in row]
            if not found:
                continue
            values = [row[self.metric] for row in found]
            source = self.prepared["train"].manifest.source_rows
            last = {
                "best": max(values) if self.maximize else min(values),
                "value": values[-1],
                "step": found[-1]["step"],
                "rows": round(found[-1]["epoch"] * source),
                "scores": {name: value for name, value in found[-1].items() if name.startswith("eval_")},
            }
            self.tell(number, trial.fields, "stopped", last)
            self.end(number, "stopped", last)

    def _summed(self, number: int, last: dict[str, Any]) -> dict[str, Any]:
        """`last` with the seconds of all times that the trial has run."""
        seconds, saved = self._spent.get(number, (0.0, 0.0))
        more = {"seconds": (last.get("seconds") or 0.0) + seconds, "saved_s": (last.get("saved_s") or 0.0) + saved}
        return {**last, **{name: round(value, 3) for name, value in more.items()}}

    def tell(self, number: int, fields: dict[str, Any], status: str, last: dict[str, Any]) -> None:
        """Shows how a trial fares."""
        told = {name: last.get(name) for name in ("value", "best", "rows", "error")}
        seconds = self._summed(number, last)["seconds"] if "seconds" in last or number in self._spent else None
        goal = {"metric": self.metric, "maximize": self.maximize}
        event = {"event": "trial", "status": status, **goal, **told, "seconds": seconds}
        self.show({**event, "trial": number, "fields": fields})

    def _delete_unwanted(self) -> None:
        """The checkpoints of trials that have ended and are not the best."""
        best = trials.best_of(self.ended, self.maximize)
        for other in self.ended:
            folder = storage.join(other.folder, "checkpoints")
            if best is not None and other.number != best.number and folder not in self._deleted:
                storage.delete(folder)
                self._deleted.add(folder)

    # -- the answer

    def _recipe_of(self, trial: Known) -> Recipe:
        return trials.trial_recipe(self.recipe, trial.number, trial.fields)

    def write(self) -> Known | None:
        """best.yaml and trials.parquet; the best trial, None where none has a score."""
        every = [trial for _, trial in sorted(self.known.items())]
        trials.write_table(self.folder, every)
        best = trials.best_of(self.ended, self.maximize)
        if best is not None:
            alone = self._recipe_of(best).model_copy(update={"name": f"{self.recipe.name}-best"})
            storage.write_text(storage.join(self.folder, "best.yaml"), alone.to_yaml())
        return best

    def _result(self, status: str, best: Known | None, export: str | None, scores: dict[str, float]) -> dict[str, Any]:
        ended = self.ended
        cache = None
        if self.cache is not None:
            saved = round(sum(trial.saved_s for trial in ended), 3)
            found = self.cache
            cache = {"depths": found.depths, "bytes": found.bytes, "seconds": round(found.seconds, 3), "saved_s": saved}
        return {
            "run": self.folder,
            "status": status,
            "error": None,
            "trials": {
                kind: sum(trial.status == kind for trial in ended) for kind in ("finished", "stopped", "failed")
            },
            "best": {"trial": best.number, "metric": self.metric, "value": best.value, "fields": best.fields}
            if best is not None
            else None,
            "metrics": scores,
            "export": export,
            "pipeline": self.recipe.task.pipeline(),
            "cache": cache,
            "seconds": round(time.time() - self.begun, 3),
        }


def depths_vary_with_rows(tune: Tune) -> bool:
    """Do trials differ in how rows are prepared, or in the model, so that each has states of its own?"""
    from rayft.trial import prepares

    return prepares(tune.search) or "model.dtype" in tune.search or "model.attention" in tune.search
