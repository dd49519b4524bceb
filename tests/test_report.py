"""Runs are read from folders that hold just the files which runs write."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from rayft import leftovers, report, storage
from rayft.errors import StorageError
from rayft.record import process_begun
from run_folders import write_run


@pytest.fixture
def where(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


# --- lists


def test_list_finds_runs_at_any_depth_newest_first(where: str) -> None:
    write_run(where, "old", silent_s=900)
    write_run(where, "sweep/trials/00001", silent_s=300)
    write_run(where, "sweep/trials/00001/more", silent_s=600)
    storage.write_json(storage.join(where, "old", "export", "run.json"), {"status": "not a run"})
    found = report.runs(where)
    assert [run["name"] for run in found] == ["sweep/trials/00001", "sweep/trials/00001/more", "old"]
    newest = found[0]
    assert (newest["status"], newest["steps"], newest["metric"], newest["value"]) == (
        "finished",
        4,
        "eval_accuracy",
        0.5,
    )
    assert newest["seconds"] == pytest.approx(60)


def test_a_sweep_is_one_row_and_its_own_folder_lists_its_trials(where: str) -> None:
    sweep = write_run(where, "sweep")
    for number in range(3):
        write_run(where, f"sweep/trials/{number:05d}")
    assert [(run["name"], run["trials"]) for run in report.runs(where)] == [("sweep", 3)]
    assert sorted(run["name"] for run in report.runs(sweep)) == ["sweep", *(f"trials/{n:05d}" for n in range(3))]


def test_running_run_shows_its_last_step_and_evaluation_not_an_earlier_attempts_result(where: str) -> None:
    run = write_run(where, "again", "failed")
    write_run(where, "again", "running")
    with open(storage.join(run, "metrics.jsonl"), "a") as file:
        file.write('{"step": 5, "epoch": 2.5, "loss": 0.')  # a line being written
    summary = report.runs(where)[0]
    assert (summary["status"], summary["steps"]) == ("running", 4)
    assert (summary["metric"], summary["value"]) == ("eval_accuracy", 0.5)
    assert report.show(run)["error"] is None


@pytest.mark.parametrize(
    ("said", "silent_s", "fields", "shown"),
    [
        ("running", 0, {}, "running"),
        ("running", 29, {}, "running"),
        ("running", 31, {}, "lost"),
        ("running", 31, {"host": socket.gethostname(), "pid": 2**22 + 1}, "lost"),
        ("running", 31, {"host": socket.gethostname(), "pid": None}, "running"),  # this process, filled in below
        ("finished", 1e6, {}, "finished"),
        ("failed", 1e6, {}, "failed"),
        ("stopped", 1e6, {}, "stopped"),
    ],
)
def test_a_running_run_that_fell_silent_is_lost(
    where: str, said: str, silent_s: float, fields: dict[str, Any], shown: str
) -> None:
    if "pid" in fields and fields["pid"] is None:
        fields = {**fields, "pid": os.getpid(), "pid_started": process_begun(os.getpid())}
    write_run(where, "one", said, silent_s, **fields)
    assert report.runs(where)[0]["status"] == shown


def test_show_says_what_the_files_say(where: str) -> None:
    run = write_run(where, "one")
    for name in ("step-000002-a1", "step-000004-a1", "step-000005-a1"):
        storage.write_text(storage.join(run, "checkpoints", name, "state.json"), "{}")
    for name in ("step-000002-a1", "step-000004-a1"):
        storage.commit(storage.join(run, "checkpoints", name), {"step": 1})
    found = report.show(run)
    assert found["checkpoints"] == ["step-000002-a1", "step-000004-a1"]
    assert [row["step"] for row in found["evaluations"]] == [2, 4]
    assert "test_accuracy" not in found["evaluations"][-1]
    assert found["metrics"]["test_accuracy"] == 0.4
    assert (found["epochs"], found["export"], found["timing"]["train_s"]) == (2.0, storage.join(run, "export"), 12.0)


def test_failed_run_keeps_its_reason_and_how_far_it_came(where: str) -> None:
    found = report.show(write_run(where, "one", "failed"))
    assert (found["status"], found["error"], found["steps"], found["value"]) == ("failed", "a worker was lost", 4, 0.5)


def test_compare_gives_only_the_fields_that_differ(where: str) -> None:
    found = report.compare(write_run(where, "a"), write_run(where, "b", "running", rate="1e-4"))
    assert found["recipe"] == {"name": ["a", "b"], "train.learning_rate": [5e-5, 1e-4]}
    assert found["metrics"] == {
        "eval_accuracy": [0.5, 0.5],
        "eval_loss": [0.25, 0.25],
        "test_accuracy": [0.4, None],
    }


def test_what_is_not_there_is_named(where: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere does not exist; the storage is the recipe's") as caught:
        report.runs(str(tmp_path / "nowhere"))
    assert caught.value.exit_code == 2
    write_run(where, "one")
    with pytest.raises(StorageError, match=r"has no run\.json, so it is not a run"):
        report.show(where)
    with pytest.raises(StorageError, match="onee does not exist; RUN is"):
        report.show(storage.join(where, "onee"))


@pytest.mark.parametrize("name", ["run.json", "result.json"])
@pytest.mark.parametrize("content", [b'{"status": "runn', b"[1, 2]", b"", b"\xff"])
def test_a_damaged_file_makes_only_its_own_run_unreadable(where: str, name: str, content: bytes) -> None:
    run = write_run(where, "torn")
    write_run(where, "sound")
    storage.write_bytes(storage.join(run, name), content)
    assert {one["name"]: one["status"] for one in report.runs(where)} == {"torn": "unreadable", "sound": "finished"}
    found = report.show(run)
    assert (found["status"], found["error"]) == ("unreadable", f"{run}/{name} is damaged: it holds no JSON object")


def test_fields_of_other_types_than_they_should_be_spoil_no_list(where: str) -> None:
    run = write_run(where, "odd")
    write_run(where, "sound")
    for name, fields in (("run.json", {"started": "today", "heartbeat": [1]}), ("result.json", {"best": 5})):
        path = storage.join(run, name)
        storage.write_json(path, {**storage.read_json(path), **fields})
    odd = next(one for one in report.runs(where) if one["name"] == "odd")
    assert (odd["status"], odd["started"], odd["seconds"]) == ("finished", None, None)


def test_a_storage_without_runs_is_an_empty_list(tmp_path: Path) -> None:
    assert report.runs(str(tmp_path)) == []


def test_runs_are_read_from_an_url_as_from_a_folder() -> None:
    where = "memory://bucket/runs"
    run = write_run(where, "team/one")
    storage.write_text(storage.join(run, "checkpoints", "step-000004-a1", "state.json"), "{}")
    assert [(one["name"], one["run"]) for one in report.runs(where)] == [("team/one", run)]
    assert report.show(run)["value"] == 0.5
    assert [one.path for one in leftovers.leftovers(where)] == [storage.join(run, "checkpoints/step-000004-a1")]
