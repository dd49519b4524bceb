"""Pictures and sounds without a table: a row for each file, whose label is the name of the folder that it lies in.

train/RBC/cell_2.jpg below /data is the row {"file_name": "/data/train/RBC/cell_2.jpg", "label": "RBC"}.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from rayft import storage
from rayft.data import formats
from rayft.storage import Entry

FORMAT = "files"
COLUMNS = ("file_name", "label")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif")


def media(entries: Sequence[Entry]) -> list[Entry]:
    """Those of `entries` that are pictures or sounds, by their names' ends, in the same order."""
    return [entry for entry in entries if entry.path.lower().endswith((*PICTURES, *SOUNDS))]


def parts(entries: Sequence[Entry], most: int) -> Iterator[tuple[int, int]]:
    """The files in runs (first, end) of at most about `most` bytes."""
    first, size = 0, 0
    for place, entry in enumerate(entries, start=1):
        size += entry.size
        if size >= most or place == len(entries):
            yield first, place
            first, size = place, 0


def name(entry: Entry) -> str:
    """A file's name with its folder's: what a row is known by, wherever the data lie."""
    folder, file = os.path.split(entry.path)
    return f"{os.path.basename(folder)}/{file}"


def read(path: str, part: tuple[int, int]) -> formats.Table:
    """Files `part[0]` up to `part[1]` of those that `path`, a folder or a glob, stands for."""

    def rows() -> Iterator[formats.Row]:
        chosen = media(storage.expand(path))[slice(*part)]
        for number, entry in enumerate(chosen, start=part[0]):
            label = name(entry).partition("/")[0]
            yield formats.Row(number, 0, dict(zip(COLUMNS, (entry.path, label), strict=True)))

    return formats.Table(COLUMNS, rows())
