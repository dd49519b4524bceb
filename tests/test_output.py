"""One file of predictions: its columns and types, in Parquet and JSONL, and that it is whole or not there."""

from __future__ import annotations

import datetime as dt
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayft import output, storage
from rayft.data.pieces import fragments
from rayft.errors import RunRefused, StorageRefused
from rayft.output import Output
from rayft.recipe import Source


def written(path: Path, *blocks: tuple[list[dict[str, Any]], list[Any], list[str | None]]) -> Any:
    with Output(str(path)) as file:
        for inputs, predictions, errors in blocks:
            file.add(inputs, predictions, errors)
        file.commit()
    if path.suffix == ".parquet":
        return pq.read_table(path)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_rows_keep_their_order_and_columns(tmp_path: Path, ending: str) -> None:
    blocks = [([{"text": f"row {n}"}], [{"score": n / 4}], [None]) for n in range(20)]
    found = written(tmp_path / f"out.{ending}", *blocks)
    rows = found.to_pylist() if ending == "parquet" else found
    assert rows == [{"text": f"row {n}", "score": n / 4} for n in range(20)]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_colliding_keys_are_prefixed_and_errors_come_only_where_a_row_failed(tmp_path: Path, ending: str) -> None:
    late = ([{"text": "b", "label": "y"}], [None], ["too long"])
    found = written(tmp_path / f"out.{ending}", ([{"text": "a", "label": "x"}], [{"label": "z"}], [None]), late)
    assert (found.to_pylist() if ending == "parquet" else found) == [
        {"text": "a", "label": "x", "predicted_label": "z", "error": None},
        {"text": "b", "label": "y", "predicted_label": None, "error": "too long"},
    ]


def test_an_input_column_named_error_is_kept(tmp_path: Path) -> None:
    rows = written(tmp_path / "out.jsonl", ([{"error": "theirs"}], [None], ["ours"]))
    assert rows == [{"error": "theirs", "predicted_error": "ours"}]


def test_types_are_those_of_all_blocks(tmp_path: Path) -> None:
    first = {"n": 1, "mixed": 3, "late": None, "list": [], "empty": {}, "day": dt.date(2024, 5, 1), "big": 2**70}
    second = {"n": 0.5, "mixed": "three", "late": "x", "list": [1], "empty": {}, "day": None, "big": 1, "new": True}
    table = written(tmp_path / "out.parquet", ([first], [{}], [None]), ([second], [{}], [None]))
    assert table.schema.field("n").type == pa.float64()
    assert table.schema.field("list").type == pa.list_(pa.int64())
    assert table.schema.field("day").type == pa.date32()
    rows = table.to_pylist()
    assert [row["mixed"] for row in rows] == ["3", "three"]
    assert [row["late"] for row in rows] == [None, "x"]
    assert [row["empty"] for row in rows] == ["{}", "{}"]
    assert [row["big"] for row in rows] == [str(2**70), "1"]
    assert [row["new"] for row in rows] == [None, True]


def test_jsonl_holds_what_json_has_no_words_for(tmp_path: Path) -> None:
    row = {"bytes": b"\x00\xff", "day": dt.date(2024, 5, 1), "lone": "\ud800", "umlaut": "ü"}
    assert written(tmp_path / "out.jsonl", ([row], [{}], [None])) == [
        {"bytes": "AP8=", "day": "2024-05-01", "lone": "\ud800", "umlaut": "ü"}
    ]


def test_numbers_that_are_not_finite_are_null_in_jsonl(tmp_path: Path) -> None:
    """Python's own words for them are no JSON, and other readers stop at them."""
    row = {"nan": math.nan, "deep": {"list": [1.5, -math.inf, [math.inf]]}, "plain": 2, "day": dt.date(2024, 5, 1)}
    written(tmp_path / "out.jsonl", ([row], [{"score": math.nan}], [None]))
    found = json.loads((tmp_path / "out.jsonl").read_text(), parse_constant=pytest.fail)
    assert found == {"nan": None, "deep": {"list": [1.5, None, [None]]}, "plain": 2, "day": "2024-05-01", "score": None}


