"""Which job is meant; what is told of one and how it is stopped is in the tests of both servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayft import attempts, storage
from rayft.errors import RunRefused, TrainingError
from rayft.submission import jobs
from rayft.submission.servers import Job


class Server:
    """Knows two jobs, the newest first: one of a folder, one of an URL."""

    address, options = "http://head:8265", ""

    def __init__(self, folder: Path) -> None:
        self.known = [
            Job("rayft-one-a2", "FAILED", "one", run=storage.join(str(folder), "runs", "one"), exit_code=130),
            Job("rayft-two-a1", "RUNNING", "team/two", run="s3://bucket/team/two"),
        ]

    def jobs(self) -> list[Job]:
        return self.known


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("one", 0),
        ("runs/one", 0),
        ("./runs/one/", 0),
        ("rayft-two-a1", 1),
        ("team/two", 1),
        ("s3://bucket/team/two/", 1),
        ("runs/two", None),
    ],
)
def test_a_job_is_found_by_id_or_by_its_runs_name_or_folder(
    name: str, place: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server: Any = Server(tmp_path)
    if place is None:
        with pytest.raises(RunRefused, match="knows no job `runs/two`"):
            jobs.find(server, name)
    else:
        assert jobs.find(server, name) is server.known[place]


class Waiting:
    """Knows one job, which waits for CPUs and hears of a stop only when it has them."""

    address, options = "http://head:8265", " --address http://head:8265"
    known = Job("rayft-one-a1", "PENDING", "one", message="Job has not started yet. It may be waiting for resources.")

    def jobs(self) -> list[Job]:
        return [self.known]

    def job(self, job: str) -> Job:
        return self.known

    def waits(self, job: str) -> None:
        return None

    last_try = stop = waits


def test_a_stop_of_a_job_that_waits_says_at_once_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOOK_S", 0.0)
    monkeypatch.setattr(jobs, "END_S", 0.0)
    shown: list[dict[str, Any]] = []
    server: Any = Waiting()
    with pytest.raises(TrainingError) as raised:
        jobs.stop(server, "one", shown.append)
    waits = "Job has not started yet. It may be waiting for resources."
    assert shown[0] == {"event": "note", "text": f"rayft-one-a1 has not started: {waits}"}
    assert "may end only when its turn comes" in str(raised.value)
    assert "`rayft jobs status rayft-one-a1 --address http://head:8265`" in str(raised.value)


def test_a_run_that_was_stopped_has_not_failed(tmp_path: Path) -> None:
    server: Any = Server(tmp_path)
    assert jobs.told(server.known[0])["status"] == "stopped"
    with pytest.raises(RunRefused, match="rayft-one-a2 has ended already: stopped"):
        jobs.stop(server, "one", lambda event: None)


@pytest.mark.parametrize(
    ("begun", "step", "left"),
    [
        (0, 50, 100.0),  # 50 steps in 100 s, 50 to go
        (90, 95, 100.0),  # of the whole run 95 steps are done, of this attempt 5 in 100 s
        (90, 90, None),
        (90, 80, None),  # on an object store what the attempt has done is not to be seen yet
    ],
)
@pytest.mark.parametrize("train", [{"max_steps": 100}, {"epochs": 10}])
def test_the_time_left_goes_by_the_attempts_own_pace(
    train: dict[str, int], begun: int, step: int, left: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    attempts.claim(run, [], 0)
    attempts.claim(run, [f"step-{number:06d}-a1" for number in (begun // 2, begun) if number], 1)
    claimed = attempts.current(run)
    assert claimed is not None
    monkeypatch.setattr(jobs.time, "time", lambda: claimed.since + 100.0)
    storage.write_json(storage.join(run, "run.json"), {"status": "running", "attempt": 2, "started": claimed.since})
    storage.write_json(storage.join(run, "recipe.yaml"), {"train": train})
    row = {"step": step, "epoch": step / 10, "loss": 0.5}
    storage.write_text(storage.join(run, "metrics.jsonl"), json.dumps(row) + "\n")
    assert jobs.told(Job("one", "RUNNING", "one", run=run))["left_s"] == left
