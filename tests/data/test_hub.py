"""Hub data sets, tried on folders that are laid out like one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayft.data.hub import HubData, parse
from rayft.data.pieces import fragments, identity
from rayft.data.source import read
from rayft.errors import DataError
from rayft.recipe import Source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("train-0", 3), ("train-1", 2), ("test-0", 1)):
        rows = [{"text": f"{name} {number}", "label": number} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://owner/name", HubData("owner/name", None, None, None)),
        ("hf://owner/name:test", HubData("owner/name", None, "test", None)),
        ("hf://owner/name/config:train@v1.0", HubData("owner/name", "config", "train", "v1.0")),
        ("hf://squad", HubData("squad", None, None, None)),
    ],
)
def test_a_path_has_a_name_a_config_a_split_and_a_revision(path: str, expected: HubData) -> None:
    assert parse(path) == expected
    assert str(expected) == path


@pytest.mark.parametrize("path", ["hf://", "hf://a/b:", "hf://a/b@"])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(DataError, match="is no Hub data set; hf://owner/name"):
        parse(path)


def test_shards_are_read_apart_and_give_every_row_once(folder: Path) -> None:
    one = Source(path=f"hf://{folder}", where={"label": [0, 1]})
    pieces = fragments([one])
    assert [(piece.file, piece.part) for piece in pieces] == [(0, (0, 2)), (1, (1, 2))]
    rows = [batch for piece in pieces for batch in read(piece, one, {"text": "body"}, ("body",))]
    assert [batch.columns["body"] for batch in rows] == [["train-0 0", "train-0 1"], ["train-1 0", "train-1 1"]]
    assert [batch.numbers for batch in rows] == [[0, 1], [0, 1]]


def test_the_split_is_the_one_named_else_the_recipes(folder: Path) -> None:
    assert len(fragments([Source(path=f"hf://{folder}")], "test")) == 1
    assert len(fragments([Source(path=f"hf://{folder}:train")], "test")) == 2
    with pytest.raises(DataError, match="has no split 'validation'; it has train, test: write hf://"):
        fragments([Source(path=f"hf://{folder}")], "validation")


def test_identity_is_that_of_the_split_s_content(folder: Path) -> None:
    def known(split: str) -> str:
        one = [Source(path=f"hf://{folder}:{split}")]
        return identity(fragments(one), one)

    train, test = known("train"), known("test")
    (folder / "train-1.jsonl").write_text('{"text": "changed", "label": 1}')
    assert known("train") != train
    assert known("test") == test


def test_class_labels_come_as_their_names(tmp_path: Path) -> None:
    header = """---
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': ham, '1': spam}}}}
  - {name: tags, list: {class_label: {names: {'0': O, '1': B-x}}}}
  splits:
  - {name: train, num_bytes: 1, num_examples: 2}
---
"""
    (tmp_path / "README.md").write_text(header)
    lines = [{"text": "a", "label": 1, "tags": [0, 1]}, {"text": "b", "label": 0, "tags": []}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    one = Source(path=f"hf://{tmp_path}")
    (batch,) = read(fragments([one])[0], one, {}, ("label", "tags"))
    assert batch.columns == {"label": ["spam", "ham"], "tags": [["O", "B-x"], []]}


def test_a_data_set_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"hf://.* can't be loaded"):
        fragments([Source(path=f"hf://{tmp_path}")])
