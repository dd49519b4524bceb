"""Single files: every row with its number and line, and every fault in its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayft.data.formats import (
    Row,
    Table,
    parquet_groups,
    place_of,
    read_csv,
    read_parquet,
    read_text,
)
from rayft.errors import DataError


def written(folder: Path, content: str | bytes, name: str = "rows") -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def faults(table: Table) -> list[tuple[int, int, str]]:
    return [(row.number, row.line, row.fault) for row in table.rows if row.fault]


def test_csv_fields_are_strings_over_lines_with_quotes_and_empty_ones(tmp_path: Path) -> None:
    path = written(tmp_path, '\ufefftext,label\r\n"one, ""two""\nthree",1\r\n\r\n,\r\nlast,0')
    table = read_csv(path, ",")
    assert table.columns == ("text", "label")
    assert list(table.rows) == [
        Row(0, 2, {"text": 'one, "two"\nthree', "label": "1"}),
        Row(1, 5, {"text": "", "label": ""}),
        Row(2, 6, {"text": "last", "label": "0"}),
    ]


def test_csv_faults_have_row_and_line_and_end_nothing(tmp_path: Path) -> None:
    content = b'text,label\ngood,1\ntoo,many,fields\nfew\nb\xe9te,1\n"stray" quote,1\ngood,2\n"open,3\n'
    path = written(tmp_path, content)
    assert [row.values["text"] for row in read_csv(path, ",").rows if not row.fault] == ["good", "good"]
    assert faults(read_csv(path, ",")) == [
        (1, 3, "3 fields where the header has 2"),
        (2, 4, "1 field where the header has 2"),
        (3, 5, "byte 0xe9 at position 2 of its line is not UTF-8; save it as that"),
        (4, 6, "broken quotes: ',' expected after '\"'"),
        (6, 8, "broken quotes: unexpected end of data"),
    ]


def test_a_tsv_without_quoting_keeps_its_lines_apart(tmp_path: Path) -> None:
    """As those of GLUE, whose texts may begin with a quotation mark that another line closes."""
    texts = ['"Hello there', 'I am fine"', '"odd" tail', 'he said "x', '"', '"a" or "b"', '"last']
    content = b"text\tlabel\n" + "".join(f"{text}\t{number}\r\n" for number, text in enumerate(texts)).encode()
    rows = list(read_csv(written(tmp_path, content), "\t").rows)
    assert rows == [Row(place, place + 2, {"text": text, "label": str(place)}) for place, text in enumerate(texts)]
    turned = "label\ttext\n" + "".join(f"{number}\t{text}\n" for number, text in enumerate(texts))
    assert [row.values["text"] for row in read_csv(written(tmp_path, turned), "\t").rows] == texts
    pairs = read_csv(written(tmp_path, 'one\tother\tlabel\n"Hello\tthere"\t1\n'), "\t")
    assert [row.values for row in pairs.rows] == [{"one": '"Hello', "other": 'there"', "label": "1"}]


@pytest.mark.parametrize("columns", [["text", "label"], ["label", "text"], ["text"]])
def test_a_tsv_with_quoting_is_read_as_it_was_written(tmp_path: Path, columns: list[str]) -> None:
    """As spreadsheets and pandas write it: quotes around what holds a tab, a quote or a line's end."""
    texts = ["plain", "a\ttab", 'a "quote"', '"whole"', "two\nlines", "three\n\nlines", 'the "\nend', "last\n"]
    given = [dict.fromkeys(columns, str(place)) | {"text": text} for place, text in enumerate(texts)]
    with (tmp_path / "rows").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t")
        writer.writeheader()
        writer.writerows(given)
    rows = list(read_csv(str(tmp_path / "rows"), "\t").rows)
    assert [row.values for row in rows] == given
    assert [row.line for row in rows] == [2, 3, 4, 5, 6, 8, 11, 13]


def test_a_fault_behind_an_open_quote_is_told_of_its_own_line(tmp_path: Path) -> None:
    path = written(tmp_path, b'text\tlabel\n"open\t1\nb\xe9te\t2\ngood\t3\n')
    rows = list(read_csv(path, "\t").rows)
    assert [(row.number, row.line, bool(row.fault)) for row in rows] == [(0, 2, False), (1, 3, True), (2, 4, False)]
    path = written(tmp_path, b'label\ttext\n1\t"b\xe9te\ngoes on"\n2\tgood\n')
    rows = list(read_csv(path, "\t").rows)
    assert [(row.number, row.line, bool(row.fault)) for row in rows] == [(0, 2, True), (1, 4, False)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", " is empty; it needs a header and rows"),
        ("\n\n", " is empty; it needs a header and rows"),
        ("text,text\n1,2\n", ": the header names 'text' twice"),
        (
            b"t\xe9xt\n1\n",
            " line 1: the header can't be read: byte 0xe9 at position 2 of its line is not UTF-8; save it as that",
        ),
        ("text\n1\n".encode("utf-16"), " is UTF-16; rows are read as UTF-8, so save it as that"),
    ],
)
def test_a_table_without_a_usable_header_is_an_error(tmp_path: Path, content: str | bytes, sentence: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DataError) as raised:
        read_csv(path, ",")
    assert str(raised.value) == path + sentence


