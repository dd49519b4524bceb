"""Pictures and sounds without a table: a row for each file, whose label is the name of the folder that it lies in.

train/RBC/cell_2.jpg below /data is the row {"file_name": "/data/train/RBC/cell_2.jpg", "label": "RBC"}. A file beside
the classes' folders has no label.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from rayft import storage
from rayft.data import formats
from rayft.storage import Entry

FORMAT = "files"
COLUMNS = ("file_name", "label")
PICTURES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga",
)  # fmt: skip
SOUNDS = (
    ".wav", ".flac", ".ogg", ".oga", ".mp3", ".opus", ".aiff", ".aif", ".aifc", ".au", ".caf", ".w64", ".rf64",
)  # fmt: skip
_NOTES = ("", ".txt", ".md", ".rst", ".pdf", ".html", ".ini", ".db", ".log")  # what lies beside data and is none


def media(entries: Sequence[Entry]) -> list[Entry]:
    """Those of `entries` that are pictures or sounds, by their names' ends, in the same order."""
    return [entry for entry in entries if entry.path.lower().endswith((*PICTURES, *SOUNDS))]


def endings(entries: Sequence[Entry]) -> tuple[tuple[str, int], ...]:
    """(ending, files with it) of those of `entries` that are no notes, the most frequent first."""
    found = Counter(os.path.splitext(entry.path.lower())[1] for entry in entries)
    kept = [(ending, count) for ending, count in found.items() if ending not in _NOTES]
    return tuple(sorted(kept, key=lambda pair: (-pair[1], pair[0])))


def parts(entries: Sequence[Entry], most: int) -> Iterator[tuple[int, int]]:
    """The files in runs (first, end) of at most about `most` bytes."""
    first, size = 0, 0
    for place, entry in enumerate(entries, start=1):
        size += entry.size
        if size >= most or place == len(entries):
            yield first, place
            first, size = place, 0


def names(entries: Sequence[Entry]) -> list[str]:
    """Each file's name with its class's, RBC/cell_2.jpg: what a row is known by, wherever the data lie.

    Where all the other folders lie in one that holds files too, these are in no class: /cell_3.jpg.
    """
    split = [os.path.split(entry.path) for entry in entries]
    folders = {folder for folder, _ in split}
    top = min(folders, key=len, default="")
    beside = len(folders) > 1 and all(folder == top or folder.startswith(f"{top}/") for folder in folders)
    return [f"{'' if beside and folder == top else os.path.basename(folder)}/{file}" for folder, file in split]


def read(path: str, part: tuple[int, int], labelled: bool) -> formats.Table:
    """Files `part[0]` up to `part[1]` of those that `path`, a folder or a glob, stands for.

    Where they have to be `labelled` one in no class is a bad row.
    """

    def rows() -> Iterator[formats.Row]:
        files = media(storage.expand(path))
        for number, (entry, name) in islice(enumerate(zip(files, names(files), strict=True)), *part):
            label = name.partition("/")[0]
            fault = f"{entry.path} lies in no class's folder" if labelled and not label else ""
            yield formats.Row(number, 0, dict(zip(COLUMNS, (entry.path, label or None), strict=True)), fault)

    return formats.Table(COLUMNS, rows())
