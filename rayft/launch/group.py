"""One worker group under Ray Train: its start, what the driver sees and orders while it works, and how it ends.

Ray Train runs in a thread of its own. The driver's thread passes on events, and looks every moment who stands still,
whether a stop was asked for, whether machines are about to leave or have come, and whether another attempt took over.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft import storage
from rayft.data.feed import Feed, streams
from rayft.data.prepared import Prepared
from rayft.errors import ClusterError, RayftError, WorkersLost
from rayft.launch import controller, placement, prestart, session
from rayft.launch.board import Board, Place, standstill
from rayft.launch.failure import Left, cause
from rayft.launch.network import GroupConfig
from rayft.recipe import Recipe
from rayft.training.schedule import order, total_steps
from rayft.training.watch import LEAVE

Show = Callable[[dict[str, Any]], None]

TURN_S = 0.2  # between two looks of the driver
ANSWER_S = 30.0  # for the board to answer
NOTICE_S = 1.0  # between two looks for notices to machines
ROOM_S = 5.0  # between two looks for new machines
SLACK_S = 60  # by which collectives outlast `failure.timeout_s`, so that the driver names who stood still


@dataclass(frozen=True)
class Start:
    """What a worker group starts from: the attempt that it writes as, and the checkpoint (None: the beginning).

    `step` optimizer steps are done; with `feeds` there are more to do. `begun` is when the command was given, in
    seconds since 1970, `identity` the base model's. With `exports` the best model is tested and exported in the end;
    without `trains` that is all that is done.
    """

    attempt: int
    begun: float
    checkpoint: str | None
    step: int
    feeds: bool
    identity: str
    exports: bool
    trains: bool


def fit(
    recipe: Recipe,
    model_path: str,
    prepared: dict[str, Prepared],
    start: Start,
    *,
    most: int,
    show: Show,
    asked: Callable[[], Left | RayftError | None],
) -> Left | None:
    """One worker group, as many workers as the recipe says; None when it has written result.json.

    `most` is the number of workers with which it would rather work. Left where it was asked to leave, by `asked` or by
    what happens to the machines. Raises why it failed otherwise, and the error of `asked` where that gives one.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
    trainer = _trainer(recipe, model_path, prepared, start, board)
    show({"event": "stage", "name": "starting workers"})
    group = _Group(recipe, most, start.step, trainer, board, show, asked)
    try:
        return group.run()
    finally:
        ray.kill(board)
        storage.delete(storage.join(recipe.folder, "ray"))


def _work(config: dict[str, Any]) -> None:
    """What every worker does. Its module comes with torch, which this process need not import."""
    from rayft.training import worker

    worker.work(config)


class _Trainer(DataParallelTrainer):
    """Without three processes that Ray Train starts and that have nothing of their own to do here."""

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        return controller.run(**arguments)

    def _create_default_callbacks(self) -> list[Any]:
        """One hands out datasets. The other frees what is reserved where Ray's job outlives the one who started this:
        a trial of a sweep; what a driver leaves is freed with its job."""
        idle = set() if self.datasets else {"DatasetsCallback"}
        if ray.get_runtime_context().get_actor_id() is None:
            idle.add("PlacementGroupCleanerCallback")
        callbacks: list[Any] = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in idle]


def _trainer(recipe: Recipe, model_path: str, prepared: dict[str, Prepared], start: Start, board: Any) -> _Trainer:
    rows, training, cluster = order(recipe, prepared["train"]), prepared["train"], recipe.cluster
    streamed = start.feeds and streams(recipe.data.stream, training.manifest.shards, recipe.task.varies)
    config = {
        "recipe": recipe.dump(),
        # What only this machine may have a copy of, each machine fetches for itself.
        "model": model_path if os.path.isdir(recipe.model.path) else recipe.model.path,
        "prepared": {split: data.folder for split, data in prepared.items()},
        "attempt": start.attempt,
        "start": start.checkpoint,
        "begun": start.begun,
        "board": board,
        "feeds": start.feeds,
        "streams": streamed,
        "identity": start.identity,
        "exports": start.exports,
        "trains": start.trains,
    }
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    steps, position = total_steps(recipe.train, rows.steps_per_epoch), rows.position(start.step)
    # Only where rows vary: with the task, torch and transformers come into every process that reads.
    task = recipe.task if recipe.task.varies else None
    feed = Feed(training.folder, training.manifest.shards, rows, steps, lambda: position, task)
    return _Trainer(
        _work,
        train_loop_config=config,
        backend_config=GroupConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=recipe.failure.timeout_s + SLACK_S
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.max_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
            # GPUs of one machine are joined by more than the network; processors share its memory's bandwidth.
            placement_strategy="PACK" if cluster.gpus_per_worker else "SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{start.attempt}-{int(time.time() * 1000)}",
            storage_path=storage.join(recipe.folder, "ray"),
            failure_config=ray.train.FailureConfig(max_failures=0),
            worker_runtime_env=prestart.environment(cluster),  # type: ignore[call-arg] # Ray's types are of Train V1
        ),
        datasets=feed.datasets() if streamed else None,
        dataset_config=feed if streamed else None,
    )


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if "RayTrainWorker" in " ".join(process.cmdline()):  # else it has ended, and its number is another's now
            process.kill()


