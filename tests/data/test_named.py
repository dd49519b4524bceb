"""Files that rows name are part of what the rows are."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft import storage
from rayft.data.named import identity
from rayft.data.source import fragments
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
