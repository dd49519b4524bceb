"""Pictures and sounds in a folder per class: a row for each file, by its name and the name of its folder."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from rayft.data.classes import PICTURES, SOUNDS, parts
from rayft.data.pieces import fragments, identity
from rayft.data.source import read
from rayft.data.splits import passed_over
from rayft.entries import Entry
from rayft.errors import DataError
from rayft.recipe import Source
from rayft.tasks.images import opened
from rayft.tasks.sound import Wanted, read_sound

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


@pytest.mark.parametrize("ending", PICTURES)
def test_each_ending_of_a_picture_is_one_that_is_read(ending: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 0, 0)).save(file, Image.registered_extensions()[ending])
    assert opened("image", file.getvalue()).size == (16, 16)


@pytest.mark.parametrize("ending", SOUNDS)
def test_each_ending_of_a_sound_is_one_that_is_read(ending: str) -> None:
    kind = {".oga": "OGG", ".opus": "OGG", ".aif": "AIFF", ".aifc": "AIFF"}.get(ending, ending[1:].upper())
    within = {".opus": "OPUS", ".aifc": "FLOAT"}.get(ending)
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(16_000) / 5), 16_000, format=kind, subtype=within)
    assert len(read_sound(file.getvalue(), Wanted("audio", 16_000, 1.0, convert=False)).samples) == 16_000


def test_files_that_are_neither_pictures_nor_sounds_are_counted_and_notes_are_not(tmp_path: Path) -> None:
    """Or half a class would vanish without a word."""
    others = {"RBC/d.HEIC": b"", "RBC/e.heic": b"", "WBC/f.m4a": b"", "WBC/Thumbs.db": b"", "WBC/.g.heic": b""}
    folder = laid_out(tmp_path / "train", {**FILES, **others})
    pieces = fragments([Source(path=str(folder))])
    assert passed_over(pieces) == {".heic": 2, ".m4a": 1}
    assert passed_over(fragments([Source(path=f"{folder}/*/*.jpg")])) == {}


def test_pictures_outside_the_folders_that_metadata_describe_are_counted(tmp_path: Path) -> None:
    folder = laid_out(tmp_path, {**FILES, "RBC/metadata.csv": b"file_name,label\nb.jpg,red\n"})
    pieces = fragments([Source(path=str(folder))])
    assert rows_of(folder) == [(str(folder / "RBC/b.jpg"), "red")]
    assert passed_over(pieces) == {".png": 1}


def test_two_metadata_files_in_one_folder_are_refused(tmp_path: Path) -> None:
    listed = {"metadata.csv": b"file_name\nRBC/b.jpg\n", "metadata.jsonl": b'{"file_name": "RBC/b.jpg"}\n'}
    with pytest.raises(DataError, match=r"has a metadata.csv and a metadata.jsonl, whose rows would count twice"):
        fragments([Source(path=str(laid_out(tmp_path, {**FILES, **listed})))])


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
