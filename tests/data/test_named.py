"""Files that rows name are part of what the rows are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayft import storage
from rayft.data.named import identity
from rayft.data.pieces import fragments
from rayft.errors import DataError
from rayft.recipe import Source


def known(table: Path, *columns: str) -> str:
    sources = [Source(path=str(table))]
    return identity(fragments(sources), sources, {"picture": "image"}, columns)


def test_a_picture_that_a_table_names_is_known_by_its_content(tmp_path: Path) -> None:
    pictures = [tmp_path / name for name in ("a.png", "b.png")]
    for picture in pictures:
        picture.write_bytes(picture.name.encode())
    table = tmp_path / "rows.csv"
    table.write_text("picture,label\n" + "".join(f"{picture},x\n" for picture in (*pictures, "none.png", "/no/c.png")))
    base = known(table, "image")
    assert base == known(table, "image")
    assert known(table) == ""
    pictures[1].write_bytes(b"other")
    other = known(table, "image")
    pictures[1].unlink()
    assert len({base, other, known(table, "image")}) == 3


def test_files_beside_a_metadata_file_are_part_of_that_already(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "metadata.csv").write_text("file_name\na.png\n")
    assert known(tmp_path, "file_name") == ""


@pytest.mark.parametrize("count", [3, 12])
def test_objects_are_known_by_what_their_storage_says_of_them(tmp_path: Path, s3: str, count: int) -> None:
    urls = [storage.join(s3, "pictures", f"{number}.png") for number in range(count)]
    for url in urls:
        storage.write_text(url, url)
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(f'{{"image": {{"path": "{url}", "bytes": null}}}}\n' for url in urls))
    base = known(table, "image")
    assert base == known(table, "image")
    storage.write_text(urls[-1], "other")
    assert known(table, "image") != base


def embedded(path: Path, cells: list[dict[str, Any] | None]) -> Path:
    """A Parquet file as `datasets` writes one, whose pictures can't be read: their bytes are overwritten."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, kind), "n": range(len(cells))}), path, compression="none")
    held = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert held.path_in_schema == "image.bytes"
    start = held.dictionary_page_offset or held.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + held.total_compressed_size] = b"\xff" * held.total_compressed_size
    path.write_bytes(content)
    return path


def test_pictures_that_a_parquet_file_holds_are_not_read_to_find_that_none_is_named(tmp_path: Path) -> None:
    """Or each start would read and decode all of the source."""
    picture = tmp_path / "a.png"
    picture.write_bytes(b"a")
    whole = embedded(tmp_path / "whole.parquet", [{"bytes": b"a", "path": str(picture)}, {"bytes": b"b", "path": None}])
    assert known(whole, "image") == ""
    some = [{"bytes": b"b", "path": "b.png"}, {"bytes": None, "path": str(picture)}, None]
    named = embedded(tmp_path / "some.parquet", some)
    before = known(named, "image")
    picture.write_bytes(b"other")
    assert "" != known(named, "image") != before
    with pytest.raises(DataError, match="column 'file_name' is missing"):
        known(whole, "file_name")


def test_a_parquet_file_may_hold_plain_bytes_or_paths(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"a")
    pq.write_table(pa.table({"picture": [b"a", None]}), tmp_path / "bytes.parquet")
    pq.write_table(pa.table({"picture": [str(picture)]}), tmp_path / "paths.parquet")
    assert known(tmp_path / "bytes.parquet", "image") == ""
    assert known(tmp_path / "paths.parquet", "image") != ""
