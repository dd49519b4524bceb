"""Who may write a run: another writer is heard of, or is silent for too long."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayft import attempts, record, storage
from rayft.errors import RecipeError, RunRefused, Superseded, TrainingError
from rayft.layout import INSIDE
from rayft.recipe import Recipe
from rayft.record import Record

RECIPE = Recipe.parse(
    {
        "name": "a",
        "task": {"type": "text-classification"},
        "model": {"path": "m"},
        "data": {"train": "rows.csv"},
        "train": {"epochs": 1},
    }
)


def state(folder: Path, **fields: Any) -> dict[str, Any]:
    """A run.json as a writer on another machine leaves it."""
    plain = {"status": "running", "attempt": 1, "host": "elsewhere", "pid": 7, "pid_started": 1.0}
    made = {**plain, "started": time.time() - 60, "heartbeat": time.time(), **fields}
    storage.write_json(str(folder / "run.json"), made)
    return made


def refuse(folder: Path, take_over: bool = False) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    Record(str(folder)).refuse_second_writer(take_over, shown.append)
    return shown


def test_a_writer_elsewhere_that_beats_is_a_refusal(tmp_path: Path) -> None:
    made, over = state(tmp_path), threading.Event()

    def beat() -> None:
        while not over.wait(0.2):
            storage.write_json(str(tmp_path / "run.json"), {**made, "heartbeat": time.time()})

    writer = threading.Thread(target=beat)
    writer.start()
    try:
        with pytest.raises(RunRefused, match="is being written by process 7 on elsewhere"):
            refuse(tmp_path)
        assert refuse(tmp_path, take_over=True) == []
    finally:
        over.set()
        writer.join()


def test_a_writer_elsewhere_that_died_a_moment_ago_is_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "SILENT_S", 1.5)
    monkeypatch.setattr(record, "LOOK_S", 0.1)
    state(tmp_path)
    (note,) = refuse(tmp_path)
    assert note["text"].startswith("process 7 on elsewhere wrote this run a moment ago")
    state(tmp_path, heartbeat=time.time() - 60)
    assert refuse(tmp_path) == []


def test_a_writer_on_this_machine_is_looked_at(tmp_path: Path) -> None:
    here = {"host": socket.gethostname(), "pid": os.getpid()}
    state(tmp_path, **here, pid_started=record.process_begun(os.getpid()), heartbeat=0.0)
    with pytest.raises(RunRefused, match=f"process {os.getpid()} on"):
        refuse(tmp_path)
    state(tmp_path, **here, pid_started=1.0)  # another process with its number
    assert refuse(tmp_path) == []
    assert record.process_begun(2**22 + 1) is None


def test_a_writer_that_was_killed_and_that_nobody_reaps_is_gone(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        here = {"host": socket.gethostname(), "pid": writer.pid, "pid_started": record.process_begun(writer.pid)}
        made = state(tmp_path, **here)
        assert record.alive(made)
        writer.kill()
        os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is left unreaped
        assert psutil.Process(writer.pid).status() == psutil.STATUS_ZOMBIE
        assert not record.alive(made)
        assert refuse(tmp_path) == []
    finally:
        writer.kill()
        writer.communicate()


def test_a_writer_lives_on_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "pid_started": record.process_begun(os.getpid())}
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 1.0)
    assert record.alive(mine)


@pytest.mark.parametrize("torn", ["", '{"status": "runn', "[]"])
def test_a_damaged_record_is_told_and_written_anew(tmp_path: Path, torn: str) -> None:
    (tmp_path / "run.json").write_text(torn)
    (tmp_path / "result.json").write_text(torn)
    told = refuse(tmp_path)
    assert [event["text"] for event in told] == [f"{tmp_path}/run.json is damaged, and is written anew"]
    known = Record(str(tmp_path))
    assert known.result() is None
    known.forget()
    assert not (tmp_path / "run.json").exists()


def test_a_recipe_that_an_earlier_rayft_has_written_is_read_without_the_fields_that_are_gone(tmp_path: Path) -> None:
    text = RECIPE.to_yaml().replace("  type: text-classification\n", "  type: text-classification\n  id: id\n")
    (tmp_path / "recipe.yaml").write_text(text + "colour: {of: it}\n")
    assert Record(str(tmp_path)).recipe() == RECIPE
    (tmp_path / "recipe.yaml").write_text(text.replace("text-classification", "unheard-of"))
    with pytest.raises(RecipeError, match="unknown task"):
        Record(str(tmp_path)).recipe()


class Killed(BaseException):
    """As if by SIGKILL: nothing that follows is done."""


@contextmanager
def killed_at(name: str, ends: str) -> Iterator[None]:
    """Inside, the call `storage.<name>` of a path that ends like that is where the process is killed."""
    plain = getattr(storage, name)

    def call(path: str, *more: Any) -> Any:
        if path.endswith(ends):
            raise Killed
        return plain(path, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, name, call)
        try:
            yield
        except Killed:
            return
    raise AssertionError(f"nothing came to {ends}")


def finished(folder: Path) -> None:
    """A run of one epoch that has ended."""
    attempts.claim(str(folder), [], 0)
    storage.write_text(str(folder / "recipe.yaml"), RECIPE.to_yaml())
    state(folder, status="finished")
    storage.write_json(str(folder / "result.json"), {"status": "finished"})
    storage.write_text(str(folder / "export" / "rayft.json"), "{}")


@pytest.mark.parametrize(("call", "ends"), [("write_text", "recipe.yaml"), ("write_json", "run.json")])
def test_a_run_that_goes_on_and_is_killed_at_once_has_not_finished(tmp_path: Path, call: str, ends: str) -> None:
    finished(tmp_path)
    longer = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"epochs": 2})})
    mine = Record(str(tmp_path))
    with killed_at(call, ends), mine.writing(longer, "model", {}):
        mine.claim()
    assert Record(str(tmp_path)).standing(longer) in ("longer", "resumed")


@pytest.mark.parametrize("ends", ["export", "tensorboard", "recipe.yaml"])
def test_a_run_that_was_killed_while_it_is_forgotten_does_not_answer_with_what_is_gone(
    tmp_path: Path, ends: str
) -> None:
    finished(tmp_path)
    trial = tmp_path / "trials" / "00000"
    storage.write_json(str(trial / "result.json"), {"status": "finished"})
    with killed_at("delete", ends):
        Record(str(tmp_path)).forget()
    assert Record(str(tmp_path)).standing(RECIPE) == "resumed"
    assert not (trial / "result.json").exists()


def test_a_run_does_not_go_on_with_other_rows_of_training_or_validation(tmp_path: Path) -> None:
    """Scores of different rows would choose the best model."""
    state(tmp_path, prepared={"train": "a", "validation": "b", "test": "c"})
    known = Record(str(tmp_path))
    known.refuse_other_data("a", "b")
    known.refuse_other_data("a")
    for keys, split in (("xb", "training"), ("xy", "training"), ("ay", "validation")):
        with pytest.raises(RunRefused, match=f"the {split} rows of {tmp_path} have changed since it began"):
            known.refuse_other_data(*keys)


def test_each_worker_group_claims_and_run_json_says_which(tmp_path: Path) -> None:
    mine = Record(str(tmp_path))
    with mine.writing(RECIPE, "model", {"train": "key"}):
        assert mine.claim() == 1
        assert mine.claim() == 2
        assert storage.read_json(mine.file)["attempt"] == 2
        assert storage.read_json(mine.file)["status"] == "running"
        mine.status = "finished"
    assert storage.read_json(mine.file)["status"] == "finished"


def test_the_seconds_of_earlier_starts_are_added_up(tmp_path: Path) -> None:
    state(tmp_path, status="stopped", started=1000.0, heartbeat=1060.5)
    second = Record(str(tmp_path))
    assert second.before_s == 60.5
    with second.writing(RECIPE, "model", {}):
        second.claim()
    kept = storage.read_json(second.file)
    storage.write_json(second.file, {**kept, "started": 2000.0, "heartbeat": 2030.0})
    third = Record(str(tmp_path))
    assert third.before_s == 90.5
    third.forget()
    assert third.before_s == 0.0


def test_who_was_superseded_hears_of_it_and_leaves_the_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "BEAT_S", 0.05)
    older = Record(str(tmp_path))
    with older.writing(RECIPE, "model", {}):
        older.claim()
        attempts.claim(str(tmp_path), [], 1)
        until = time.monotonic() + 30
        while older.superseded is None and time.monotonic() < until:
            time.sleep(0.01)
        theirs = state(tmp_path, attempt=2)
        older.end("failed", "what the older one thinks of it")
    assert isinstance(older.superseded, Superseded)
    assert storage.read_json(older.file) == theirs
    assert not (tmp_path / "result.json").exists()


def test_starting_over_keeps_the_claims(tmp_path: Path) -> None:
    """Or an attempt that still runs somewhere would take itself for the newest."""
    (tmp_path / "checkpoints" / "step-000001-a1").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert attempts.claim(str(tmp_path), [], 0) == 1
    Record(str(tmp_path)).forget()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempts"]
    with pytest.raises(Superseded):
        attempts.hold(str(tmp_path), 1)


def test_starting_over_deletes_nothing_of_runs_below_its_name(tmp_path: Path) -> None:
    """The runs `exp` and `exp/a` lie in each other, and so do a sweep and its trials."""
    own = [*(f"{name}/file" for name in INSIDE), "trials/00000/run.json", "run.json", "best.yaml"]
    others = ["a/run.json", "a/checkpoints/step-000001-a1/COMMITTED", "deeper/b/run.json"]
    for name in (*own, *others):
        storage.write_text(str(tmp_path / name), "{}")
    Record(str(tmp_path)).forget()
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted([*others, "attempts/000001.json", "attempts/file"])


def test_of_two_that_start_at_once_the_second_changes_nothing(tmp_path: Path) -> None:
    first, second = Record(str(tmp_path)), Record(str(tmp_path))
    with first.writing(RECIPE, "model", {}):
        first.claim()
        theirs = storage.read_text(first.file)
        with second.writing(RECIPE, "model", {}):
            with pytest.raises(RunRefused, match="is being started by process"):
                second.claim()
            second.end("failed", "it was second")
        assert storage.read_text(first.file) == theirs
        assert not (tmp_path / "result.json").exists()


def test_the_next_cluster_of_a_job_ends_with_what_it_would_meet_again_and_every_other_start_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)
    monkeypatch.setenv(record.JOB, "a-1f0c94ab")
    Record(folder).end("failed", "a worker was lost")
    Record(folder).refuse_same_failure()  # other machines may do better
    Record(folder).end("failed", "step 7: the loss is NaN", sure=True)
    with pytest.raises(TrainingError, match=r"^step 7: the loss is NaN \(this ended the cluster before"):
        Record(folder).refuse_same_failure()
    monkeypatch.setenv(record.JOB, "a-1f0c94ab-2")
    Record(folder).refuse_same_failure()
    monkeypatch.delenv(record.JOB)
    Record(folder).refuse_same_failure()
    monkeypatch.setenv(record.JOB, "a-1f0c94ab")  # a new one of that name, after the old one was deleted
    Record(folder).forget_failure("a-1f0c94ab-2")
    with pytest.raises(TrainingError):
        Record(folder).refuse_same_failure()
    Record(folder).forget_failure("a-1f0c94ab")
    Record(folder).refuse_same_failure()
