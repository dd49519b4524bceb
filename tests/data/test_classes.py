"""Pictures and sounds in a folder per class: a row for each file, by its name and the name of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.data.classes import parts
from rayft.data.source import fragments, identity, read
from rayft.entries import Entry
from rayft.errors import DataError
from rayft.recipe import Source

FILES = {"RBC/b.jpg": b"b", "RBC/a.JPG": b"a", "WBC/c.png": b"cc", "notes.txt": b"a note", "WBC/.hidden.png": b"d"}


def laid_out(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def rows_of(path: Path | str) -> list[tuple[str, str]]:
    source = Source(path=str(path))
    found = []
    for piece in fragments([source]):
        for batch in read(piece, source, {}, ("file_name", "label")):
            found.extend(zip(batch.columns["file_name"], batch.columns["label"], strict=True))
    return found


def test_a_row_for_each_file_with_the_name_of_its_folder(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "train")
    expected = [("RBC/a.JPG", "RBC"), ("RBC/b.jpg", "RBC"), ("WBC/c.png", "WBC")]
    assert rows_of(folder) == [(str(folder / name), label) for name, label in expected]
    assert rows_of(f"{folder}/*/*.jpg") == [(str(folder / "RBC/b.jpg"), "RBC")]


def test_a_file_beside_the_folders_of_the_classes_is_a_bad_row_where_labels_are_asked_for(tmp_path: Path) -> None:
    """Or the data's own folder would become a class."""
    folder = laid_out(tmp_path / "train", {**FILES, "stray.png": b"s"})
    source = Source(path=str(folder))
    (piece,) = fragments([source])
    (rows,) = read(piece, source, {}, ("file_name", "label"))
    assert rows.columns["label"] == ["RBC", "RBC", "WBC"]
    assert [str(row) for row in rows.bad] == [f"{folder} row 4: {folder}/stray.png lies in no class's folder"]
    (rows,) = read(piece, source, {}, ("file_name",))  # as predictions need no label
    assert (len(rows.columns["file_name"]), rows.bad) == (4, [])


def test_files_of_one_folder_are_of_its_class(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "train")
    assert [label for _, label in rows_of(folder / "RBC")] == ["RBC", "RBC"]


def test_a_table_beside_them_is_read_instead(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "train")
    (folder / "metadata.csv").write_text("file_name,label\nRBC/b.jpg,red\n")
    assert rows_of(folder) == [(str(folder / "RBC/b.jpg"), "red")]


def test_identity_follows_content_and_class_and_not_the_place(tmp_path: Path) -> None:
    def known(folder: Path) -> str:
        source = Source(path=str(folder))
        return identity(fragments([source]), [source])

    first = known(laid_out(tmp_path / "one"))
    assert known(laid_out(tmp_path / "two")) == first
    assert known(laid_out(tmp_path / "three", {**FILES, "RBC/b.jpg": b"B"})) != first
    moved = {("WBC/b.jpg" if name == "RBC/b.jpg" else name): content for name, content in FILES.items()}
    assert known(laid_out(tmp_path / "four", moved)) != first


def test_files_in_runs_of_about_a_size() -> None:
    entries = [Entry(str(place), size, 0.0) for place, size in enumerate([3, 3, 9, 1, 1])]
    assert list(parts(entries, 6)) == [(0, 2), (2, 3), (3, 5)]
    assert list(parts(entries[:1], 6)) == [(0, 1)]


def test_a_folder_of_neither_says_what_fits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a picture or a sound"):
        fragments([Source(path=str(laid_out(tmp_path, {"a/b.bin": b"x", "a/c.bin": b"y"})))])
