"""Which files a recipe's sources mean, and the pieces in which these are read; what identifies them.

A row is known by its file's place in the sorted listing of the split and its number there, never by a path, so that
data which moves to another folder or bucket keeps its ids, its order and its prepared shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from rayft import storage
from rayft.data import classes, formats, hub
from rayft.errors import DataError
from rayft.recipe import Source
from rayft.storage import Entry

TABLES = ("csv", "tsv", "json", "jsonl", "parquet")
FORMATS = (*TABLES, "txt")
METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"  # the column of a metadata file that names a file beside it
PART_BYTES = 64 << 20  # uncompressed; a Parquet file is read in runs of row groups of about this size
_RATIO = 4  # text packs to about a quarter; only sizes of work and shards hang on it
_FETCHED = 4  # a small file takes as long to ask for as to read and decode, or longer
_THREADS = 16
_UNREAD = (".xz", ".lz4", ".zip", ".7z", ".br", ".lzma", ".snappy")


@dataclass(frozen=True)
class Fragment:
    """A piece of a source that is read in one go.

    file       the file's place in the sorted listing of the whole split, over all its sources
    source     index of its Source
    identity   of the file's content (and of the files that a metadata file names)
    size       bytes to work through: uncompressed, with the files that a metadata file names
    first_row  the number of its first row in the file
    rows       how many rows it holds, where that is known without reading it
    part       Parquet: row groups [start, stop); Hub data: (shard, shards); files in folders: [start, stop) of them;
               None: the whole file
    passed_over  in the first fragment of a source: (ending, how many) of the files there that give no rows
    """

    path: str
    format: str
    file: int
    source: int
    identity: str
    size: int
    first_row: int = 0
    rows: int | None = None
    part: tuple[int, int] | None = None
    passed_over: tuple[tuple[str, int], ...] = ()


def work(pieces: Iterable[Fragment]) -> int:
    """About the bytes to work through: pictures and sounds of an object store, fetched one by one, count more."""
    return sum(piece.size * (_FETCHED if _fetched_one_by_one(piece) else 1) for piece in pieces)


def _fetched_one_by_one(piece: Fragment) -> bool:
    return not storage.is_local(piece.path) and (piece.format == classes.FORMAT or folder_of(piece.path) is not None)


def row_id(file: Any, number: Any) -> Any:
    """The id of row `number` of file `file`: ints, or integer arrays, below 2**63."""
    return file << 40 | number


def fragments(sources: Sequence[Source], split: str = "train") -> tuple[Fragment, ...]:
    """All pieces of a split in their order; DataError says what was looked for where nothing is found.

    `split` is the split that Hub data is asked for where its path names none.
    """
    found: list[Fragment] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for index, source in enumerate(sources):
            pieces = _hub(source.path, split) if source.path.startswith("hf://") else _files(source.path, pool.map)
            first = found[-1].file + 1 if found else 0
            found.extend(replace(piece, file=first + piece.file, source=index) for piece in pieces)
    return tuple(found)


def identity(fragments: Sequence[Fragment], sources: Sequence[Source]) -> str:
    """A hash of what the rows of a split are: contents, order, filters and weights; independent of any path."""
    parts: list[Any] = [[piece.format, piece.identity, piece.size, piece.source, piece.part] for piece in fragments]
    parts += [[sorted(source.where.items()), source.weight] for source in sources]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def folder_of(path: str) -> str | None:
    """The folder that a metadata file describes; None for other files."""
    folder, _, name = path.rpartition("/")
    return folder if name in METADATA else None


def _hub(path: str, split: str) -> list[Fragment]:
    data, content, shards = hub.look_up(path, split)
    return [
        Fragment(str(data), "hf", shard, 0, f"{content}-{shard}", PART_BYTES, part=(shard, shards))
        for shard in range(shards)
    ]


def _files(path: str, mapped: Callable[..., Iterable[Any]]) -> list[Fragment]:
    entries = storage.expand(storage.absolute(path))
    _refuse_others(path, entries)
    chosen = _chosen(entries)
    named = classes.media(entries)
    if not chosen and named:
        given = {entry.path for entry in named}
        others = [entry for entry in entries if entry.path not in given]
        return _passing(_classes(storage.absolute(path), named), others)
    if not chosen:
        endings, packed = ", ".join(f".{ending}" for ending in FORMATS), " or ".join(formats.COMPRESSED)
        if not entries:
            raise DataError(f"{path}: no such file, folder or glob")
        if len(entries) == 1:
            raise DataError(f"{path} is no file of rows; {endings} fit, {packed} after any but .parquet too")
        raise DataError(
            f"{path}: none of its {len(entries)} files is a file of rows ({endings}), a list of them "
            f"({' or '.join(METADATA)}), a picture or a sound"
        )
    pieces = mapped(_pieces, range(len(chosen)), chosen)
    described = _described(chosen)
    beside = [entry for entry in named if described and not entry.path.startswith(described)]
    return _passing([piece for some in pieces for piece in some], beside)


def _passing(pieces: list[Fragment], others: list[Entry]) -> list[Fragment]:
    """The fragments of a source, of which the first tells what other files there were."""
    return [replace(piece, passed_over=classes.endings(others)) for piece in pieces[:1]] + pieces[1:]


def _refuse_others(path: str, entries: list[Entry]) -> None:
    """DataError where rows lie in files that would be passed over, or taken for something else."""
    names = {os.path.basename(entry.path) for entry in entries}
    if names & {"dataset_dict.json", "state.json"} and any(entry.path.endswith(".arrow") for entry in entries):
        raise DataError(f"{path} was written by `save_to_disk` of the datasets library; hf://{path} reads it")
    listed = Counter(_described(entries))
    if twice := next((folder for folder, count in listed.items() if count > 1), None):
        raise DataError(
            f"{twice[:-1]} has a {' and a '.join(METADATA)}, whose rows would count twice; keep one of them"
        )
    there = {entry.path.lower() for entry in entries}
    for entry in entries:
        stem, ending = os.path.splitext(entry.path.lower())
        if ending in _UNREAD and _format(stem) in TABLES and stem not in there:  # else the same rows lie beside it
            fits = ", ".join(formats.COMPRESSED)
            raise DataError(f"{entry.path} is compressed as {ending}, which is not read; {fits} fit")


def _chosen(entries: list[Entry]) -> list[Entry]:
    """The files of rows among `entries`.

    What lies in the folder of a metadata file is what it describes; a text beside tables, pictures or sounds is a note
    about them.
    """
    described = _described(entries)
    if described:
        others = [entry for entry in entries if not entry.path.startswith(described) and _format(entry.path) in TABLES]
        return sorted(
            [*(entry for entry in entries if folder_of(entry.path) is not None), *others], key=lambda entry: entry.path
        )
    tables = [entry for entry in entries if _format(entry.path) in TABLES]
    if not tables and classes.media(entries):
        return []
    return tables or [entry for entry in entries if _format(entry.path)]


def _described(entries: list[Entry]) -> tuple[str, ...]:
    """The folders that metadata files among `entries` describe, with a slash at their end."""
    return tuple(f"{folder}/" for entry in entries if (folder := folder_of(entry.path)) is not None)


def _format(path: str) -> str | None:
    stem, ending = os.path.splitext(path.lower())
    if ending in formats.COMPRESSED:
        ending = os.path.splitext(stem)[1]
        return ending[1:] if ending[1:] in FORMATS and ending != ".parquet" else None
    ending = {".ndjson": ".jsonl", ".pq": ".parquet"}.get(ending, ending)
    return ending[1:] if ending[1:] in FORMATS else None


def _pieces(file: int, entry: Entry) -> list[Fragment]:
    """The fragments of one file."""
    kind = _format(entry.path) or ""
    size = entry.size * (_RATIO if entry.path.lower().endswith((*formats.COMPRESSED,)) else 1)
    content = storage.content_hash(entry)
    folder = folder_of(entry.path)
    if folder is not None:
        beside = [one for one in storage.expand(folder) if one.path != entry.path]
        hashes = [(one.path.removeprefix(folder), storage.content_hash(one)) for one in beside]
        content = hashlib.sha256(json.dumps([content, hashes]).encode()).hexdigest()
        size += sum(one.size for one in beside)
    whole = Fragment(entry.path, kind, file, 0, content, size)
    return _parts(whole) if kind == "parquet" else [whole]


def _classes(path: str, files: list[Entry]) -> list[Fragment]:
    """Pictures or sounds in a folder per class, as runs of them."""
    found, names = [], classes.names(files)
    for start, stop in classes.parts(files, PART_BYTES):
        some = files[start:stop]
        contents = [storage.content_hash(entry) for entry in some]
        hashes = list(zip(names[start:stop], contents, strict=True))
        content = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
        size = sum(entry.size for entry in some)
        found.append(Fragment(path, classes.FORMAT, 0, 0, content, size, start, stop - start, (start, stop)))
    return found


def _parts(whole: Fragment) -> list[Fragment]:
    """A Parquet file as runs of row groups, so that a large one is read by many."""
    found: list[Fragment] = []
    start = rows = size = first = 0
    groups = formats.parquet_groups(whole.path)
    for index, (count, weight) in enumerate(groups):
        rows, size = rows + count, size + weight
        if size >= PART_BYTES or index == len(groups) - 1:
            found.append(replace(whole, size=size, first_row=first, rows=rows, part=(start, index + 1)))
            start, first, rows, size = index + 1, first + rows, 0, 0
    return found or [replace(whole, rows=0, part=(0, 0))]
