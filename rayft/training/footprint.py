"""How much memory the parameters of a run take, and which ZeRO stage holds them: arithmetic, without torch.

Counting them takes an outline of the model, and so torch and transformers. That is done once: the count is kept beside
the prepared training rows, under a key of all that it depends on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass

from rayft import __version__, storage
from rayft.data.prepared import Prepared
from rayft.models import model_identity
from rayft.recipe import Recipe

LIBRARIES = ("torch", "transformers", "peft", "diffusers")  # that build the outline
FOUR_BITS = 4.127 / 8  # bytes of a weight in 4 bits and its share of the quantized constants (Dettmers et al. 2023)


def zero_stage(recipe: Recipe, trainable: int, frozen: int, memory: int | None) -> int:
    """The ZeRO stage of the recipe; `auto` takes the least sharding whose state fits into half of `memory` (bytes).

    Half, because activations need the rest. None (unknown memory) takes the least that the offload allows. A model that
    is compiled or quantized keeps its weights whole: stage 2 at most.
    """
    if recipe.deepspeed.zero_stage != "auto":
        return int(recipe.deepspeed.zero_stage)
    least = {"none": 0, "optimizer": 1, "parameters": 3}[recipe.deepspeed.offload]
    if memory is None:
        return least
    most = 2 if recipe.model.compile or recipe.model.quantize else 3
    for stage in range(least, most):
        if state_bytes(recipe, stage, trainable, frozen) <= memory / 2:
            return stage
    return most


def state_bytes(recipe: Recipe, stage: int, trainable: int, frozen: int) -> int:
    """Bytes of weights, gradients and optimizer state per worker; parts offloaded to host memory don't count.

    Stage 0 keeps 16 bytes a trainable parameter; stages 1 and 2 hold the full weights and gradients beside a share of
    an fp32 copy and its moments (stage 2 shares the gradients too); stage 3 shares all (Rajbhandari et al. 2020).
    """
    world, offload = recipe.cluster.max_workers, recipe.deepspeed.offload
    weights = 4 * trainable + frozen_width(recipe, stage) * frozen
    gradients, moments, master = 4 * trainable, 8 * trainable, 4 * trainable
    if stage == 0:
        return weights + gradients + moments
    moments, master = moments // world, master // world
    if offload != "none":
        moments = master = 0
    if stage >= 2:
        gradients //= world
    if stage == 3:
        weights = 0 if offload == "parameters" else weights // world
        master = 0  # the shard of a float32 weight is its own master
    return weights + gradients + moments + master


def frozen_width(recipe: Recipe, stage: int) -> int:
    """Bytes of a frozen parameter: the recipe's dtype where it is whole; what is sharded while loading is float32."""
    return 2 if recipe.model.dtype != "float32" and stage < 3 else 4


def machine_bytes(recipe: Recipe, stage: int, trainable: int, total: int, workers: int) -> int:
    """Bytes of a machine's own memory that `workers` of it with GPUs take at most, by the weights alone.

    Each builds the model there before its GPU has it, at stage 3 one alone, and one does to export it. What is
    offloaded stays there: masters, moments and gradients on their way, in float32 (Rajbhandari et al. 2021).
    """
    world, offload = recipe.cluster.max_workers, recipe.deepspeed.offload
    width = 2 if recipe.model.lora is not None and recipe.model.dtype != "float32" else 4
    offloaded = {"none": 0, "optimizer": 16 * trainable, "parameters": 16 * trainable + width * (total - trainable)}
    return width * total * (workers if stage < 3 else 1) + offloaded[offload] * workers // world


@dataclass(frozen=True)
class Parameters:
    """`trainable` learn in the first epoch, `most` in the last (gradual unfreezing); `total` are all, adapters too, and
    `narrow` of them are kept in 4 bits. `norms` BatchNorms learn, or would where the recipe asked for it. `drops` tells
    whether the model has any dropout."""

    trainable: int
    most: int
    total: int
    narrow: int = 0
    norms: int = 0
    drops: bool = True

    @property
    def frozen(self) -> int:
        return self.total - self.trainable

    def state_bytes(self, recipe: Recipe, stage: int) -> int:
        """Bytes of weights, gradients and optimizer state per worker, at the end of the run."""
        return state_bytes(recipe, stage, self.most, self._frozen_at_end(recipe))

    def machine_bytes(self, recipe: Recipe, workers: int) -> int:
        """Bytes of a machine's own memory, where `workers` of it have GPUs, at the recipe's ZeRO stage."""
        return machine_bytes(recipe, int(recipe.deepspeed.zero_stage), self.most, self.total, workers)

    def zero_stage(self, recipe: Recipe, memory: int | None) -> int:
        """The stage of the whole run, for workers that have `memory` bytes each."""
        return zero_stage(recipe, self.most, self._frozen_at_end(recipe), memory)

    def _frozen_at_end(self, recipe: Recipe) -> int:
        """Frozen parameters, those in 4 bits as fewer ones of the usual width."""
        return self.total - self.most - int(self.narrow * (1 - FOUR_BITS / frozen_width(recipe, 0)))


def known(recipe: Recipe, model_path: str, training: Prepared, epochs: int) -> Parameters | None:
    """What `keep` has kept of a run with this model, task and freezing; None where nothing was, or is damaged."""
    path = _path(recipe, model_path, training, epochs)
    found = storage.read_object(path) if path else None
    return Parameters(**found) if found and found.keys() == Parameters.__dataclass_fields__.keys() else None


def keep(recipe: Recipe, model_path: str, training: Prepared, epochs: int, counted: Parameters) -> None:
    """Keeps what was counted for a run of `epochs` epochs."""
    if path := _path(recipe, model_path, training, epochs):
        storage.write_json(path, asdict(counted))


def _path(recipe: Recipe, model_path: str, training: Prepared, epochs: int) -> str | None:
    """None where it can change under the same key, as on the Hub, or has to be asked for each time, as for 4 bits."""
    if not os.path.isdir(model_path) or recipe.model.quantize:
        return None
    depends = {
        "rayft": __version__,
        "libraries": [_version(name) for name in LIBRARIES],
        "identity": model_identity(model_path, recipe.model.revision),
        "task": recipe.task.model_dump(mode="json"),
        "model": recipe.model.model_dump(mode="json", exclude={"path"}),
        "epochs": epochs if recipe.model.unfreeze_every is not None else 1,
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
    return storage.join(training.folder, f"parameters-{key}.json")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
