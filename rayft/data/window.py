"""One window of the order: read from its shards, dealt to the ranks, and cut into the shares of their steps. No Ray.

`feed.py` has windows read by tasks elsewhere, for many workers; `local_shares` reads them where they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayft import storage
from rayft.data.order import Chunk, Order, Part, Position, batches, micro_batches, row_generator, share
from rayft.data.read import Shards, firsts, read_pieces
from rayft.errors import TrainingError
from rayft.tasks.task import Task


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


@dataclass(frozen=True)
class Reading:
    """All that it takes to read one window, as plain data; `task` is given where rows vary by epoch.

    paths    of the window's shards, by their number
    firsts   (shard, row group) -> the number in the split of its first row
    size     the global batch size
    """

    part: Part
    paths: dict[int, str]
    firsts: dict[tuple[int, int], int]
    world: int
    size: int
    seed: int
    shuffle: bool
    task: Task | None


def readings(
    folder: str, shards: Shards, order: Order, start: Position, total_steps: int, world: int, task: Task | None
) -> Iterator[Reading]:
    """What is still to be read, from `start` to the end of a run of `total_steps` optimizer steps."""
    paths = [storage.join(folder, shard["path"]) for shard in shards]
    numbers = firsts(shards)
    for part in order.parts(start, total_steps):
        pieces = part.window.pieces
        own = {piece.shard: paths[piece.shard] for piece in pieces}
        begin = {(piece.shard, piece.group): numbers[piece.shard, piece.group] for piece in pieces}
        yield Reading(part, own, begin, world, order.global_batch_size, order.seed, order.shuffle, task)


def read_window(reading: Reading) -> Iterator[pa.Table]:
    """Yields one block of one row for each rank: its rows of all steps, in their order, and how to cut them.

    Their column `position` is a row's number in the split.
    """
    part, world, task = reading.part, reading.world, reading.task
    window = part.window
    rows = read_pieces(reading.paths, window.pieces)
    begin = [(reading.firsts[piece.shard, piece.group], piece) for piece in window.pieces]
    numbers = np.concatenate([np.arange(first + piece.start, first + piece.stop) for first, piece in begin])
    rows = rows.append_column("position", pa.array(numbers, pa.int64()))
    lengths = rows["length"].to_numpy()
    todo = batches(window, lengths, reading.size, reading.seed, reading.shuffle)[part.start : part.stop]
    for rank in range(world):
        shares = [batch[share(len(batch), world, rank)] for batch in todo]
        own, spare = rows.take(np.concatenate(shares)), rows.slice(0, 1)
        if task is not None and task.varies:
            own, spare = (varied(table, task, reading.seed, window.epoch) for table in (own, spare))
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
            cuts = micro_batches(total, self.world, self.rank, self.micro_batch_size)
            micro = [mine.slice(cut.start, cut.stop - cut.start) for cut in cuts]
            yield Share(at.epoch, step, mine, total, micro, spare)
            first += own
            step += 1


def local_shares(
    folder: str,
    shards: Shards,
    order: Order,
    start: Position,
    total_steps: int,
    micro_batch_size: int,
    task: Task | None,
) -> Iterator[Share]:
    """The shares of a single worker, whose process reads them itself: the next window while it works on this one."""
    cutter, step = Cutter(order, 1, 0, micro_batch_size), order.step(start)
    todo = readings(folder, shards, order, start, total_steps, 1, task)
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(_only, reading) for _, reading in zip(range(1), todo, strict=False)]
        while ahead:
            block = ahead.pop().result()
            ahead.extend(pool.submit(_only, reading) for _, reading in zip(range(1), todo, strict=False))
            for share_of_step in cutter(block, step):
                yield share_of_step
                step += 1


def _only(reading: Reading) -> pa.Table:
    return next(read_window(reading))
