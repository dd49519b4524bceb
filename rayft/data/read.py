"""Prepared shards, read: pieces of row groups for a step, and a whole split in the source's order for an evaluation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayft import storage
from rayft.data.order import WINDOW_BYTES, Piece
from rayft.errors import Damaged
from rayft.retry import telling

Shards = Sequence[Mapping[str, Any]]  # of a manifest: {path, rows, row_groups, bytes, ...}

BUFFERED = 32  # batches of an evaluation among which rows are sorted by length


def firsts(shards: Shards) -> list[np.ndarray]:
    """Of each shard, for each of its row groups, the number in the split of its first row."""
    found, row = [], 0
    for shard in shards:
        ends = row + np.cumsum(shard["row_groups"], dtype=np.int64)
        found.append(np.concatenate([[row], ends[:-1]]))
        row += sum(shard["row_groups"])
    return found


def read_pieces(paths: dict[int, str], pieces: Sequence[Piece]) -> pa.Table:
    """The rows of `pieces`, in their order; every shard is opened once."""
    tables: dict[Piece, pa.Table] = {}
    for shard, path in paths.items():
        with _parquet(path) as file:
            for piece in pieces:
                if piece.shard == shard:
                    group = file.read_row_group(piece.group, use_threads=False)
                    tables[piece] = group.slice(piece.start, piece.stop - piece.start)
    return pa.concat_tables([tables[piece] for piece in pieces]).combine_chunks()


def columns(folder: str, shards: Shards, names: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Some columns of a whole split as plain values, in batches; `folder` is the prepared one."""
    for shard in shards:
        with _parquet(storage.join(folder, shard["path"])) as file:
            for batch in file.iter_batches(columns=list(names)):
                yield batch.to_pydict()


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    """A shard whose pages are compared with their checksums as they are read; Damaged where it isn't as written."""
    try:
        filesystem, inside = storage.arrow(path)
        options = {"pre_buffer": True, "page_checksum_verification": True}
        with pq.ParquetFile(inside, filesystem=filesystem, **options) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        folder = path.rpartition("/")[0].rpartition("/")[0]
        if isinstance(error, FileNotFoundError):
            raise Damaged(folder, path, "is missing") from None
        # What a system or a service answers has a number or says who it is; the rest is pyarrow on the bytes it found.
        if not isinstance(error, OSError) or (type(error) is OSError and not error.errno and "AWS" not in str(error)):
            raise Damaged(folder, path, "is not as it was prepared") from None
        with telling(path, "reading"):
            raise


def strided(folder: str, shards: Shards, rank: int, world: int, batch_size: int) -> Iterator[pa.Table]:
    """Batches of rows `rank`, `rank + world`, ... of a split in the source's order, each row once.

    Column `position` is a row's number in the split. Rows of like length meet among those of `BUFFERED` batches. Every
    rank yields as many batches, so that all meet in the same collective operations: those that have no row left yield
    empty tables (see `first_row`).
    """
    rows, size = sum(shard["rows"] for shard in shards), sum(shard["bytes"] for shard in shards)
    buffered = max(1, min(BUFFERED, int(WINDOW_BYTES * rows / max(1, size * batch_size))))
    missing = math.ceil(math.ceil(rows / world) / batch_size)
    for table in _tables_of(_own_rows(folder, shards, rank, world), batch_size * buffered):
        by_length = table.take(np.argsort(table["length"].to_numpy(), kind="stable"))
        for first in range(0, table.num_rows, batch_size):
            missing -= 1
            yield by_length.slice(first, batch_size)
    for _ in range(missing):
        yield first_row(folder, shards).slice(0, 0)


def first_row(folder: str, shards: Shards) -> pa.Table:
    """One row of the split: what a rank without rows runs through a model whose parameters others wait for."""
    return next(table for table in _own_rows(folder, shards, 0, 1) if table.num_rows).slice(0, 1)


def _own_rows(folder: str, shards: Shards, rank: int, world: int) -> Iterator[pa.Table]:
    """Row group by row group, the rows whose number in the split, `position`, is `rank` modulo `world`."""
    first = 0
    for shard in shards:
        with _parquet(storage.join(folder, shard["path"])) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, use_threads=False)
                own = np.arange((rank - first) % world, table.num_rows, world)
                yield table.take(own).append_column("position", pa.array(first + own))
                first += table.num_rows


def _tables_of(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` rows; the last may have fewer, and none is empty."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(part.num_rows for part in held) >= rows:
            whole = pa.concat_tables(held)
            yield whole.slice(0, rows).combine_chunks()
            held = [whole.slice(rows)]
    if sum(part.num_rows for part in held):
        yield pa.concat_tables(held).combine_chunks()
