"""First recipes: each of them is a whole recipe for the task that its columns call for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayft import document
from rayft.data.pieces import fragments
from rayft.errors import DataError
from rayft.first import first_recipe, look
from rayft.recipe import Recipe, Source


def recipe_for(columns: list[str], sample: dict[str, list[Any]] | None = None, path: str = "data/train.csv") -> Recipe:
    read = document.read(first_recipe(columns, sample or {}, path).text)
    assert read.faults == []
    return Recipe.parse(read.value)


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        (["text", "label"], {"type": "text-classification", "text": "text", "label": "label"}),
        (["Label", "id", "Review"], {"type": "text-classification", "text": "Review", "label": "Label"}),
        (
            ["premise", "hypothesis", "label"],
            {"type": "text-classification", "text": "premise", "text_pair": "hypothesis"},
        ),
        (["sentence1", "sentence2", "score"], {"type": "sequence-regression", "text_pair": "sentence2"}),
        (["id", "text", "score"], {"type": "sequence-regression", "text": "text", "target": "score"}),
        (["anchor", "positive"], {"type": "sentence-embedding", "negative": None}),
        (["anchor", "positive", "negative"], {"type": "sentence-embedding", "negative": "negative"}),
        (["id", "title", "context", "question", "answers"], {"type": "question-answering", "answers": "answers"}),
        (["id", "tokens", "ner_tags"], {"type": "token-classification", "tokens": "tokens", "tags": "ner_tags"}),
        (["messages"], {"type": "causal-lm", "messages": "messages", "tools": None}),
        (["messages", "tools"], {"type": "causal-lm", "messages": "messages", "tools": "tools"}),
        (["prompt", "completion"], {"type": "causal-lm", "prompt": "prompt", "completion": "completion"}),
        (["instruction", "output"], {"type": "causal-lm", "prompt": "instruction", "completion": "output"}),
        (
            ["instruction", "input", "output"],
            {"type": "causal-lm", "prompt": "{instruction}\n\n{input}", "completion": "output"},
        ),
        (["question", "answer", "qtype"], {"type": "causal-lm", "prompt": "question", "completion": "answer"}),
        (
            ["question", "context", "answer"],
            {"type": "causal-lm", "prompt": "{context}\n\n{question}", "completion": "answer"},
        ),
        (
            ["instruction", "context", "response", "category"],
            {"type": "causal-lm", "prompt": "{instruction}\n\n{context}", "completion": "response"},
        ),
        (["input", "output"], {"type": "causal-lm", "prompt": "input", "completion": "output"}),
        (["review", "rating"], {"type": "text-classification", "text": "review", "label": "rating"}),
        (["text"], {"type": "causal-lm", "text": "text"}),
        (["content", "url"], {"type": "causal-lm", "text": "content"}),
        (["file_name", "identity", "split"], {"type": "face-recognition", "image": "file_name"}),
    ],
    ids=str,
)
def test_columns_call_for_a_task(columns: list[str], task: dict[str, Any]) -> None:
    dumped = recipe_for(columns).dump()["task"]
    assert {key: dumped[key] for key in task} == task


@pytest.mark.parametrize(
    ("columns", "file", "task"),
    [
        (["file_name", "label"], "/data/Yes/a.WAV", {"type": "audio-classification", "label": "label"}),
        (["file_name", "split", "text", "label"], "/a.flac", {"type": "speech-recognition", "text": "text"}),
        (["text", "path"], "https://host/a.mp3", {"type": "speech-recognition", "audio": "path", "text": "text"}),
    ],
    ids=str,
)
def test_sounds_call_for_a_task_of_theirs(columns: list[str], file: str, task: dict[str, Any]) -> None:
    sample = {name: [file, file] if name in ("file_name", "path") else ["one", "two"] for name in columns}
    recipe = recipe_for(columns, sample)
    assert {key: recipe.dump()["task"][key] for key in task} == task
    assert recipe.model.path == "facebook/wav2vec2-base"


def test_pictures_call_for_a_model_of_pictures() -> None:
    assert recipe_for(["file_name", "label"]).model.path == recipe_for(["file_name", "identity"]).model.path
    assert "resnet" in recipe_for(["file_name", "label"]).model.path


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        (["file_name", "text"], {"type": "text-to-image", "image": "file_name", "text": "text"}),
        (["path", "caption", "split"], {"type": "text-to-image", "image": "path", "text": "caption"}),
        (["path", "person", "label"], {"type": "face-recognition", "image": "path", "identity": "person"}),
        (["path", "category"], {"type": "image-classification", "image": "path", "label": "category"}),
    ],
    ids=str,
)
def test_files_that_are_pictures_are_looked_at(columns: list[str], task: dict[str, Any]) -> None:
    sample = {name: ["a.PNG", "b.jpg"] if name in ("file_name", "path") else ["one", "two"] for name in columns}
    recipe = recipe_for(columns, sample)
    assert {key: recipe.dump()["task"][key] for key in task} == task
    assert ("stable-diffusion" in recipe.model.path) == (task["type"] == "text-to-image")


@pytest.mark.parametrize(
    ("values", "task"),
    [
        ([5.0, 3.8, 2.6, None], "sequence-regression"),
        (["3.75", "0.5", "", "4.0"], "sequence-regression"),
        ([1.0, 0.0, 1.5, None, float("nan"), float("nan")], "text-classification"),
        (["1", "0", "2"], "text-classification"),
        (["1.5 stars", "2.5 stars"], "text-classification"),
    ],
)
@pytest.mark.parametrize("columns", [["sentence1", "sentence2", "label"], ["review", "stars"]], ids=str)
def test_labels_that_are_mostly_fractions_are_a_measure(columns: list[str], values: list[Any], task: str) -> None:
    sample = {name: ["a"] * len(values) for name in columns[:-1]} | {columns[-1]: values}
    assert recipe_for(columns, sample).task.type == task


def test_columns_that_are_not_used_are_told() -> None:
    made = first_recipe(["", "id", "text", "entities: all", "Split"], {}, "rows.csv")
    assert made.unused == ["id", "entities: all"]
    assert "\n  # not used of the data: id, entities: all\n" in made.text.replace("'", "")
    assert document.read(made.text).faults == []
    odd = first_recipe(["text", "two\nlines"], {}, "rows.csv").text
    assert Recipe.parse(document.read(odd).value).task.type == "causal-lm"
    assert "not used" not in first_recipe(["text", "label"], {}, "rows.csv").text


def test_columns_that_call_for_no_task_are_told_what_would() -> None:
    with pytest.raises(
        DataError, match=r"x\.csv: no task fits the columns height, weight; these would do: .*text \+ label"
    ):
        first_recipe(["height", "weight"], {}, "x.csv")


def test_rows_are_looked_at_where_there_are_some(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n")
    source = Source(path=str(tmp_path))
    with pytest.raises(DataError, match=f"{tmp_path} has no rows; a first recipe needs some"):
        look(fragments([source]), source.path)
    (tmp_path / "b.csv").write_text("text,label\nhello,ham\n")
    assert look(fragments([source]), source.path) == (["text", "label"], {"text": ["hello"], "label": ["ham"]})
    (tmp_path / "a.csv").write_text("text;label\nhello, you;ham\n")
    assert look(fragments([source]), source.path) == (["text", "label"], {"text": ["hello, you"], "label": ["ham"]})


@pytest.mark.parametrize(("words", "length"), [(10, 64), (60, 128), (1000, 512)])
def test_lengths_come_from_the_first_rows(words: int, length: int) -> None:
    recipe = recipe_for(["text", "label"], {"text": ["a", "b " * words], "label": ["x", "y"]})
    assert recipe.dump()["task"]["max_length"] == length


def test_lists_of_labels_make_it_multi_label() -> None:
    assert recipe_for(["text", "labels"], {"text": ["a"], "labels": [["x", "y"]]}).dump()["task"]["multi_label"] is True
    listed = {"text": ["a"] * 2, "labels": ["[]", "['x', 'y']"]}
    assert recipe_for(["text", "labels"], listed).dump()["task"]["multi_label"] is True
    for other in ("x", "[x]"):
        assert recipe_for(["text", "labels"], {"text": ["a"], "labels": [other]}).dump()["task"]["multi_label"] is False


def test_empty_answers_make_it_unanswerable() -> None:
    columns = ["question", "context", "answers"]
    some, none = {"text": ["a"], "answer_start": [0]}, {"text": [], "answer_start": []}
    assert recipe_for(columns, {"answers": [some]}).dump()["task"]["unanswerable"] is False
    assert recipe_for(columns, {"answers": [some, none]}).dump()["task"]["unanswerable"] is True


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("sms spam/train.csv", "sms-spam"),
        ("rows.jsonl.gz", "rows"),
        ("data/faces/metadata.csv", "faces"),
        ("s3://bucket/reviews/train/*.parquet", "reviews"),
        ("hf://owner/nli:train", "nli"),
        ("train.csv", "train"),
        ("./prepared.csv", "first-run"),
        ("data/export/train.csv", "first-run"),
        ("é", "first-run"),
    ],
)
def test_names_come_from_the_path(path: str, name: str) -> None:
    assert recipe_for(["text"], path=path).name == name


def test_other_splits_that_lie_beside_are_taken(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").touch()
    data = recipe_for(["text"], path=str(tmp_path / "train.csv")).data
    assert data.validation is not None
    assert data.test is not None
    assert [data.validation[0].path, data.test[0].path] == [str(tmp_path / "dev.csv"), str(tmp_path / "test.csv")]
    alone = recipe_for(["text"], path=str(tmp_path / "dev.csv")).data
    assert (alone.validation, alone.test) == (None, None)


def test_a_column_that_names_the_split_keeps_test_rows_out_of_training() -> None:
    sample = {"text": ["a", "b"], "label": ["x", "y"], "Split": ["train", "dev", "test, kept apart", "test"]}
    recipe = recipe_for(list(sample), sample, path="all, of it.csv")
    data = recipe.data
    assert data.validation is not None
    assert data.test is not None
    parts = [data.train[0], data.validation[0], data.test[0]]
    assert [part.where for part in parts] == [{"Split": "train"}, {"Split": "dev"}, {"Split": "test"}]
    assert {part.path for part in parts} == {"all, of it.csv"}


def test_a_column_of_other_values_names_no_split() -> None:
    sample = {"text": ["a"], "label": ["x"], "split": ["stock", "fork"]}
    data = recipe_for(list(sample), sample).data
    assert (data.train[0].where, data.validation, data.test) == ({}, None, None)


def test_odd_names_are_quoted() -> None:
    recipe = recipe_for(["text", "label"], path="a: b #1/no.csv")
    assert recipe.data.train[0].path == "a: b #1/no.csv"
