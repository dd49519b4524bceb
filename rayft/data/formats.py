"""Reads single files of rows, exactly and in flat memory: csv, tsv, jsonl, json, txt (each also packed), parquet.

A broken row never ends a file where the next one can still be found: it comes out as a Row with a fault.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from rayft import retry, storage
from rayft.data import class_labels
from rayft.errors import DataError

# A field beyond this is an unclosed quote that swallows the rest of the file, not text that anyone trains on.
LONGEST_FIELD = 64 << 20
NOT_UTF8 = "is not UTF-8; save it as that"
CHUNK = 1 << 20
COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}  # by the end of a name
_SIGNS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # what divides the fields of files that are called .csv too


class Row(NamedTuple):
    """`number` counts the file's rows from 0, `line` its lines from 1 (0: there are none); `fault` "": all is well."""

    number: int
    line: int
    values: dict[str, Any]
    fault: str = ""


@dataclass(frozen=True)
class Table:
    """Rows in the file's order. `columns` are those of every row; None where each row brings its own."""

    columns: tuple[str, ...] | None
    rows: Iterator[Row]


@dataclass
class Lines:
    """The lines of a UTF-8 file as text, with their ends.

    Bytes that are no UTF-8 come through as lone surrogates, and `fault` says so until it is taken: the reader above
    knows which row they belong to.
    """

    path: str
    number: int = 0
    fault: str = field(default="", init=False)

    def __iter__(self) -> Iterator[str]:
        with open_binary(self.path) as file:
            for line in file:
                if not self.number:
                    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise DataError(f"{self.path} is UTF-16; rows are read as UTF-8, so save it as that")
                    line = line.removeprefix(codecs.BOM_UTF8)  # noqa: PLW2901
                self.number += 1
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    self.fault = f"byte {line[error.start]:#04x} at position {error.start + 1} of its line {NOT_UTF8}"
                    yield line.decode(errors="surrogateescape")

    def take_fault(self) -> str:
        fault, self.fault = self.fault, ""
        return fault


@dataclass
class TabbedLines(Lines):
    """The lines of a table that tabs divide, with the quotes that its writer may have left out.

    Some writers quote the fields that hold a tab, a quote or a line's end, others quote none, and a text may begin with
    a quotation mark. A line that has its `fields` by tabs alone was written without quotes where quotes make other
    fields of it, or would join it with a line that has its fields too.
    """

    fields: int = field(default=0, init=False)  # 0: the header is still to come

    def __iter__(self) -> Iterator[str]:
        rest = super().__iter__()
        line, inside = next(rest, None), False
        while line is not None:
            ahead: list[str | None] = []
            found = _fields(f'"{line}' if inside else line) if inside or '"' in line else self.fields
            if found != self.fields > 1 and not inside and self._whole(line):
                if found is None:
                    ahead.append(self._peek(rest))
                if found is not None or ahead[0] is None or self._whole(ahead[0]):
                    line, found = _quoted(line), self.fields
            inside = found is None
            yield line
            if ahead:
                self.number, self.fault = self.number + (ahead[0] is not None), self._fault_ahead or self.fault
            line = ahead[0] if ahead else next(rest, None)

    def _whole(self, line: str) -> bool:
        return line.count("\t") + 1 == self.fields

    def _peek(self, rest: Iterator[str]) -> str | None:
        """The next line, of which neither `number` nor `fault` tells yet."""
        number, fault = self.number, self.take_fault()
        ahead, self._fault_ahead = next(rest, None), self.take_fault()
        self.number, self.fault = number, fault
        return ahead


def _fields(line: str) -> int | None:
    """How many fields tabs and quotes make of a line; None where a quote stays open, 0 where quotes are broken."""
    try:
        return len(next(csv.reader([line], delimiter="\t", strict=True), []))
    except csv.Error as error:
        return None if "end of data" in str(error) else 0


def _quoted(line: str) -> str:
    fields = (text.replace('"', '""') for text in line.rstrip("\r\n").split("\t"))
    return "\t".join(f'"{text}"' for text in fields) + "\n"


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[Any]:
    """The file's bytes, decompressed where its name ends in one of COMPRESSED."""
    kind = COMPRESSED.get(os.path.splitext(path.lower())[1])
    with storage.open_read(path) as raw:
        if kind is None:
            yield raw
            return
        try:
            with _opened(raw, kind) as file:
                yield io.BufferedReader(file, CHUNK)
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the storage's fault, and not what the file holds
                raise
            raise DataError(f"{path} is not a whole {kind} file: {error}") from None


def _opened(raw: Any, kind: str) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if kind == "bzip2":
        return bz2.BZ2File(raw)
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")


def read_csv(path: str, delimiter: str | None) -> Table:
    """A header, then rows of as many fields; all values are strings, an empty field is "". Blank lines are no rows.

    Without a `delimiter` its header says it: a comma, or where it has none a semicolon, a tab or a bar. Where a tab is
    given, quotes may be left out, as TabbedLines says.
    """
    csv.field_size_limit(LONGEST_FIELD)
    lines = TabbedLines(path) if delimiter == "\t" else Lines(path)
    rest = iter(lines)
    first = next((line for line in rest if line.strip()), "")
    # Strict: a stray quote is a fault with a place, where the lenient reader would guess.
    reader = csv.reader(chain([first], rest), delimiter=delimiter or _delimiter(first), strict=True)
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise DataError(f"{path} line {lines.number}: the header can't be read: {error}") from None
    if not header:
        raise DataError(f"{path} is empty; it needs a header and rows")
    if fault := lines.take_fault():
        raise DataError(f"{path} line {lines.number}: the header can't be read: {fault}")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}: the header names {', '.join(map(repr, twice))} twice")
    if isinstance(lines, TabbedLines):
        lines.fields = len(header)
    return Table(tuple(header), _csv_rows(reader, lines, header))


