"""The frozen blocks' output at every depth that a sweep will use, computed in one pass before its trials begin.

Tasks on the cluster, one for each trial that runs at a time, pass a share of the rows each through the blocks; where it
is little, the driver does it. The trials find what they need in storage.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rayft.data.prepared import Prepared
from rayft.fields.search import Space, Tune
from rayft.fields.sections import Freeze, Model
from rayft.recipe import Recipe
from rayft.tasks.stacked import Blocks

Show = Callable[[dict[str, Any]], None]
HERE_S = 60.0  # as `prefix.Cost` counts seconds, which is many times what it takes
FIELDS = ("model.freeze.layers", "model.freeze")


@dataclass(frozen=True)
class Stored:
    """What is stored now: depths, bytes, and the seconds of computing them (by all processes together)."""

    depths: list[int]
    bytes: int
    seconds: float


def shares(recipe: Recipe, blocks: int) -> dict[int, float]:
    """Depth -> the share of the trials that will freeze so many of the model's `blocks`."""
    tune, freeze = recipe.tune, recipe.model.freeze
    spaces = {name: space for name, space in (tune.search if isinstance(tune, Tune) else {}).items() if name in FIELDS}
    if not spaces:
        found = {_depth(freeze.layers if freeze is not None else 0, blocks): 1.0}
    else:
        values = _values(next(iter(spaces.values())))
        found = {}
        for value in values:
            depth = _depth(value, blocks)
            found[depth] = found.get(depth, 0.0) + 1 / len(values)
    return dict(sorted(found.items()))


def _values(space: Space) -> list[Any]:
    if space.int:
        return list(range(space.int[0], space.int[1] + 1))
    return list(space.choices)


def _depth(value: Any, blocks: int) -> int:
    if value == "all":
        return blocks
    if isinstance(value, dict):
        return _depth(value.get("layers", 0), blocks)
    return min(value, blocks) if isinstance(value, int) and not isinstance(value, bool) else 0


@dataclass(frozen=True)
class Task:
    """What one process needs to compute its part of the states; `targets` is {split: {depth: folder}}."""

    recipe: dict[str, Any]
    prepared: dict[str, str]
    targets: dict[str, dict[int, str]]
    attempt: str
    warm: Any
    rank: int
    world: int


def store(
    recipe: Recipe, prepared: dict[str, Prepared], identity: str, warm: Any, blocks: Blocks, trials: int, world: int,
    show: Show,
) -> Stored | None:  # fmt: skip
    """Computes what is missing and pays; None where nothing of it does. `recipe` has its ZeRO stage decided."""
    from rayft.training import prefix, states
    from rayft.training.first_token import read_first

    wanted: dict[int, float] = {}
    for depth, share in shares(recipe, len(blocks.blocks)).items():
        frozen = max(depth, blocks.fixed)
        if not prefix.impossible(recipe, frozen):
            stored = blocks.chained(recipe.task.steady(frozen))
            wanted[stored] = wanted.get(stored, 0.0) + share
    if not wanted:
        return None
    stage, first = int(recipe.deepspeed.zero_stage), read_first(recipe.task, network(warm), blocks)
    targets = {
        split: {
            d: states.states_folder(
                prepared[split].folder, recipe, identity, d, stage, first and d == len(blocks.blocks)
            )
            for d in wanted
        }
        for split in ("train", "validation")
    }
    missing = {
        split: {depth: path for depth, path in found.items() if states.found(path) is None}
        for split, found in targets.items()
    }
    chosen, seconds = _worth(recipe, prepared, warm, missing, wanted, trials, show)
    if any(chosen.values()):
        show({"event": "stage", "name": "computing the frozen blocks"})
        here = seconds < HERE_S and not recipe.cluster.gpus_per_worker
        _compute(recipe, prepared, chosen, warm, 0 if here else world)
    manifests = [states.found(path) for found in targets.values() for path in found.values()]
    there = [manifest for manifest in manifests if manifest is not None]
    if not there:
        return None
    deepest = max(manifest["seconds"] for manifest in there)
    whole = [depth for depth in wanted if all(states.found(found[depth]) for found in targets.values())]
    return Stored(whole, sum(manifest["bytes"] for manifest in there), deepest)


def _worth(
    recipe: Recipe,
    prepared: dict[str, Prepared],
    warm: Any,
    missing: dict[str, dict[int, str]],
    shares: dict[int, float],
    trials: int,
    show: Show,
) -> tuple[dict[str, dict[int, str]], float]:
    """What of the missing states costs less than it saves, and the seconds that computing it takes.

    Tells of the others why they are left out.
    """
    from rayft.training.schedule import order, total_steps

    per_epoch = order(recipe, prepared["train"]).steps_per_epoch
    epochs = total_steps(recipe.train, per_epoch) / per_epoch
    every = recipe.train.evaluate_every
    between = every.count if every.unit == "epoch" else every.count / per_epoch
    often = {"train": epochs, "validation": epochs / between}
    kept: dict[str, dict[int, str]] = {split: {} for split in missing}
    seconds = 0.0
    asked = [depth for depth in shares if any(depth in found for found in missing.values())]
    for depth, tried in _tried(recipe, prepared["train"], warm, asked).items():
        rows = {split: prepared[split].manifest.rows for split in missing}
        passes = {split: often[split] * shares[depth] * trials for split in rows}
        lacking = [split for split in rows if depth in missing[split]]
        cost = tried.cost(rows, passes, lacking, recipe)
        dear = cost.too_dear() if recipe.model.cache_frozen == "auto" else None
        if why := tried.why_not or dear:
            text = f"the output of {depth} frozen blocks is not stored: {why}"
            show({"event": "note", "text": text})
        else:
            for split in lacking:
                kept[split][depth] = missing[split][depth]
            seconds = max(seconds, cost.rows * cost.seconds)  # one pass gives all depths on its way to the deepest
    return kept, seconds


