"""What can go from a storage, and what never may."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from rayft import leftovers, report, storage
from run_folders import KEY, OTHER, THIRD, age, shards, write_run


@pytest.fixture
def where(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


def test_prepared_shards_go_when_old_and_unused(where: str) -> None:
    write_run(where, "one")
    used, young, old = shards(where, KEY, 9), shards(where, OTHER, 0.5), shards(where, THIRD, 2)
    storage.write_text(storage.join(where, "prepared", "my notes", "x"), "not rayft's")
    age(storage.join(where, "prepared", "my notes"), 9)
    found = leftovers.leftovers(where)
    assert [(one.path, one.bytes) for one in found] == [(old, 100)]
    assert leftovers.remove(where, found) == found
    assert [os.path.exists(path) for path in (used, young, old)] == [True, True, False]


def test_what_is_younger_than_a_day_is_told_and_counted_once(where: str) -> None:
    lost = write_run(where, "one", status="failed")
    storage.delete(storage.join(lost, "checkpoints"))
    young = shards(where, OTHER, 0.5)
    old, later = leftovers.survey(where)
    assert old == []
    assert [one.path for one in later] == [lost, young]
    assert later[1].bytes == 100


def test_of_shards_in_use_only_what_a_killed_preparation_has_left_goes(where: str) -> None:
    write_run(where, "one")
    folder = shards(where, KEY, 9)
    gone = ["attempt-killed", "frozen/f00/killed", "frozen/f01/killed"]
    for name in (*gone, "attempt-used", "attempt-going", "frozen/f00/used", "frozen/f01/going"):
        storage.write_bytes(storage.join(folder, name, "0.bin"), b"x" * 10)
        age(storage.join(folder, name), 0.5 if name.endswith("going") else 2)
    storage.write_json(storage.join(folder, "manifest.json"), {"shards": [{"path": "attempt-used/0.bin"}]})
    storage.write_json(storage.join(folder, "frozen/f00/manifest.json"), {"parts": [{"data": "used/0.bin"}]})
    found = leftovers.leftovers(where)
    assert [(one.path, one.bytes) for one in found] == [(storage.join(folder, name), 10) for name in gone]
    assert leftovers.remove(where, found) == found
    assert leftovers.leftovers(where) == []


def test_what_a_preparation_is_only_writing_stays(where: str) -> None:
    begun = Path(where, "prepared", KEY, "attempt-1", "scratch")
    begun.mkdir(parents=True)
    (begun / ".rayft-tmp-abc").write_text("half", encoding="utf-8")
    empty = Path(where, "prepared", OTHER)
    empty.mkdir()
    assert leftovers.leftovers(where) == []
    for folder in (begun, *begun.parents[:2], empty):
        os.utime(folder, (time.time() - 2 * leftovers.DAY_S,) * 2)
    assert {one.path for one in leftovers.leftovers(where)} == {str(begun.parents[1]), str(empty)}


@pytest.mark.parametrize("fields", [{"prepared": {"train": OTHER}}, {"prepared": [OTHER]}, {"facts": [OTHER]}])
def test_shards_that_a_run_refers_to_stay(where: str, fields: dict[str, Any]) -> None:
    write_run(where, "deep/one", "running", silent_s=3600, **fields)
    shards(where, OTHER, 9)
    assert not [one for one in leftovers.leftovers(where) if "prepared" in one.path]


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
    assert sorted(one.path for one in leftovers.leftovers(where)) == sorted(gone)
    leftovers.remove(where, leftovers.leftovers(where))
    assert leftovers.leftovers(where) == []
    assert len(report.runs(where)) == 4


def test_failed_runs_with_nothing_in_them_go_after_a_day_and_take_their_shards_along(where: str) -> None:
    day = 2 * leftovers.DAY_S
    barren = write_run(where, "barren", "failed", day)
    lost = write_run(where, "lost", "running", day)
    write_run(where, "young", "failed", 60, prepared={"train": OTHER})
    resumable = write_run(where, "resumable", "failed", day, prepared={"train": OTHER})
    storage.commit(storage.join(resumable, "checkpoints", "step-000002-a1"), {})
    kept, old = shards(where, OTHER, 9), shards(where, KEY, 9)
    found = leftovers.leftovers(where)
    assert {one.path for one in found} == {barren, lost, old}
    leftovers.remove(where, found)
    assert sorted(run["name"] for run in report.runs(where)) == ["resumable", "young"]
    assert os.path.exists(kept)


def test_a_failed_run_goes_with_its_claims_and_pictures_but_no_trial_of_a_sweep(where: str) -> None:
    day = 2 * leftovers.DAY_S
    barren = write_run(where, "barren", "failed", day)
    storage.write_bytes(storage.join(barren, "pictures", "step-000002", "eval_confusion_matrix.png"), b"png")
    write_run(where, "sweep", "failed", day, prepared={"train": OTHER})
    for number in range(2):
        write_run(where, f"sweep/trials/{number:05d}", "failed", day, prepared={"train": OTHER})
    for place in (where, storage.join(where, "sweep"), storage.join(where, "sweep", "trials")):
        assert [one.path for one in leftovers.leftovers(place)] == ([barren] if place == where else [])
    leftovers.remove(where, leftovers.leftovers(where))
    assert not os.path.exists(barren)


def test_while_a_run_can_not_be_read_it_keeps_its_remains_and_every_shard(where: str) -> None:
    run = write_run(where, "torn", silent_s=2 * leftovers.DAY_S)
    storage.write_text(storage.join(run, "checkpoints", "step-000004-a1", "state.json"), "{}")
    shards(where, OTHER, 9)
    told: list[str] = []
    storage.write_text(storage.join(run, "run.json"), '{"status": "runn')
    assert leftovers.leftovers(where, told.append) == []
    assert told == [f"{run}/run.json is damaged, and may refer to any of the prepared shards: all stay"]
    storage.delete(run)
    assert len(leftovers.leftovers(where, told.append)) == 1
    assert len(told) == 1


def test_what_came_into_use_after_the_question_stays(where: str) -> None:
    write_run(where, "one")
    folder = shards(where, OTHER, 9)
    agreed = leftovers.leftovers(where)
    write_run(where, "two", "running", prepared={"train": OTHER})
    assert leftovers.remove(where, agreed) == []
    assert os.path.exists(folder)
