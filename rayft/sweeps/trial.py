"""A trial of a sweep, as Ray Tune runs it: a class whose step ends with an evaluation.

A trial of one worker trains in the Tune actor itself, which is used again by the next: no new processes and imports,
one process group, the pretrained weights in Ray's object store. A trial of several workers is a run of its own, from
here. Either way a trial's folder is a run's folder, from which it goes on where it was interrupted.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import ray.tune

from rayft import storage
from rayft.errors import Damaged, RayftError, RecipeError, Stopped, Superseded
from rayft.fields.search import prepares
from rayft.launch import ahead
from rayft.launch.session import gpu_environment
from rayft.launch.takeover import take_over
from rayft.models import model_identity
from rayft.recipe import Recipe
from rayft.record import Record
from rayft.sweeps.trials import folder_of, merit, trial_recipe
from rayft.training import checkpoints

FINISHED = "finished"


class Keep(Exception):  # an order, not an error
    """Thrown into a trial's work: it saves where it stands, and ends."""


ASK_S = 2.0  # between two requests to a trial to stop: one that only begins deletes those that it finds


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common; plain data.

    `recipe` is the sweep's, with the ZeRO stage of its trials decided; `prepared` {split: folder}; `identity` the base
    model's; `warm` its network in the object store, None where trials have several workers.
    """

    recipe: dict[str, Any]
    prepared: dict[str, str]
    identity: str
    warm: Any


@dataclass(frozen=True)
class Evaluated:
    """What a trial has come to at an evaluation: `value` is the leading score there, `best` the best so far."""

    step: int
    rows: int
    value: float
    best: float
    scores: dict[str, float]
    saved_s: float = 0.0
    finished: bool = False


Work = Generator[Evaluated, None, None]


def number_of(config: dict[str, Any], trial_id: str) -> int:
    """The number of the sweep's trial that Tune knows as `trial_id`.

    Population based training copies the better trial's config, so there the number follows from Tune's own.
    """
    if "numbers" in config:
        return int(config["numbers"][int(trial_id.rpartition("_")[2])])
    return int(config["number"])


class Trial(ray.tune.Trainable):
    """One trial after another. `config`: {"number", "fields"}; or {"place", "numbers", "fields"}, see `number_of`."""

    def setup(self, config: dict[str, Any], shared: Shared | None = None) -> None:
        assert shared is not None
        self.shared = shared
        self.sweep = Recipe.parse(shared.recipe)
        self._start(config)

    def _start(self, config: dict[str, Any]) -> None:
        self.number, self.begun = number_of(config, self.trial_id), time.monotonic()
        self.folder = folder_of(self.sweep.folder, self.number)
        self.last: dict[str, Any] = {"rows": 0}
        self.work: Work = self._work(config["fields"])

    def _work(self, fields: dict[str, Any]) -> Work:
        """Begins with the first step: fields that don't go together are a failure like any other."""
        recipe = trial_recipe(self.sweep, self.number, fields)
        yield from _here(recipe, self.shared) if recipe.cluster.max_workers == 1 else _nested(recipe)

    def step(self) -> dict[str, Any]:
        """Trains up to the next evaluation, or to the end."""
        try:
            evaluated = next(self.work, None)
        except Superseded:  # population based training has started this trial again while its step was on its way
            return dict(self.last)
        except Stopped:  # with a checkpoint, from which it goes on
            return {**self.last, "done": True, "seconds": self._seconds}
        except Damaged as error:
            if not error.folder.startswith(storage.join(self.folder, "checkpoints")):
                return self._failed(error)
            checkpoints.discard(error.folder, str(error))  # the one before is used
            self._start(self.config)
            return self.step()
        except Exception as error:  # noqa: BLE001 # the sweep goes on; the trial's folder and the table say why
            return self._failed(error)
        if evaluated is None:
            return {**self.last, FINISHED: True, "done": True, "seconds": self._seconds}
        self.last = {
            "value": evaluated.value,
            "best": evaluated.best,
            "rows": evaluated.rows,
            "step": evaluated.step,
            "scores": evaluated.scores,
            "saved_s": evaluated.saved_s,
            "seconds": self._seconds,
        }
        if evaluated.finished:
            return {**self.last, FINISHED: True, "done": True}
        return dict(self.last)

    def _failed(self, error: Exception) -> dict[str, Any]:
        return {**self.last, "error": _sentence(error), "done": True, "seconds": self._seconds}

    @property
    def _seconds(self) -> float:
        return round(time.monotonic() - self.begun, 3)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.work.close()
        self._start(new_config)
        return True

    def cleanup(self) -> None:
        self.work.close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Where this trial's newest checkpoint lies: what passes through Tune is the pointer.

        With ASHA a trial is saved to wait: its work ends, so that any process may go on with it.
        """
        if self.sweep.tune is not None and self.sweep.tune.scheduler == "asha":
            with contextlib.suppress(Keep, StopIteration):
                self.work.throw(Keep())
        return {"checkpoint": checkpoints.newest(storage.join(self.folder, "checkpoints"))}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Goes on from its own checkpoint, or from another trial's with this trial's fields."""
        path = (checkpoint or {}).get("checkpoint")
        if path is not None:
            self.work.close()
            self._start(self.config)
            if not path.startswith(self.folder.rstrip("/") + "/"):  # else it was only paused
                self._take_over(path)

    def _take_over(self, donor: str) -> None:
        """What is wrong with the fields or the copy fails this trial with its next step. Superseded is tried again."""
        try:
            take_over(trial_recipe(self.sweep, self.number, self.config["fields"]), donor)
        except Superseded:
            raise
        except RayftError as error:
            self.work = _failing(error)


