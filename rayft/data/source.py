"""Where rows come from: which files a recipe's sources mean, what identifies them, and their rows by the task's names.

A row is known by its file's place in the sorted listing of the split and its number there, never by a path, so that
data which moves to another folder or bucket keeps its ids, its order and its prepared shards.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from rayft import storage
from rayft.data import classes, formats, hub, json_rows
from rayft.errors import DataError
from rayft.recipe import Source
from rayft.storage import Entry
from rayft.tasks.cells import quoted, short
from rayft.tasks.texts import broken

TABLES = ("csv", "tsv", "json", "jsonl", "parquet")
FORMATS = (*TABLES, "txt")
METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"  # the column of a metadata file that names a file beside it
PART_BYTES = 64 << 20  # uncompressed; a Parquet file is read in runs of row groups of about this size
_RATIO = 4  # text packs to about a quarter; only sizes of work and shards hang on it
_FETCHED = 4  # a small file takes as long to ask for as to read and decode, or longer
_THREADS = 16
_SHOWN = 12  # names that a message lists
_LOOKED = 8  # pieces that are looked at for what a column holds
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
    return not storage.is_local(piece.path) and (piece.format == classes.FORMAT or _folder(piece.path) is not None)


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used: `row` counts from 0, `line` from 1 (0: no lines)."""

    path: str
    row: int
    reason: str
    line: int = 0

    def __str__(self) -> str:
        return f"{formats.place_of(self.path, self.row, self.line)}: {self.reason}"


@dataclass
class Rows:
    """A batch. `numbers` count the file's rows from 0, `lines` from 1 (0: no lines); `bad` rows are in neither."""

    columns: dict[str, list[Any]]
    numbers: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


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


def read(
    fragment: Fragment,
    source: Source,
    names: dict[str, str],
    columns: Sequence[str],
    batch_size: int = 1024,
    contents: bool = True,
) -> Iterator[Rows]:
    """The rows of `fragment` that `source.where` lets through, streamed in batches of `batch_size` rows, good and bad.

    `names` maps their column names to ours; a file that lacks a mapped column is asked for ours itself. A column that a
    table lacks as a whole is a DataError with the nearest names; in JSON each row that lacks it is bad. Without
    `contents` a Parquet file's pictures and sounds come as their paths alone.
    """
    theirs = candidates(names, columns)
    wanted = {name for known in theirs.values() for name in known} | set(source.where)
    table = table_of(fragment, wanted, batch_size, contents)
    folder = _folder(fragment.path)
    chosen: dict[str, str] = {}  # our columns -> theirs, where every row has them
    if table.columns is not None:
        theirs = _present(fragment.path, table.columns, theirs, source)
        chosen = {ours: names[0] for ours, names in theirs.items()} if folder is None else {}
    batch = Rows({ours: [] for ours in columns})
    for row in table.rows:
        if row.fault:
            batch.bad.append(BadRow(fragment.path, row.number, row.fault, row.line))
        elif not source.where or all(_matches(row.values.get(name), value) for name, value in source.where.items()):
            if chosen:
                _append(batch, row, chosen)
            else:
                _add(batch, row, theirs, fragment.path, folder)
        if len(batch.numbers) + len(batch.bad) == batch_size:
            yield batch
            batch = Rows({ours: [] for ours in columns})
    if batch.numbers or batch.bad:
        yield batch


def candidates(names: dict[str, str], columns: Sequence[str]) -> dict[str, list[str]]:
    """Our columns -> the names that a file may have for them, of which the first that there is counts."""
    return {ours: [*(own for own, name in names.items() if name == ours), ours] for ours in columns}


def distinct(fragments: Sequence[Fragment], column: str) -> list[Any]:
    """The texts in a column, as they first come; of more than PART_BYTES, those of each file's first rows."""
    few = sum(piece.size for piece in fragments) > PART_BYTES
    rows = (row for piece in fragments for row in islice(table_of(piece, {column}, 1024).rows, 100 if few else None))
    values = (row.values.get(column) for row in rows if not row.fault)
    return list(dict.fromkeys(value for value in values if isinstance(value, str)))


def unmatched(fragments: Sequence[Fragment], sources: Sequence[Source]) -> str:
    """What the columns hold instead of what `where` asks for, to end a sentence with; "" where no text tells."""
    told = []
    for index, source in enumerate(sources):
        pieces = [piece for piece in fragments if piece.source == index][:_LOOKED]
        for column, value in source.where.items():
            found = distinct(pieces, column)
            if found and not any(_matches(one, value) for one in found):
                more = ", …" if len(found) > _SHOWN else ""
                held = ", ".join(map(quoted, found[:_SHOWN])) + more
                told.append(f"; `where` asks for {quoted(value)} in `{column}`, which holds {held}")
    return "".join(dict.fromkeys(told))


def peek(fragment: Fragment, rows: int = 100) -> tuple[list[str], dict[str, list[Any]]]:
    """The columns, and by column the values of the good ones of the first `rows` rows; None where a row lacks one.

    DataError with the first of them where there are rows and none is good.
    """
    columns = table_of(fragment, set(), rows).columns or ()
    first = list(islice(table_of(fragment, set(columns), rows).rows, rows))
    found = [row.values for row in first if not row.fault]
    if first and not found:
        raise DataError(str(BadRow(fragment.path, first[0].number, first[0].fault, first[0].line)))
    names = list(dict.fromkeys([*columns, *(name for values in found for name in values)]))
    return names, {name: [values.get(name) for values in found] for name in names}


