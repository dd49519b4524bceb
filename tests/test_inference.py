"""What an actor makes of a block of rows: each row's own prediction in its place, whatever the batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from exported import LABELS, WORDS, classifier, reader, writer
from rayft import tasks
from rayft.data.pieces import fragments
from rayft.errors import DataError, ModelError, TrainingError
from rayft.inference import Answering, Answers, Model, Reading, _Read
from rayft.recipe import Source


def model(folder: str) -> Model:
    details = json.loads((Path(folder) / "rayft.json").read_text())
    task = tasks.find(details["task"]["type"]).model_validate(details["task"])
    return Model(folder, task, details["facts"], batch_size=4)


def blocks(path: Path, used: Model, labelled: bool, whole: bool = True, size: int = 8, **reading: Any) -> list[Any]:
    """The blocks of a file as readers give them."""
    columns = used.task.columns(labelled)
    asked = Reading((Source(path=str(path)),), {}, columns, whole, **reading)
    return list(_Read(asked, size)(fragments(asked.sources, "test")))


def answered(used: Model, found: list[Any], labelled: bool) -> list[Answers]:
    stage = Answering(used, labelled)
    return [answers for block in found for answers in stage(block)]


def texts(rows: int) -> list[str]:
    return [" ".join(WORDS[(row * 7 + word) % 60] for word in range(1 + row * 5 % 13)) for row in range(rows)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_unlabelled_rows_get_what_the_model_says_of_each_alone(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model")
    rows = [{"id": number, "text": text} for number, text in enumerate(texts(21))]
    used = model(folder)
    found = answered(used, blocks(jsonl(tmp_path / "rows.jsonl", rows), used, False), False)
    assert [row for answers in found for row in answers.inputs] == rows
    assert [answers.rows for answers in found] == [8, 8, 5]
    network, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    predictions = [answers.predictions[place] for answers in found for place in range(answers.rows)]
    for row, prediction in zip(rows, predictions, strict=True):
        with torch.no_grad():
            logits = network(**tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=16)).logits[0]
        assert prediction["label"] == LABELS[int(logits.argmax())]
        assert prediction["score"] == pytest.approx(float(logits.softmax(0).max()), abs=1e-6)
    assert len({prediction["label"] for prediction in predictions}) == 2


def test_rows_that_cannot_be_used_keep_their_places(tmp_path: Path) -> None:
    rows = [{"text": "w1"}, '{"text": ', {"other": 1}, {"text": " "}, {"text": "w2 w3", "note": "kept"}]
    used = model(classifier(tmp_path / "model"))
    (found,) = answered(used, blocks(jsonl(tmp_path / "rows.jsonl", rows), used, False), False)
    assert sorted(found.predictions) == [0, 4]
    assert sorted(found.bad) == [1, 2, 3]
    assert found.inputs == [{"text": "w1"}, {}, {"other": 1}, {"text": " "}, {"text": "w2 w3", "note": "kept"}]
    assert "broken JSON" in found.bad[1].reason
    assert str(found.bad[2]).startswith(f"{tmp_path}/rows.jsonl row 3 (line 3): column 'text' is missing")
    assert found.bad[3].reason == "`text` is ' '; it needs text"


def test_csv_rows_bring_all_their_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,text,label\n1,w1,a\n2,w2\n3,w3,c\n")
    used = model(classifier(tmp_path / "model"))
    (found,) = answered(used, blocks(tmp_path / "rows.csv", used, False), False)
    assert found.inputs == [{"id": "1", "text": "w1", "label": "a"}, {}, {"id": "3", "text": "w3", "label": "c"}]
    assert found.bad[1].reason == "2 fields where the header has 3"


def test_loss_and_references_come_with_labelled_rows(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model")
    rows = [{"text": text, "label": LABELS[number % 2]} for number, text in enumerate(texts(10))]
    used = model(folder)
    found = answered(used, blocks(jsonl(tmp_path / "rows.jsonl", rows), used, True, whole=False), True)
    assert [answers.references[place] for answers in found for place in range(answers.rows)] == LABELS * 5
    assert sum(answers.items for answers in found) == 10
    assert all(answers.inputs == [] for answers in found)
    network, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    expected = 0.0
    for row in rows:
        tokens = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            expected += float(network(**tokens, labels=torch.tensor([LABELS.index(row["label"])])).loss)
    assert sum(answers.loss for answers in found) == pytest.approx(expected, rel=1e-5)


def test_windows_of_a_row_become_one_answer(tmp_path: Path) -> None:
    rows = [
        {"question": "w1 w2", "context": " ".join(WORDS[:39])},
        {"question": " ".join(WORDS[:14]), "context": "w5 w6"},
        {"question": "w3", "context": " ".join(WORDS[5:13])},
    ]
    used = model(reader(tmp_path / "model"))
    (found,) = answered(used, blocks(jsonl(tmp_path / "rows.jsonl", rows), used, False), False)
    assert sorted(found.predictions) == [0, 2]
    assert list(found.dropped) == [1]
    for place, prediction in found.predictions.items():
        assert prediction["answer"] == rows[place]["context"][prediction["start"] : prediction["end"]]


def test_prompts_are_continued(tmp_path: Path) -> None:
    folder = writer(tmp_path / "model")
    rows = [{"question": text} for text in texts(9)]
    used = model(folder)
    found = answered(used, blocks(jsonl(tmp_path / "rows.jsonl", rows), used, False), False)
    predictions = [answers.predictions[place] for answers in found for place in range(answers.rows)]
    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for row, prediction in zip(rows, predictions, strict=True):
        ids = used.task.encode(
            {"question": [row["question"]]}, tokenizer, {}, evaluation=True, labelled=False
        ).features["input_ids"]
        written = network.generate(torch.tensor(ids), max_new_tokens=5, do_sample=False)
        assert prediction == {"text": tokenizer.decode(written[0, len(ids[0]) :], skip_special_tokens=True)}


def test_only_rows_cut_for_validation_are_read(tmp_path: Path) -> None:
    from rayft.data.pieces import row_id
    from rayft.data.places import cut_hashes

    rows = [{"text": text, "label": "ham"} for text in texts(50)]
    used = model(classifier(tmp_path / "model"))
    hashes = {number: int(cut_hashes(torch.tensor([row_id(0, number)]).numpy())[0]) for number in range(50)}
    threshold = sorted(hashes.values())[4]
    found = blocks(jsonl(tmp_path / "rows.jsonl", rows), used, True, whole=False, threshold=threshold)
    numbers = [number for block in found for number in block.rows.numbers]
    assert numbers == [number for number in range(50) if hashes[number] <= threshold]
    assert len(numbers) == 5


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,txet\n1,w1\n")
    used = model(classifier(tmp_path / "model"))
    with pytest.raises(DataError, match="column 'text' is missing; there are id, txet; did you mean 'txet'"):
        blocks(tmp_path / "rows.csv", used, False)


def test_a_folder_that_lacks_the_head_is_refused(tmp_path: Path) -> None:
    used = model(classifier(tmp_path / "model"))
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    save_file(kept, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    found = blocks(jsonl(tmp_path / "rows.jsonl", [{"text": "w1"}]), used, False)
    with pytest.raises(ModelError, match=r"its weights lack classifier\.bias, classifier\.weight"):
        answered(used, found, False)


def test_a_model_that_fails_is_told_with_the_rows(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["beyond"])  # the model's embeddings know nothing of it
    tokenizer.save_pretrained(folder)
    used = model(folder)
    found = blocks(jsonl(tmp_path / "rows.jsonl", [{"text": "w1"}, {"text": "beyond"}]), used, False)
    with pytest.raises(TrainingError, match=r"the model failed on .*rows\.jsonl rows 1 to 2: IndexError"):
        answered(used, found, False)


def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    used = model(classifier(tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"half")
    found = blocks(jsonl(tmp_path / "rows.jsonl", [{"text": "w1"}]), used, False)
    with pytest.raises(ModelError, match="can't be loaded, SafetensorError"):
        answered(used, found, False)