class _Group:
    """A worker group that works, seen from the driver."""

    def __init__(
        self,
        recipe: Recipe,
        most: int,
        step: int,
        trainer: _Trainer,
        board: Any,
        show: Show,
        asked: Callable[[], Left | RayftError | None],
    ) -> None:
        self.recipe, self.most, self.step = recipe, most, step
        self.trainer, self.board, self.show, self.asked = trainer, board, show, asked
        self.places: list[Place] = []
        self.failure: BaseException | None = None
        self.leaving: Left | None = None
        self.ended: RayftError | None = None
        self.left = False
        self._given_up, self._begun = False, time.time()
        self._deadline = float("inf")
        self._asked = self._looked = time.monotonic()
        self._larger = 0
        self._growth = placement.Growth(recipe)

    def run(self) -> Left | None:
        fitting = threading.Thread(target=self._fit, daemon=True)
        fitting.start()
        while fitting.is_alive() and not self._given_up:
            fitting.join(TURN_S)
            self._turn()
        self._turn()
        self._growth.end()
        if self.ended is not None:
            raise self.ended
        if self.failure is None and not self.left and not self._given_up:
            return None
        if self.leaving is not None:  # a worker that fails while all are leaving changes nothing
            return Left(self.leaving.why, self.leaving.text, late=not self.left)
        raise cause(self.failure or RuntimeError("the group has left unasked"), self.places, self.recipe)

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except Exception as error:  # noqa: BLE001 # `run` raises what it means
            self.failure = error

    def _turn(self) -> None:
        """Shows what has come in, and orders what follows from it."""
        try:
            events, self.places = ray.get(self.board.drain.remote(), timeout=ANSWER_S)
        except ray.exceptions.RayError:  # a busy machine, or the end; the folder has the metrics
            session.refuse_lost()
            return
        for event in events:
            if event["event"] == "left":  # between worker and driver; what follows from it is shown
                self.left = True
            else:
                self.show(event)
        if self.ended is not None:
            return
        if still := standstill(self.places, self.recipe.failure.timeout_s):
            self._end(WorkersLost(still))
        elif time.monotonic() > self._deadline:
            self._end(None)
        elif self.leaving is None and (wish := self.asked() or self._machines()) is not None:
            if isinstance(wish, Left):
                self._leave(wish)
            else:
                self._end(wish)

    def _leave(self, wish: Left) -> None:
        self.leaving, self._deadline = wish, time.monotonic() + self.recipe.failure.grace_s
        self.show({"event": "warning", "text": f"{wish.text}; saving a checkpoint"})
        self.board.tell.remote(LEAVE)

    def _end(self, why: RayftError | None) -> None:
        """Kills the workers, each by a task on its machine: a process that hangs hears no order.

        Those that never began are not waited for: Ray would try to start them as long as this process lives.
        """
        self.ended, self._deadline = why, float("inf")
        self._given_up = not self.places
        for place in self.places:
            there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
            _kill.options(scheduling_strategy=there).remote(place.pid)

    def _machines(self) -> Left | ClusterError | None:
        """A wish to move, where machines of this group have been told to leave, or there is room for more workers; or
        why they can't begin."""
        if time.monotonic() - self._asked < NOTICE_S:
            return None
        self._asked = time.monotonic()
        if not self.places and (why := prestart.failing(self._begun)) is not None:
            return ClusterError(why)
        about_to = placement.leaving()
        if losing := [place for place in self.places if place.node_id in about_to]:
            return Left(
                "preemption", f"{losing[0].node} is about to leave the cluster, and rank {losing[0].rank} with it"
            )
        cluster = self.recipe.cluster
        if cluster.max_workers >= self.most or time.monotonic() - self._looked < ROOM_S:
            return None
        self._looked = time.monotonic()
        self._growth.wish(self.most - cluster.max_workers)
        moving = any(place.step is not None and place.step > self.step + 1 for place in self.places)
        # Twice, so that a machine that comes and goes moves nobody.
        self._larger = self._larger + 1 if moving and placement.room(cluster) > 0 else 0
        if self._larger < 2:
            return None
        return Left("room", f"there is room for more than {cluster.max_workers} workers")
