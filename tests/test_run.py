"""A whole run: it ends with a model, survives being killed, goes on when asked for more, and refuses what it must."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import small
from rayft.errors import NotFinite, RunRefused
from rayft.recipe import Recipe


def run(plain: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from rayft.run import run as start

    events: list[dict[str, Any]] = []
    return start(Recipe.parse(plain), show=events.append, **options), events


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(str(folder / "model.safetensors"))


@pytest.mark.slow
def test_a_killed_run_ends_as_an_untouched_one(tmp_path: Path) -> None:
    model = small.small_bert(tmp_path / "bert")
    fields = {"train__save_every": "3 steps", "deepspeed__zero_stage": 2, "train__epochs": 3}
    untouched = small.recipe(tmp_path, model, name="untouched", **fields)
    killed = small.recipe(tmp_path, model, name="killed", **fields)
    small.finish(small.start("run", small.write_recipe(tmp_path, untouched)))
    runs = tmp_path / "runs"
    expected = small.losses(runs / "untouched")
    assert sorted(expected) == list(range(1, 40))  # 3 epochs of ceil(203 / 16) steps
    rng, reached = random.Random(7), 0
    path = small.write_recipe(tmp_path, killed)
    for _ in range(3):
        target = rng.randint(reached + 4, reached + 11)
        process = small.start("run", path)
        small.wait_for(
            lambda until=target: max((r["step"] for r in small.metrics(runs / "killed")), default=0) >= until, process
        )
        small.kill_with_children(process)
        reached = target
    small.finish(small.start("run", path))
    assert small.losses(runs / "killed") == expected
    ours, theirs = weights(runs / "killed" / "export"), weights(runs / "untouched" / "export")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert json.loads((runs / "killed" / "run.json").read_text())["attempt"] == 4


@pytest.mark.slow
def test_a_finished_run_answers_and_goes_on_when_asked_for_more(tmp_path: Path, ray_local: None) -> None:
    model = small.small_bert(tmp_path / "bert")
    plain = small.recipe(tmp_path, model, train__epochs=1, train__schedule="constant")
    first, _ = run(plain)
    again, events = run(plain)
    assert again == first
    assert any("is finished" in event.get("text", "") for event in events)
    more, events = run({**plain, "train": {**plain["train"], "epochs": 2}})
    assert (first["steps"], more["steps"]) == (13, 26)
    assert any("going on from step 13" in event.get("text", "") for event in events)
    assert sorted(small.losses(tmp_path / "runs" / "small")) == list(range(1, 27))
    straight, _ = run({**plain, "name": "straight", "train": {**plain["train"], "epochs": 2}})
    assert small.losses(tmp_path / "runs" / "straight") == small.losses(tmp_path / "runs" / "small")
    assert straight["metrics"] == more["metrics"]
    # Another run starts from the export, head included: its first scores are near the last ones.
    export = str(tmp_path / "runs" / "small" / "export")
    other, _ = run(
        {**plain, "name": "other", "model": {"path": export}, "train": {**plain["train"], "learning_rate": 1e-12}}
    )
    assert other["metrics"]["test_loss"] == pytest.approx(more["metrics"]["test_loss"], rel=1e-5)
    with pytest.raises(RunRefused, match=r"train\.learning_rate: 0\.001 -> 0\.01"):
        run({**plain, "train": {**plain["train"], "learning_rate": 1e-2}})


WITHOUT_RAYFT = """
import csv, json, sys
sys.modules["rayft"] = None
from transformers import pipeline
rows = list(csv.DictReader(open(sys.argv[2], encoding="utf-8")))
found = pipeline("text-classification", model=sys.argv[1], device="cpu")([row["text"] for row in rows], truncation=True)
print(json.dumps(sum(answer["label"] == row["label"] for answer, row in zip(found, rows)) / len(rows)))
"""


@pytest.mark.slow
def test_the_export_scores_alike_without_rayft_and_in_evaluate(tmp_path: Path, ray_local: None) -> None:
    plain = small.recipe(tmp_path, small.small_bert(tmp_path / "bert"), train__epochs=1)
    result, _ = run(plain)
    alone = [sys.executable, "-c", WITHOUT_RAYFT, result["export"], plain["data"]["test"]]
    told = subprocess.run(alone, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout.splitlines()[-1]) == result["metrics"]["test_accuracy"]
    from rayft.predict import evaluate

    scores = evaluate(result["run"], None, show=lambda event: None)
    assert scores["test_accuracy"] == result["metrics"]["test_accuracy"]
    assert scores["test_loss"] == pytest.approx(result["metrics"]["test_loss"], rel=1e-6)


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
    alone = {"cluster": {"workers": 1}, "deepspeed": {"zero_stage": 0}, "train": {**plain["train"], "epochs": 3}}
    straight, _ = run({**plain, "name": "straight", **alone})
    expected = small.losses(tmp_path / "runs" / "straight")
    assert small.losses(tmp_path / "runs" / "small") == pytest.approx(expected, rel=1e-5)
    assert result["metrics"] == pytest.approx(straight["metrics"], rel=1e-4)


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
    for epochs in (1, 2, 3):
        run(small.recipe(tmp_path, model, train__epochs=epochs, **fields))
        state = json.loads(
            (tmp_path / f"runs/small/checkpoints/step-{13 * epochs:06d}-a{epochs}/state.json").read_text()
        )
        parts = ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "classifier")
        learned.append({part for part in parts if any(name.startswith(part) for name in state["shapes"])})
    assert learned == [{"classifier"}, {"bert.encoder.layer.1", "classifier"}, set(parts)]
    straight = small.recipe(tmp_path, model, name="straight", train__epochs=3, **fields)
    run(straight)
    assert small.losses(tmp_path / "runs" / "straight") == small.losses(tmp_path / "runs" / "small")


@pytest.mark.slow
def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    model = small.small_bert(tmp_path / "bert")
    plain = small.recipe(tmp_path, model, train__epochs=40, train__save_every="2 steps")
    path = small.write_recipe(tmp_path, plain)
    first = small.start("run", path)
    small.wait_for(lambda: len(small.metrics(tmp_path / "runs" / "small")) > 5, first)
    refused = small.finish(small.start("run", path), code=2)
    assert f"is being written by process {first.pid}" in refused
    small.kill_with_children(first)
    finished = small.finish(
        small.start("run", path, "train.epochs=40", "train.early_stopping={metric: loss, patience: 1}"), code=2
    )
    assert "train.early_stopping" in finished  # another recipe, but no longer another writer
