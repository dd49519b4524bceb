"""Jobs on a cluster beside the runs that they write: one table, and a stop that leaves a checkpoint first."""

from __future__ import annotations

import getpass
import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rayft import attempts, document, storage
from rayft.errors import RunRefused, StorageError, TrainingError
from rayft.launch import stopping
from rayft.submission.servers import TERMINAL, Job, Server
from rayft.text import last_line
from rayft.training import checkpoints

Show = Callable[[dict[str, Any]], None]
Told = dict[str, Any]

INTERRUPTED = 130  # the exit code of a run that was stopped
LOOK_S = 0.5
SLACK_S = 30.0  # beyond the grace period: for a request to be seen, a long step, a slow storage
END_S = 60.0  # for a job's processes to end
READERS = 8


def listed(server: Server) -> list[Told]:
    """Every job of rayft that the cluster knows, the newest first, with what its run's folder says.

    Each: {"job", "status", "run", "recipe", "attempt", "step", "epoch", "loss", "metric", "value", "left_s",
    "started", "seconds", "message"}; what is not known is None.
    """
    jobs = server.jobs()
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(told, jobs))


def find(server: Server, name: str) -> Job:
    """The job with the id `name`, or the newest one of the run whose name or folder that is."""
    for job in server.jobs():
        if name in (job.id, job.recipe) or job.run in (name.rstrip("/"), storage.absolute(name).rstrip("/")):
            return job
    raise RunRefused(
        f"{server.address} knows no job `{name}`; `rayft jobs list{server.options}` shows those that it knows"
    )


def status(server: Server, name: str) -> Told:
    """One job and its run as `told` has them; where it has not started, `message` says what it waits for."""
    job = find(server, name)
    why = server.waits(job.id) if job.status == "PENDING" else None
    return told(job) | ({"message": why} if why else {})


def told(job: Job) -> Told:
    """A job as its server knows it, and its run as its folder tells it."""
    found: Told = {
        "job": job.id,
        "status": _status(job),
        "run": job.run,
        "recipe": job.recipe,
        "attempt": None,
        "step": None,
        "epoch": None,
        "loss": None,
        "metric": None,
        "value": None,
        "left_s": None,
        "started": job.started,
        "seconds": round((job.ended or time.time()) - job.started, 1) if job.started else None,
        "message": job.message,
    }
    if job.run:
        try:
            found |= _of_run(job.run, job.status == "RUNNING")
        except (StorageError, OSError):  # a storage that is not to be seen from here; the job is
            found["message"] = f"{job.run} can't be read from here"
    return found


def _status(job: Job) -> str:
    """Ray calls it a failure when a run that was asked to stop ends by itself, with the code that says so."""
    return "stopped" if job.exit_code == INTERRUPTED else job.status.lower()


def _of_run(folder: str, running: bool) -> Told:
    """Attempt, step, loss, score and seconds left, from the run's folder."""
    state = storage.join(folder, "run.json")
    if not storage.exists(state):
        return {}
    known = storage.read_json(state)
    found: Told = {"attempt": known.get("attempt")}
    path = storage.join(folder, "metrics.jsonl")
    lines = storage.read_text(path).splitlines() if storage.exists(path) else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    steps = [row for row in rows if "loss" in row]
    if steps:
        last = steps[-1]
        found |= {name: last.get(name) for name in ("step", "epoch", "loss")}
        if running:
            found["left_s"] = _left(folder, last)
    scores = [row for row in rows if "loss" not in row]
    if scores:
        metric = next((name for name in scores[-1] if name.startswith("eval_") and name != "eval_loss"), None)
        found |= {"metric": metric, "value": scores[-1].get(metric)} if metric else {}
    return found


def _left(folder: str, last: dict[str, Any]) -> float | None:
    """Seconds, by the pace of the newest attempt since the step from which it goes on.

    None where it has made no step yet, or the recipe's end is not to be known from its epochs or steps.
    """
    attempt = attempts.current(folder)
    if attempt is None:
        return None
    train = (document.read(storage.read_text(storage.join(folder, "recipe.yaml"))).value or {}).get("train") or {}
    shares = [
        last[name] / train[whole]
        for name, whole in (("epoch", "epochs"), ("step", "max_steps"))
        if last.get(name) and train.get(whole)
    ]
    done = max(shares, default=0.0)
    begun = max(map(checkpoints.step_of, attempt.accepts), default=0)
    own = done * (1 - begun / last["step"]) if done else 0.0
    return round((time.time() - attempt.since) * (1 - done) / own, 1) if own > 0 and done <= 1 else None


def stop(server: Server, name: str, show: Show) -> Told:
    """Asks the run to write a checkpoint and stop, waits for that up to its grace period, then stops the job."""
    job = find(server, name)
    if job.status in TERMINAL:
        raise RunRefused(f"{job.id} has ended already: {_status(job)}")
    run = job.run
    waits = (server.waits(job.id) or job.message) if job.status == "PENDING" else None
    if waits:
        show({"event": "note", "text": f"{job.id} has not started: {last_line(waits)}"})
    server.last_try(job.id)
    if run and _asked_to_stop(run):
        show({"event": "stage", "name": "waiting for the checkpoint"})
        until = time.monotonic() + job.grace_s + SLACK_S
        while time.monotonic() < until and not _ended(server, job) and _running(run):
            time.sleep(LOOK_S)
    # The command writes its result and goes by itself once the run has stopped.
    until = time.monotonic() + LOOK_S * 10
    while run and time.monotonic() < until and not _ended(server, job) and not _running(run):
        time.sleep(LOOK_S)
    if not _ended(server, job):
        show({"event": "stage", "name": "stopping the job"})
        server.stop(job.id)
        until = time.monotonic() + END_S
        while not _ended(server, job):
            if time.monotonic() > until:
                later = "; a job that has not started may end only when its turn comes" if waits else ""
                raise TrainingError(
                    f"{job.id} was told to stop and has not ended within {END_S:g} s{later}; "
                    f"`rayft jobs status {job.id}{server.options}` shows when it has"
                )
            time.sleep(LOOK_S)
    return told(server.job(job.id) or replace(job, status="STOPPED"))


def _asked_to_stop(run: str) -> bool:
    """Leaves the request where a run is going on; False where there is none to hear it."""
    try:
        if not _running(run):
            return False
        stopping.request(run, f"{getpass.getuser()}@{socket.gethostname()}")
    except (StorageError, OSError):  # not to be reached from here: it is stopped without
        return False
    return True


def _running(run: str) -> bool:
    state = storage.join(run, "run.json")
    return storage.exists(state) and storage.read_json(state).get("status") == "running"


def _ended(server: Server, job: Job) -> bool:
    now = server.job(job.id)
    return now is None or now.status in TERMINAL
