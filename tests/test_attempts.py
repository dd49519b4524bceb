"""Claims: one winner, on local storage and on S3, and the loser is told who won."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rayft import attempts, storage
from rayft.errors import Superseded


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    return storage.join(request.getfixturevalue("s3"), "attempts", request.node.name.replace("[", "-").strip("]"))


def _claim(run: str) -> int | str:
    try:
        return attempts.claim(run, [], 0)
    except Superseded as error:
        return error.owner


def test_of_many_that_claim_at_once_one_wins(run: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(_claim, [run] * 8))
    assert found.count(1) == 1
    assert {one for one in found if one != 1} == {f"process {os.getpid()} on {os.uname().nodename}"}
    assert attempts.newest(run) == 1


def test_of_several_processes_one_wins(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(_claim, [str(tmp_path)] * 3)
    assert found.count(1) == 1


def test_the_newest_holds_and_older_ones_are_told_who_took_over(run: str) -> None:
    assert (attempts.newest(run), attempts.accepts(run)) == (0, None)
    attempts.hold(run, 0)
    assert attempts.claim(run, [], 0) == 1
    assert attempts.claim(run, ["step-000004-a1"], 1) == 2
    assert attempts.accepts(run) == (2, {"step-000004-a1"})
    attempts.hold(run, 2)
    with pytest.raises(Superseded, match=r"was taken over by process \d+ on .* \(attempt 2\)"):
        attempts.hold(run, 1)
    with pytest.raises(Superseded):
        attempts.claim(run, [], 1)


def test_a_run_whose_folder_was_deleted_is_not_written_on(run: str) -> None:
    attempts.claim(run, [], 0)
    storage.delete(run)
    with pytest.raises(Superseded, match="whoever deleted its folder"):
        attempts.hold(run, 1)


def test_a_repeated_request_finds_its_own_claim(run: str) -> None:
    path = storage.join(run, "file")
    assert storage.create(path, b"mine")
    assert storage.create(path, b"mine")
    assert not storage.create(path, b"theirs")
    assert storage.read_bytes(path) == b"mine"
    assert [entry.path for entry in storage.listing(run)] == [path]