def _delimiter(header: str) -> str:
    """What divides the names of a .csv's header: spreadsheets write semicolons where commas are for numbers."""
    outside = re.sub('"[^"]*"', "", header)
    return "," if "," in outside else max(",", *_SIGNS, key=outside.count)


def divided(path: str, columns: Sequence[str], missing: Sequence[str]) -> str:
    """Why a .csv has not the columns that are `missing`: its header has commas, and another sign divides its names.

    "" where no other sign is to blame.
    """
    stem, ending = os.path.splitext(path.lower())
    if not (stem if ending in COMPRESSED else path.lower()).endswith(".csv"):
        return ""
    header = ",".join(columns)
    sign = next((sign for sign in _SIGNS if {*missing} & {*re.split(f"[,{re.escape(sign)}]", header)}), "")
    return (
        f"{path}: {_SIGNS[sign]} divide its fields, and its header has commas; let commas divide them" if sign else ""
    )


def _csv_rows(reader: Any, lines: Lines, header: list[str]) -> Iterator[Row]:
    number = 0
    while True:
        line = lines.number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.take_fault()
            yield Row(number, line, {}, f"broken {'quotes' if 'field' not in str(error) else 'field'}: {error}")
        else:
            if not fields:
                continue
            fault = lines.take_fault() if lines.fault else ""
            if not fault and len(fields) != len(header):
                fault = f"{len(fields)} field{'s' * (len(fields) != 1)} where the header has {len(header)}"
            yield Row(number, line, {} if fault else dict(zip(header, fields, strict=True)), fault)
        number += 1


def read_text(path: str) -> Table:
    """One row a line, in the column `text`, without the line's end; blank lines are no rows."""
    return Table(("text",), _text_rows(path))


def _text_rows(path: str) -> Iterator[Row]:
    lines, number = Lines(path), 0
    for text in lines:
        if text.strip():
            yield Row(number, lines.number, {"text": text.rstrip("\r\n")}, lines.take_fault())
            number += 1


def parquet_groups(path: str) -> list[tuple[int, int]]:
    """(rows, uncompressed bytes) of each row group."""
    with _parquet(path) as file:
        groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def holds_contents(path: str, columns: Sequence[Sequence[str]]) -> bool:
    """Whether a Parquet file has the contents of all pictures or sounds in `columns`, and so no row names a file.

    Of the names that each column may have the first that there is counts. Told by the file's footer alone.
    """
    with _parquet(path) as file:
        there, groups = file.schema_arrow, range(file.metadata.num_row_groups)
        leaves = {file.schema.column(place).path: place for place in range(len(file.schema))}

        def held(names: Sequence[str]) -> bool:
            name = next((name for name in names if name in there.names), None)
            if name is None or _is_bytes(there.field(name).type):
                return name is not None
            place = leaves.get(f"{name}.bytes")
            if place is None:
                return False
            counts = [file.metadata.row_group(group).column(place).statistics for group in groups]
            return all(known is not None and known.has_null_count and not known.null_count for known in counts)

        return all(map(held, columns))


def read_parquet(
    path: str, part: tuple[int, int], first_row: int, wanted: set[str], batch_size: int, contents: bool = True
) -> Table:
    """Row groups part[0] up to part[1], whose first row is number `first_row`; only the columns in `wanted`.

    Class labels come as their names, where the file says them: as `datasets` writes it. Without `contents` a
    {"bytes", "path"} is {"path"}, and its bytes are not read.
    """
    with _parquet(path) as file:
        columns = tuple(file.schema_arrow.names)
        read = [name for name in columns if name in wanted]
        if not contents:
            read = [f"{name}.path" if _is_file(file.schema_arrow.field(name).type) else name for name in read]
        known = class_labels.names_in(file.schema_arrow.metadata)

    def rows() -> Iterator[Row]:
        number = first_row
        with _parquet(path) as file:
            options = {"row_groups": list(range(*part)), "columns": read}
            for batch in file.iter_batches(batch_size, **options):
                # A batch without columns has rows all the same.
                for values in batch.to_pylist() if batch.num_columns else ({} for _ in range(batch.num_rows)):
                    yield _named(number, values, known) if known else Row(number, 0, values)
                    number += 1

    return Table(columns, rows())


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_file(kind: Any) -> bool:
    """Whether an Arrow type is that of {"bytes", "path"}, as `datasets` keeps a picture or a sound."""
    return {kind.field(place).name for place in range(kind.num_fields)} == {"bytes", "path"}


def _named(number: int, values: dict[str, Any], known: dict[str, list[str]]) -> Row:
    try:
        return Row(number, 0, class_labels.named(values, known))
    except ValueError as fault:
        return Row(number, 0, {}, str(fault))


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        filesystem, inside = storage.arrow(path)
        with (
            retry.telling(path, "reading"),
            filesystem.open_input_file(inside) as file,
            pq.ParquetFile(file) as parquet,
        ):
            yield parquet
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from None


def place_of(path: str, number: int, line: int) -> str:
    """Where a row is, as a user counts: from 1, and with its line where the format has lines."""
    return f"{path} row {number + 1}" + (f" (line {line})" if line else "")
