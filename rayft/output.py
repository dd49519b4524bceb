"""Predictions on their way into one file, Parquet or JSONL, which comes into being whole or not at all.

Or into a folder of pictures, as image tasks read one: PNG files, and metadata.jsonl with a row for each, written last.

The rows wait on this machine's disk until all are there: only then is it known which columns there are, of which types,
and whether any row failed. Memory holds one block of rows at a time.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from rayft import storage
from rayft.errors import RunRefused
from rayft.finite import finite

Rows = list[dict[str, Any]]

ENDINGS = (".parquet", ".jsonl")
GROUP_ROWS = 8192  # of a row group in Parquet
GROUP_BYTES = 64 << 20
METADATA, FILE_NAME = "metadata.jsonl", "file_name"  # of a folder of pictures
INPUT_FILE_NAME = "input_file_name"
ERROR = "error"
PREFIX = "predicted_"


def refuse(path: str) -> None:
    """RunRefused where `path` has another ending or exists; a StorageError where it can't be written."""
    if not path.endswith((*ENDINGS, "/")):
        known = f"{' or '.join(ENDINGS)}, pictures into a folder, FOLDER/"
        raise RunRefused(f"{path}: predictions are written as {known}; let the name end so")
    if storage.listing(path) if path.endswith("/") else storage.exists(path):
        raise RunRefused(f"{path} exists; name another, or delete it first")
    storage.check_writable(path.rstrip("/"), file=not path.endswith("/"))


class Output:
    """Rows for the file `path`; a context manager, which leaves nothing behind but what `commit` has written.

    A row has its input's columns, its prediction's keys (those that an input column has already as `predicted_…`), and
    `error` where any row failed. In a folder, whose `path` ends in /, a prediction that is a picture is a file of its
    own, and `file_name` names it: such a column of the input's becomes `input_file_name`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.rows = 0
        self._pictures: dict[str, None] = {}
        self._inputs: dict[str, None] = {}  # as ordered sets
        self._predictions: dict[str, None] = {}
        self._failed = False

    def __enter__(self) -> Output:
        self._folder = tempfile.TemporaryDirectory(prefix="rayft-predictions-")
        self._waiting = open(os.path.join(self._folder.name, "waiting"), "w+b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.close()
        self._folder.cleanup()

    def add(self, inputs: Rows, predictions: Sequence[dict[str, Any] | None], errors: Sequence[str | None]) -> None:
        """The next rows; a row without prediction has an error."""
        for values in inputs:
            self._inputs.update(dict.fromkeys(values))
        for prediction in predictions:
            self._predictions.update(dict.fromkeys(prediction or ()))
            self._pictures.update(
                {name: None for name, value in (prediction or {}).items() if isinstance(value, bytes)}
            )
        self._failed = self._failed or any(error is not None for error in errors)
        self.rows += len(inputs)
        pickle.dump((inputs, predictions, errors), self._waiting, protocol=5)

    def commit(self) -> None:
        """Writes the file, or the folder."""
        made = os.path.join(self._folder.name, "made")
        if self.path.endswith("/"):
            rows = os.path.join(self._folder.name, METADATA)
            _write_pictures(made, rows, self)
            storage.upload(made, self.path)
            storage.upload(rows, storage.join(self.path, METADATA))
        else:
            (_write_parquet if self.path.endswith(".parquet") else _write_jsonl)(made, self)
            storage.upload(made, self.path)

    def columns(self) -> dict[str, str]:
        """The key of a prediction -> its column."""
        apart = self._pictures if self.path.endswith("/") else {}
        return {name: FILE_NAME if name in apart else self._own(name) for name in self._predictions}

    def pictures(self) -> list[str]:
        """The columns that hold pictures."""
        return [column for name, column in self.columns().items() if name in self._pictures]

    def blocks(self) -> Iterator[Rows]:
        """The rows as they are to be written, from the first one on, a block at a time."""
        names = self.columns()
        aside = FILE_NAME if FILE_NAME in names.values() and FILE_NAME in self._inputs else None
        error_name, aside_name = self._own(ERROR), self._own(INPUT_FILE_NAME)
        self._waiting.seek(0)
        for _ in iter(self._more, False):
            inputs, predictions, errors = pickle.load(self._waiting)
            rows = []
            for values, prediction, error in zip(inputs, predictions, errors, strict=True):
                kept = {aside_name if name == aside else name: value for name, value in values.items()}
                row = {**kept, **{own: (prediction or {}).get(name) for name, own in names.items()}}
                rows.append({**row, error_name: error} if self._failed else row)
            yield rows

    def _own(self, name: str) -> str:
        taken = {*self._inputs, *(self._predictions if name == ERROR else ())}
        while name in taken:
            name = PREFIX + name
        return name

    def _more(self) -> bool:
        """Whether another block follows."""
        place = self._waiting.tell()
        more = bool(self._waiting.read(1))
        self._waiting.seek(place)
        return more


def _write_jsonl(path: str, output: Output) -> None:
    with open(path, "wb") as file:
        for rows in output.blocks():
            for row in rows:
                file.write(_json(row).encode(errors="backslashreplace") + b"\n")


def _write_pictures(folder: str, path: str, output: Output) -> None:
    os.mkdir(folder)
    columns = output.pictures()
    with open(path, "wb") as file:
        for number, row in enumerate(row for rows in output.blocks() for row in rows):
            for column in columns:
                if row[column] is not None:
                    name = f"{number:06d}.png"
                    with open(os.path.join(folder, name), "wb") as picture:
                        picture.write(row[column])
                    row[column] = name
            file.write(_json(row).encode(errors="backslashreplace") + b"\n")


def _write_parquet(path: str, output: Output) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(output)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        held: list[Any] = []
        for rows in output.blocks():
            arrays = [_array([row.get(field.name) for row in rows], field) for field in schema]
            held.append(pa.Table.from_arrays(arrays, schema=schema))
            if sum(table.num_rows for table in held) >= GROUP_ROWS or sum(t.nbytes for t in held) >= GROUP_BYTES:
                writer.write_table(pa.concat_tables(held))
                held = []
        if held:
            writer.write_table(pa.concat_tables(held))


def _schema(output: Output) -> Any:
    """One type for each column, from all of its values; what has none is text: JSON, and strings as they are."""
    import pyarrow as pa

    types: dict[str, Any] = {}
    for rows in output.blocks():
        for name in dict.fromkeys(name for row in rows for name in row):
            found = _type([row.get(name) for row in rows])
            types[name] = _joined(types[name], found) if name in types else found
    metadata = {name: {} if kind else {"rayft": "json"} for name, kind in types.items()}
    return pa.schema([pa.field(name, kind or pa.string(), metadata=metadata[name]) for name, kind in types.items()])


def _type(values: list[Any]) -> Any:
    """The Arrow type of a column's values; None where they have none that Parquet can hold."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        kind = pa.array(values).type
        pq.write_table(pa.table({"column": pa.array([], kind)}), io.BytesIO())
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        return None
    return kind


def _joined(one: Any, other: Any) -> Any:
    import pyarrow as pa

    if one is None or other is None or one == other:
        return one if one == other else None
    try:
        schemas = [pa.schema([("column", kind)]) for kind in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def _array(values: list[Any], field: Any) -> Any:
    import pyarrow as pa

    if field.metadata:
        texts = [value if value is None or isinstance(value, str) else _json(value) for value in values]
        return pa.array([text and text.encode(errors="backslashreplace").decode() for text in texts], field.type)
    return pa.array(values, field.type)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(finite(value), ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON has no words for: bytes as base64, dates and decimals as they print."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
