"""Sources: what files a recipe means, what identifies them, and every row or its fault with its place."""

from __future__ import annotations

import gzip
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayft import storage
from rayft.data import pieces as pieces_module
from rayft.data import source
from rayft.data.pieces import fragments, identity
from rayft.data.source import Rows, absent, distinct, peek, read, unmatched
from rayft.errors import DataError
from rayft.recipe import Source


def everything(path: str | Path, columns: tuple[str, ...] = ("text",), **options: Any) -> Rows:
    """All rows of a source in one batch."""
    one = Source(path=str(path), where=options.pop("where", {}))
    names = options.pop("names", {})
    total = Rows({})
    for piece in fragments([one]):
        for rows in read(piece, one, names, columns, **options):
            for name, values in rows.columns.items():
                total.columns.setdefault(name, []).extend(values)
            total.numbers += rows.numbers
            total.lines += rows.lines
            total.bad += rows.bad
    return total


def faults(path: str | Path, columns: tuple[str, ...] = ("text",), **options: Any) -> list[str]:
    return [str(row).removeprefix(f"{path} ") for row in everything(path, columns, **options).bad]


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_table_without_a_needed_column_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "Text,label\n1,2\n")
    with pytest.raises(DataError) as raised:
        everything(path)
    assert str(raised.value) == f"{path}: column 'text' is missing; there are Text, label; did you mean 'Text'?"


def test_faults_of_rows_name_row_and_line_and_end_nothing(tmp_path: Path) -> None:
    content = b'{"text": "a"}\n\n{"text": "b"\n[1]\n{"txet": "c"}\n{"text": "\xff"}\n{"text": null, "x": 1}'
    path = written(tmp_path / "a.jsonl", content)
    rows = everything(path)
    assert rows.columns == {"text": ["a", None]}
    assert (rows.numbers, rows.lines) == ([0, 5], [1, 7])
    assert faults(path) == [
        "row 2 (line 3): broken JSON: Expecting ',' delimiter at position 13",
        "row 3 (line 4): a JSON array where a row is an object of columns",
        "row 4 (line 5): column 'text' is missing; there is txet; did you mean 'txet'?",
        "row 5 (line 6): byte 0xff at position 11 of its line is not UTF-8; save it as that",
    ]


def test_a_row_with_half_a_character_is_bad_wherever_in_its_cells_that_is(tmp_path: Path) -> None:
    """Tokenizers raise a TypeError about it, which names neither file nor row."""
    cells = [r'"\ud83d\ude00 é"', r'"cut \ud83d"', r'[{"role": "user", "content": "\ude00"}]', r'["a", "\udfff"]', "1"]
    lines = [f'{{"text": {cell}, "unused": "\\ud83d"}}' for cell in cells]
    for path in (
        written(tmp_path / "a.jsonl", "\n".join(lines)),
        written(tmp_path / "a.json", f"[{', '.join(lines)}]"),
        written(tmp_path / "b.json", f'{{"data": [{", ".join(lines)}]}}'),
    ):
        rows = everything(path)
        assert rows.columns == {"text": ["😀 é", 1]}
        assert [row.row for row in rows.bad] == [1, 2, 3]
        assert all("\ud83d" not in str(row) for row in rows.bad)
    assert faults(tmp_path / "a.jsonl") == [
        rf"row {number} (line {number}): `text` holds {half}, which is half a character; text needs whole ones"
        for number, half in ((2, r"\ud83d"), (3, r"\ude00"), (4, r"\udfff"))
    ]


def test_a_large_parquet_file_is_cut_into_runs_of_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"row {i}" for i in range(1000)], "nested": [{"a": [i]} for i in range(1000)]})
    pq.write_table(table, path, row_group_size=64)
    monkeypatch.setattr(pieces_module, "PART_BYTES", 3 * pq.ParquetFile(path).metadata.row_group(0).total_byte_size)
    pieces = fragments([Source(path=str(path))])
    assert len(pieces) > 3
    assert [(piece.file, piece.rows) for piece in pieces[:2]] == [(0, 192), (0, 192)]
    assert sum(piece.rows or 0 for piece in pieces) == 1000
    rows = everything(path, ("nested", "text"), batch_size=100)
    assert rows.numbers == list(range(1000))
    assert rows.columns == {name: table[name].to_pylist() for name in ("text", "nested")}
    assert everything(path, ()).numbers == list(range(1000))


