"""What a sweep will cost: parameters, memory and seconds of a trial at each freezing depth, and of all of them.

One batch is timed on the resources of a worker, whole and up to each depth; the rest is arithmetic. A backward pass
goes down to the lowest block that learns, and stored output of frozen blocks is not computed again: as in
`sweeps/depths.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from rayft.data.prepared import Prepared
from rayft.recipe import Freeze, Recipe
from rayft.sweeps import depths
from rayft.sweeps.sampling import trials


@dataclass(frozen=True)
class Pace:
    """Seconds of one token (the unit of a row's length): `below` up to each depth, `forward` through the whole model,
    `backward` down to depth `least`; `update` those of the optimizer for one parameter that learns, each step."""

    below: dict[int, float]
    forward: float
    backward: float
    least: int
    update: float

    def learn(self, depth: int, stored: bool) -> float:
        """A token's forward and backward pass with so many frozen blocks."""
        above, all_above = (self.forward - self.below.get(one, 0.0) for one in (depth, self.least))
        return self.score(depth, stored) + self.backward * above / all_above

    def score(self, depth: int, stored: bool) -> float:
        """A token's forward pass."""
        return self.forward - (self.below.get(depth, 0.0) if stored else 0.0)


def measure(plain: dict[str, Any], folder: str, wanted: list[int]) -> Pace:
    """In a task of Ray with a worker's resources: times one batch of the prepared split in `folder`, in the precision
    in which training passes it through."""
    import time

    import torch

    from rayft.launch.session import quiet
    from rayft.models import fetch_model
    from rayft.training.assembly import pretrained
    from rayft.training.evaluate import Network, mixed
    from rayft.training.first_token import read_first
    from rayft.training.standin import captured

    quiet()
    recipe = Recipe.parse(plain)
    torch.set_num_threads(recipe.cluster.cpus_per_worker)
    device = torch.device("cuda" if recipe.cluster.gpus_per_worker else "cpu")
    prepared, task = Prepared.open(folder), recipe.task
    base, facts = pretrained(recipe, fetch_model(recipe.model.path)), prepared.manifest.facts
    processor = task.processor(base)
    model = task.load(base, facts, processor).to(device).train()
    network = Network(model, task, processor, facts, device)
    table = _middling(prepared, recipe.train.micro_batch_size)
    batch, blocks = network.batch(table), task.blocks(model)
    read_first(task, model, blocks)
    least = min(wanted, default=0)
    learning = _frozen(recipe, model, blocks, least)
    optimizer = torch.optim.AdamW([model.get_parameter(name) for name in learning], lr=0.0, fused=True)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(2):  # the first pass of a process is slower than all others
        at: dict[int, float] = {}
        with captured(model, blocks, [depth for depth in wanted if depth], at=at):
            begun = now()
            with mixed(recipe.model.dtype, device):
                outputs = task.forward(model, batch)
            loss = task.loss(outputs, batch)
            passed = now()
        loss.backward()
        ended = now()
        optimizer.step()
        updated = now()
    tokens = sum(table.column("length").to_pylist())
    below = {depth: (moment - begun) / tokens for depth, moment in at.items()}
    update = (updated - ended) / sum(model.get_parameter(name).numel() for name in learning)
    return Pace(below, (passed - begun) / tokens, (ended - passed) / tokens, least, update)


def _middling(prepared: Prepared, size: int) -> Any:
    """So many rows of middling length."""
    from rayft.data.read import BUFFERED, strided

    stream = strided(prepared.folder, prepared.manifest.shards, rank=0, world=1, batch_size=size)
    tables = list(itertools.islice(stream, BUFFERED))  # sorted by length
    return tables[len(tables) // 2]


def _frozen(recipe: Recipe, model: Any, blocks: Any, depth: int) -> list[str]:
    """Freezes the first `depth` blocks as training does, without adapters; the names of what learns."""
    import torch

    from rayft.training import freeze

    how = recipe.model.model_copy(update={"freeze": Freeze(layers=depth), "lora": None})
    learning = freeze.freeze(model, how, blocks).trainable
    if recipe.model.dtype != "float32":
        freeze.store_frozen_in(model, getattr(torch, recipe.model.dtype))
    return list(learning)


def forecast(
    recipe: Recipe, prepared: dict[str, Prepared], counted: dict[int, Any], pace: Pace, at_once: int
) -> dict[str, Any]:
    """{"trials", "at_once", "scheduler", "depths": [...], "seconds"}; see `preflight.check`.

    `counted` has the parameters at each depth (plan.Parameters), with their stage and memory decided by the caller.
    """
    from rayft.training import prefix
    from rayft.training.schedule import order, total_steps

    assert recipe.tune is not None
    per_epoch = order(recipe, prepared["train"]).steps_per_epoch
    steps = total_steps(recipe.train, per_epoch)
    epochs = steps / per_epoch
    every = recipe.train.evaluate_every
    scored = epochs / (every.count if every.unit == "epoch" else every.count / per_epoch)
    tokens = {split: prepared[split].manifest.tokens for split in ("train", "validation")}
    world, found = recipe.cluster.max_workers, []
    shares = depths.shares(recipe, max(counted))
    for depth, share in shares.items():
        stored = prefix.impossible(recipe, depth) is None
        seconds = tokens["train"] * epochs * pace.learn(depth, stored)
        seconds += tokens["validation"] * scored * pace.score(depth, stored)
        seconds += steps * pace.update * counted[depth]["trainable"]
        found.append({"depth": depth, "share": share, "stored": stored, "seconds": seconds / world, **counted[depth]})
    once = max((pace.below.get(one["depth"], 0.0) for one in found if one["stored"]), default=0.0) * sum(
        tokens.values()
    )
    count = trials(recipe.tune)
    total = count * sum(one["share"] * one["seconds"] for one in found) + once
    return {
        "trials": count, "at_once": at_once, "scheduler": recipe.tune.scheduler,
        "depths": found, "seconds": total / at_once,
    }  # fmt: skip
