"""A run, from a recipe to a result: one writer, preparation, one worker group after another, the folder it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rayft import storage
from rayft.doubts import doubts
from rayft.errors import CheckpointError, Damaged, RayftError, RunRefused, Stopped, StorageDown, TrainingError
from rayft.launch import ahead, placement, prestart
from rayft.launch.failure import AGAIN, SURE, Left, decide
from rayft.launch.gauges import Gauges
from rayft.launch.stopping import Stop
from rayft.models import UNTRAINED, fetch_model, model_identity, without_weights
from rayft.recipe import Recipe
from rayft.record import Record
from rayft.text import counted
from rayft.training import checkpoints, footprint
from rayft.training.schedule import order, total_steps

Show = Callable[[dict[str, Any]], None]


def run(
    recipe: Recipe,
    *,
    show: Show,
    restart: bool = False,
    take_over: bool = False,
    exports: bool = True,
    trains: bool = True,
    begun: float | None = None,
) -> dict[str, Any]:
    """Trains what `recipe` says, or goes on where its run stopped; returns what result.json holds.

    With `exports` false it ends with the best evaluation: nothing is tested or exported. With `trains` false no step is
    made: the best model of a run that has one is tested and exported, wherever it stands. The time to the first step
    counts from `begun`, when the command was given, in seconds since 1970 (None: now).

    Raises a RayftError: before anything is started where the run is refused, else after result.json says what failed.
    """
    begun = begun or time.time()
    # A recipe that says what to search is that of a sweep's folder.
    recipe = recipe.resolved().model_copy(update={"tune": None})
    show = Gauges(recipe.name).beside(show)
    record = Record(recipe.folder)
    record.refuse_sweep()
    record.refuse_second_writer(take_over, show)
    record.refuse_same_failure()
    finished = _settle(recipe, record, show) if trains and not restart else None
    if finished is not None:
        return finished
    storage.check_writable(recipe.storage)
    if text := placement.passing(recipe):
        show({"event": "warning", "text": text})
    model_path = fetch_model(recipe.model.path)
    identity = model_identity(model_path, recipe.model.revision, recipe.train.seed)
    if not restart:
        record.refuse_other_model(identity)
    from rayft.data.prepare import Preparation
    from rayft.launch.session import cluster

    rows = Preparation(recipe, model_path)
    prepared = rows.found()
    # Where rows are prepared and parameters counted, this process needs neither torch nor transformers.
    light = prepared is not None and known(recipe, model_path, prepared) is not None
    workers, cpus = recipe.cluster.max_workers, recipe.cluster.cpus_per_worker
    with (
        cluster(workers, cpus, imports=() if light else ahead.START),
        _processes(recipe, () if light else ahead.DRIVER, show) as settled,
    ):
        prepared = prepared or rows.made(_preparing(show))
        _tell_damage(rows.damaged, show)
        parameters = shown_plan(recipe, model_path, prepared, show)
        if restart:  # only now, when nothing refuses the new start
            record.forget()
        keys = {split: split_data.manifest.key for split, split_data in prepared.items()}
        record.refuse_other_data(keys["train"], keys.get("validation"))
        settled()
        stop = Stop(recipe.folder)
        with record.writing(recipe, identity, keys), stop.listening(), _ending(record):
            Attempts(recipe, model_path, prepared, parameters, record, stop, begun, show, exports, trains).run()
    result: dict[str, Any] = storage.read_json(storage.join(recipe.folder, "result.json"))
    return result


@contextmanager
def _ending(record: Record) -> Iterator[None]:
    """The record says how what is inside has ended."""
    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        record.end(
            "stopped", str(error) or "interrupted; the same command goes on from the last checkpoint, if there is one"
        )
        raise
    except Exception as error:
        told = str(error) if isinstance(error, RayftError) else f"{type(error).__name__}: {error}"
        record.end("failed", told, sure=isinstance(error, SURE))
        raise
    record.status = "finished"


@contextmanager
def _processes(recipe: Recipe, imports: tuple[str, ...], show: Show) -> Iterator[Callable[[], None]]:
    """Has the workers' processes started, and imports beside them; gives what waits until workers can have them."""
    show({"event": "stage", "name": "preparing"})
    placement.refuse(recipe)
    settled = prestart.workers(recipe.cluster)
    with ahead.importing(*imports):
        yield settled


