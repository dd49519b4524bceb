"""The record of a run in its folder: run.json and result.json, and the rule that only one process writes them."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rayft import attempts, document, storage
from rayft.errors import RunRefused, StorageError, Superseded, TrainingError
from rayft.layout import INSIDE, TRIALS
from rayft.recipe import Recipe
from rayft.training import checkpoints

BEAT_S = 5.0
LOOK_S = 1.0  # between two looks for the heartbeat of another writer
JOB = "RAYFT_JOB"  # the variable in which a driver on Kubernetes finds the name of its RayJob
ENDED = ("Z", "X")  # states of a process that Linux still lists, since nobody has asked how it ended
SILENT_S = 30.0  # a writer elsewhere that was not heard of for so long is dead


class Record:
    """`folder` is `<storage>/<name>`. `attempt` is the newest that this process knows of; 0 where none was claimed.

    `superseded` is set once another process has claimed a newer one.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.file = storage.join(folder, "run.json")
        self.before: dict[str, Any] = storage.read_object(self.file) or {}
        self.attempt = attempts.newest(folder)
        self.status = "failed"
        self.superseded: Superseded | None = None
        self._state: dict[str, Any] = {}
        self._recipe = ""
        self._claiming = threading.Lock()

    def recipe(self) -> Recipe | None:
        """The recipe that this run was started with, or None."""
        path = storage.join(self.folder, "recipe.yaml")
        if not storage.exists(path):
            return None
        return Recipe.written(storage.read_text(path), path)

    def result(self) -> dict[str, Any] | None:
        """What result.json says; None where there is none, or it is damaged: then the run comes to its end again."""
        return storage.read_object(storage.join(self.folder, "result.json"))

    def standing(self, recipe: Recipe) -> str:
        """What starting `recipe` means: "new", "resumed", "longer" (it asks for more than before), or "finished".

        RunRefused where this run was started with a recipe that differs in what matters.
        """
        before = self.recipe()
        if before is None:
            return "new"
        differences = before.differences(recipe)
        if differences:
            listed = "\n".join(f"  {difference}" for difference in differences)
            raise RunRefused(
                f"{self.folder} was trained with another recipe:\n{listed}\n"
                "give it another `name=`, or start over with --restart"
            )
        if (before.train.epochs, before.train.max_steps) != (recipe.train.epochs, recipe.train.max_steps):
            return "longer"
        result = self.result()
        return "finished" if result is not None and result.get("status") == "finished" else "resumed"

    def refuse_sweep(self) -> None:
        """RunRefused where this folder was begun by `rayft tune`: only there does recipe.yaml say what is searched."""
        path = storage.join(self.folder, "recipe.yaml")
        known = document.read(storage.read_text(path)).value if storage.exists(path) else None
        if isinstance(known, dict) and known.get("tune") is not None:
            raise RunRefused(f"{self.folder} is a sweep; `rayft tune` goes on with it, or give the run another `name=`")

    def settle(self) -> None:
        """Makes run.json say that a run has finished whose result is there, where it was killed before it could."""
        if self.before.get("status") == "running" and not alive(self.before):
            storage.write_json(self.file, {**self.before, "status": "finished"})
            storage.delete(storage.join(self.folder, "ray"))

    def refuse_second_writer(self, take_over: bool, show: Callable[[dict[str, Any]], None]) -> None:
        """RunRefused while another process writes this run.

        On this host its process is looked at. One elsewhere is watched until it is heard of again, or has been silent
        for SILENT_S: whatever restarts a job that died may be faster than that.
        """
        if not self.before and storage.exists(self.file):
            show({"event": "warning", "text": f"{self.file} is damaged, and is written anew"})
        if take_over or self.before.get("status") != "running" or not alive(self.before):
            return
        if self.before["host"] != socket.gethostname():
            who = f"process {self.before['pid']} on {self.before['host']}"
            show({"event": "note", "text": f"{who} wrote this run a moment ago; waiting to see whether it still does"})
            if not self._heard():
                return
        raise RunRefused(
            f"{self.folder} is being written by process {self.before['pid']} on {self.before['host']}; "
            "wait for it, stop it, or take over with --take-over"
        )

    def _heard(self) -> bool:
        """Does the other writer beat once more before it has been silent for too long?"""
        silent = min(SILENT_S, max(0.0, time.time() - float(self.before["heartbeat"])))
        until = time.monotonic() + SILENT_S - silent
        while time.monotonic() < until:
            time.sleep(LOOK_S)
            now = storage.read_json(self.file)
            if now != self.before:
                self.before, self.attempt = now, attempts.newest(self.folder)
                return bool(now["status"] == "running")
        return False

    def refuse_same_failure(self) -> None:
        """TrainingError where the cluster before this one, of the same RayJob, has met what this one would meet.

        KubeRay's operator makes the next cluster whatever the failure was. Another job, and who runs the recipe by
        hand, may have mended what is not in the recipe.
        """
        job, result = os.environ.get(JOB), self.result() or {}
        if job and result.get("given_up_by") == job:
            raise TrainingError(
                f"{result['error']} (this ended the cluster before, and would this one; a new submission tries again)"
            )

    def forget_failure(self, job: str) -> None:
        """For a new RayJob named `job`: what one of that name has left, which was deleted since, is not its own."""
        if (self.result() or {}).get("given_up_by") == job:
            storage.delete(storage.join(self.folder, "result.json"))

    def refuse_other_model(self, identity: str) -> None:
        known = self.before.get("model")
        if known and known != identity:
            raise RunRefused(
                f"{self.folder} was trained from another model (its content is {known}, now {identity}); "
                "give it another `name=`, or start over with --restart"
            )

    def refuse_other_data(self, train: str, validation: str | None = None) -> None:
        """RunRefused where the run began with other rows; the keys are those of its prepared splits.

        Validation rows count as those of training do: scores of different rows must not choose the best model.
        """
        for split, key in (("training", train), ("validation", validation)):
            known = self.before.get("prepared", {}).get(split.removesuffix("ing"))
            if known and key and known != key:
                raise RunRefused(
                    f"the {split} rows of {self.folder} have changed since it began (prepared {known}, now {key}); "
                    "give it another `name=`, or start over with --restart"
                )

    def claim(self) -> int:
        """Claims the next attempt, for one worker group; from now on only what it commits is added to the run.

        Only then run.json and recipe.yaml become this process's. RunRefused where another process started at the same
        moment and was first, Superseded where one has taken over since.
        """
        found = checkpoints.committed(storage.join(self.folder, "checkpoints"))
        with self._claiming:
            try:
                self.attempt = attempts.claim(self.folder, [path.rpartition("/")[2] for path in found], self.attempt)
            except Superseded as error:
                self.superseded = error
                if self._claimed:
                    raise
                raise RunRefused(f"{self.folder} is being started by {error.owner}, which was first") from None
            self._state["attempt"] = self.attempt
        # A run that goes on is no longer what an earlier end of it said. That goes first: beside a recipe that asks for
        # more it would count as the result.
        storage.delete(storage.join(self.folder, "result.json"))
        storage.write_text(storage.join(self.folder, "recipe.yaml"), self._recipe)
        storage.write_json(self.file, {**self._state, "heartbeat": time.time()})
        return self.attempt

    @property
    def model(self) -> str:
        """What identifies the base model of the run that is being written."""
        return str(self._state["model"])

    @property
    def before_s(self) -> float:
        """Seconds in which earlier starts have written this run, as far as its heartbeat said so."""
        before = self.before
        return round(before.get("before_s", 0.0) + before["heartbeat"] - before["started"], 3) if before else 0.0

    @property
    def _claimed(self) -> bool:
        return "attempt" in self._state

    def forget(self) -> None:
        """Deletes what the run has so far, but the claims: whoever still writes must find itself old.

        Other folders are runs with longer names, and stay. Whoever ends half-way leaves a run that has not finished.
        """
        for folder in (self.folder, *storage.folders(storage.join(self.folder, TRIALS))):
            storage.delete(storage.join(folder, "result.json"))
        self.attempt = attempts.claim(self.folder, [], self.attempt)
        for name in sorted({*INSIDE, TRIALS} - {attempts.FOLDER}):
            storage.delete(storage.join(self.folder, name))
        for entry in storage.listing(self.folder, recursive=False):
            storage.delete(entry.path)
        self.before = {}

    @contextmanager
    def writing(self, recipe: Recipe, model: str, prepared: dict[str, str]) -> Iterator[None]:
        """From the first claim on, run.json says `running` and its heartbeat is renewed; at the end, `status`."""
        self._state = {
            "status": "running",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_started": process_begun(os.getpid()),
            "started": time.time(),
            "heartbeat": time.time(),
            "before_s": self.before_s,
            "model": model,
            "prepared": prepared,
        }
        self._recipe = recipe.to_yaml()
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_S):
                try:
                    with self._claiming:
                        attempts.hold(self.folder, self.attempt)
                    if self._claimed:
                        storage.write_json(self.file, {**self._state, "heartbeat": time.time()})
                except Superseded as error:
                    self.superseded = error
                    return
                except StorageError:  # an outage: it is told where something has to be written, and may pass
                    continue

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            if self._claimed and not self._replaced():
                storage.write_json(self.file, {**self._state, "status": self.status, "heartbeat": time.time()})

    def _replaced(self) -> bool:
        """Has another process claimed the run since?"""
        if self.superseded is None:
            try:
                attempts.hold(self.folder, self.attempt)
            except Superseded as error:
                self.superseded = error
        return self.superseded is not None

    def end(self, status: str, error: str, sure: bool = False) -> None:
        """Writes result.json of a run that did not finish; `error` is one sentence. Nothing where another took over.

        `sure`: another cluster would fail in the same way, which the next one of the same RayJob is told.
        """
        self.status = status
        if self._replaced():
            return
        result = {"run": self.folder, "status": status, "error": error, "steps": None, "epochs": None}
        if sure and (job := os.environ.get(JOB)):
            result["given_up_by"] = job
        empty: dict[str, Any] = {"metrics": {}, "best": None, "export": None, "timing": {}, "warnings": []}
        storage.write_json(storage.join(self.folder, "result.json"), {**result, **empty})


def alive(state: dict[str, Any]) -> bool:
    """Is the process that wrote this run.json still there?"""
    if state.get("host") == socket.gethostname():
        begun = process_begun(state["pid"])
        return begun is not None and begun == state["pid_started"]
    return bool(time.time() - float(state.get("heartbeat", 0)) < SILENT_S)


def process_begun(pid: int) -> str | float | None:
    """When a process began, which tells it from a later one with its number; None where it has ended, reaped or not.

    On Linux that is in ticks since the boot, with the boot's id: seconds since 1970 move when the clock is set.
    """
    import psutil

    try:
        if not psutil.LINUX:
            return float(psutil.Process(pid).create_time())
        with open(f"/proc/{pid}/stat") as file, open("/proc/sys/kernel/random/boot_id") as boot:
            fields = file.read().rpartition(")")[2].split()  # from the third on; the name before may hold anything
            return None if fields[0] in ENDED else f"{boot.read().strip()}:{fields[19]}"
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None
