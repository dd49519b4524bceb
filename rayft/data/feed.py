"""How prepared rows reach the steps: one stream, in the order that `order.py` says, on any number of workers.

    one reading task per window  ->  one one-row block per rank  ->  streaming_split(n)  ->  the worker slices

A Ray Data execution spans all epochs still to come. With `preserve_order` and blocks of one row each, the split deals
blocks like cards, whatever the speed of readers and consumers: each worker gets exactly its own, and checks that.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import DataIterator, Dataset, ExecutionOptions, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.train import DataConfig

from rayft import storage
from rayft.data.order import (
    WINDOW_BYTES,
    Chunk,
    Order,
    Part,
    Piece,
    Position,
    batches,
    micro_batches,
    row_generator,
    share,
)
from rayft.errors import Damaged, TrainingError
from rayft.retry import telling
from rayft.tasks.task import Task

Shards = Sequence[Mapping[str, Any]]  # of a manifest: {path, rows, row_groups, bytes, ...}

READERS = 2  # windows read at once
AHEAD_BYTES = 64 * 2**20  # what may wait in the object store for slower workers, besides one window per reader
BUFFERED = 32  # batches of an evaluation among which rows are sorted by length


@dataclass(frozen=True)
class Share:
    """What one rank has to do in one optimizer step.

    step        optimizer steps before this one, over all epochs
    rows        this rank's rows of the global batch, possibly none
    rows_total  rows of the global batch, over all ranks
    micro       `rows` cut into micro-batches: as many on every rank, so that some may be empty
    spare       one row to run through the model, not to learn from, where a micro-batch is empty and others wait for it
    """

    epoch: int
    step: int
    rows: pa.Table
    rows_total: int
    micro: list[pa.Table]
    spare: pa.Table


def order_of(shards: Shards, global_batch_size: int, seed: int, shuffle: bool) -> Order:
    """The order of a prepared split, from its manifest's shards."""
    chunks = [Chunk(i, group, rows) for i, s in enumerate(shards) for group, rows in enumerate(s["row_groups"])]
    rows = sum(chunk.rows for chunk in chunks)
    bytes_per_row = sum(shard["bytes"] for shard in shards) / max(1, rows)
    return Order(chunks, global_batch_size, seed, shuffle, bytes_per_row=bytes_per_row)


# On the driver


class Feed(DataConfig):
    """Ray Train's data configuration: asked for the workers' iterators at every start of the worker group.

    `position` says where to go on, usually by reading the last commit; it is called at each of these starts and must be
    picklable. Use: `TorchTrainer(..., datasets=Feed.datasets(), dataset_config=feed)`, on the worker
    `ray.train.get_dataset_shard(Feed.NAME)` and `Shares`.
    """

    NAME = "train"

    def __init__(
        self,
        folder: str,
        shards: Shards,
        order: Order,
        total_steps: int,
        position: Callable[[], Position],
        task: Task | None = None,
    ):
        super().__init__()
        self._dataset = partial(train_dataset, folder, shards, order, total_steps=total_steps, task=task)
        self._position = position

    @classmethod
    def datasets(cls) -> dict[str, Dataset | Callable[[], Dataset]]:
        """What the trainer wants as `datasets`: a name. The dataset itself is made by `configure`."""
        return {cls.NAME: partial(ray.data.range, 1)}

    def configure(self, datasets: Any, world_size: int, *args: Any, **kwargs: Any) -> list[dict[str, DataIterator]]:
        """One iterator per rank."""
        dataset = self._dataset(start=self._position(), world=world_size)
        splits = dataset.streaming_split(world_size, equal=False, locality_hints=None)
        return [dict.fromkeys(datasets, split) for split in splits]


def train_dataset(
    folder: str,
    shards: Shards,
    order: Order,
    *,
    start: Position,
    total_steps: int,
    world: int,
    task: Task | None = None,
) -> Dataset:
    """The blocks for `world` ranks of all steps from `start` to the end of a run of `total_steps` optimizer steps.

    `folder` holds the prepared split; `task` is given where rows vary by epoch.
    """
    source = Windows(folder, shards, order, start, total_steps, world, task)
    tasks = max(1, len(source.tasks))
    # Reading takes no CPU of its own: with every CPU given to the workers, a reader that needs one would never start.
    dataset = ray.data.read_datasource(source, num_cpus=0, concurrency=min(READERS, tasks), override_num_blocks=tasks)
    context = dataset.context
    context.target_max_block_size = 1  # or blocks are merged
    context.enable_progress_bars = False
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources.for_limits(object_store_memory=source.bytes_ahead)
    )
    return dataset


