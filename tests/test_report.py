"""Runs are read from folders that hold just the files which runs write."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from rayft import report, storage
from rayft.errors import StorageError
from rayft.record import process_begun

KEY = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba98" * 4
THIRD = "89abcdef" * 4
RECIPE = "name: {name}\ntrain:\n  epochs: 2\n  learning_rate: {rate}\ndata:\n  train:\n  - path: /data/a.csv\n"


def write_run(
    where: str, name: str, status: str = "finished", silent_s: float = 0.0, rate: str = "5e-05", **fields: Any
) -> str:
    """A run's folder as a run leaves it; one that is not running has a result."""
    run, now = storage.join(where, name), time.time()
    state = {"status": status, "attempt": 1, "host": "elsewhere", "pid": 1, "pid_started": 0.0, "model": "m"}
    times = {"started": now - silent_s - 60, "heartbeat": now - silent_s}
    storage.write_json(storage.join(run, "run.json"), {**state, **times, "prepared": {"train": KEY}, **fields})
    storage.write_text(storage.join(run, "recipe.yaml"), RECIPE.format(name=name, rate=rate))
    rows: list[dict[str, Any]] = []
    for step in range(1, 5):
        rows.append({"step": step, "epoch": step / 2, "loss": 1 / step, "learning_rate": 1e-4})
        rows += (
            [{"step": step, "epoch": step / 2, "eval_loss": 1 / step, "eval_accuracy": step / 8}]
            if step % 2 == 0
            else []
        )
    if status == "finished":
        rows.append({"step": 4, "epoch": 2.0, "eval_loss": 0.25, "eval_accuracy": 0.5, "test_accuracy": 0.4})
        metrics = {"eval_accuracy": 0.5, "eval_loss": 0.25, "test_accuracy": 0.4}
        best = {"step": 4, "metric": "eval_accuracy", "value": 0.5}
        result = {
            "run": run,
            "status": status,
            "error": None,
            "steps": 4,
            "epochs": 2.0,
            "metrics": metrics,
            "best": best,
        }
        more = {"export": storage.join(run, "export"), "timing": {"train_s": 12.0, "data_wait": None}}
        storage.write_json(storage.join(run, "result.json"), {**result, **more})
    elif status == "failed":
        result = {
            "run": run,
            "status": status,
            "error": "a worker was lost",
            "steps": None,
            "epochs": None,
            "metrics": {},
        }
        storage.write_json(storage.join(run, "result.json"), {**result, "best": None, "export": None, "timing": {}})
    storage.write_text(storage.join(run, "metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    storage.write_json(storage.join(run, "attempts", "000001.json"), {"number": 1, "accepts": []})
    return run


def age(folder: str, days: float) -> None:
    for entry in storage.listing(folder):
        then = time.time() - days * report.DAY_S
        os.utime(entry.path, (then, then))


def shards(where: str, key: str, days: float, size: int = 100) -> str:
    folder = storage.join(where, "prepared", key)
    storage.write_bytes(storage.join(folder, "part-00000.parquet"), b"x" * size)
    age(folder, days)
    return folder


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
    assert [one.path for one in report.leftovers(where)] == [storage.join(run, "checkpoints/step-000004-a1")]


# --- what can go


def test_prepared_shards_go_when_old_and_unused(where: str) -> None:
    write_run(where, "one")
    used, young, old = shards(where, KEY, 9), shards(where, OTHER, 0.5), shards(where, THIRD, 2)
    storage.write_text(storage.join(where, "prepared", "my notes", "x"), "not rayft's")
    age(storage.join(where, "prepared", "my notes"), 9)
    found = report.leftovers(where)
    assert [(one.path, one.bytes) for one in found] == [(old, 100)]
    assert report.remove(where, found) == found
    assert [os.path.exists(path) for path in (used, young, old)] == [True, True, False]


def test_of_shards_in_use_only_what_a_killed_preparation_has_left_goes(where: str) -> None:
    write_run(where, "one")
    folder = shards(where, KEY, 9)
    gone = ["attempt-killed", "frozen/f00/killed", "frozen/f01/killed"]
    for name in (*gone, "attempt-used", "attempt-going", "frozen/f00/used", "frozen/f01/going"):
        storage.write_bytes(storage.join(folder, name, "0.bin"), b"x" * 10)
        age(storage.join(folder, name), 0.5 if name.endswith("going") else 2)
    storage.write_json(storage.join(folder, "manifest.json"), {"shards": [{"path": "attempt-used/0.bin"}]})
    storage.write_json(storage.join(folder, "frozen/f00/manifest.json"), {"parts": [{"data": "used/0.bin"}]})
    found = report.leftovers(where)
    assert [(one.path, one.bytes) for one in found] == [(storage.join(folder, name), 10) for name in gone]
    assert report.remove(where, found) == found
    assert report.leftovers(where) == []


def test_what_a_preparation_is_only_writing_stays(where: str) -> None:
    begun = Path(where, "prepared", KEY, "attempt-1", "scratch")
    begun.mkdir(parents=True)
    (begun / ".rayft-tmp-abc").write_text("half", encoding="utf-8")
    empty = Path(where, "prepared", OTHER)
    empty.mkdir()
    assert report.leftovers(where) == []
    for folder in (begun, *begun.parents[:2], empty):
        os.utime(folder, (time.time() - 2 * report.DAY_S,) * 2)
    assert {one.path for one in report.leftovers(where)} == {str(begun.parents[1]), str(empty)}


@pytest.mark.parametrize("fields", [{"prepared": {"train": OTHER}}, {"prepared": [OTHER]}, {"facts": [OTHER]}])
def test_shards_that_a_run_refers_to_stay(where: str, fields: dict[str, Any]) -> None:
    write_run(where, "deep/one", "running", silent_s=3600, **fields)
    shards(where, OTHER, 9)
    assert not [one for one in report.leftovers(where) if "prepared" in one.path]


def test_remains_of_attempts_go_but_never_those_of_a_running_run(where: str) -> None:
    gone = []
    for status, silent_s in (("running", 0.0), ("running", 3600.0), ("finished", 0.0), ("failed", 0.0)):
        run = write_run(where, f"{status}-{silent_s:.0f}", status, silent_s)
        torn, whole = (storage.join(run, "checkpoints", name) for name in ("step-000004-a2", "step-000002-a1"))
        for path in (torn, whole):
            storage.write_text(storage.join(path, "state.json"), "{}")
        storage.commit(whole, {})
        storage.write_text(storage.join(run, "ray", "attempt-1", "snapshot.json"), "{}")
        gone += [torn, storage.join(run, "ray")] if status != "running" else []
    assert sorted(one.path for one in report.leftovers(where)) == sorted(gone)
    report.remove(where, report.leftovers(where))
    assert report.leftovers(where) == []
    assert len(report.runs(where)) == 4


def test_failed_runs_with_nothing_in_them_go_after_a_day_and_take_their_shards_along(where: str) -> None:
    day = 2 * report.DAY_S
    barren = write_run(where, "barren", "failed", day)
    lost = write_run(where, "lost", "running", day)
    write_run(where, "young", "failed", 60, prepared={"train": OTHER})
    resumable = write_run(where, "resumable", "failed", day, prepared={"train": OTHER})
    storage.commit(storage.join(resumable, "checkpoints", "step-000002-a1"), {})
    kept, old = shards(where, OTHER, 9), shards(where, KEY, 9)
    found = report.leftovers(where)
    assert {one.path for one in found} == {barren, lost, old}
    report.remove(where, found)
    assert sorted(run["name"] for run in report.runs(where)) == ["resumable", "young"]
    assert os.path.exists(kept)


def test_a_failed_run_goes_with_its_claims_and_pictures_but_no_trial_of_a_sweep(where: str) -> None:
    day = 2 * report.DAY_S
    barren = write_run(where, "barren", "failed", day)
    storage.write_bytes(storage.join(barren, "pictures", "step-000002", "eval_confusion_matrix.png"), b"png")
    write_run(where, "sweep", "failed", day, prepared={"train": OTHER})
    for number in range(2):
        write_run(where, f"sweep/trials/{number:05d}", "failed", day, prepared={"train": OTHER})
    for place in (where, storage.join(where, "sweep"), storage.join(where, "sweep", "trials")):
        assert [one.path for one in report.leftovers(place)] == ([barren] if place == where else [])
    report.remove(where, report.leftovers(where))
    assert not os.path.exists(barren)


def test_while_a_run_can_not_be_read_it_keeps_its_remains_and_every_shard(where: str) -> None:
    run = write_run(where, "torn", silent_s=2 * report.DAY_S)
    storage.write_text(storage.join(run, "checkpoints", "step-000004-a1", "state.json"), "{}")
    shards(where, OTHER, 9)
    told: list[str] = []
    storage.write_text(storage.join(run, "run.json"), '{"status": "runn')
    assert report.leftovers(where, told.append) == []
    assert told == [f"{run}/run.json is damaged, and may refer to any of the prepared shards: all stay"]
    storage.delete(run)
    assert len(report.leftovers(where, told.append)) == 1
    assert len(told) == 1


def test_what_came_into_use_after_the_question_stays(where: str) -> None:
    write_run(where, "one")
    folder = shards(where, OTHER, 9)
    agreed = report.leftovers(where)
    write_run(where, "two", "running", prepared={"train": OTHER})
    assert report.remove(where, agreed) == []
    assert os.path.exists(folder)
