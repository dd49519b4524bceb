"""What one worker of the group does under Ray Train: its process, its share of the rows, and the attempt on them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from rayft.data.prepared import Prepared
from rayft.data.window import Share
from rayft.recipe import Recipe
from rayft.training import engine
from rayft.training.attempt import Run, Setting
from rayft.training.watch import Watch


def work(config: dict[str, Any]) -> None:
    """Runs under Ray Train on every worker.

    `config`: `recipe` (dump, its ZeRO stage decided), `model` (what `fetch_model` takes), `prepared` ({split: folder}),
    `attempt`, `start` (the checkpoint to go on from, or None), `begun` (epoch seconds of the command), `board` (the
    driver's actor, or None), `feeds` (are there steps to make?), `streams` (does Ray Data read their rows?), `identity`
    (of the base model), `exports` and `trains` (see Setting).
    Leaves checkpoints, metrics, export and result.json in the run's folder; or, asked to leave, a checkpoint and the
    event `left`.
    """
    import ray.train

    from rayft.data.feed import Shares

    recipe = Recipe.parse(config["recipe"])
    context = ray.train.get_context()
    gpu = recipe.cluster.gpus_per_worker > 0
    device = own_device(gpu)
    engine.prepare_process(recipe.cluster.cpus_per_worker, context.get_local_world_size(), gpu)
    board = config["board"]
    chief = dist.get_rank() == 0

    def emit(event: dict[str, Any]) -> None:
        if chief and board is not None:
            board.push.remote(event)

    with Watch(board, dist.get_rank(), dist.get_world_size()) as watch:
        prepared = {split: Prepared.open(folder) for split, folder in config["prepared"].items()}

        def streamed(run: Run) -> Iterator[Share]:
            dataset: Any = ray.train.get_dataset_shard("train")
            size = recipe.train.micro_batch_size
            return iter(Shares(dataset, run.order, run.position, dist.get_world_size(), dist.get_rank(), size))

        run = Run(
            recipe, config, prepared, device, emit, watch, Setting(exports=config["exports"], trains=config["trains"])
        )
        feed = streamed if config["streams"] else Run.own_shares
        for _ in run.go(feed if config["feeds"] else None):
            pass


def own_device(gpu: bool) -> torch.device:
    """The GPU that Ray has given this worker, which torch and DeepSpeed take from here on; without `gpu` the CPU.

    DeepSpeed takes LOCAL_RANK for the device's number. The workers of a machine need not be counted in the order in
    which its GPUs are listed.
    """
    if not gpu:
        return torch.device("cpu")
    from ray.train.torch import get_device

    device = get_device()
    torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(device.index)
    return device
