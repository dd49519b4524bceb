"""Windows of the order: read from their shards, dealt to the ranks, and cut into the shares of their steps. No Ray.

`feed.py` has windows read by tasks elsewhere; `local_shares` reads them where they are used.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayft import storage
from rayft.data.order import WINDOW_BYTES, Order, Part, Position, batches, micro_batches, row_generator, share
from rayft.data.read import Shards, firsts, read_pieces
from rayft.errors import TrainingError
from rayft.tasks.task import Task

RANKS = 8  # for so many ranks a task reads one window, for twice as many two: each rank costs it a block


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


def order_of(
    shards: Shards, global_batch_size: int, seed: int, shuffle: bool, group: int = 1, alike: bool = True
) -> Order:
    """The order of a prepared split, from its manifest's shards: see `Order`."""
    counts = [len(shard["row_groups"]) for shard in shards]
    rows = np.fromiter(itertools.chain.from_iterable(shard["row_groups"] for shard in shards), np.int32, sum(counts))
    groups = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    chunks = np.stack([np.repeat(np.arange(len(counts)), counts), groups, rows], axis=1)
    bytes_per_row = sum(shard["bytes"] for shard in shards) / max(1, int(rows.sum(dtype=np.int64)))
    return Order(chunks, global_batch_size, seed, shuffle, bytes_per_row=bytes_per_row, group=group, alike=alike)


@dataclass(frozen=True)
class Reading:
    """All that it takes to read windows of one epoch, as plain data; `task` is given where rows vary by epoch.

    parts    of the windows, one after the other
    paths    of their shards, by their number
    firsts   of each piece, in their order, the number in the split of its first row
    size     the global batch size
    group    how many consecutive rows of a global batch go to one rank together
    """

    parts: tuple[Part, ...]
    paths: dict[int, str]
    firsts: tuple[int, ...]
    world: int
    size: int
    group: int
    seed: int
    shuffle: bool
    alike: bool
    task: Task | None

    @property
    def rows(self) -> int:
        return sum(part.window.rows for part in self.parts)


def windows_at_once(world: int, window_bytes: float) -> int:
    """How many windows one task reads for `world` ranks.

    What a split passes on in a second is a number of blocks, whatever they hold: with one window for any number of
    ranks, each would get the less often the more they are. Together they take no more memory than one window may.
    """
    return max(1, min(world // RANKS, int(WINDOW_BYTES // max(1.0, window_bytes))))


def readings(
    folder: str, shards: Shards, order: Order, start: Position, total_steps: int, world: int, task: Task | None
) -> Iterator[Reading]:
    """What is still to be read, from `start` to the end of a run of `total_steps` optimizer steps."""
    paths = [storage.join(folder, shard["path"]) for shard in shards]
    numbers = firsts(shards)
    bytes_per_row = sum(shard["bytes"] for shard in shards) / order.rows
    together = windows_at_once(world, order.window_rows * bytes_per_row)
    for _, epoch in itertools.groupby(order.parts(start, total_steps), lambda part: part.window.epoch):
        while parts := tuple(itertools.islice(epoch, together)):
            pieces = [piece for part in parts for piece in part.window.pieces]
            own = {piece.shard: paths[piece.shard] for piece in pieces}
            begin = tuple(int(numbers[piece.shard][piece.group]) + piece.start for piece in pieces)
            size, group = order.global_batch_size, order.group
            yield Reading(parts, own, begin, world, size, group, order.seed, order.shuffle, order.alike, task)


def read_windows(reading: Reading, rank: int | None = None) -> Iterator[pa.Table]:
    """Yields one block of one row for each rank, or for `rank` alone: its rows of all steps, in their order, and how to
    cut them.

    Their column `position` is a row's number in the split.
    """
    parts, world, task = reading.parts, reading.world, reading.task
    epoch, pieces = parts[0].window.epoch, [piece for part in parts for piece in part.window.pieces]
    rows = read_pieces(reading.paths, pieces)
    begin = zip(reading.firsts, pieces, strict=True)
    numbers = np.concatenate([np.arange(first, first + piece.stop - piece.start) for first, piece in begin])
    rows = rows.append_column("position", pa.array(numbers, pa.int64()))
    todo = _batches(reading, rows["length"].to_numpy())
    for one in range(world) if rank is None else [rank]:
        shares = [batch[share(len(batch), world, one, reading.group)] for batch in todo]
        own, spare = rows.take(np.concatenate(shares)), rows.slice(0, 1)
        if task is not None and task.varies:
            own, spare = (varied(table, task, reading.seed, epoch) for table in (own, spare))
        yield pa.table(
            {
                "epoch": [epoch],
                "step": [parts[0].window.first_step + parts[0].start],
                "rank": [one],
                "own": [[len(numbers) for numbers in shares]],
                "total": [[len(numbers) for numbers in todo]],
                "rows": _value(own),
                "spare": _value(spare),
            }
        )


def _batches(reading: Reading, lengths: np.ndarray) -> list[np.ndarray]:
    """The global batches that are to be made of the reading's rows, whose lengths these are: indices of rows."""
    found, first = [], 0
    for part in reading.parts:
        own = lengths[first : first + part.window.rows]
        all_of_it = batches(part.window, own, reading.size, reading.seed, reading.shuffle, reading.alike)
        found += [first + batch for batch in all_of_it[part.start : part.stop]]
        first += len(own)
    return found


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


@dataclass(frozen=True)
class Cutter:
    """Cuts the blocks of rank `rank` of `world` into the shares of its steps."""

    order: Order
    world: int
    rank: int
    micro_batch_size: int

    def __call__(self, block: pa.Table, step: int) -> Iterator[Share]:
        """The shares of a block; `step` optimizer steps were made before. TrainingError where another was to come."""
        at = self.order.position(step)
        found = tuple(block[name].to_pylist() for name in ("epoch", "step", "rank"))
        if found != ([at.epoch], [at.step], [self.rank]):
            raise TrainingError(
                f"the feed gave rank {self.rank} of {self.world} a block of (epoch, step, rank) {found} where epoch "
                f"{at.epoch}, step {at.step} was to come: the order of the data is broken, so the run was stopped"
            )
        rows, spare = (pa.ipc.open_stream(block[name][0].as_buffer()).read_all() for name in ("rows", "spare"))
        first = 0
        for own, total in zip(block["own"][0].as_py(), block["total"][0].as_py(), strict=True):
            mine = rows.slice(first, own)
            cuts = micro_batches(total, self.world, self.rank, self.micro_batch_size, self.order.group)
            micro = [mine.slice(cut.start, cut.stop - cut.start) for cut in cuts]
            yield Share(at.epoch, step, mine, total, micro, spare)
            first += own
            step += 1


def local_shares(
    folder: str, shards: Shards, cutter: Cutter, start: Position, total_steps: int, task: Task | None
) -> Generator[Share, None, None]:
    """The shares of a worker whose process reads them itself: the next windows while it works on these.

    To be closed where not all are taken: its thread ends then.
    """
    order, rank, step = cutter.order, cutter.rank, cutter.order.step(start)
    todo = readings(folder, shards, order, start, total_steps, cutter.world, task)
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(_only, reading, rank) for _, reading in zip(range(1), todo, strict=False)]
        while ahead:
            block = ahead.pop().result()
            ahead.extend(pool.submit(_only, reading, rank) for _, reading in zip(range(1), todo, strict=False))
            for share_of_step in cutter(block, step):
                yield share_of_step
                step += 1


def _only(reading: Reading, rank: int) -> pa.Table:
    return next(read_windows(reading, rank))