def test_where_lets_through_equal_values_and_members_on_their_own_columns(tmp_path: Path) -> None:
    table = written(tmp_path / "a.csv", "body,digit,ok\na,0,true\nb,1,False\nc,00,TRUE\nd,2,\n")
    content = '{"body": "a", "digit": 0, "ok": true}\n{"body": "b", "digit": 1}\n{"digit": true}\n'
    lines = written(tmp_path / "a.jsonl", content)

    def bodies(path: Path, **where: Any) -> list[str]:
        return everything(path, ("text",), names={"body": "text"}, where=where).columns.get("text", [])

    assert bodies(table, digit=0) == ["a"]
    assert bodies(table, digit=["1", 2]) == ["b", "d"]
    assert bodies(table, ok=True) == ["a", "c"]
    assert bodies(table, ok=None) == ["d"]
    assert bodies(table, ok=True, digit="00") == ["c"]
    assert bodies(lines, digit=[0, 1]) == ["a", "b"]
    assert bodies(lines, ok=True) == ["a"]
    assert bodies(lines, other=1) == []
    dated = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "day": [date(2026, 1, 2), date(2026, 1, 3)]}), dated)
    assert bodies(dated, day="2026-01-03") == ["b"]
    with pytest.raises(DataError, match=r"`where` asks for it, but column 'digits' is missing.*did you mean 'digit'"):
        bodies(table, digits=1)


def test_columns_are_renamed_and_files_that_need_no_renaming_mix_in(tmp_path: Path) -> None:
    written(tmp_path / "a.csv", "review,text\nfirst,other\n")
    written(tmp_path / "b.csv", "text,spare\nsecond,x\n")
    rows = everything(tmp_path, ("text",), names={"review": "text"})
    assert rows.columns == {"text": ["first", "second"]}


def test_a_metadata_file_stands_for_its_folder(tmp_path: Path) -> None:
    written(tmp_path / "faces/metadata.csv", "file_name,who\none/a.jpg,1\ns3://b/c.jpg,2\n")
    for image in ("faces/one/a.jpg", "faces/one/a.txt"):
        written(tmp_path / image, image)
    written(tmp_path / "more/metadata.jsonl", '{"file_name": "b.jpg", "who": "3"}\n')
    rows = everything(tmp_path, ("image", "who"), names={"file_name": "image"})
    assert rows.columns["image"] == [f"{tmp_path}/faces/one/a.jpg", "s3://b/c.jpg", f"{tmp_path}/more/b.jpg"]
    assert everything(tmp_path / "faces" / "metadata.csv", ("file_name",)).columns["file_name"][0].endswith("one/a.jpg")
    before = identity(fragments(named := [Source(path=str(tmp_path))]), named)
    written(tmp_path / "faces/one/a.jpg", "another picture")
    assert identity(fragments(named), named) != before


def test_folders_and_globs_are_listed_in_order_without_notes_and_hidden_files(tmp_path: Path) -> None:
    for name in ("b.csv", "a/z.csv", ".c.csv", ".git/d.csv"):
        written(tmp_path / name, f"text\n{name}\n")
    written(tmp_path / "LICENSE.txt", "words")
    written(tmp_path / "README.md", "words")
    assert everything(tmp_path).columns["text"] == ["a/z.csv", "b.csv"]
    assert everything(tmp_path / "*" / "*.csv").columns["text"] == ["a/z.csv"]
    two = fragments([Source(path=str(tmp_path / "b.csv")), Source(path=str(tmp_path))])
    assert [(piece.file, piece.source) for piece in two] == [(0, 0), (1, 1), (2, 1)]


def test_a_packed_file_beside_its_unpacked_one_is_passed_over(tmp_path: Path) -> None:
    """As Kaggle's downloads leave them."""
    written(tmp_path / "train.csv", "text\none\n")
    written(tmp_path / "train.csv.zip", "PK")
    assert everything(tmp_path).columns["text"] == ["one"]