def _failing(error: RayftError) -> Work:
    yield from ()
    raise error


def _sentence(error: Exception) -> str:
    if isinstance(error, RecipeError):
        return "; ".join(str(fault) for fault in error.faults)
    text = str(error) if isinstance(error, RayftError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0]


# --- one worker: in this process


_processors: dict[str, Any] = {}


def _processor(recipe: Recipe, base: Any) -> Any:
    """The task's processor, once per process and way to make it."""
    key = f"{recipe.task.model_dump_json()} {base}"
    if key not in _processors:
        _processors.clear()
        _processors[key] = recipe.task.processor(base)
    return _processors[key]


def _identity(recipe: Recipe, path: str, shared: Shared) -> str:
    """What identifies the trial's base model, which lies at `path`."""
    model, swept = recipe.model, shared.recipe["model"]
    own = (model.path, model.revision, recipe.train.seed)
    if own == (swept["path"], swept["revision"], shared.recipe["train"]["seed"]):
        return shared.identity
    return model_identity(path, model.revision, recipe.train.seed)


def _here(recipe: Recipe, shared: Shared) -> Work:
    """Trains in this process. Stopped where a request in its folder asks for that, when a checkpoint is committed."""
    with ahead.uncollected():
        import torch
        import transformers.modeling_utils  # noqa: F401 # by the network that comes out of the object store

        from rayft.launch.session import quiet
        from rayft.launch.stopping import Stop
        from rayft.models import fetch_model
        from rayft.sweeps.warm import own_trainable
        from rayft.training.assembly import pretrained
        from rayft.training.attempt import Run, Setting
        from rayft.training.watch import Watch

    quiet()
    alone(recipe.cluster.cpus_per_worker, recipe.cluster.gpus_per_worker > 0)
    record = Record(recipe.folder)
    path = fetch_model(recipe.model.path)
    base = pretrained(recipe, path)
    prepared = _prepared(recipe, path, shared)
    identity = _identity(recipe, path, shared)

    def load(how: Any, facts: dict[str, Any], processor: Any) -> Any:
        found = shared.warm.load(how, recipe.task, facts) if shared.warm is not None else None
        return recipe.task.load(how, facts, processor) if found is None else found

    setting = Setting(load, own_trainable, _processor(recipe, base), exports=False)
    keys = {split: data.manifest.key for split, data in prepared.items()}
    stop = Stop(recipe.folder)
    with record.writing(recipe, identity, keys), stop.looking():
        record.status = "stopped"  # unless it comes to its end
        attempt = record.claim()
        start = checkpoints.newest(storage.join(recipe.folder, "checkpoints"))
        config = {
            "model": recipe.model.path, "start": start, "attempt": attempt,
            "begun": time.time(), "identity": identity,
        }  # fmt: skip
        device = torch.device("cuda" if recipe.cluster.gpus_per_worker else "cpu")
        watch = Watch(None, 0, asked=stop.asked)
        run = Run(recipe, config, prepared, device, lambda event: None, watch, setting)
        yield from _trained(run, record, stop)


