"""The trials of a sweep: which there are, which of them run, wait or have ended, and which comes next."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

from rayft import storage
from rayft.errors import Damaged, StorageError
from rayft.fields.search import Tune
from rayft.sweeps import sampling, trials
from rayft.sweeps.rungs import Rungs
from rayft.sweeps.trials import Known
from rayft.training import checkpoints


class Roster:
    """Every trial of the sweep in `folder`, those of earlier starts too. `rungs` are ASHA's, None for others.

    `source_rows` are those of an epoch. `last` below is what a trial told last: value, best, rows, step, seconds,
    scores, saved_s, error; each may be missing.
    """

    def __init__(
        self,
        folder: str,
        tune: Tune,
        metric: str,
        maximize: bool,
        source_rows: int,
        show: Callable[[dict[str, Any]], None],
    ) -> None:
        self.folder, self.tune, self.metric, self.maximize, self.show = folder, tune, metric, maximize, show
        self.source_rows = source_rows
        self.total = sampling.trials(tune)
        self.rungs: Rungs | None = None
        self.known: dict[int, Known] = {}
        self.running: set[int] = set()
        self._spent: dict[int, tuple[float, float]] = {}  # seconds of earlier times, and what stored states saved then
        self._deleted: set[str] = set()
        self.read()

    def read(self) -> None:
        """Takes from the trials' folders what this process has not heard of."""
        found = {trial.number: trial for trial in trials.known(self.folder)}
        self.known |= {n: trial for n, trial in found.items() if n not in self.known or trial.status is not None}
        for number in self.waiting:
            self.known[number].value = None  # which it was may be that of weights that it has no more
            if last := self._came_to(self.known[number]):
                self._take(number, last)

    @property
    def every(self) -> list[Known]:
        return [trial for _, trial in sorted(self.known.items())]

    @property
    def ended(self) -> list[Known]:
        return [trial for trial in self.every if trial.status is not None]

    @property
    def waiting(self) -> list[int]:
        """Trials that have begun and neither ended nor run now."""
        return [trial.number for trial in self.every if trial.status is None and trial.number not in self.running]

    @property
    def best(self) -> Known | None:
        """Of all that have a score, also where it waits to go on."""
        return trials.best_of(self.every, self.maximize)

    # -- which comes next

    def propose(self) -> tuple[int, dict[str, Any]] | None:
        """The number and fields of the trial to run next: one that goes on, or a new one; None where there is none."""
        number = self._next()
        if number is None:
            return None
        if number not in self.known:
            fields = sampling.propose(self.tune, self.maximize, number, self.heard)
            trials.propose(self.folder, number, fields)
            self.known[number] = Known(number, fields, trials.folder_of(self.folder, number))
        self.running.add(number)
        return number, self.known[number].fields

    def _next(self) -> int | None:
        """Of those that were never begun the first, also where somebody has deleted its folder."""
        absent = (number for number in range(self.total) if number not in self.known)
        waiting, new = self.waiting, next(absent, None) if len(self.known) < self.total else None
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

    @property
    def heard(self) -> dict[int, sampling.Heard]:
        """What the sampler learns from: with ASHA every trial by the highest rung that it has come to, or its end."""
        found = {trial.number: self._heard(trial) for trial in self.every}
        return {number: one for number, one in found.items() if one is not None}

    def _heard(self, trial: Known) -> sampling.Heard | None:
        """None of one that has failed, or has no score yet that is to be compared with others'."""
        score, came = trial.value, None if trial.status == "finished" else trial.rows
        if self.rungs is not None and trial.status != "finished":
            came = self.rungs.height(trial.number)
            score = self.rungs.seen[came].get(trial.number) if came >= 0 else None
        elif trial.status is None:
            return None
        known = score is not None and math.isfinite(score) and trial.status != "failed"
        return sampling.Heard(trial.fields, float(score or 0.0), came) if known else None

    # -- how they fare

    def begin(self, number: int, fields: dict[str, Any], before: dict[str, Any]) -> None:
        """A trial starts, or goes on, maybe with the fields that population based training now gives it.

        `before` is what it told last since it had last begun, in this start of the sweep; empty where it had not.
        """
        trial = self.known[number]
        self._spend(number, before)
        if trial.fields != fields:
            trial.fields = dict(fields)
            trials.propose(self.folder, number, trial.fields)

    def wait(self, number: int, last: dict[str, Any]) -> None:
        """A trial waits until others have come as far."""
        self.running.discard(number)
        self._spend(number, last)
        seconds, saved_s = self._spent[number]
        self._take(number, {**last, "seconds": seconds, "saved_s": saved_s})
        self.progress()

    def end(self, number: int, status: str, last: dict[str, Any]) -> None:
        """A trial has ended: its result, and which checkpoints are still wanted."""
        trial = self.known[number]
        self.running.discard(number)
        trials.end(trial, status, self._summed(number, last), self.metric)
        trials.hparams(trial, self.metric)
        if self.tune.scheduler != "pbt":  # there another trial may go on from any of them
            with contextlib.suppress(StorageError):  # all of it is tried again when no trial writes any more
                self.delete_unwanted()
        self.progress()

    def end_waiting(self) -> None:
        """What still waits when no trial may go on any more, was stopped there."""
        for number in self.waiting:
            if last := self._came_to(self.known[number]):
                self.end(number, "stopped", last)
                self.tell(number, self.known[number].fields, "stopped", last)

    def evaluations(self, trial: Known) -> list[tuple[int, float, dict[str, Any]]]:
        """(source rows trained on, score, the whole line) at each evaluation of a trial, oldest first."""
        lines = [line for line in trials.evaluations(trial.folder) if self.metric in line]
        return [(round(line["epoch"] * self.source_rows), line[self.metric], line) for line in lines]

    def _came_to(self, trial: Known) -> dict[str, Any] | None:
        """What a trial told last, as its folder has it; None where no checkpoint of it has a best model.

        One that has taken another's weights over has none until it is evaluated again, whatever it was before.
        """
        found = self.evaluations(trial)
        try:
            best = checkpoints.best(storage.join(trial.folder, "checkpoints"))
        except Damaged:  # the trial goes on from the one before, and says so
            best = None
        if not found or best is None:
            return None
        rows, value, line = found[-1]
        scores = {name: score for name, score in line.items() if name.startswith("eval_")}
        return {"best": best["value"], "value": value, "step": line["step"], "rows": rows, "scores": scores}

    def _take(self, number: int, last: dict[str, Any]) -> None:
        """A trial that goes on later counts with what it has come to."""
        trial = self.known[number]
        trial.value, trial.scores, trial.rows = last["best"], last["scores"], last["rows"]
        trial.seconds, trial.saved_s = last.get("seconds") or trial.seconds, last.get("saved_s") or trial.saved_s

    def _spend(self, number: int, last: dict[str, Any]) -> None:
        """The seconds that a trial told in `last` are those of an earlier time from now on."""
        summed = self._summed(number, last)
        self._spent[number] = summed["seconds"], summed["saved_s"]

    def _summed(self, number: int, last: dict[str, Any]) -> dict[str, Any]:
        """`last` with the seconds of all times that the trial has run."""
        seconds, saved = self._spent.get(number, (0.0, 0.0))
        more = {"seconds": (last.get("seconds") or 0.0) + seconds, "saved_s": (last.get("saved_s") or 0.0) + saved}
        return {**last, **{name: round(value, 3) for name, value in more.items()}}

    # -- what is seen and kept of them

    def tell(self, number: int, fields: dict[str, Any], status: str, last: dict[str, Any]) -> None:
        """Shows how a trial fares."""
        told = {name: last.get(name) for name in ("value", "best", "rows", "error")}
        seconds = self._summed(number, last)["seconds"] if "seconds" in last or number in self._spent else None
        goal = {"metric": self.metric, "maximize": self.maximize}
        event = {"event": "trial", "status": status, **goal, **told, "seconds": seconds}
        self.show({**event, "trial": number, "fields": fields})

    def progress(self) -> None:
        """Shows how many trials have ended, or wait at a rung."""
        done = len(self.ended) + len(self.waiting if self.rungs is not None else ())
        self.show({"event": "stage", "name": "trials", "done": done, "total": self.total})

    def delete_unwanted(self, again: bool = False) -> None:
        """Deletes the checkpoints of trials that have ended and are not the best; `again` also where it was done.

        While one leads that has not ended, the best of those that have stays too: the leader may yet fail.
        """
        if again:
            self._deleted.clear()
        kept = {best.number for best in (self.best, trials.best_of(self.ended, self.maximize)) if best is not None}
        for other in self.ended:
            folder = storage.join(other.folder, "checkpoints")
            if kept and other.number not in kept and folder not in self._deleted:
                storage.delete(folder)
                self._deleted.add(folder)
