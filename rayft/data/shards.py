"""What preparation does on the workers: read rows, encode them, scatter the features over shards, write each shard.

The scattering is a shuffle through storage. An encoded batch is written as one scratch file that holds, shard by shard,
an Arrow stream; its index goes to the driver, and whoever writes a shard reads its part of each file. A file that a
lost worker left behind is in no index, so nothing is counted twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rayft import retry, storage
from rayft.data import places
from rayft.data.pack import pack, packed_table
from rayft.data.pieces import Fragment, row_id
from rayft.data.source import BadRow, Rows, read
from rayft.models import fetch_model
from rayft.recipe import Source
from rayft.tasks.task import Encoded, Pretrained, Task

ENCODE_ROWS = 256  # rows that the task encodes at once
GROUP_ROWS = 512  # rows of a row group: a chunk of the order
GROUP_BYTES = 8 << 20
SHARD_ROWS = 16_384  # rows of a shard in the source's order
EXAMPLES = 10
_READERS = 8
_SCRATCH_ONLY = ("_place", "_feature")


@dataclass(frozen=True)
class Encoder:
    """What turns rows into features.

    source     the recipe's model.path, for machines that lack the model's folder
    processor  what identifies the processor: a process outlives a change of the files behind one path
    """

    task: Task
    model: Pretrained
    source: str
    processor: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How one split is prepared. No task is in it: unpickled on a worker, it would bring torch to those who only read.

    folder      where its scratch files and shards go, given to this attempt alone
    names       their column names -> ours; `columns` are the ones that the task asks for
    evaluation  the features are for evaluation: with references, without weights
    in_order    the source's order; else that of the hash
    capacity    tokens of a packed row; None: not packed
    shards      number of shards in the order of the hash
    groups      (group, alone) of each file: files that share a shard, or one that makes several
    blob        about how many bytes of memory the rows take that go to an encoder at once
    threshold   rows with a cut hash up to this one belong to validation; `cut` says whether this split is that one
    """

    folder: str
    sources: tuple[Source, ...]
    names: dict[str, str]
    columns: tuple[str, ...]
    evaluation: bool
    in_order: bool
    capacity: int | None
    shards: int
    groups: tuple[tuple[int, bool], ...]
    blob: int
    threshold: int | None
    cut: bool

    def takes(self, file: int, numbers: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which rows of a file belong to this split."""
        if self.threshold is None:
            return np.ones(len(numbers), bool)
        hashes = places.cut_hashes(row_id(file, np.asarray(numbers, np.int64)))
        return (hashes <= np.uint64(self.threshold)) == self.cut


@dataclass(frozen=True)
class Blob:
    """Rows on the way from a reader to an encoder: batches with the fragment they came from."""

    split: str
    batches: list[tuple[Fragment, Rows]]


@dataclass
class Counts:
    """What was seen of a split. `lengths` counts features by the upper bound of their size, see `bound`.

    `met` are (source, place in `asked(where)`) of the values that some row has.
    """

    source_rows: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    bad: int = 0
    examples: list[tuple[int, int, str]] = field(default_factory=list)  # (file, row, sentence), the first in order
    met: set[tuple[int, int]] = field(default_factory=set)

    def add(self, other: Counts) -> None:
        self.source_rows += other.source_rows
        self.truncated += other.truncated
        self.dropped += other.dropped
        self.lengths += other.lengths
        self.bad += other.bad
        self.examples = sorted(self.examples + other.examples)[:EXAMPLES]
        self.met |= other.met

    def add_bad(self, file: int, row: BadRow) -> None:
        self.bad += 1
        self.examples = sorted([*self.examples, (file, row.row, str(row))])[:EXAMPLES]


@dataclass(frozen=True)
class Scattered:
    """One scratch file: `pieces` are (shard, offset, length in bytes); path None where no feature came out."""

    split: str
    path: str | None
    pieces: list[tuple[int, int, int]]
    counts: Counts


@dataclass(frozen=True)
class Shard:
    """A shard to write: its place among the split's, and its pieces (path, offset, length) in the scratch files."""

    split: str
    number: int
    pieces: list[tuple[str, int, int]]


@dataclass(frozen=True)
class Written:
    """A shard in its place; `entry` is what the manifest says of it."""

    split: str
    number: int
    entry: dict[str, Any]
    tokens: int
    longest: int


def read_rows(unit: tuple[str, Sequence[Fragment]], plans: dict[str, Plan]) -> Iterator[Blob]:
    """The rows of a split's fragments, about `blob` bytes at a time."""
    split, fragments = unit
    plan = plans[split]
    batches: list[tuple[Fragment, Rows]] = []
    size = 0
    for fragment in fragments:
        source = plan.sources[fragment.source]
        for rows in read(fragment, source, plan.names, plan.columns, ENCODE_ROWS):
            own = rows if plan.threshold is None else _own(rows, plan, fragment.file)
            batches.append((fragment, own))
            size += _size(own.columns)
            if size >= plan.blob:
                yield Blob(split, batches)
                batches, size = [], 0
    if batches:
        yield Blob(split, batches)


def _own(rows: Rows, plan: Plan, file: int) -> Rows:
    """Those of `rows` that belong to the split."""
    mine = np.flatnonzero(plan.takes(file, rows.numbers)).tolist()
    bad = plan.takes(file, [row.row for row in rows.bad])
    return Rows(
        {name: [values[i] for i in mine] for name, values in rows.columns.items()},
        [rows.numbers[i] for i in mine],
        [rows.lines[i] for i in mine],
        [row for row, own in zip(rows.bad, bad, strict=True) if own],
        rows.met,
    )


def _size(value: Any) -> int:
    """About how many bytes of memory a value takes: in short rows most of them are Python's own."""
    if isinstance(value, str | bytes):
        return 64 + len(value)
    if isinstance(value, dict):
        return 64 + sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return 64 + sum(map(_size, value))
    return 32


def encode_rows(blob: Blob, plans: dict[str, Plan], encoder: Encoder) -> Iterator[Scattered]:
    """Encodes a blob and writes its features as one scratch file."""
    plan, counts = plans[blob.split], Counts()
    tables: list[pa.Table] = []
    shards: list[npt.NDArray[np.int64]] = []
    for fragment, rows in blob.batches:
        counts.met.update((fragment.source, place) for place in rows.met)
        for row in rows.bad:
            counts.add_bad(fragment.file, row)
        if not rows.numbers:
            continue
        encoded = encoder.task.encode(rows.columns, _loaded(encoder), encoder.facts, evaluation=plan.evaluation)
        counts.source_rows += len(rows.numbers) - len(encoded.bad)
        counts.truncated += len(encoded.truncated)
        counts.dropped.update(encoded.dropped.values())
        for index, reason in sorted(encoded.bad.items()):
            counts.add_bad(fragment.file, BadRow(fragment.path, rows.numbers[index], reason, rows.lines[index]))
        if encoded.rows:
            table = _table(encoded, encoder.task.arrow_schema(plan.evaluation), fragment, rows, plan)
            counts.lengths.update(bound(length) for length in table["length"].to_pylist())
            tables.append(table)
            shards.append(_shards(table, fragment.file, plan))
    table = pa.concat_tables(tables) if tables else None
    if table is None or not table.num_rows:
        yield Scattered(blob.split, None, [], counts)
        return
    content, pieces = _streams(table, np.concatenate(shards))
    path = storage.join(plan.folder, "scratch", f"{uuid.uuid4().hex}.arrow")
    storage.write_bytes(path, content)
    yield Scattered(blob.split, path, pieces, counts)


def _loaded(encoder: Encoder) -> Any:
    wanted = (encoder.task, encoder.model, encoder.source, encoder.processor)
    if _kept.of != wanted:
        with _making:
            _kept.processor, _kept.of = _processor(encoder), wanted
    return _kept.processor


class _Kept(threading.local):
    """A thread's processor: two may not use one at once, and making one takes as long as thousands of rows."""

    of: tuple[Any, ...] | None = None
    processor: Any = None


_kept = _Kept()
_making = threading.Lock()  # diffusers is half there for a thread that imports it while another one does


def _processor(encoder: Encoder) -> Any:
    model = encoder.model
    if os.path.isabs(model.path) and not os.path.isdir(model.path):  # another machine than the driver's
        model = Pretrained(fetch_model(encoder.source), model.revision, trust_remote_code=model.trust_remote_code)
    return encoder.task.processor(model)


def _table(encoded: Encoded, schema: pa.Schema, fragment: Fragment, rows: Rows, plan: Plan) -> pa.Table:
    """The features with their row's id, length, reference and place, repeated as the source's weight says."""
    columns = {name: pa.array(encoded.features[name], schema.field(name).type) for name in schema.names}
    owners = np.asarray(encoded.rows, np.int64)
    ids = row_id(fragment.file, np.asarray(rows.numbers, np.int64))[owners]
    columns["row_id"] = pa.array(ids)
    columns["length"] = pa.array(encoded.lengths, pa.int32())
    if plan.evaluation:
        references = encoded.references if encoded.references is not None else [None] * len(owners)
        texts = [None if truth is None else json.dumps(truth, ensure_ascii=False) for truth in references]
        columns["reference"] = pa.array(texts, pa.string())
    table = pa.table(columns)
    # The first feature of each row, to number a row's features from 0.
    begins = np.flatnonzero(np.diff(owners, prepend=-1))
    feature = np.arange(len(owners)) - np.repeat(begins, np.diff(begins, append=len(owners)))
    copy = np.zeros(len(owners), np.int64)
    weight = plan.sources[fragment.source].weight
    if weight != 1.0 and not plan.evaluation:
        often = places.times(ids, weight)
        taken = np.repeat(np.arange(len(owners)), often)
        copy = np.arange(len(taken)) - np.repeat(np.cumsum(often) - often, often)
        table, ids, feature = table.take(pa.array(taken)), ids[taken], feature[taken]
    place = places.places(ids, copy) if not plan.in_order else copy.astype(np.uint64)
    return table.append_column("_place", pa.array(place)).append_column("_feature", pa.array(feature, pa.int32()))


def _shards(table: pa.Table, file: int, plan: Plan) -> npt.NDArray[np.int64]:
    """The shard of each feature: any ascending numbers, which the driver makes consecutive."""
    if not plan.in_order:
        return (table["_place"].to_numpy() % np.uint64(plan.shards)).astype(np.int64)
    if plan.cut:  # few rows, from wherever
        return np.zeros(table.num_rows, np.int64)
    group, alone = plan.groups[file]
    numbers = table["row_id"].to_numpy() - row_id(file, 0)
    return (group << 32) + (numbers // SHARD_ROWS if alone else np.zeros_like(numbers))


def _streams(table: pa.Table, shards: npt.NDArray[np.int64]) -> tuple[bytes, list[tuple[int, int, int]]]:
    """An Arrow stream per shard, one after the other, and where each lies."""
    order = np.argsort(shards, kind="stable")
    table = table.take(pa.array(order)).combine_chunks()
    values, starts = np.unique(shards[order], return_index=True)
    sink = pa.BufferOutputStream()
    pieces = []
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for shard, start, stop in zip(values.tolist(), starts, [*starts[1:], table.num_rows], strict=True):
        begin = sink.tell()
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table.slice(start, stop - start))
        pieces.append((shard, begin, sink.tell() - begin))
    return sink.getvalue().to_pybytes(), pieces


def write_shard(shard: Shard, plans: dict[str, Plan]) -> Iterator[Written]:
    """Brings a shard's pieces together in their order, packs them where the task does, and writes its Parquet file."""
    plan = plans[shard.split]
    table = _gathered(shard.pieces)
    keys = ["row_id", "_place", "_feature"] if plan.in_order else ["_place", "row_id", "_feature"]
    table = table.sort_by([(key, "ascending") for key in keys]).drop_columns(list(_SCRATCH_ONLY))
    if plan.capacity is not None:
        table = packed_table(table, pack(table["length"].to_numpy(), plan.capacity, in_order=plan.in_order))
    table = table.combine_chunks()
    rows = table.num_rows
    group = max(1, min(GROUP_ROWS, GROUP_BYTES * rows // max(1, table.nbytes)))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=group, compression="zstd", write_page_checksum=True)
    content = sink.getvalue().to_pybytes()
    name = f"{shard.number:05d}.parquet"
    storage.write_bytes(storage.join(plan.folder, name), content)
    entry = {
        "path": storage.join(os.path.basename(plan.folder), name),
        "rows": rows,
        "row_groups": [min(group, rows - start) for start in range(0, rows, group)],
        "bytes": table.nbytes,
        "checksum": hashlib.sha256(content).hexdigest(),
    }
    lengths = table["length"].to_numpy()
    yield Written(shard.split, shard.number, entry, int(lengths.sum()), int(lengths.max()))


def _gathered(pieces: Sequence[tuple[str, int, int]]) -> pa.Table:
    def fetched(piece: tuple[str, int, int]) -> pa.Table:
        path, offset, length = piece
        filesystem, inside = storage.arrow(path)
        with retry.telling(path, "reading"), filesystem.open_input_file(inside) as file:
            return pa.ipc.open_stream(file.read_at(length, offset)).read_all()

    with ThreadPoolExecutor(_READERS) as pool:
        return pa.concat_tables(list(pool.map(fetched, pieces)))


def bound(length: int) -> int:
    """The upper bound of the class of lengths that `length` falls into: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, …"""
    top = 1 << max(0, length - 1).bit_length()
    return top * 3 // 4 if top >= 4 and length <= top * 3 // 4 else top