def _append(batch: Rows, row: formats.Row, chosen: dict[str, str]) -> None:
    for ours, name in chosen.items():
        batch.columns[ours].append(row.values[name])
    batch.numbers.append(row.number)
    batch.lines.append(row.line)


def _add(batch: Rows, row: formats.Row, theirs: dict[str, list[str]], path: str, folder: str | None) -> None:
    """Appends the row's columns under our names, or the row to the bad ones."""
    values = {}
    for ours, known in theirs.items():
        name = next((name for name in known if name in row.values), None)
        if name is not None:
            value = row.values[name]
            values[ours] = _resolved(folder, value) if folder and name == FILE_NAME else value
    missing = [ours for ours in theirs if ours not in values]
    halved = [f"`{ours}` {fault}" for ours, value in values.items() if (fault := broken(value))]
    if missing or halved:
        reason = _unknown(theirs[missing[0]][0], row.values) if missing else halved[0]
        batch.bad.append(BadRow(path, row.number, reason, row.line))
        return
    for ours, value in values.items():
        batch.columns[ours].append(value)
    batch.numbers.append(row.number)
    batch.lines.append(row.line)


def table_of(fragment: Fragment, wanted: set[str], batch_size: int, contents: bool = True) -> formats.Table:
    if fragment.format == "parquet":
        part, first = fragment.part or (0, 0), fragment.first_row
        return formats.read_parquet(fragment.path, part, first, wanted, batch_size, contents)
    if fragment.format == "hf":
        return hub.read_hub(fragment.path, fragment.part or (0, 1))
    if fragment.format == classes.FORMAT:
        return classes.read(fragment.path, fragment.part or (0, 0), "label" in wanted)
    readers: dict[str, Callable[[str], formats.Table]] = {
        "csv": lambda path: formats.read_csv(path, None),
        "tsv": lambda path: formats.read_csv(path, "\t"),
        "jsonl": json_rows.read_jsonl,
        "json": json_rows.read_json,
        "txt": formats.read_text,
    }
    return readers[fragment.format](fragment.path)


def _present(path: str, there: Sequence[str], theirs: dict[str, list[str]], source: Source) -> dict[str, list[str]]:
    """Our columns -> the one name each has in this table; faults for columns and filters that it lacks."""
    chosen = {ours: [name for name in names if name in there][:1] for ours, names in theirs.items()}
    faults = [_unknown(theirs[ours][0], there) for ours in theirs if not chosen[ours]]
    faults += [f"`where` asks for it, but {_unknown(name, there)}" for name in source.where if name not in there]
    if faults:
        lacking = [name for ours, names in theirs.items() if not chosen[ours] for name in names]
        raise DataError(formats.divided(path, there, lacking) or f"{path}: {'; '.join(faults)}")
    return chosen


def _unknown(name: str, there: Iterable[str]) -> str:
    known = [str(one) for one in there]
    near = difflib.get_close_matches(name, known, 1) or [one for one in known if one.lower() == name.lower()]
    listed = ", ".join(map(short, known[:_SHOWN])) or "none"
    text = f"column {name!r} is missing; there {'are' if len(known) != 1 else 'is'} {listed}"
    return text + (", …" if len(known) > _SHOWN else "") + (f"; did you mean {near[0]!r}?" if near else "")


def _matches(value: Any, wanted: Any) -> bool:
    """Equality or membership. Text files know no types, so that "0" is 0 and "true" is true; a date is its text."""
    if isinstance(wanted, list | tuple):
        return any(_matches(value, one) for one in wanted)
    if value == wanted:
        return isinstance(value, bool) == isinstance(wanted, bool) or not isinstance(wanted, bool | int)
    if isinstance(value, str) and wanted is not None:
        return value.lower() == str(wanted).lower() if isinstance(wanted, bool) else value == str(wanted)
    if isinstance(wanted, str):
        return not isinstance(value, bool | None) and str(value) == wanted
    return wanted is None and value == ""


def _folder(path: str) -> str | None:
    """The folder that a metadata file describes; None for other files."""
    folder, _, name = path.rpartition("/")
    return folder if name in METADATA else None


def _resolved(folder: str, value: Any) -> Any:
    """The path of a file that a metadata file names, taken from its folder."""
    if not isinstance(value, str) or not value or value.startswith("/") or "://" in value:
        return value
    return storage.join(folder, value)


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
            [*(entry for entry in entries if _folder(entry.path) is not None), *others], key=lambda entry: entry.path
        )
    tables = [entry for entry in entries if _format(entry.path) in TABLES]
    if not tables and classes.media(entries):
        return []
    return tables or [entry for entry in entries if _format(entry.path)]


def _described(entries: list[Entry]) -> tuple[str, ...]:
    """The folders that metadata files among `entries` describe, with a slash at their end."""
    return tuple(f"{folder}/" for entry in entries if (folder := _folder(entry.path)) is not None)


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
    folder = _folder(entry.path)
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