def export(run_folder: str, folder: str) -> str:
    """Copies the exported model of a run to `folder`; returns it. Raises RunRefused where there is none yet.

    All or nothing: rayft.json comes last, and what a failure leaves half-written is deleted.
    """
    source, details = storage.join(run_folder, "export"), "rayft.json"
    if not storage.exists(storage.join(source, details)):
        raise RunRefused(f"{run_folder} has no exported model; a run exports when it ends")
    if storage.listing(folder):
        raise RunRefused(f"{folder} exists and is not empty; name another folder, or delete it first")
    storage.check_writable(folder)
    import tempfile

    with tempfile.TemporaryDirectory(prefix="rayft-export-") as local:
        storage.download(source, local)
        try:
            storage.upload(local, folder, marker=details)
        except BaseException:
            for entry in storage.listing(folder):
                storage.delete(entry.path)
            raise
    return folder


def _settle(recipe: Recipe, record: Record, show: Show) -> dict[str, Any] | None:
    """What an earlier start of this run means: its result where finished, a refusal where the recipe has changed."""
    standing = record.standing(recipe)
    if standing == "finished":
        record.settle()
        show({"event": "note", "text": f"{recipe.folder} is finished; this is its result"})
        return record.result()
    before = record.recipe()
    if standing == "longer" and before is not None and recipe.train.schedule != "constant":
        now = length(recipe)
        show(
            {
                "event": "note",
                "text": f"the {recipe.train.schedule} schedule now ends later: {length(before)} -> {now}",
            }
        )
    return None


def length(recipe: Recipe) -> str:
    """How long it trains, in words."""
    asked = ((recipe.train.epochs, "epoch"), (recipe.train.max_steps, "step"))
    return ", at most ".join(counted(count, unit) for count, unit in asked if count is not None)


def _preparing(show: Show) -> Callable[[str, int, int | None], None]:
    return lambda stage, done, total: show({"event": "stage", "name": stage, "done": done, "total": total})


def prepared_for(recipe: Recipe, model_path: str, show: Show) -> dict[str, Any]:
    """Every split, from an earlier preparation where there is one."""
    from rayft.data.prepare import Preparation

    rows = Preparation(recipe, model_path)
    prepared = rows.made(_preparing(show))
    _tell_damage(rows.damaged, show)
    return prepared


def _tell_damage(files: list[str], show: Show) -> None:
    for file in files:
        show({"event": "warning", "text": f"{storage.shown(file)} is damaged, and was prepared anew"})


def shown_plan(recipe: Recipe, model_path: str, prepared: dict[str, Any], show: Show) -> Any:
    """How many parameters learn; shows notes on what preparation did to the rows, and the plan."""
    if without_weights(model_path):
        show({"event": "note", "text": UNTRAINED.format(recipe.model.path)})
    for split, data in prepared.items():
        for text in data.manifest.notes(split):
            show({"event": "note", "text": text})
    for text in doubts(recipe, prepared["train"]):
        show({"event": "note", "text": text})
    steps, epochs = _steps(recipe, prepared)
    parameters = known(recipe, model_path, prepared)
    if parameters is None:
        from rayft.training import plan
        from rayft.training.assembly import pretrained

        base, facts = pretrained(recipe, model_path), prepared["train"].manifest.facts
        parameters = plan.parameters(recipe, base, facts, recipe.task.processor(base), epochs)
        footprint.keep(recipe, model_path, prepared["train"], epochs, parameters)
    planned = decided(recipe, recipe.cluster.max_workers, parameters)
    machines = placement.memories(recipe.cluster, gpu=False) if recipe.cluster.gpus_per_worker else []
    if text := placement.short_of_memory(planned, parameters, machines):
        show({"event": "warning", "text": text})
    counts = {
        f"{split}_rows" if split != "train" else "rows": data.manifest.source_rows for split, data in prepared.items()
    }
    show(
        {
            "event": "plan",
            "steps": steps,
            "epochs": recipe.train.epochs,
            "workers": recipe.cluster.max_workers,
            "zero_stage": planned.deepspeed.zero_stage,
            "trainable": parameters.trainable,
            "frozen": parameters.frozen,
            "global_batch_size": recipe.train.global_batch_size,
            **counts,
        }
    )
    return parameters


def known(recipe: Recipe, model_path: str, prepared: dict[str, Any]) -> Any:
    """The parameters, where an earlier run has counted them; None elsewhere."""
    return footprint.known(recipe, model_path, prepared["train"], _steps(recipe, prepared)[1])


