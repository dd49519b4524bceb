"""Scores and predictions of exported models through Ray Data: the right rows, in their order, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import accuracy_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from exported import LABELS, WORDS, classifier, writer
from rayft import storage
from rayft.errors import DataError, ModelError, RunRefused
from rayft.predict import _find, _model, evaluate, predict
from rayft.recipe import Recipe

Events = list[dict[str, Any]]


def rows(count: int) -> list[dict[str, Any]]:
    texts = (" ".join(WORDS[(row * 7 + word) % 60] for word in range(1 + row * 5 % 13)) for row in range(count))
    return [{"id": row, "text": text, "label": LABELS[row % 3 == 0]} for row, text in enumerate(texts)]


def jsonl(path: Path, content: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content))
    return str(path)


def a_run(place: Path, **data: Any) -> str:
    """The folder of a run as far as its model's use goes: a recipe and an export."""
    recipe = Recipe.parse(
        {
            "name": "run",
            "task": {"type": "text-classification", "max_length": 16},
            "model": {"path": "unused"},
            "data": data,
            "train": {"epochs": 1, "micro_batch_size": 4},
            "storage": str(place),
        }
    )
    storage.write_text(storage.join(recipe.folder, "recipe.yaml"), recipe.to_yaml())
    classifier(Path(recipe.folder) / "export")
    return recipe.folder


