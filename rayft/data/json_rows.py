"""Reads rows in JSON, exactly and in flat memory: one object a line, or an array of objects.

A broken row never ends a file where the next one can still be found: it comes out as a Row with a fault.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from rayft.data.formats import CHUNK, LONGEST_FIELD, NOT_UTF8, Lines, Row, Table, open_binary, place_of
from rayft.errors import DataError

BY_COLUMN = "columns, as pandas writes them, where rows are needed: df.to_json(path, orient='records', lines=True)"


def read_jsonl(path: str) -> Table:
    """One JSON object a line; blank lines are no rows."""
    return Table(None, _jsonl_rows(path))


def _jsonl_rows(path: str) -> Iterator[Row]:
    lines, number = Lines(path), 0
    for text in lines:
        if not text.strip():
            continue
        fault = lines.take_fault()
        if fault:
            yield Row(number, lines.number, {}, fault)
        else:
            try:
                yield _object(number, lines.number, json.loads(text.rstrip()))
            except (ValueError, RecursionError) as error:
                yield Row(number, lines.number, {}, _broken_json(error))
        number += 1


def _broken_json(error: Exception) -> str:
    place = f" at position {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
    return f"broken JSON: {getattr(error, 'msg', error)}{place}"


def _object(number: int, line: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(number, line, {}, BY_COLUMN) if _by_column(value) else Row(number, line, value)
    return Row(number, line, {}, f"a JSON {_KINDS.get(type(value), 'value')} where a row is an object of columns")


def _by_column(value: dict[str, Any]) -> bool:
    """Whether a JSON object holds whole columns as {"text": {"0": …, "1": …}}: numbered rows, the same in each."""
    columns = list(value.values())
    if not columns or not all(isinstance(column, dict) and column for column in columns):
        return False
    return all(map(str.isdecimal, columns[0])) and all(column.keys() == columns[0].keys() for column in columns)


_KINDS = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def read_json(path: str) -> Table:
    """An array of objects, {"data": [...]}, or one object a line. Arrays are streamed; {"data": …} is read whole."""
    with open_binary(path) as file:
        # Blank bytes are skipped by hand, since the first sign decides how the file is read.
        first = file.readline()
        while first and not first.removeprefix(codecs.BOM_UTF8).strip():
            first = file.readline()
        start = first.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if start == b"[":
            return Table(None, _array_rows(path))
        whole: Any = None
        try:
            whole = json.loads(first)
        except ValueError:  # an object over several lines, or a broken one
            with contextlib.suppress(ValueError):
                whole = json.loads(first + file.read())
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        return Table(None, (_object(number, 0, value) for number, value in enumerate(whole["data"])))
    if isinstance(whole, dict) and _by_column(whole):
        return Table(None, iter([_object(0, 1, whole)]))
    if start != b"{":
        raise DataError(f'{path} is no JSON of rows; an array of objects, {{"data": [...]}} or one object a line fits')
    return read_jsonl(path)


class _Array:
    """The elements of a JSON array, decoded one after the other.

    What follows a broken one can't be found, so that it ends the file with a DataError.
    """

    _blanks = re.compile(r"[ \t\r\n]*")

    def __init__(self, path: str, file: Any):
        self._path = path
        self._stream = codecs.getreader("utf-8-sig")(file)
        self._text = ""  # what has been read and not been decoded, from `_place` on
        self._place = 0
        self._line = 1  # of the text's begin
        self._number = 0
        self._ended = False

    def rows(self) -> Iterator[Row]:
        self._sign()
        self._place += 1  # the bracket
        sign = self._sign()
        while sign != "]":
            line = self._line_here()
            yield _object(self._number, line, self._element())
            self._number += 1
            sign = self._sign()
            if sign == ",":
                self._place += 1
                sign = self._sign()
            elif sign != "]":
                raise self._broken("the array ends too early" if not sign else "a comma is missing before this row")
        self._place += 1
        if self._sign():
            raise self._broken("more follows the array")

    def _element(self) -> Any:
        decoder = json.JSONDecoder()
        while True:
            fault = "a row is too long"
            try:
                value, end = decoder.raw_decode(self._text, self._place)
                if end < len(self._text) or self._ended:  # else a number might go on
                    self._place = end
                    return value
            except (ValueError, RecursionError) as error:
                fault = f"broken JSON: {getattr(error, 'msg', error)}"  # its position is one in the buffer
            if self._ended or len(self._text) - self._place > LONGEST_FIELD:
                raise self._broken(fault)
            self._more()

    def _sign(self) -> str:
        """Skips blanks and gives the sign that follows, "" at the end of the file."""
        while True:
            blanks = self._blanks.match(self._text, self._place)
            self._place = blanks.end() if blanks else self._place
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._more()

    def _more(self) -> None:
        self._line, rest = self._line_here(), self._text[self._place :]
        try:
            read = self._stream.read(max(CHUNK, len(rest)))  # doubling keeps a long element linear
        except UnicodeDecodeError as error:
            raise self._broken(f"byte {error.object[error.start]:#04x} after its begin {NOT_UTF8}") from None
        self._text, self._place, self._ended = rest + read, 0, not read

    def _line_here(self) -> int:
        return self._line + self._text.count("\n", 0, self._place)

    def _broken(self, fault: str) -> DataError:
        place = place_of(self._path, self._number, self._line_here())
        return DataError(f"{place}: {fault}; nothing can be read from here on")


def _array_rows(path: str) -> Iterator[Row]:
    with open_binary(path) as file:
        yield from _Array(path, file).rows()
