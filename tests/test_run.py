"""A whole run: it ends with a model, goes on when asked for more, and refuses what it must."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import small
from group import run_group
from rayft import run as run_module
from rayft import storage
from rayft.data.prepared import Prepared
from rayft.errors import (
    CheckpointError,
    Damaged,
    NotFinite,
    OutOfMemory,
    RayftError,
    RunRefused,
    StorageDown,
    StorageError,
    TrainingError,
    WorkersLost,
)
from rayft.recipe import Recipe
from rayft.record import JOB, Record
from rayft.run import Attempts, _ending, export, length
from rayft.tune import tune
from whole import trained


def run(plain: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from rayft.run import run as start

    events: list[dict[str, Any]] = []
    return start(Recipe.parse(plain), show=events.append, **options), events


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> dict[str, Any]:
    """The recipe and the result of a run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    plain = small.recipe(folder, small.small_bert(folder / "bert"), train__epochs=1, train__schedule="constant")
    return {"recipe": plain, "result": run(plain)[0]}


def straight(plain: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """What the same run gives without interruption, on workers of a group without Ray."""
    plain = {"deepspeed": {"zero_stage": 0}, **plain, "name": "straight", **fields}
    found: dict[str, Any] = run_group(trained, plain["cluster"]["workers"], plain, True)[0]
    return found


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"epochs": 1}, "1 epoch"),
        ({"max_steps": 2000}, "2,000 steps"),
        ({"epochs": 3, "max_steps": 1}, "3 epochs, at most 1 step"),
    ],
)
def test_how_long_a_run_trains_is_said_in_words(train: dict[str, int], said: str) -> None:
    plain = {"name": "n", "task": {"type": "text-classification"}, "model": {"path": "m"}, "data": {"train": "d.csv"}}
    assert length(Recipe.parse({**plain, "train": train})) == said


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "x"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_an_export_that_fails_leaves_nothing_and_works_when_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    names = ["config.json", "model.safetensors", "rayft.json", "tokenizer.json", "unigram.json"]
    source, target = tmp_path / "run" / "export", tmp_path / "copy"
    for name in names:
        storage.write_text(str(source / name), name)
    written, write = list[str](), storage.write_local

    def harmed(path: str, *options: Any) -> None:
        if path == str(target / "tokenizer.json"):
            raise failure
        write(path, *options)
        written.append(Path(path).name if path.startswith(str(target)) else "")

    monkeypatch.setattr(storage, "write_local", harmed)
    with pytest.raises((StorageError, KeyboardInterrupt)) as caught:
        export(str(tmp_path / "run"), str(target))
    assert "rayft.json" not in written
    assert "model.safetensors" in written
    if isinstance(failure, OSError):
        full = f"{target}/tokenizer.json: writing failed, the disk of {target} is full; free some space"
        assert str(caught.value) == full
    monkeypatch.undo()
    assert storage.listing(str(target)) == []
    assert export(str(tmp_path / "run"), str(target)) == str(target)
    assert sorted(path.name for path in target.iterdir()) == names


WITHOUT_RAYFT = """
import csv, json, sys
sys.modules["rayft"] = None
from transformers import pipeline
rows = list(csv.DictReader(open(sys.argv[2], encoding="utf-8")))
found = pipeline("text-classification", model=sys.argv[1], device="cpu")([row["text"] for row in rows], truncation=True)
print(json.dumps(sum(answer["label"] == row["label"] for answer, row in zip(found, rows)) / len(rows)))
"""


@pytest.mark.slow
def test_the_export_scores_alike_without_rayft_and_in_evaluate(finished: dict[str, Any]) -> None:
    plain, result = finished["recipe"], finished["result"]
    alone = [sys.executable, "-c", WITHOUT_RAYFT, result["export"], plain["data"]["test"]]
    told = subprocess.run(alone, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout.splitlines()[-1]) == result["metrics"]["test_accuracy"]
    from rayft.predict import evaluate

    scores = evaluate(result["run"], None, show=lambda event: None)
    assert scores["test_accuracy"] == result["metrics"]["test_accuracy"]
    assert scores["test_loss"] == pytest.approx(result["metrics"]["test_loss"], rel=1e-6)


@pytest.mark.slow
def test_a_finished_run_answers_and_goes_on_when_asked_for_more(finished: dict[str, Any]) -> None:
    plain, first = finished["recipe"], finished["result"]
    again, events = run(plain)
    assert again == first
    assert any("is finished" in event.get("text", "") for event in events)
    longer = {**plain, "train": {**plain["train"], "epochs": 2}}
    more, events = run(longer)
    assert (first["steps"], more["steps"]) == (13, 26)
    assert any("going on from step 13" in event.get("text", "") for event in events)
    expected = straight(longer)
    assert small.losses(Path(more["run"])) == dict(enumerate(expected["losses"], 1))
    assert expected["result"]["metrics"] == more["metrics"]
    # Another run starts from the export, head included: its first scores are near the last ones.
    other, _ = run(
        {
            **plain,
            "name": "other",
            "model": {"path": more["export"]},
            "train": {**plain["train"], "learning_rate": 1e-12},
        }
    )
    assert other["metrics"]["test_loss"] == pytest.approx(more["metrics"]["test_loss"], rel=1e-5)
    with pytest.raises(RunRefused, match=r"train\.learning_rate: 0\.001 -> 0\.01"):
        run({**plain, "train": {**plain["train"], "learning_rate": 1e-2}})