def _tried(recipe: Recipe, prepared: Prepared, warm: Any, asked: list[int]) -> dict[int, Any]:
    """What a batch of the split shows at each depth (prefix.Trial); where the trials have GPUs, on one of them: a head
    without any would take minutes for a large model."""
    import ray

    cluster = recipe.cluster
    if not asked:
        return {}
    if not cluster.gpus_per_worker:
        return tried(recipe.dump(), prepared.folder, warm, asked)
    apart = ray.remote(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker, max_retries=0)(tried)
    found: dict[int, Any] = ray.get(apart.remote(recipe.dump(), prepared.folder, warm, asked))
    return found


def tried(plain: dict[str, Any], folder: str, warm: Any, asked: list[int]) -> dict[int, Any]:
    """`_tried` by this process, the split lying in `folder`."""
    from rayft.launch.session import quiet
    from rayft.training import prefix
    from rayft.training.evaluate import mixed
    from rayft.training.standin import Prefix

    quiet()
    recipe, prepared = Recipe.parse(plain), Prepared.open(folder)
    found = {}
    for depth in asked:
        source = _source(recipe, warm, prepared.manifest.facts, depth)
        with mixed(recipe.model.dtype, source.network.device):
            standing = Prefix(source.module, source.blocks, depth)
            found[depth] = prefix.trial(source, standing, prepared, 16)
    return found


def _source(recipe: Recipe, warm: Any, facts: dict[str, Any], depth: int) -> Any:
    """The sweep's network, its first `depth` blocks frozen, as trials have it and where they train: prefix.Source."""
    import torch

    from rayft.training import freeze, prefix
    from rayft.training.evaluate import Network
    from rayft.training.first_token import read_first

    device = torch.device("cuda" if recipe.cluster.gpus_per_worker else "cpu")
    model = network(warm)
    blocks = recipe.task.blocks(model)
    read_first(recipe.task, model, blocks)
    freeze.freeze(model, _frozen(recipe, depth), blocks)
    if recipe.model.dtype != "float32":
        freeze.store_frozen_in(model, getattr(torch, recipe.model.dtype))
    model.to(device).eval()
    given = Network(model, recipe.task, recipe.task.processor(warm.base), facts, device)
    return prefix.Source(given, model, blocks)


def _frozen(recipe: Recipe, depth: int) -> Model:
    """The recipe's model with its first `depth` blocks frozen."""
    return recipe.model.model_copy(update={"freeze": Freeze(layers=depth), "lora": None})


def network(warm: Any) -> Any:
    """The sweep's pretrained network, from the object store."""
    import ray

    from rayft.sweeps.warm import unpacked

    return unpacked(ray.get(warm.reference))


def _compute(
    recipe: Recipe, prepared: dict[str, Prepared], wanted: dict[str, dict[int, str]], warm: Any, world: int
) -> None:
    """By `world` tasks, or where that is 0 by this process: a thread for each processor, with a network of its own.

    Multiplications as small as these gain little from several threads each.
    """
    import ray

    from rayft.sweeps.trial import alone
    from rayft.training import states

    attempt, cluster = states.new_attempt(), recipe.cluster
    folders = {split: data.folder for split, data in prepared.items()}
    count = world or os.cpu_count() or 1
    tasks = [Task(recipe.dump(), folders, wanted, attempt, warm, rank, count) for rank in range(count)]
    if world == 0:
        alone(1, gpu=False, trains=False)
        with ThreadPoolExecutor(count) as pool:
            parts = list(pool.map(lambda task: part(task, 1), tasks))
    else:
        apart = ray.remote(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker, max_retries=0)(part)
        parts = ray.get([apart.remote(task, cluster.cpus_per_worker) for task in tasks])
    for split, found in wanted.items():
        for depth, folder in found.items():
            states.commit(folder, [part[split, depth] for part in parts])


def part(task: Task, threads: int) -> dict[tuple[str, int], Any]:
    """(split, depth) -> the part that this process has written."""
    from rayft.launch.session import quiet
    from rayft.sweeps.trial import alone
    from rayft.training import prefix
    from rayft.training.evaluate import mixed
    from rayft.training.states import Writer
    from rayft.training.watch import Watch

    quiet()
    recipe = Recipe.parse(task.recipe)
    alone(threads, recipe.cluster.gpus_per_worker > 0, trains=False)
    deepest = max(depth for found in task.targets.values() for depth in found)
    source = _source(recipe, task.warm, Prepared.open(task.prepared["train"]).manifest.facts, deepest)
    found: dict[tuple[str, int], Any] = {}
    for split, targets in task.targets.items():
        if not targets:
            continue
        writers = {depth: Writer(folder, task.attempt, task.rank) for depth, folder in targets.items()}
        with mixed(recipe.model.dtype, source.network.device):
            written = prefix.compute(
                source, Prepared.open(task.prepared[split]), writers,
                rank=task.rank, world=task.world, batch_size=2 * recipe.train.micro_batch_size,
                watch=Watch(None, task.rank),
            )  # fmt: skip
        found |= {(split, depth): one for depth, one in written.items()}
    return found
