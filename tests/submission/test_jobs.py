"""Which job is meant; what is told of one and how it is stopped is in the tests of both servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayft import storage
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