def test_where_a_shard_is_damaged_what_was_computed_from_its_rows_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a run that is trained from stored states would go on from others, computed anew by other workers."""
    folder = tmp_path / "prepared" / "key"
    kept = ["frozen/f00/manifest.json", "frozen/f00/1/0.bin", "parameters-1.json"]
    for name in (*kept, "manifest.json", "attempt-1/00000.parquet"):
        storage.write_text(str(folder / name), "{}")
    manifest: Any = SimpleNamespace(shards=[{"path": "attempt-1/00000.parquet"}])
    prepared = {"train": Prepared(str(folder), manifest)}
    recipe = Recipe.parse(small.recipe(tmp_path, "nowhere"))
    anything: Any = None
    given = Attempts(recipe, "", prepared, None, anything, anything, 0.0, print, True, True)
    monkeypatch.setattr(run_module, "prepared_for", lambda *_: "anew")
    given._repair(Damaged(str(folder), "attempt-1/00000.parquet", "is missing"))
    assert given.prepared == "anew"
    left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(kept)
    given.prepared = prepared
    given._repair(Damaged(str(folder / "frozen" / "f00"), "0.bin", "is missing"))
    assert not (folder / "frozen" / "f00").exists()


def test_a_run_that_is_only_to_be_exported_is_not_trained_anew_where_its_checkpoints_are_gone(tmp_path: Path) -> None:
    anything: Any = None
    recipe = Recipe.parse(small.recipe(tmp_path, "nowhere"))
    given = Attempts(recipe, "", {}, None, anything, anything, 0.0, print, True, False)
    with pytest.raises(CheckpointError, match="has no checkpoint of its best model"):
        given._position()
    assert replace(given, trains=True)._position() == (0, True, None)


@pytest.mark.parametrize("outcome", [StorageDown("s3 is away"), WorkersLost("rank 0 was lost")])
def test_an_outage_after_a_group_has_ended_is_a_try_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: RayftError
) -> None:
    recipe, groups, told = Recipe.parse(small.recipe(tmp_path, "nowhere")), list[int](), list[dict[str, Any]]()
    anything: Any = None
    given = Attempts(recipe, "", {}, None, anything, anything, 0.0, told.append, True, True)

    def away(folder: str) -> None:
        raise StorageDown("listing failed")

    def once(self: Attempts) -> RayftError | None:
        groups.append(1)
        return outcome if len(groups) < 3 else None

    monkeypatch.setattr(run_module.checkpoints, "newest", away)
    monkeypatch.setattr(Attempts, "_once", once)
    given.run()
    assert [event["text"].partition("; ")[2] for event in told] == [
        f"retry {n} of 3 (failure.max_retries)" for n in (1, 2)
    ]
    groups.clear()
    none = recipe.failure.model_copy(update={"max_retries": 0})
    given.recipe = recipe.model_copy(update={"failure": none})
    with pytest.raises(TrainingError, match="no retries are allowed"):
        given.run()


def as_if_killed_at_its_end(plain: dict[str, Any], result: dict[str, Any]) -> Recipe:
    """The folder of a run whose process was killed after its result was written."""
    recipe = Recipe.parse(plain).resolved()
    gone = {"host": socket.gethostname(), "pid": 2**22 + 1, "pid_started": "then"}
    storage.write_text(storage.join(recipe.folder, "recipe.yaml"), recipe.to_yaml())
    storage.write_json(
        storage.join(recipe.folder, "run.json"), {"status": "running", "started": 0.0, "heartbeat": 0.0, **gone}
    )
    storage.write_json(storage.join(recipe.folder, "result.json"), {"status": "finished", **result})
    storage.write_text(storage.join(recipe.folder, "ray", "attempt-1", "snapshot.json"), "{}")
    return recipe


@pytest.mark.parametrize("searched", [False, True])
def test_what_was_killed_after_its_result_counts_as_finished_once_it_has_answered(
    tmp_path: Path, searched: bool
) -> None:
    plain = small.recipe(tmp_path, "nowhere")
    if searched:
        plain["tune"] = {"search": {"train.seed": {"choice": [1, 2]}}, "trials": 2}
    recipe = as_if_killed_at_its_end(plain, {"trials": {"finished": 2}} if searched else {})
    answer = tune(recipe, show=lambda event: None) if searched else run(plain)[0]
    assert answer["status"] == "finished"
    assert storage.read_json(f"{recipe.folder}/run.json")["status"] == "finished"
    assert not Path(recipe.folder, "ray").exists()


@pytest.mark.parametrize("restart", [False, True])
def test_a_run_stays_out_of_a_sweeps_folder(tmp_path: Path, restart: bool) -> None:
    plain = small.recipe(tmp_path, "nowhere")
    search = {"search": {"train.seed": {"choice": [1, 2]}}, "trials": 2}
    recipe = as_if_killed_at_its_end({**plain, "tune": search}, {"trials": {"finished": 2}})
    for given in (plain, {**plain, "tune": search}):
        with pytest.raises(RunRefused, match="is a sweep; `rayft tune` goes on with it, or give the run another"):
            run(given, restart=restart)
    assert storage.exists(f"{recipe.folder}/result.json")


@pytest.mark.slow
def test_a_run_goes_on_with_other_workers_and_another_stage(tmp_path: Path, ray_local: None) -> None:
    model = small.small_bert(tmp_path / "bert")
    plain = small.recipe(tmp_path, model, train__epochs=1, train__schedule="constant", model__dropout=0.0)
    stages = [(2, 2, 1), (4, 3, 2), (1, 1, 3)]  # workers, ZeRO stage, epochs
    for workers, stage, epochs in stages:
        changed = {
            "cluster": {"workers": workers},
            "deepspeed": {"zero_stage": stage},
            "train": {**plain["train"], "epochs": epochs},
        }
        result, _ = run({**plain, **changed})
        assert result["steps"] == 13 * epochs
    expected = straight(plain, cluster={"workers": 1}, train={**plain["train"], "epochs": 3})
    losses = small.losses(tmp_path / "runs" / "small")
    assert losses == pytest.approx(dict(enumerate(expected["losses"], 1)), rel=1e-5)
    assert result["metrics"] == pytest.approx(expected["result"]["metrics"], rel=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(tmp_path: Path, ray_local: None) -> None:
    model = small.small_bert(tmp_path / "bert")
    plain = small.recipe(
        tmp_path, model, train__learning_rate=1e38, train__save_every="1 steps", train__max_grad_norm=0
    )
    with pytest.raises(NotFinite, match=r"^step 2: the loss is not finite") as caught:
        run(plain)
    assert caught.value.step == 2
    folder = tmp_path / "runs" / "small"
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"].startswith("step 2: the loss is not finite")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001-a1"]
    assert (folder / "checkpoints" / "step-000001-a1" / "COMMITTED").exists()


@pytest.mark.parametrize(
    ("error", "sure"),
    [
        (NotFinite(7, "loss"), True),
        (OutOfMemory("too little"), True),
        (WorkersLost("gone"), False),
        (KeyError(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_every_cluster_would_meet_ends_the_next_one_of_a_job_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sure: bool
) -> None:
    monkeypatch.setenv(JOB, "one")
    plain = small.recipe(tmp_path, str(tmp_path / "no-model"))
    with pytest.raises(type(error)), _ending(Record(str(tmp_path / "runs" / "small"))):
        raise error
    expected = "this ended the cluster before" if sure else "there is no folder"
    with pytest.raises(RayftError, match=expected):
        run(plain)


@pytest.mark.slow
def test_early_stopping_ends_the_run_and_exports_the_best(tmp_path: Path, ray_local: None) -> None:
    model = small.small_bert(tmp_path / "bert")
    stopping = {
        "train__epochs": 5,
        "train__learning_rate": 1e-12,
        "train__early_stopping": {"metric": "accuracy", "patience": 2},
    }
    plain = small.recipe(tmp_path, model, **stopping)
    result, _ = run(plain)
    assert (result["steps"], result["epochs"]) == (39, 3.0)  # the first evaluation is the best, two more bring nothing
    assert result["best"]["step"] == 13
    again, _ = run(plain)
    assert again == result


@pytest.mark.slow
def test_gradual_unfreezing_frees_one_block_an_epoch(tmp_path: Path, ray_local: None) -> None:
    model = small.small_bert(tmp_path / "bert")
    fields = {
        "model__freeze": "all",
        "model__unfreeze_every": 1,
        "train__schedule": "constant",
        "deepspeed__zero_stage": 2,
    }
    learned = []
    for attempt, epochs in enumerate((1, 3), 1):
        run(small.recipe(tmp_path, model, train__epochs=epochs, **fields))
        state = json.loads(
            (tmp_path / f"runs/small/checkpoints/step-{13 * epochs:06d}-a{attempt}/state.json").read_text()
        )
        parts = ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "classifier")
        learned.append({part for part in parts if any(name.startswith(part) for name in state["shapes"])})
    assert learned == [{"classifier"}, set(parts)]
    between = json.loads((tmp_path / "runs/small/checkpoints/step-000026-a2/state.json").read_text())["shapes"]
    assert {part for part in parts if any(name.startswith(part) for name in between)} == {parts[2], parts[3]}
    expected = straight(small.recipe(tmp_path, model, train__epochs=3, **fields))
    assert small.losses(tmp_path / "runs" / "small") == dict(enumerate(expected["losses"], 1))
