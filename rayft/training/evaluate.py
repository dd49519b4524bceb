"""Scores over a whole split: every row once, in the source's order, strided over the ranks."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from rayft.data.prepared import Prepared
from rayft.data.read import first_row, strided
from rayft.tasks.task import Batch, Columns, Prediction, Task
from rayft.training.pictures import Keep
from rayft.training.watch import Watch

ASK_EVERY = 8  # batches between two agreements on whether to leave
INTERNAL = ("row_id", "row_ids", "length", "reference", "position")


def features_of(table: pa.Table) -> dict[str, list[Any]]:
    """A prepared table as the columns that a task's `collate` takes."""
    return {name: table.column(name).to_pylist() for name in table.column_names if name not in INTERNAL}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch in the host's memory, with its tensors on `device`; on the CPU they are the same tensors."""
    return {name: _moved(value, device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To a GPU it goes by way of pinned memory: its copy then waits for nothing, and nobody waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class Measured:
    """One forward pass over rows with truth: `loss` is the sum over `items`, `predictions` are one per feature."""

    loss: float
    items: int
    predictions: list[Prediction]


def measure(
    network: Any, task: Task, features: Columns, processor: Any, facts: dict[str, Any], device: torch.device
) -> Measured:
    """Passes features through the network, which is in evaluation mode, under the caller's `no_grad`."""
    collated = task.collate(features, processor, facts)
    items, batch = task.items(collated), to_device(collated, device)
    outputs = task.forward(network, batch)
    loss = float(task.loss(outputs, batch))
    return Measured(loss, items, task.predict(outputs, batch, features, processor, facts))


def by_row(task: Task, entries: Iterable[tuple[int, Prediction, Any]]) -> dict[int, tuple[Prediction, Any]]:
    """Row -> its combined prediction and its reference, rows ascending; `entries` are one (row, prediction, reference)
    per feature, those of a row in their order."""
    parts: dict[int, list[Prediction]] = defaultdict(list)
    truth: dict[int, Any] = {}
    for row, prediction, reference in entries:
        parts[row].append(prediction)
        truth[row] = reference
    return {row: (task.combine(parts[row]), truth[row]) for row in sorted(parts)}


@dataclass(frozen=True)
class Network:
    """A model, or the engine around it, and what its task needs to pass rows through it."""

    model: Any
    task: Task
    processor: Any
    facts: dict[str, Any]
    device: torch.device

    def batch(self, table: pa.Table) -> Batch:
        return to_device(self.task.collate(features_of(table), self.processor, self.facts), self.device)


def generated(network: Network, asked: Columns) -> list[Prediction]:
    """What the model writes for features that a task has `asked`, one batch of them, under the caller's `no_grad`."""
    batch = to_device(network.task.collate(asked, network.processor, network.facts), network.device)
    with _precision(network.model, network.device):
        return network.task.generate(network.model, batch, asked, network.processor, network.facts)


def mixed(dtype: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The precision in which a recipe's engine passes rows through, for a network without an engine."""
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype))


def _precision(model: Any, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The precision in which an engine passes rows through: generation goes past the engine to its module."""
    if getattr(model, "torch_autocast_enabled", lambda: False)():
        return torch.autocast(device.type, model.torch_autocast_dtype())
    return contextlib.nullcontext()


def evaluate(
    network: Network,
    prepared: Prepared,
    batch_size: int,
    watch: Watch,
    before: Callable[[Sequence[int]], None] = lambda rows: None,
    keep: Keep | None = None,
) -> dict[str, float] | None:
    """`loss` (mean over the items) and the task's metrics, the same on every rank; None where one was asked to leave.

    Rows without any item give no `loss`. Collective; leaves evaluation mode on. `before` is called with the rows'
    numbers in the split before each pass, and with none before the model generates for the rows that the task has asked
    for; `keep` on rank 0 with the pictures that the task draws.

    With ZeRO-3 all ranks run as many forward passes as the longest share, since the weights are gathered together.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    model, task, device = network.model, network.task, network.device
    model.eval()
    total, items = 0.0, 0
    mine: list[tuple[int, int, Prediction, str | None]] = []  # position, row, result, reference
    waiting: list[tuple[Prediction, Columns]] = []  # results that the model is to write more for, from a feature each
    together = sharded(model)
    with torch.inference_mode() if not together else torch.no_grad():
        stream = strided(prepared.folder, prepared.manifest.shards, rank=rank, world=world, batch_size=batch_size)
        for number, table in enumerate(stream):
            watch.at("evaluating")
            if number % ASK_EVERY == ASK_EVERY - 1 and _leaving(watch, device):
                return None
            if not table.num_rows:  # the others still have rows; with sharded weights they need this rank's shards
                if together:
                    before([0])
                    task.forward(model, network.batch(first_row(prepared.folder, prepared.manifest.shards)))
                continue
            before(table.column("position").to_pylist())
            features = features_of(table)
            measured = measure(model, task, features, network.processor, network.facts, device)
            total, items, results = total + measured.loss, items + measured.items, measured.predictions
            references = (
                table.column("reference").to_pylist() if "reference" in table.column_names else [None] * len(results)
            )
            places = (table.column(name).to_pylist() for name in ("position", "row_id"))
            mine.extend(zip(*places, results, references, strict=True))
            chosen, asked = task.asked(features)
            for number_asked, place in enumerate(chosen):
                one = {name: [values[number_asked]] for name, values in asked.items()}
                waiting.append((results[place], one))
        before([])
        if not _write(network, waiting, batch_size, watch, together):
            return None
    return _scored(task, mine, total, items, keep)


def _scored(
    task: Task, mine: list[tuple[int, int, Prediction, str | None]], total: float, items: int, keep: Keep | None
) -> dict[str, float]:
    """The scores of what all ranks hold: `total` is the loss summed over this one's `items`; collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, (total, items))
    counted = sum(i for _, i in gathered)
    scores = {"loss": sum(t for t, _ in gathered) / counted} if counted else {}
    parts: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(mine, parts)
    if parts is not None:
        entries = sorted((entry for part in parts for entry in part), key=lambda entry: entry[0])
        rows = by_row(task, ((row, result, truth and json.loads(truth)) for _, row, result, truth in entries))
        answers = [prediction for prediction, _ in rows.values()], [truth for _, truth in rows.values()]
        scores |= task.score(*answers)
        if keep is not None:
            keep(task.pictures(*answers))
    shared = [scores]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _write(
    network: Network, waiting: list[tuple[Prediction, Columns]], batch_size: int, watch: Watch, together: bool
) -> bool:
    """Lets the model generate for what waits, `batch_size` at a time, and joins that to its results; collective.

    False where a rank was asked to leave. With sharded weights a rank that has none left writes for another's feature.
    """
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (len(waiting), waiting[0][1] if waiting else None))
    spare: Columns = next((feature for _, feature in shares if feature is not None), {})
    for first in range(0, max(count for count, _ in shares), batch_size):
        watch.at("generating")
        if _leaving(watch, network.device):
            return False
        some = waiting[first : first + batch_size]
        if not some and not together:
            continue
        asked = {name: [one[name][0] for _, one in some] or spare[name] for name in spare}
        for (result, _), found in zip(some, generated(network, asked), strict=False):
            result.update(found)
    return True


def _leaving(watch: Watch, device: torch.device) -> bool:
    asked = torch.tensor([int(watch.leave)], device=device)
    dist.all_reduce(asked)
    return int(asked) > 0


def sharded(network: Any) -> bool:
    """Are the weights spread over the ranks (ZeRO-3), so that each forward pass needs all of them?"""
    return any(hasattr(parameter, "ds_id") for parameter in network.parameters())
