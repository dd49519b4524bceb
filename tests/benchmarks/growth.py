"""What grows with workers, rows and checkpoints' ranks: the parts of rayft that all of them pass through, one by one.

    python tests/benchmarks/growth.py [rows] [ranks] [board] [split]      (without names: all, some minutes)

    rows   the manifest and the order of 10^6 to 10^9 rows, and the reading tasks of one epoch for 8 workers
    ranks  a checkpoint of 50 parameters that 8 to 4,096 ranks wrote: its commit, and opening and reading it
    board  the driver's board with 8 to 4,096 ranks: processor time of a pulse and of the driver's look
    split  Ray Data's split among 8 to 512 consumers, threads of this process: the rows are tiny, the blocks real

There is no worker group and no model: the functions are rayft's own, and what calls them is made up; `growth_runs.py`
measures whole commands. Prints a Markdown table for each and one JSON line for all.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

Row = dict[str, float]

ROW_BYTES = 600  # in memory: 128 ids of 32 bits, a mask's share, length and number
SOURCE_BYTES = 400  # of a row of text, from which the number of shards follows
GLOBAL_BATCH = 256
PARAMETERS, ELEMENTS = 50, 4  # of a made-up model, and what each rank holds of a parameter


# Rows


def shards_for(rows: int) -> list[dict[str, Any]]:
    """What a manifest says of so many rows, by the rules of preparation."""
    from rayft.data.shards import GROUP_ROWS
    from rayft.data.splits import MOST_SHARDS, SHARD_BYTES

    count = max(1, min(MOST_SHARDS, rows * SOURCE_BYTES // SHARD_BYTES))
    shards = []
    for number in range(count):
        own = rows * (number + 1) // count - rows * number // count
        groups = [min(GROUP_ROWS, own - first) for first in range(0, own, GROUP_ROWS)]
        shards.append(
            {
                "path": f"attempt-0123456789ab/{number:05d}.parquet",
                "rows": own,
                "row_groups": groups,
                "bytes": own * ROW_BYTES,
                "checksum": "0" * 64,
            }
        )
    return shards


def rows(count: int) -> Row:
    from rayft import storage
    from rayft.data.feed import Windows
    from rayft.data.order import Position
    from rayft.data.prepared import Manifest, Prepared
    from rayft.data.window import order_of

    with tempfile.TemporaryDirectory() as folder:
        manifest = Manifest(
            key="0" * 32, split="train", order="hash", rows=count, source_rows=count, tokens=100 * count, longest=128,
            lengths=[], truncated=0, dropped={}, bad={"count": 0, "examples": []}, facts={}, shards=shards_for(count),
        )  # fmt: skip
        path = storage.join(folder, "manifest.json")
        storage.write_json(path, manifest.model_dump(mode="json"))
        del manifest
        size, before = os.path.getsize(path), memory()
        begun = time.perf_counter()
        shards = Prepared.open(folder).manifest.shards
        opened, after_open = time.perf_counter() - begun, memory()
        begun = time.perf_counter()
        order = order_of(shards, GLOBAL_BATCH, seed=0, shuffle=True)
        ordered, after_order = time.perf_counter() - begun, memory()
        begun = time.perf_counter()
        source = Windows(folder, shards, order, Position(), order.steps_per_epoch, 8, None)
        planned, after_plan = time.perf_counter() - begun, memory()
    return {
        "rows": count,
        "manifest_mb": size / 1e6,
        "open_s": opened,
        "open_mb": after_open - before,
        "order_s": ordered,
        "order_mb": after_order - after_open,
        "windows": order.windows_per_epoch,
        "tasks": len(source.tasks),
        "plan_s": planned,
        "plan_mb": after_plan - after_order,
    }


def memory() -> float:
    """Resident now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


# Ranks


def ranks(world: int) -> Row:
    import torch
    import torch.distributed as dist

    from rayft import attempts, storage
    from rayft.training import checkpoint, checkpoints
    from rayft.training.saver import Saver

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as run:
        attempts.claim(run, [], 0)
        saver = Saver(run, 1, 1, 600, None, lambda step: None)
        saver.world = world
        path = storage.join(saver.folder, checkpoints.folder_name(1, 1))
        names = [f"model.layers.{number}.self_attn.weight" for number in range(PARAMETERS)]
        shapes = {name: [world * ELEMENTS] for name in names}
        storage.write_json(
            storage.join(path, "state.json"), {"step": 1, "best": None, "world": world, "shapes": shapes}
        )
        begun = time.perf_counter()
        for rank in range(world):
            index = [
                {"key": key, "name": name, "start": rank * ELEMENTS, "length": ELEMENTS, "step": 1}
                for key, name in enumerate(names)
            ]
            tensors = {f"{key}.{kind}": torch.ones(ELEMENTS) for key in range(PARAMETERS) for kind in checkpoint.KINDS}
            checkpoint.write(path, rank, index, tensors)
        written = time.perf_counter() - begun
        begun = time.perf_counter()
        saver._commit(path, {"step": 1, "world": world, "best": None})
        committed = time.perf_counter() - begun
        opened, files = counted(lambda: checkpoint.Checkpoint(path).names)
        before = memory()
        begun = time.perf_counter()
        with checkpoint.Checkpoint(path) as saved:
            for name in names:
                saved.read(name, "exp_avg", 0, ELEMENTS)
            own, held = time.perf_counter() - begun, memory() - before
            begun = time.perf_counter()
            for name in names:
                saved.read(name, "master", 0, world * ELEMENTS)
            whole = time.perf_counter() - begun
    return {
        "ranks": world,
        "write_ms_per_rank": 1000 * written / world,
        "commit_s": committed,
        "open_s": opened,
        "open_files": files,
        "open_mb": held,
        "own_s": own,
        "whole_s": whole,
    }