def _trained(run: Any, record: Record, stop: Any) -> Work:
    """Trains; the record says how that ends."""
    with contextlib.ExitStack() as reading:
        try:
            for _ in run.go(lambda run: reading.enter_context(contextlib.closing(run.own_shares()))):
                run.saver.finish()  # a trial that waits writes nothing: it may be stopped, deleted, or copied from
                if not run.done:
                    yield _evaluated(run)
            if not run.done:
                raise Stopped(str(stop.asked()), run.progress.step)
            record.status = FINISHED
            yield _evaluated(run, finished=True)
        except Keep:
            run.keep()
        except Stopped:
            raise
        except Exception as error:
            record.end("failed", str(error) if isinstance(error, RayftError) else f"{type(error).__name__}: {error}")
            raise
        finally:
            run.close()
            checkpoints.sweep(storage.join(run.recipe.folder, "checkpoints"), run.attempt)


def _prepared(recipe: Recipe, model_path: str, shared: Shared) -> dict[str, Any]:
    """The sweep's prepared rows; where its trials differ in how rows are prepared, those of this trial."""
    from rayft.data.prepare import prepare
    from rayft.data.prepared import Prepared

    if any(map(prepares, shared.recipe["tune"]["search"])):
        return prepare(recipe, model_path, progress=lambda stage, done, total: None)
    return {split: Prepared.open(path) for split, path in shared.prepared.items()}


def _evaluated(run: Any, finished: bool = False) -> Evaluated:
    from rayft.training.progress import leading_metric

    saved = run.prefix.saved_s if run.prefix is not None else 0.0
    scores, value = run.progress.scores, run.progress.scores[f"eval_{leading_metric(run.recipe)}"]
    return Evaluated(run.progress.step, run.rows, value, run.progress.best["value"], dict(scores), saved, finished)


def alone(cpus: int, gpu: bool, trains: bool = True) -> None:
    """A process group of this process alone, kept from trial to trial; where it `trains`, DeepSpeed is made ready."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(cpus)
    if dist.is_initialized():
        return
    # DeepSpeed asks the environment, also where it is only imported (by transformers, to save a model).
    os.environ["DS_ACCELERATOR"] = "cuda" if gpu else "cpu"
    if gpu:
        os.environ |= gpu_environment()
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if trains:
        from rayft.training import engine

        engine.prepare_process(cpus, 1, gpu)


# --- several workers: a run of its own


def _nested(recipe: Recipe) -> Work:
    """A run whose driver is a thread of this process; what it shows are the evaluations. Stopped as it is."""
    from rayft.launch import stopping
    from rayft.run import run
    from rayft.training.progress import leading_metric

    events: queue.Queue[Any] = queue.Queue()
    name = f"eval_{leading_metric(recipe)}"

    def drive() -> None:
        try:
            events.put(run(recipe, show=shown, exports=False, take_over=True))
        except Exception as error:  # noqa: BLE001 # raised again where the trial is asked for its next evaluation
            events.put(error)

    rows: dict[str, Any] = {}

    def shown(event: dict[str, Any]) -> None:
        if event["event"] == "plan":
            rows.update(event)
        if event["event"] == "scores" and name in event:
            events.put(event)

    thread = threading.Thread(target=drive, daemon=True)
    thread.start()
    maximize, best = name.removeprefix("eval_") not in recipe.task.lower_is_better, None
    try:
        while True:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            if "event" not in event:  # its result: the run is ahead of who asks for its evaluations
                value, reached = event["best"]["value"], (event["steps"], event["rows"])
                yield Evaluated(*reached, value, value, dict(event["metrics"]), finished=True)
                return
            scores = {key: value for key, value in event.items() if key.startswith("eval_")}
            value = scores[name]
            best = value if best is None else max(best, value, key=lambda one: merit(one, maximize))
            yield Evaluated(event["step"], round(event["epoch"] * rows["rows"]), value, best, scores)
    finally:
        while thread.is_alive():
            with contextlib.suppress(RayftError):
                stopping.request(recipe.folder, "the sweep")
            thread.join(ASK_S)
