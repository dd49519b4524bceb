"""Which job is meant; what is told of one and how it is stopped is in the tests of both servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayft import jobs, storage
from rayft.errors import RunRefused
from rayft.servers import Job


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


def test_a_run_that_was_stopped_has_not_failed(tmp_path: Path) -> None:
    server: Any = Server(tmp_path)
    assert jobs.told(server.known[0])["status"] == "stopped"
    with pytest.raises(RunRefused, match="rayft-one-a2 has ended already: stopped"):
        jobs.stop(server, "one", lambda event: None)