def test_what_a_column_holds_is_told_where_nothing_in_it_is_asked_for(tmp_path: Path) -> None:
    """Class labels count as their names, so that a number matches none."""
    features = {"label": {"names": ["ham", "spam"], "_type": "ClassLabel"}}
    table = pa.table({"text": ["a", "b"], "label": [0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")

    def told(**where: Any) -> str:
        sources = [Source(path=str(tmp_path / "a.parquet"), where=where)]
        return unmatched(fragments(sources), sources)

    assert told(label=1, text="a") == "; `where` asks for 1 in `label`, which holds 'ham', 'spam'"
    assert told(label="spam") == ""


def test_values_asked_for_that_no_row_has_are_told_with_what_is_there(tmp_path: Path) -> None:
    """A misspelt one of several would leave its rows out without a word."""
    accents = ["DEU/German", "GRC/Greek"] * 5
    for name in ("a", "b"):
        rows = [f"{row},{accent},{row % 2}" for row, accent in enumerate(accents)]
        written(tmp_path / f"{name}.csv", "\n".join(["text,accent,half", *rows]))

    def told(*wheres: dict[str, Any]) -> list[str]:
        sources = [Source(path=str(tmp_path), where=where) for where in wheres]
        pieces = fragments(sources)
        met = {
            (piece.source, place)
            for piece in pieces
            for rows in read(piece, sources[piece.source], {}, ("text",), batch_size=2)
            for place in rows.met
        }
        return absent(pieces, sources, met)

    assert told({"accent": ["DEU/German", "GRC/Greek"]}, {}) == []
    assert told({"accent": ["GRC/Greek"], "half": 0}) == []  # there are both, though never in one row
    assert told({"accent": ["DEU/German", "GRC/greek"], "half": [0, 1]}) == [
        "`where` asks for 'GRC/greek' (did you mean 'GRC/Greek'?) in `accent`, which no row has"
    ]
    assert told({}, {"accent": ["DEU/German", "x"], "half": [1, 7]}) == [
        "`where` of source 2 asks for 'x' in `accent`, which no row has; there are 'DEU/German', 'GRC/Greek'",
        "`where` of source 2 asks for 7 in `half`, which no row has; there are '0', '1'",
    ]


def test_batches_hold_as_many_rows_as_asked_for_good_and_bad(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", "".join('{"text": "a"}\n' if i % 5 else "{\n" for i in range(103)))
    one = Source(path=str(path))
    batches = read(fragments([one])[0], one, {}, ("text",), batch_size=10)
    assert [(len(rows.numbers), len(rows.bad)) for rows in batches] == [(8, 2)] * 10 + [(2, 1)]


def test_a_look_at_the_first_rows_leaves_out_bad_ones(tmp_path: Path) -> None:
    lines = ["text,n", "a,1", "b", "c,3", "d,4"]
    (piece,) = fragments([Source(path=str(written(tmp_path / "a.csv", "\n".join(lines))))])
    assert peek(piece, 3) == (["text", "n"], {"text": ["a", "c"], "n": ["1", "3"]})
    (piece,) = fragments([Source(path=str(written(tmp_path / "b.jsonl", '{"a": 1}\n{"b": 2}\n')))])
    assert peek(piece) == (["a", "b"], {"a": [1, None], "b": [None, 2]})


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "a.jsonl",
            '["a", 1]\n["b", 2]\n',
            r"a.jsonl row 1 (line 1): a JSON array where a row is an object of columns",
        ),
        ("a.csv", "text,n\na\nb\n", "a.csv row 1 (line 2): 1 field where the header has 2"),
        ("a.csv", "text;n\na\nb\n", "a.csv row 1 (line 2): 1 field where the header has 2"),
    ],
)
def test_a_look_at_rows_that_are_all_bad_says_why(tmp_path: Path, name: str, content: str, told: str) -> None:
    (piece,) = fragments([Source(path=str(written(tmp_path / name, content)))])
    with pytest.raises(DataError, match=re.escape(told)):
        peek(piece)


@pytest.mark.parametrize(("sign", "name"), [(";", "semicolons"), ("|", "bars"), ("\t", "tabs")])
def test_what_divides_a_csv_is_said_by_its_header(tmp_path: Path, sign: str, name: str) -> None:
    content = f'\n"text, as it came"{sign}label\nhello, you{sign}ham\n"one{sign} two"{sign}spam\n'
    one = Source(path=str(written(tmp_path / "a.csv", content)))
    (rows,) = read(fragments([one])[0], one, {"text, as it came": "text"}, ("text", "label"))
    assert rows.columns == {"text": ["hello, you", f"one{sign} two"], "label": ["ham", "spam"]}
    comma = Source(path=str(written(tmp_path / "comma.csv", f"id,text{sign}label,more\n1,hello{sign}ham,2\n")))
    with pytest.raises(DataError, match=f"comma.csv: {name} divide its fields, and its header has commas"):
        list(read(fragments([comma])[0], comma, {}, ("label",)))
    with pytest.raises(DataError, match="column 'body' is missing; there are id, "):
        list(read(fragments([comma])[0], comma, {}, ("body",)))


def test_values_of_a_column_are_found_behind_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"{row},{'train' if row < 150 else 'test'}" for row in range(200)]
    written(tmp_path / "a.csv", "\n".join(["text,split", *rows]) + "\nbroken\n")
    written(tmp_path / "b.csv", "text,split\n1,dev\n")
    pieces = fragments([Source(path=str(tmp_path))])
    assert distinct(pieces, "split") == ["train", "test", "dev"]
    monkeypatch.setattr(source, "PART_BYTES", 100)
    assert distinct(pieces, "split") == ["train", "dev"]


def test_object_storage_gives_the_same_rows_and_an_identity_of_its_own(s3: str, tmp_path: Path) -> None:
    where = storage.join(s3, "source")
    files = {"a.csv": b"text,n\none,1\ntwo\n", "b.jsonl.gz": gzip.compress(b'{"text": "three"}\n')}
    pq.write_table(pa.table({"text": ["four"]}), tmp_path / "c.parquet")
    for name, content in {**files, "c.parquet": (tmp_path / "c.parquet").read_bytes()}.items():
        storage.write_bytes(storage.join(where, name), content)
    rows = everything(where)
    assert rows.columns == {"text": ["one", "three", "four"]}
    assert [str(row) for row in rows.bad] == [f"{where}/a.csv row 2 (line 3): 1 field where the header has 2"]
    named = [Source(path=where)]
    before = identity(fragments(named), named)
    assert identity(fragments(named), named) == before
    storage.write_bytes(storage.join(where, "a.csv"), b"text,n\none,2\ntwo\n")
    assert identity(fragments(named), named) != before