def test_text_has_a_row_a_line_without_blank_ones(tmp_path: Path) -> None:
    rows = list(read_text(written(tmp_path, " one\r\n\n  \ntwo\n\xff".encode("latin-1"))).rows)
    assert rows[:2] == [Row(0, 1, {"text": " one"}), Row(1, 4, {"text": "two"})]
    assert rows[2].fault == "byte 0xff at position 1 of its line is not UTF-8; save it as that"


def _zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("ending", "kind", "pack"),
    [
        (".gz", "gzip", gzip.compress),
        (".bz2", "bzip2", bz2.compress),
        (".zst", "zstd", _zstd),
    ],
)
def test_what_packs_a_file_is_known_by_its_ending_and_has_to_be_whole(
    tmp_path: Path, ending: str, kind: str, pack: Callable[[bytes], bytes]
) -> None:
    lines = "".join(f"a text of number {row}, to be packed\n" for row in range(3000)).encode()
    content = pack(b"text\n" + lines)
    rows = list(read_csv(written(tmp_path, content, f"a.csv{ending}"), "\t").rows)
    assert (len(rows), rows[0]) == (3000, Row(0, 2, {"text": "a text of number 0, to be packed"}))
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
    summed = [flipped] if kind != "zstd" else []  # Arrow writes zstd without a checksum
    for broken in (content[:-6], b"text\none\n", *summed):
        with pytest.raises(DataError, match=rf"broken.csv{ending} is not a whole {kind} file"):
            list(read_csv(written(tmp_path, broken, f"broken.csv{ending}"), "\t").rows)


def test_packed_files_one_behind_the_other_are_read_as_one(tmp_path: Path) -> None:
    for ending, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".zst", _zstd)):
        content = pack(b"text\none\n") + pack(b"two\n")
        rows = read_csv(written(tmp_path, content, f"a.csv{ending}"), ",").rows
        assert [row.values["text"] for row in rows] == ["one", "two"]


def test_parquet_gives_a_run_of_row_groups_and_the_wanted_columns(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    table = pa.table({"text": [f"row {i}" for i in range(100)], "nested": [{"a": [i]} for i in range(100)]})
    pq.write_table(table, path, row_group_size=30)
    assert [rows for rows, _ in parquet_groups(path)] == [30, 30, 30, 10]
    found = read_parquet(path, (1, 3), 30, {"nested", "other"}, 7)
    assert found.columns == ("text", "nested")
    assert list(found.rows) == [Row(i, 0, {"nested": {"a": [i]}}) for i in range(30, 90)]
    assert list(read_parquet(path, (3, 4), 90, set(), 7).rows) == [Row(i, 0, {}) for i in range(90, 100)]


def test_parquet_of_a_data_set_gives_class_labels_as_their_names(tmp_path: Path) -> None:
    label, path = {"names": ["ham", "spam"], "_type": "ClassLabel"}, str(tmp_path / "a.parquet")
    kinds = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": label,
        "tags": {"feature": label, "_type": "List"},
        "words": {"feature": label, "length": -1, "_type": "Sequence"},
        "old": [label],
    }
    rows = [
        {"text": "a", "label": 1, "tags": [0, 1], "words": [1], "old": [0], "own": 1},
        {"text": "b", "label": -1, "tags": [], "words": None, "old": [-1, 1], "own": 0},
        {"text": "c", "label": 2, "tags": [0], "words": [0], "old": [0], "own": 1},
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds}})}), path)
    assert list(read_parquet(path, (0, 1), 0, set(table.column_names), 7).rows) == [
        Row(0, 0, {"text": "a", "label": "spam", "tags": ["ham", "spam"], "words": ["spam"], "old": ["ham"], "own": 1}),
        Row(1, 0, {"text": "b", "label": None, "tags": [], "words": None, "old": [None, "spam"], "own": 0}),
        Row(2, 0, {}, "class label 2 has no name; the data set's features name 2"),
    ]
    assert list(read_parquet(path, (0, 1), 0, {"text"}, 7).rows)[1] == Row(1, 0, {"text": "b"})


def test_parquet_that_is_broken_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a whole Parquet file"):
        parquet_groups(written(tmp_path, "PAR1"))


def test_places_count_as_users_do() -> None:
    assert place_of("a.csv", 16, 18) == "a.csv row 17 (line 18)"
    assert place_of("a.parquet", 16, 0) == "a.parquet row 17"
