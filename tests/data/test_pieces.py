"""Pieces: what files a recipe means, in which runs they are read, and what identifies them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.data import classes
from rayft.data.pieces import Fragment, fragments, identity, row_id, work
from rayft.errors import DataError
from rayft.recipe import Source


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing", "no such file, folder or glob"),
        ("*.csv", "no such file, folder or glob"),
        ("more", r"none of its 2 files is a file of rows \(.csv, .tsv, .json, .jsonl, .parquet, .txt\)"),
        ("a.xlsx", "is no file of rows; .csv, .tsv"),
        ("a.parquet.gz", "is no file of rows; .csv, .tsv"),
        ("packed", r"packed/b.jsonl.xz is compressed as .xz, which is not read; .gz, .bz2, .zst fit"),
        ("saved", r"saved was written by `save_to_disk` of the datasets library; hf://.*/saved reads it"),
    ],
)
def test_what_was_looked_for_is_said_where_nothing_is(tmp_path: Path, name: str, sentence: str) -> None:
    for file in ("a.xlsx", "a.parquet.gz", "more/a.xlsx", "more/a.parquet.gz"):
        written(tmp_path / file, "")
    for file in ("packed/a.jsonl", "packed/b.jsonl.xz", "saved/state.json", "saved/data-00000-of-00001.arrow"):
        written(tmp_path / file, "{}")
    with pytest.raises(DataError, match=sentence):
        fragments([Source(path=str(tmp_path / name))])


def test_identity_is_the_content_the_order_the_filter_and_the_weight_and_never_a_path(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        for name in ("a", "b"):
            written(tmp_path / folder / f"{name}.csv", f"text\n{name}\n")

    def known(*sources: Source) -> str:
        return identity(fragments(sources), sources)

    base = known(Source(path=f"{tmp_path}/x"))
    assert known(Source(path=f"{tmp_path}/y")) == base
    assert known(Source(path=f"{tmp_path}/y/*.csv")) == base
    others = {
        known(Source(path=f"{tmp_path}/x", weight=2.0)),
        known(Source(path=f"{tmp_path}/x", where={"text": "a"})),
        known(Source(path=f"{tmp_path}/x/a.csv")),
        known(Source(path=f"{tmp_path}/x/b.csv"), Source(path=f"{tmp_path}/x/a.csv")),
        known(Source(path=f"{tmp_path}/x/a.csv"), Source(path=f"{tmp_path}/x/b.csv")),
    }
    written(tmp_path / "x/b.csv", "text\nB\n")
    assert len({*others, base, known(Source(path=f"{tmp_path}/x"))}) == 7


def test_the_same_bytes_read_in_another_way_are_other_rows(tmp_path: Path) -> None:
    sources = [[Source(path=str(written(tmp_path / name, "text\none\n")))] for name in ("a.csv", "a.txt", "b.csv")]
    table, text, moved = (identity(fragments(each), each) for each in sources)
    assert table == moved != text


def test_row_ids_are_in_the_order_of_file_and_row() -> None:
    ids = [row_id(0, 0), row_id(0, 2**40 - 1), row_id(1, 0), row_id(2**22, 5)]
    assert ids == sorted(ids)
    assert ids[-1] < 2**63


def test_small_files_of_an_object_store_count_more_than_their_bytes(tmp_path: Path) -> None:
    def piece(path: str, kind: str = "csv") -> Fragment:
        return Fragment(path, kind, 0, 0, "", 1000)

    listed, table = "s3://bucket/pictures/metadata.csv", "s3://bucket/rows.csv"
    assert work([piece(listed), piece("s3://bucket/pictures", classes.FORMAT)]) == 8000
    assert work([piece(table), piece(str(tmp_path / "metadata.csv")), piece(str(tmp_path), classes.FORMAT)]) == 3000
