"""How prepared rows reach the steps: one stream, in the order that `order.py` says, on any number of workers.

    one reading task per few windows  ->  one one-row block per rank  ->  streaming_split(n)  ->  the worker slices

A Ray Data execution spans all epochs still to come. With `preserve_order` and blocks of one row each, the split deals
blocks like cards, whatever the speed of readers and consumers: each worker gets exactly its own, and checks that.

Where there is little to read and nothing to vary, workers read it themselves (`window.local_shares`), in the same
order: sooner than Ray Data starts the processes that would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.data import DataIterator, Dataset, ExecutionOptions, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.train import DataConfig

from rayft.data.order import Order, Position
from rayft.data.read import Shards
from rayft.data.window import Cutter, Share, read_windows, readings
from rayft.tasks.task import Task

READERS = 2  # tasks that read at once
LITTLE_BYTES = 16 * 2**20  # of a split, which each worker may read whole in every epoch
AHEAD_BYTES = 64 * 2**20  # what may wait in the object store for slower workers, besides what readers hold


# On the driver


def streams(wanted: Literal["auto", "on", "off"], shards: Shards, varies: bool) -> bool:
    """Does Ray Data read for the workers, or do they read themselves? `wanted` is the recipe's `data.stream`."""
    if wanted == "auto":
        return varies or sum(shard["bytes"] for shard in shards) > LITTLE_BYTES
    return wanted == "on"


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
    """The reading tasks for all windows that are still to come."""

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
        self.tasks, most = [], 0
        for reading in readings(folder, shards, order, start, total_steps, world, task):
            size = int(reading.rows * bytes_per_row)
            most = max(most, size)
            metadata = BlockMetadata(world, size, input_files=None, exec_stats=None)
            self.tasks.append(ReadTask(partial(read_windows, reading), metadata))
        self.bytes_ahead = AHEAD_BYTES + READERS * most

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return self.tasks


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
        self._step = order.step(position)
        self._cut = Cutter(order, world, rank, micro_batch_size)

    def __iter__(self) -> Iterator[Share]:
        blocks = iter(self._iterator.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1))
        while (block := self._next(blocks)) is not None:
            for share in self._cut(block, self._step):
                yield share
                self._step += 1

    def _next(self, blocks: Iterator[pa.Table]) -> pa.Table | None:
        began = time.perf_counter()
        block = next(blocks, None)
        self.waited += time.perf_counter() - began
        return block
