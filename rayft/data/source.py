"""The rows of a piece of a source, good and bad, by the task's names, and a look at a few of them."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rayft import storage
from rayft.data import classes, formats, hub, json_rows
from rayft.data.pieces import FILE_NAME, PART_BYTES, Fragment, folder_of
from rayft.errors import DataError
from rayft.recipe import Source
from rayft.tasks.cells import quoted, short
from rayft.tasks.texts import broken

_SHOWN = 12  # names that a message lists
_HELD = 8  # values of a column that stand in for one that is not there
_LOOKED = 8  # pieces that are looked at for what a column holds


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
    """A batch. `numbers` count the file's rows from 0, `lines` from 1 (0: no lines); `bad` rows are in neither.

    `met` are places in `asked(where)` of values that a row of the piece has, each told in one of its batches; the row
    need not be in the batch, where another column keeps it out.
    """

    columns: dict[str, list[Any]]
    numbers: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    met: set[int] = field(default_factory=set)


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
    folder = folder_of(fragment.path)
    chosen: dict[str, str] = {}  # our columns -> theirs, where every row has them
    if table.columns is not None:
        theirs = _present(fragment.path, table.columns, theirs, source)
        chosen = {ours: names[0] for ours, names in theirs.items()} if folder is None else {}
    batch = Rows({ours: [] for ours in columns})
    unmet = dict(enumerate(asked(source.where)))
    for row in table.rows:
        if unmet and not row.fault:
            _meet(row, unmet, batch)
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
    if batch.numbers or batch.bad or batch.met:
        yield batch


def asked(where: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each value that `where` asks for, with its column."""
    listed = {name: value if isinstance(value, list | tuple) else [value] for name, value in where.items()}
    return [(name, one) for name, values in listed.items() for one in values]


def _meet(row: formats.Row, unmet: dict[int, tuple[str, Any]], batch: Rows) -> None:
    """Moves the values that the row has from `unmet` to the batch: a piece soon has all, and compares no more."""
    found = [place for place, (name, one) in unmet.items() if _matches(row.values.get(name), one)]
    for place in found:
        del unmet[place]
    batch.met.update(found)


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


def absent(fragments: Sequence[Fragment], sources: Sequence[Source], met: Collection[tuple[int, int]]) -> list[str]:
    """What `where` asks for and no row has, a sentence for each column, with what is there instead.

    `met` holds (source, place in `asked(where)`) of what some row has.
    """
    told = []
    for index, source in enumerate(sources):
        missing = defaultdict[str, list[Any]](list)
        for place, (column, value) in enumerate(asked(source.where)):
            if (index, place) not in met:
                missing[column].append(value)
        pieces = [piece for piece in fragments if piece.source == index][:_LOOKED]
        which = f" of source {index + 1}" if len(sources) > 1 else ""
        told += [f"`where`{which} {_missed(column, values, pieces)}" for column, values in missing.items()]
    return told


def _missed(column: str, values: Sequence[Any], pieces: Sequence[Fragment]) -> str:
    found = distinct(pieces, column)
    listed, strange = [], False
    for value in values[:_SHOWN]:
        same = [one for one in found if one.lower() == str(value).lower()]
        near = same or difflib.get_close_matches(str(value), found, 1)
        strange = strange or not near
        listed.append(quoted(value) + (f" (did you mean {quoted(near[0])}?)" if near else ""))
    asks = ", ".join(listed) + (", …" if len(values) > _SHOWN else "")
    held = ", ".join(map(quoted, found[:_HELD])) + (", …" if len(found) > _HELD else "")
    return f"asks for {asks} in `{column}`, which no row has" + (f"; there are {held}" if strange and found else "")


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


def _resolved(folder: str, value: Any) -> Any:
    """The path of a file that a metadata file names, taken from its folder."""
    if not isinstance(value, str) or not value or value.startswith("/") or "://" in value:
        return value
    return storage.join(folder, value)
