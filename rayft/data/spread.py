"""Runs functions over units of work across the cluster: the one place where preparation starts a Ray Data execution."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rayft.errors import RayftError

Stage = Callable[[Any], Iterator[Any]]

# The first execution takes 12 s to start on two cores, which import Ray Data and the task's libraries in each process;
# another one 3 s. So much one process meanwhile reads or writes, or encodes.
READ_BYTES = 32 << 20
ENCODE_BYTES = 10 << 20


# One of two threads is in a library while Python runs in the other. That is worth 1.7 of one where a tokenizer does the
# most of the work, and 1.2 where Python has as much to do (measured on two cores; more threads would add nothing).
THREADS = 2
WORTH = 1.5


def sooner_here(size: int, meanwhile: int, processors: int, worth: float = 1.0) -> bool:
    """Has this process done the work on `size` bytes before others have started and done it?

    `meanwhile` is how much one thread does while they start. From then on they do as many times as much as there are
    `processors`; this process does `worth` times as much from the beginning.
    """
    worth = min(worth, processors)
    return size * (processors - worth) <= meanwhile * processors * worth


def processors() -> int:
    """Of the whole cluster, or without one of this machine.

    A cluster that was started here is told more than there are, so that readers find room.
    """
    import ray

    if not ray.is_initialized():
        return os.cpu_count() or 1
    there = int(ray.cluster_resources().get("CPU", 1))
    alone = sum(node["Alive"] for node in ray.nodes()) == 1
    return max(1, min(there, os.cpu_count() or 1) if alone else there)


def spread(
    units: Sequence[Any], *stages: Stage, in_order: bool = False, here: bool = False
) -> Generator[Any, None, None]:
    """Passes each unit through the first stage, each of its results through the second, and so on; yields the last's.

    Stages give results as they go, each a block of its own, so that nobody holds more than a few. They come as they are
    made, or with `in_order` in the units' order. A RayftError that a stage raises is raised here as it was. Units,
    stages and results have to be picklable; Ray has to be initialised. With `here` this process does all of the work,
    which is sooner done than started where there is little of it: this thread the first stage, two others the rest.
    """
    if here:
        yield from _here(units, stages)
        return
    import ray

    items = [{"item": packed(unit)} for unit in units]
    dataset: Any = ray.data.from_items(items, override_num_blocks=len(items))
    # Fewer inputs than tasks allowed at once are no fault.
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks for", UserWarning)
    cpus, room = processors(), int(ray.cluster_resources().get("CPU", 1))
    for number, stage in enumerate(stages):
        # Readers before another stage take no CPU of their own: paused by a full queue they would hold one that the
        # stage behind them waits for. Differing resources also keep Ray from fusing the two, so that one file's rows
        # are encoded by many.
        reads = number < len(stages) - 1
        # Each process imports for seconds, and more of them than processors hold each other up.
        most = max(1, cpus // 2) if reads else cpus if cpus < room else None
        dataset = dataset.map_batches(
            Batched(stage),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0 if reads else 1,
            compute=ray.data.TaskPoolStrategy(size=most),
        )
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # or results wait until 128 MB of them have come together
    context.execution_options.preserve_order = in_order
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for item in batch["item"]:
            yield unpacked(item.as_buffer())


def _here(units: Sequence[Any], stages: Sequence[Stage]) -> Iterator[Any]:
    """In the units' order; each thread holds what the later stages make of one result of the first."""
    first = _through(units, stages[:1])
    if len(stages) == 1:
        yield from first
        return
    with ThreadPoolExecutor(THREADS) as pool:
        working: deque[Future[list[Any]]] = deque()
        try:
            for item in first:
                working.append(pool.submit(lambda item: list(_through([item], stages[1:])), item))
                if len(working) > THREADS:
                    yield from working.popleft().result()
            while working:
                yield from working.popleft().result()
        finally:
            for future in working:
                future.cancel()


def _through(items: Iterable[Any], stages: Sequence[Stage]) -> Iterator[Any]:
    if not stages:
        yield from items
        return
    for item in items:
        yield from _through(stages[0](item), stages[1:])


class Batched:
    """A stage as Ray Data calls it: blocks of pickled items to blocks of pickled items."""

    def __init__(self, stage: Stage):
        self._stage = stage

    def __call__(self, batch: Any) -> Iterator[Any]:
        try:
            for item in batch["item"]:
                for result in self._stage(unpacked(item.as_buffer())):
                    yield _block(packed(result))
        except RayftError as error:  # passed on as a result: Ray would wrap it in pages of its own
            yield _block(pickle.dumps(error))


def _block(item: bytes) -> Any:
    import pyarrow as pa

    return pa.table({"item": pa.array([item], pa.large_binary())})


def packed(item: Any) -> bytes:
    return pickle.dumps((item,), protocol=5)


def unpacked(item: Any) -> Any:
    content = pickle.loads(item)
    if isinstance(content, RayftError):
        raise content
    return content[0]