def plain_scores(folder: str, content: list[dict[str, Any]]) -> dict[str, float]:
    """Loss and accuracy, one row at a time."""
    network, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    given, losses = [], []
    for row in content:
        tokens = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            outputs = network(**tokens, labels=torch.tensor([LABELS.index(row["label"])]))
        given.append(LABELS[int(outputs.logits.argmax())])
        losses.append(float(outputs.loss))
    accuracy = accuracy_score([row["label"] for row in content], given)
    return {"loss": sum(losses) / len(losses), "accuracy": float(accuracy)}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_run_is_scored_on_its_own_test_rows_and_on_others(tmp_path: Path) -> None:
    test = jsonl(tmp_path / "test.jsonl", rows(150))
    folder = a_run(tmp_path, train=str(tmp_path / "gone.jsonl"), validation=test, test=test)
    events: Events = []
    scores = evaluate(folder, None, show=events.append)
    assert list(scores)[:2] == ["test_loss", "test_accuracy"]
    expected = plain_scores(f"{folder}/export", rows(150))
    assert scores["test_loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert scores["test_accuracy"] == expected["accuracy"]
    stages = [event for event in events if event["event"] == "stage"]
    assert (stages[0]["done"], stages[0]["total"]) == (0, 150)
    assert stages[-1]["done"] == 150
    others = evaluate(f"{folder}/export", jsonl(tmp_path / "few.jsonl", rows(9)), show=events.append)
    assert others["eval_loss"] == pytest.approx(plain_scores(f"{folder}/export", rows(9))["loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_without_other_rows_those_cut_from_train_are_scored(tmp_path: Path) -> None:
    from rayft.data.pieces import row_id
    from rayft.data.places import cut_hashes

    folder = a_run(tmp_path, train=jsonl(tmp_path / "train.jsonl", rows(80)))
    hashes = cut_hashes(torch.tensor([row_id(0, row) for row in range(80)]).numpy()).tolist()
    cut = [row for row, value in zip(rows(80), hashes, strict=True) if value <= sorted(hashes)[7]]
    events: Events = []
    scores = evaluate(folder, None, show=events.append)
    expected = plain_scores(f"{folder}/export", cut)
    assert scores["eval_loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert scores["eval_accuracy"] == expected["accuracy"]
    assert {"event": "note", "text": "scored are the run's own validation rows"} in events
    assert not storage.listing(str(tmp_path / "prepared"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_predictions_are_written_in_the_order_of_several_files(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model")
    (tmp_path / "rows").mkdir()
    content = rows(500)
    for number in range(5):
        part = content[number * 100 : number * 100 + 100]
        jsonl(tmp_path / "rows" / f"{number}.jsonl", [{"id": row["id"], "text": row["text"]} for row in part])
    events: Events = []
    done = predict(folder, str(tmp_path / "rows"), str(tmp_path / "out.parquet"), show=events.append)
    assert {name: done[name] for name in ("rows", "failed", "output")} == {
        "rows": 500,
        "failed": 0,
        "output": str(tmp_path / "out.parquet"),
    }
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "text", "label", "score"]
    assert table["id"].to_pylist() == list(range(500))
    network, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    for row in table.to_pylist()[::50]:
        with torch.no_grad():
            logits = network(**tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=16)).logits[0]
        assert row["label"] == LABELS[int(logits.argmax())]
        assert row["score"] == pytest.approx(float(logits.softmax(0).max()), abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_bad_rows_stay_in_place_and_are_told(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model")
    data = jsonl(tmp_path / "rows.jsonl", [*rows(2), "{broken", {"id": 3}, *rows(1)])
    events: Events = []
    done = predict(folder, data, str(tmp_path / "out.jsonl"), show=events.append)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (done["rows"], done["failed"]) == (5, 2)
    assert [row.get("id") for row in found] == [0, 1, None, 3, 0]
    assert [row["predicted_label"] is None for row in found] == [False, False, True, True, False]
    assert [row["error"] and row["error"][:11] for row in found] == [None, None, "broken JSON", "column 'tex", None]
    (warning,) = [event["text"] for event in events if event["event"] == "warning"]
    assert warning.startswith("2 of 5 rows have no prediction, see the column `error`, such as ")
    with pytest.raises(DataError, match=r"(?s)2 of 5 rows are bad, so there are no scores.*rows\.jsonl row 3"):
        evaluate(folder, data, show=events.append)
    hopeless = jsonl(tmp_path / "hopeless.jsonl", [{"txet": "w1"}] * 3)
    with pytest.raises(DataError, match=r"none of its 3 rows can be predicted, so nothing was written"):
        predict(folder, hopeless, str(tmp_path / "none.jsonl"), show=events.append)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_prompts_are_continued(tmp_path: Path) -> None:
    folder = writer(tmp_path / "model")
    data = jsonl(tmp_path / "rows.jsonl", [{"question": f"w{row} w{row + 1}"} for row in range(20)])
    predict(folder, data, str(tmp_path / "out.jsonl"), show=lambda event: None)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["question"] for row in found] == [f"w{row} w{row + 1}" for row in range(20)]
    assert all(isinstance(row["text"], str) for row in found)


def test_what_is_no_exported_model_is_refused(tmp_path: Path) -> None:
    folder = a_run(tmp_path, train="rows.csv")
    silent = lambda event: None  # noqa: E731
    with pytest.raises(RunRefused, match="is a model folder, which knows no rows; say with --data"):
        evaluate(f"{folder}/export", None, show=silent)
    details = Path(folder, "export", "rayft.json")
    said = json.loads(details.read_text())
    details.write_text(json.dumps({**said, "task": {**said["task"], "id": "gone since"}}))
    assert _model(_find(folder)).task.type == "text-classification"
    details.rename(tmp_path / "kept.json")
    with pytest.raises(RunRefused, match="run has no exported model: a run exports when it ends"):
        evaluate(folder, None, show=silent)
    with pytest.raises(RunRefused, match=r"holds a model without rayft\.json"):
        predict(f"{folder}/export", "rows.csv", str(tmp_path / "out.jsonl"), show=silent)
    with pytest.raises(RunRefused, match="nowhere is neither a run's folder nor an exported model"):
        predict(str(tmp_path / "nowhere"), "rows.csv", str(tmp_path / "out.jsonl"), show=silent)
    Path(folder, "export", "rayft.json").write_text('{"rayft": "9", "task": {"type": "unheard-of"}, "facts": {}}')
    with pytest.raises(ModelError, match=r"rayft\.json \(of rayft 9\) says nothing this rayft can use: 'unheard-of'"):
        evaluate(folder, None, show=silent)


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_looked_at(tmp_path: Path) -> None:
    folder = a_run(tmp_path, train="rows.csv")
    with pytest.raises(RunRefused, match=r"predictions are written as \.parquet or \.jsonl"):
        predict(folder, "rows.csv", "out.csv", show=lambda event: None)