def _steps(recipe: Recipe, prepared: dict[str, Any]) -> tuple[int, int]:
    """Optimizer steps of the whole run, and the epochs that they begin."""
    per_epoch = order(recipe, prepared["train"]).steps_per_epoch
    steps = total_steps(recipe.train, per_epoch)
    return steps, -(-steps // per_epoch)


def decided(recipe: Recipe, workers: int, parameters: Any) -> Recipe:
    """The recipe for one worker group: a fixed number of workers, and the ZeRO stage that they need."""
    alone = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"workers": workers})})
    automatic = recipe.deepspeed.zero_stage == "auto"
    stage = parameters.zero_stage(alone, placement.worker_memory(alone.cluster) if automatic else None)
    return alone.at_stage(stage)


@dataclass
class Attempts:
    """Worker groups, one after another, until the run has ended or what failed is not worth another try."""

    recipe: Recipe
    model_path: str
    prepared: dict[str, Any]
    parameters: Any
    record: Record
    stop: Stop
    begun: float
    show: Show
    exports: bool
    trains: bool

    @property
    def folder(self) -> str:
        """Where the checkpoints are."""
        return storage.join(self.recipe.folder, "checkpoints")

    def run(self) -> None:
        retries = failed_at = 0
        while True:
            outcome = self._once()
            if outcome is None:
                return
            newest = failed_at
            # Where storage is still away, or more is damaged, this was a try without progress.
            with suppress(StorageDown, Damaged):
                self._repair(outcome)
                newest = self._step()
            decision = decide(outcome, retries, newest > failed_at, self.recipe.failure.max_retries)
            if not decision.again:
                if isinstance(outcome, Left):
                    raise Stopped(str(self.stop.by), newest, outcome.late)
                raise TrainingError(decision.text) if isinstance(outcome, AGAIN) else outcome
            retries, failed_at = decision.retries, newest
            self.show({"event": "warning", "text": decision.text})

    def _once(self) -> Left | RayftError | None:
        """One worker group; None when the run has ended, else why it hasn't."""
        from rayft.launch import group

        try:
            attempt = self.record.claim()
            workers = placement.settled(self.recipe, self.show, self.stop.asked)
            if not workers:
                return Left("stop", "")
            step, feeds, path = self._position()
            if workers < self.recipe.cluster.max_workers:
                self.show({"event": "note", "text": f"working with {workers} workers until there is room for more"})
            recipe = decided(self.recipe, workers, self.parameters)
            identity = self.record.model
            start = group.Start(attempt, self.begun, path, step, feeds, identity, self.exports, self.trains)
            most = self.recipe.cluster.max_workers
            try:
                return group.fit(
                    recipe, self.model_path, self.prepared, start, most=most, show=self.show, asked=self._asked
                )
            finally:
                with suppress(StorageDown):  # they count for nothing, and go with a later checkpoint
                    checkpoints.sweep(self.folder, attempt)
        except RayftError as error:
            return error

    def _asked(self) -> Left | RayftError | None:
        if self.record.superseded is not None:
            return self.record.superseded
        by = self.stop.asked()
        return Left("stop", f"{by} asks to stop") if by else None

    def _step(self) -> int:
        newest = checkpoints.newest(self.folder)
        return checkpoints.step_of(newest) if newest else 0

    def _position(self) -> tuple[int, bool, str | None]:
        """The step of the checkpoint to go on from, whether there are steps to make from there, and its path."""
        newest = checkpoints.newest(self.folder)
        if newest is None:
            if not self.trains:
                raise CheckpointError(f"{self.recipe.folder} has no checkpoint of its best model")
            return 0, True, None
        saved = checkpoints.state(newest)
        step, ended, total, per_epoch = (saved[k] for k in ("step", "finished", "total_steps", "steps_per_epoch"))
        self.show({"event": "note", "text": f"going on from step {step} ({newest})"})
        now = total_steps(self.recipe.train, per_epoch)
        more = now > step and (not ended or (now > total and step >= total))
        return step, self.trains and more, newest

    def _repair(self, outcome: Left | RayftError) -> None:
        """What was found damaged counts no longer: the checkpoint before is used then, shards are prepared anew."""
        if not isinstance(outcome, Damaged):
            return
        if outcome.folder.startswith(self.folder):
            checkpoints.discard(outcome.folder, str(outcome))
            return
        shards = next((split for split in self.prepared.values() if split.folder == outcome.folder), None)
        if shards is not None:
            shards.discard()
        else:
            storage.delete(outcome.folder)
        self.prepared = prepared_for(self.recipe, self.model_path, self.show)
