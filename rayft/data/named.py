"""The pictures and sounds that rows name, which are read from where they lie: what identifies them, which lie here."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rayft import storage
from rayft.data.formats import holds_contents
from rayft.data.pieces import FILE_NAME, METADATA, TABLES, Fragment, fragments
from rayft.data.source import candidates, peek, read
from rayft.recipe import Source

_THREADS = 16
_ASKED = 8  # objects in one folder from which on listing it costs less than asking for each


def identity(
    pieces: Sequence[Fragment], sources: Sequence[Source], names: dict[str, str], columns: Sequence[str]
) -> str:
    """A hash of the contents of all files that the `columns` name; "" where none do.

    The files beside a metadata file are part of what identifies that, and so are those in folders by class. Of
    addresses on the web only the name counts: whether they have changed is a question to each. The contents that a
    Parquet file holds itself are not read, so that in one that has only some of them every path counts.
    """
    if not columns:
        return ""
    tables = [piece for piece in pieces if piece.format in TABLES and os.path.basename(piece.path) not in METADATA]
    paths: set[str] = set()
    with ThreadPoolExecutor(_THREADS) as pool:
        packed = list(dict.fromkeys(piece.path for piece in tables if piece.format == "parquet"))
        wanted = list(candidates(names, columns).values())
        held = dict(zip(packed, pool.map(lambda path: holds_contents(path, wanted), packed), strict=True))
        for piece in tables:
            if not held.get(piece.path):
                for rows in read(piece, sources[piece.source], names, columns, contents=False):
                    paths.update(path for column in columns for path in _paths(rows.columns[column]))
        if not paths:
            return ""
        found = sorted(pair for pairs in pool.map(_contents, _by_folder(paths)) for pair in pairs)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def left_behind(path: str, names: dict[str, str], columns: Sequence[str], copied: set[str]) -> str | None:
    """A file of this machine that the first rows at `path` name, and that isn't read from where `copied` files go.

    None where they name none. `names` and `columns` are as in `read`.
    """
    piece = fragments([Source(path=path)])[0]
    if not columns or piece.format not in TABLES:
        return None
    _, cells = peek(piece)
    asked = [name for those in candidates(names, columns).values() for name in those]
    named = [cell for name in asked for cell in cells.get(name, ())]
    here = [storage.absolute(one) for one in _paths(named) if storage.is_local(one)]
    folder, name = os.path.split(piece.path)
    if name in METADATA and FILE_NAME in asked and storage.is_local(piece.path):
        beside = [storage.join(folder, cell) for cell in cells.get(FILE_NAME, ()) if _is_relative(cell)]
        here += [one for one in beside if one not in copied]
    return next((one for one in here if os.path.exists(one)), None)


def _is_relative(cell: Any) -> bool:
    return isinstance(cell, str) and bool(cell) and not cell.startswith("/") and "://" not in cell


def _paths(cells: Iterable[Any]) -> Iterator[str]:
    for cell in cells:
        value = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else cell
        if not isinstance(value, str) or value.startswith(("http://", "https://")):
            continue
        if value.startswith(("/", "file://")) or not storage.is_local(value):  # a relative one is a bad cell
            yield value


def _by_folder(paths: Iterable[str]) -> list[list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        found[path.rpartition("/")[0]].append(path)
    return list(found.values())


def _contents(paths: list[str]) -> list[tuple[str, str]]:
    """(path, what identifies its content) of files in one folder; those that are missing are left out."""
    folder = paths[0].rpartition("/")[0]
    if storage.is_local(folder) or len(paths) < _ASKED:
        there = {path: entry for path in paths for entry in storage.listing(path, recursive=False)}
    else:
        there = {entry.path: entry for entry in storage.listing(folder, recursive=False)}
    return [(path, storage.content_hash(there[path])) for path in paths if path in there]