def counted(action: Callable[[], Any]) -> tuple[float, int]:
    """Seconds that `action` takes, and how many files it reads."""
    from rayft import storage

    count, read = 0, storage.read_bytes

    def counting(path: str) -> bytes:
        nonlocal count
        count += 1
        return read(path)

    storage.read_bytes = counting
    try:
        begun = time.perf_counter()
        action()
        return time.perf_counter() - begun, count
    finally:
        storage.read_bytes = read


# Board


def boards(worlds: list[int]) -> list[Row]:
    import ray

    from rayft.launch.board import Board

    start_ray()
    found = []
    for world in worlds:
        board: Any = ray.remote(num_cpus=0)(Board).remote()
        place = {"count": 7, "step": 3, "doing": "waiting for rows", "node": "10.0.0.1", "node_id": "0" * 56, "pid": 70}
        ray.get([board.pulse.remote(rank, place) for rank in range(world)])
        pulses, begun, used = max(world, 2000), time.perf_counter(), spent(board)
        ray.get([board.pulse.remote(number % world, place) for number in range(pulses)])
        pulse_s, pulse_cpu = (time.perf_counter() - begun) / pulses, (spent(board) - used) / pulses
        looks, begun, used = 10, time.perf_counter(), spent(board)
        for _ in range(looks):
            ray.get(board.drain.remote())
        look_s, look_cpu = (time.perf_counter() - begun) / looks, (spent(board) - used) / looks
        found.append(
            {
                "ranks": world,
                "pulses_per_s": 1 / pulse_s,
                "pulse_cpu_ms": 1000 * pulse_cpu,
                "look_ms": 1000 * look_s,
                "look_cpu_ms": 1000 * look_cpu,
                "board_load": loaded(world, pulse_cpu, look_cpu),
            }
        )
        ray.kill(board)
    return found


def loaded(world: int, pulse_cpu: float, look_cpu: float) -> float:
    """Share of one core that the board takes with `world` ranks, at the intervals that rayft keeps."""
    from rayft.launch.group import TURN_S
    from rayft.training.watch import beat_s

    return world * pulse_cpu / beat_s(world) + look_cpu / TURN_S


def spent(actor: Any) -> float:
    import ray

    return float(ray.get(actor.__ray_call__.remote(lambda self: time.process_time())))


def start_ray() -> None:
    import ray

    from rayft.launch.session import quiet

    if not ray.is_initialized():
        quiet()
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)


# Split


def splits(worlds: list[int]) -> list[Row]:
    return [split(world) for world in worlds]


def split(world: int) -> Row:
    """About 1,000 blocks or more, from the first that comes to the last."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rayft.data.feed import Shares, train_dataset
    from rayft.data.order import Position
    from rayft.data.window import RANKS, order_of

    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        together = max(1, world // RANKS)
        count = 4096 * together * max(4, -(-1000 // world))
        ids = np.arange(count, dtype=np.int64)
        table = pa.table({"row_id": ids, "length": np.ones(count, np.int32)})
        pq.write_table(table, f"{folder}/0.parquet", row_group_size=512)
        shards = [{"path": "0.parquet", "rows": count, "row_groups": [512] * (count // 512), "bytes": table.nbytes}]
        order = order_of(shards, GLOBAL_BATCH, seed=0, shuffle=True)
        begun = time.perf_counter()
        dataset = train_dataset(folder, shards, order, start=Position(), total_steps=order.steps_per_epoch, world=world)
        iterators = dataset.streaming_split(world, equal=False, locality_hints=None)
        firsts, seen = [0.0] * world, [0] * world

        def consume(rank: int) -> None:
            for share in Shares(iterators[rank], order, Position(), world, rank, GLOBAL_BATCH):
                firsts[rank] = firsts[rank] or time.perf_counter()
                seen[rank] += share.rows.num_rows

        threads = [threading.Thread(target=consume, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ended = time.perf_counter()
    assert sum(seen) == count
    tasks = -(-order.windows_per_epoch // together)
    return {
        "ranks": world,
        "blocks": tasks * world,
        "first_s": min(firsts) - begun,
        "blocks_per_s": tasks * world / (ended - min(firsts)),
        "rows_per_s": count / (ended - min(firsts)),
    }


# All


def alone(function: Callable[[int], Row], sizes: list[int]) -> list[Row]:
    """Each size in a process of its own, since a process does not give all of its memory back."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        return list(pool.map(function, sizes))


PARTS: dict[str, Callable[[], list[Row]]] = {
    "rows": lambda: alone(rows, [10**6, 10**7, 10**8, 10**9]),
    "ranks": lambda: alone(ranks, [8, 64, 512, 4096]),
    "board": lambda: boards([8, 64, 512, 4096]),
    "split": lambda: splits([8, 32, 128, 512]),
}


def report(parts: dict[str, Callable[[], list[Row]]], names: Sequence[str]) -> None:
    """Measures those of `parts` that are named, or all, and prints them."""
    found = {}
    for name in names or parts:
        measured = found[name] = parts[name]()
        print(f"\n| {' | '.join(measured[0])} |\n|{' ---: |' * len(measured[0])}")
        for row in measured:
            print(f"| {' | '.join(f'{value:,.3g}' if value < 100 else f'{value:,.0f}' for value in row.values())} |")
    print(f"\n{json.dumps({name: [rounded(row) for row in measured] for name, measured in found.items()})}")


def rounded(row: Row) -> Row:
    return {name: float(f"{value:.4g}") for name, value in row.items()}


if __name__ == "__main__":
    report(PARTS, sys.argv[1:])
