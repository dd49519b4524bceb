"""The content of a picture or sound, from all that a cell may hold; what is wrong with it else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayft.tasks.files import file_bytes


def test_content_of_a_path_bytes_and_of_what_data_sets_hold(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"content")
    cells: list[Any] = [str(file), f"file://{file}", b"content", {"bytes": b"content", "path": None}]
    cells.append({"bytes": None, "path": str(file)})
    assert {file_bytes("image", cell) for cell in cells} == {b"content"}


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        (None, "`image` is None; it needs a file's path or URL, or its bytes"),
        ("", "`image` is ''"),
        ({"bytes": None, "path": None}, "`image` is None"),
        (
            {"array": [0.0] * 9, "sampling_rate": 16_000},
            "`image` holds `array`, `sampling_rate`; it needs a file's path",
        ),
        ({"path": None, "array": [0.0]}, "`image` holds `path`, `array`; it needs a file's path or URL, or its bytes"),
        (b"", "`image`: it is empty"),
        ("pictures/a.jpg", "relative path 'pictures/a.jpg'"),
        ("no " * 100_000, f"relative path '{'no ' * 25} ..., of which"),
        ("/texts/" + "no " * 100, f"`image` is '/texts/{'no ' * 22}no ..., too long for a file's path"),
        ("/no" * 100_000, f"`image` is '{'/no' * 25} ..., too long for a file's path"),
        (["no"] * 100_000, f"`image` is [{chr(39)}no', 'no', "),
        ("/nowhere/a.jpg", "there is no file /nowhere/a.jpg"),
    ],
)
def test_what_is_wrong_is_told(cell: Any, told: str) -> None:
    with pytest.raises(ValueError, match="`image`") as caught:
        file_bytes("image", cell)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"a\.jpg is empty"):
        file_bytes("image", str(tmp_path / "a.jpg"))