PICTURED = [
    ([{"text": "a"}, {"text": "b"}], [{"picture": b"PNG a"}, None], [None, "too long"]),
    ([{"text": "c"}], [{"picture": b"PNG c"}], [None]),
]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_pictures_go_into_a_folder_that_can_be_trained_on(tmp_path: Path, s3: str, place: str) -> None:
    folder = (s3 if place == "s3" else str(tmp_path)) + "/drawn/"
    output.refuse(folder)
    with Output(folder) as file:
        for block in PICTURED:
            file.add(*block)
        file.commit()
    assert [json.loads(line) for line in storage.read_text(folder + "metadata.jsonl").splitlines()] == [
        {"text": "a", "file_name": "000000.png", "error": None},
        {"text": "b", "file_name": None, "error": "too long"},
        {"text": "c", "file_name": "000002.png", "error": None},
    ]
    assert storage.read_bytes(folder + "000002.png") == b"PNG c"
    assert len(storage.listing(folder)) == 3
    with pytest.raises(RunRefused, match="exists; name another"):
        output.refuse(folder)
    (piece,) = fragments([Source(path=folder)])
    assert piece.path.endswith("metadata.jsonl")


def test_a_drawing_is_named_where_training_looks_for_it_whatever_the_input_has(tmp_path: Path) -> None:
    folder = f"{tmp_path}/drawn/"
    with Output(folder) as file:
        file.add([{"file_name": "old.png", "text": "a"}], [{"picture": b"PNG a"}], [None])
        file.add([{"text": "b", "input_file_name": "x"}], [{"picture": b"PNG b"}], [None])
        file.commit()
    assert [json.loads(line) for line in storage.read_text(folder + "metadata.jsonl").splitlines()] == [
        {"predicted_input_file_name": "old.png", "text": "a", "file_name": "000000.png"},
        {"text": "b", "input_file_name": "x", "file_name": "000001.png"},
    ]
    inputs = [{"file_name": "old.png"}]
    assert written(tmp_path / "out.jsonl", (inputs, [{"picture": b"PNG"}], [None]))[0]["file_name"] == "old.png"


def test_pictures_are_bytes_in_parquet_and_base64_in_jsonl(tmp_path: Path) -> None:
    table = written(tmp_path / "out.parquet", *PICTURED)
    assert table["picture"].to_pylist() == [b"PNG a", None, b"PNG c"]
    assert written(tmp_path / "out.jsonl", *PICTURED)[2]["picture"] == "UE5HIGM="


def test_lone_surrogates_are_escaped_in_parquet(tmp_path: Path) -> None:
    table = written(tmp_path / "out.parquet", ([{"text": "a\ud800"}], [{}], [None]))
    assert table["text"].to_pylist() == ["a\\ud800"]


def test_row_groups_are_large(tmp_path: Path) -> None:
    blocks = [([{"n": n} for n in range(100)], [{}] * 100, [None] * 100) for _ in range(100)]
    written(tmp_path / "out.parquet", *blocks)
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 2


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with Output(str(tmp_path / "out.jsonl")) as file:
        file.add([{"a": 1}, {"a": 2}], [{}], [None])
        with pytest.raises(ValueError, match="zip"):
            file.commit()
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").touch()
    with pytest.raises(RunRefused, match=r"there\.jsonl exists; name another,"):
        output.refuse(str(tmp_path / "there.jsonl"))
    with pytest.raises(RunRefused, match=r"predictions are written as \.parquet or \.jsonl"):
        output.refuse(str(tmp_path / "out.csv"))
    output.refuse(str(tmp_path / "new" / "out.parquet"))
    for place in ("/proc/nothing/out.jsonl", "/proc/nothing/pictures/"):
        with pytest.raises(StorageRefused, match=rf"^{place.rstrip('/')}: writing failed"):
            output.refuse(place)
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_object_storage_takes_it_too(s3: str, ending: str) -> None:
    path = f"{s3}/output/out.{ending}"
    output.refuse(path)
    with Output(path) as file:
        file.add([{"a": 1}], [{"b": 2}], [None])
        file.commit()
    assert [entry.path for entry in storage.listing(f"{s3}/output") if entry.path.endswith(ending)] == [path]
    with pytest.raises(RunRefused, match="exists"):
        output.refuse(path)
