"""Worker groups for tests: real processes, a real gloo group, DeepSpeed engines on them."""

from __future__ import annotations

import contextlib
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.multiprocessing as mp

TIMEOUT_S = 1234.0  # of collectives; none of torch's own


def run_group(function: Callable[..., Any], world: int, *arguments: Any, gpu: bool = False) -> list[Any]:
    """Runs `function(*arguments)` on `world` processes in one gloo group; what each returned, by rank.

    They see no GPU, unless with `gpu`: then they are one nccl group.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").Queue()
        context = mp.spawn(_enter, (function, world, folder, results, arguments, gpu), nprocs=world, join=False)
        found: dict[int, tuple[bool, Any]] = {}
        while len(found) < world and all(ok for ok, _ in found.values()):
            with contextlib.suppress(queue.Empty):
                rank, result = results.get(timeout=1)
                found[rank] = result
                continue
            context.join(timeout=0)  # raises where a process ended without an answer
        if not all(ok for ok, _ in found.values()):
            for process in context.processes:
                process.kill()
        else:
            while not context.join():
                pass
    failed = [value for ok, value in found.values() if not ok]
    if failed:
        raise AssertionError(failed[0])
    return [found[rank][1] for rank in range(world)]


def _enter(
    rank: int,
    function: Callable[..., Any],
    world: int,
    folder: str,
    results: Any,
    arguments: tuple[Any, ...],
    gpu: bool,
) -> None:
    import torch.distributed as dist

    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    backend, timeout = "nccl" if gpu else "gloo", timedelta(seconds=TIMEOUT_S)
    where = f"file://{folder}/group"
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=world, timeout=timeout)
    try:
        from rayft.training.engine import prepare_process

        prepare_process(1, world, gpu=gpu)
        results.put((rank, (True, function(*arguments))))
    except BaseException:  # noqa: BLE001 # whatever it was, the parent tells it
        results.put((rank, (False, traceback.format_exc())))
        results.close()
        results.join_thread()
        os._exit(0)
    dist.barrier()
    dist.destroy_process_group()
