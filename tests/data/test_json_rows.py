"""Rows in JSON: every row with its number and line, and every fault in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayft.data.formats import Row, Table
from rayft.data.json_rows import read_json, read_jsonl
from rayft.errors import DataError


def written(folder: Path, content: str | bytes, name: str = "rows") -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def faults(table: Table) -> list[tuple[int, int, str]]:
    return [(row.number, row.line, row.fault) for row in table.rows if row.fault]


def test_jsonl_faults_have_row_and_line_and_end_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, b'{"text": "a"}\n\n{"text": "b"\n[1]\n{"text": "\xff"}\n{"text": null, "x": 1}')
    good = [row for row in read_jsonl(path).rows if not row.fault]
    assert good == [Row(0, 1, {"text": "a"}), Row(4, 6, {"text": None, "x": 1})]
    assert faults(read_jsonl(path)) == [
        (1, 3, "broken JSON: Expecting ',' delimiter at position 13"),
        (2, 4, "a JSON array where a row is an object of columns"),
        (3, 5, "byte 0xff at position 11 of its line is not UTF-8; save it as that"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        ' \n[\n{"text": "a"}\n,\n{"text": "b"}\n]\n',
        '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}',
        '{"version": 1,\n"data": [{"text": "a"},\n{"text": "b"}]}',
        '{"text": "a"}\n{"text": "b"}\n',
        '\ufeff[{"text": "a"}, {"text": "b"}]',
    ],
)
def test_json_is_an_array_an_object_with_data_or_lines(tmp_path: Path, content: str) -> None:
    rows = list(read_json(written(tmp_path, content)).rows)
    assert [(row.number, row.values, row.fault) for row in rows] == [(0, {"text": "a"}, ""), (1, {"text": "b"}, "")]


def test_an_element_that_is_no_object_is_a_bad_row_of_its_array(tmp_path: Path) -> None:
    table = read_json(written(tmp_path, '[{"text": "a"},\n3,\n"b", 12]'))
    assert faults(table) == [
        (1, 2, "a JSON number where a row is an object of columns"),
        (2, 3, "a JSON string where a row is an object of columns"),
        (3, 3, "a JSON number where a row is an object of columns"),
    ]


@pytest.mark.parametrize(("read", "indent"), [(read_json, None), (read_json, 1), (read_jsonl, None)])
def test_columns_as_pandas_writes_them_are_no_rows(tmp_path: Path, read: Any, indent: int | None) -> None:
    columns = {"text": {"7": "a", "2": "b"}, "label": {"7": 1, "2": 0}}
    path = written(tmp_path, json.dumps(columns, indent=indent))
    told = "columns, as pandas writes them, where rows are needed: df.to_json(path, orient='records', lines=True)"
    assert list(read(path).rows) == [Row(0, 1, {}, told)]


@pytest.mark.parametrize(
    "row", [{}, {"a": {"text": ["b"]}}, {"a": {"1": 2}, "b": {"2": 1}}, {"a": {"1": 2}, "b": 1}, {"a": {}}], ids=str
)
def test_a_row_of_objects_is_a_row(tmp_path: Path, row: dict[str, Any]) -> None:
    assert list(read_json(written(tmp_path, json.dumps(row))).rows) == [Row(0, 1, row)]


def test_a_long_json_array_is_decoded_across_its_chunks(tmp_path: Path) -> None:
    texts = [f"{number} " + "é\n" * (number % 97) * 40 for number in range(2000)]
    path = written(tmp_path, json.dumps([{"text": text} for text in texts], indent=1, ensure_ascii=False))
    assert Path(path).stat().st_size > 5 << 20
    rows = list(read_json(path).rows)
    assert [row.values["text"] for row in rows] == texts
    assert [row.line for row in rows] == [2 + 3 * number for number in range(2000)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"text": "a"},\n{"text": "b" "c"}]', " row 2 (line 2): broken JSON: Expecting ',' delimiter; nothing"),
        ('[{"text": "a"},\n{"text": "b"}', " row 3 (line 2): the array ends too early; nothing"),
        ('[{"text": "a"}\n{"text": "b"}]', " row 2 (line 2): a comma is missing before this row; nothing"),
        ('[{"text": "a"}] 3', " row 2 (line 1): more follows the array; nothing"),
        (b'[{"text": "\xff"}]', " row 1 (line 1): byte 0xff after its begin is not UTF-8; save it as that"),
        ("3", " is no JSON of rows; an array of objects, "),
        ("", " is no JSON of rows; an array of objects, "),
    ],
)
def test_json_that_cannot_be_read_on_is_an_error_with_its_place(
    tmp_path: Path, content: str | bytes, sentence: str
) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DataError) as raised:
        list(read_json(path).rows)
    assert str(raised.value).startswith(path + sentence)