class Windows(Datasource):
    """One reading task for each window that is still to come."""

    def __init__(
        self,
        folder: str,
        shards: Shards,
        order: Order,
        start: Position,
        total_steps: int,
        world: int,
        task: Task | None,
    ):
        super().__init__()
        bytes_per_row = sum(shard["bytes"] for shard in shards) / order.rows
        self.bytes_ahead = AHEAD_BYTES + int(READERS * order.window_rows * bytes_per_row)
        paths = [storage.join(folder, shard["path"]) for shard in shards]
        self.tasks = []
        for part in order.parts(start, total_steps):
            own = {piece.shard: paths[piece.shard] for piece in part.window.pieces}
            read = partial(read_window, part, own, world, order.global_batch_size, order.seed, order.shuffle, task)
            size = int(part.window.rows * bytes_per_row)
            self.tasks.append(ReadTask(read, BlockMetadata(world, size, input_files=None, exec_stats=None)))

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return self.tasks


# In a reading task


def read_window(
    part: Part, paths: dict[int, str], world: int, size: int, seed: int, shuffle: bool, task: Task | None
) -> Iterator[pa.Table]:
    """Yields one block of one row for each rank: its rows of all steps of `part`, in their order, and how to cut them.

    `paths` are those of the window's shards, `size` is the global batch size.
    """
    window = part.window
    rows = read_pieces(paths, window.pieces)
    lengths = rows["length"].to_numpy()
    todo = batches(window, lengths, size, seed, shuffle)[part.start : part.stop]
    for rank in range(world):
        shares = [batch[share(len(batch), world, rank)] for batch in todo]
        own, spare = rows.take(np.concatenate(shares)), rows.slice(0, 1)
        if task is not None and task.varies:
            own, spare = (varied(table, task, seed, window.epoch) for table in (own, spare))
        yield pa.table(
            {
                "epoch": [window.epoch],
                "step": [window.first_step + part.start],
                "rank": [rank],
                "own": [[len(numbers) for numbers in shares]],
                "total": [[len(numbers) for numbers in todo]],
                "rows": _value(own),
                "spare": _value(spare),
            }
        )


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


def varied(rows: pa.Table, task: Task, seed: int, epoch: int) -> pa.Table:
    """`rows` as `Task.vary` makes them for this epoch, whatever the place of a row and the rank it goes to."""
    schema = task.arrow_schema(evaluation=False)
    features: dict[str, list[Any]] = {name: [] for name in schema.names}
    for row_id, row in zip(rows["row_id"].to_pylist(), rows.select(schema.names).to_pylist(), strict=True):
        changed = task.vary({name: [value] for name, value in row.items()}, row_generator(seed, epoch, row_id))
        for name, values in features.items():
            values.extend(changed[name])
    for name, values in features.items():
        rows = rows.set_column(
            rows.column_names.index(name), schema.field(name), pa.array(values, schema.field(name).type)
        )
    return rows


def _value(table: pa.Table) -> pa.Array:
    """A table as one binary value: the Arrow stream, not copied again."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    stream = sink.getvalue()
    ends = pa.py_buffer(np.array([0, stream.size], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, stream])


# On a worker


class Shares:
    """The shares of one rank, one per optimizer step, from `position` to the end of the run.

    `iterator` is the rank's split. `waited` is the time in seconds that the consumer has waited for data so far; the
    next block is fetched while the consumer works.
    """

    def __init__(
        self, iterator: DataIterator, order: Order, position: Position, world: int, rank: int, micro_batch_size: int
    ):
        self.waited = 0.0
        self._iterator = iterator
        self._order = order
        self._step = order.step(position)
        self._world = world
        self._rank = rank
        self._micro_batch_size = micro_batch_size

    def __iter__(self) -> Iterator[Share]:
        blocks = iter(self._iterator.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1))
        while (block := self._next(blocks)) is not None:
            yield from self._cut(block)

    def _next(self, blocks: Iterator[pa.Table]) -> pa.Table | None:
        began = time.perf_counter()
        block = next(blocks, None)
        self.waited += time.perf_counter() - began
        return block

    def _cut(self, block: pa.Table) -> Iterator[Share]:
        at = self._order.position(self._step)
        found = tuple(block[name].to_pylist() for name in ("epoch", "step", "rank"))
        if found != ([at.epoch], [at.step], [self._rank]):
            raise TrainingError(
                f"the feed gave rank {self._rank} of {self._world} a block of (epoch, step, rank) {found} where epoch "
                f"{at.epoch}, step {at.step} was to come: the order of the data is broken, so the run was stopped"
            )
        rows, spare = (pa.ipc.open_stream(block[name][0].as_buffer()).read_all() for name in ("rows", "spare"))
        first = 0
        for own, total in zip(block["own"][0].as_py(), block["total"][0].as_py(), strict=True):
            mine = rows.slice(first, own)
            cuts = micro_batches(total, self._world, self._rank, self._micro_batch_size)
            micro = [mine.slice(cut.start, cut.stop - cut.start) for cut in cuts]
            yield Share(at.epoch, self._step, mine, total, micro, spare)
            first += own
            self._step += 1


# For evaluation


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
