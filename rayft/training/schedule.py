"""What a step's number decides: how many there are, the learning rate, the seed, and what is due after it."""

from __future__ import annotations

import hashlib
import math

from rayft.data.order import Order
from rayft.data.prepared import Prepared
from rayft.data.window import order_of
from rayft.recipe import Every, Recipe, Train


def order(recipe: Recipe, prepared: Prepared) -> Order:
    """The order of the prepared training rows under this recipe."""
    train, data, group = recipe.train, recipe.data, recipe.coupled
    shards = prepared.manifest.shards
    return order_of(shards, train.global_batch_size, train.seed, data.shuffle, group, data.group_by_length)


def total_steps(train: Train, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: its epochs or `max_steps`, whichever ends first."""
    by_epochs = train.epochs * steps_per_epoch if train.epochs is not None else None
    return min(count for count in (by_epochs, train.max_steps) if count is not None)


def learning_rate(train: Train, step: int, total: int) -> float:
    """The learning rate of optimizer step `step` (0-based) of `total`: linear warm-up, then the schedule.

    Linear and cosine fall to 0 just after the last step, as in transformers' schedulers.
    """
    warmup = train.warmup if isinstance(train.warmup, int) and train.warmup >= 1 else math.ceil(train.warmup * total)
    if step < warmup:
        return train.learning_rate * step / max(1, warmup)
    done = (step - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[train.schedule]
    return train.learning_rate * max(0.0, factor)


def due(every: Every, step: int, steps_per_epoch: int) -> bool:
    """Does the interval end with optimizer step `step` (1-based)? Minutes are decided by rank 0's clock, not here."""
    if every.unit == "minutes":
        return False
    length = every.count * (steps_per_epoch if every.unit == "epoch" else 1)
    return math.floor(step / length + 1e-9) > math.floor((step - 1) / length + 1e-9)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch for one step: what is random depends on where the run stands, so that no state has to be kept."""
    import torch

    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
