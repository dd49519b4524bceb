"""The picture or sound that a cell stands for: a file's path or URL, its bytes, or a data set's {"bytes", "path"}."""

from __future__ import annotations

import os
from typing import Any

from rayft import storage
from rayft.errors import StorageMissing
from rayft.tasks.cells import quoted

LONGEST_PATH, LONGEST_NAME = 4096, 255  # of what Linux opens: a column of texts is soon longer


def file_bytes(column: str, value: Any) -> bytes:
    """The content of the file in a cell; ValueError, whose sentence is for `Encoded.bad`, where there is none."""
    held = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if isinstance(held, bytes | bytearray | memoryview):
        content = bytes(held)
    elif isinstance(held, str) and held.strip():
        content = _read(column, held)
    elif isinstance(value, dict) and value.keys() - {"bytes", "path"}:
        fields = ", ".join(f"`{name}`" for name in value)
        raise ValueError(
            f"`{column}` holds {fields}; it needs a file's path or URL, or its bytes: a data set whose files are not "
            "decoded has them as `bytes` and `path`"
        )
    else:
        raise ValueError(f"`{column}` is {quoted(held)}; it needs a file's path or URL, or its bytes")
    if not content:
        raise ValueError(f"`{column}`: {file_name(value)} is empty")
    return content


def _read(column: str, path: str) -> bytes:
    if storage.is_local(path) and not os.path.isabs(storage.absolute(path) if path.startswith("file://") else path):
        raise ValueError(
            f"`{column}` is the relative path {quoted(path)}, of which only a metadata.csv or metadata.jsonl beside "
            "the files can say where it starts; put the table there, with the paths in the column `file_name`"
        )
    if storage.is_local(path) and (len(path) > LONGEST_PATH or max(map(len, path.split("/"))) > LONGEST_NAME):
        raise ValueError(f"`{column}` is {quoted(path)}, too long for a file's path; it needs one, a URL or its bytes")
    try:
        return storage.read_bytes(path)
    except StorageMissing:
        raise ValueError(f"`{column}`: there is no file {storage.shown(path)}") from None
    except IsADirectoryError:
        raise ValueError(f"`{column}`: {path} is a folder, where a file is needed") from None


def file_name(value: Any) -> str:
    """What a message calls the file in a cell."""
    if isinstance(value, dict):
        value = value.get("path") or "it"
    return storage.shown(value) if isinstance(value, str) else "it"
