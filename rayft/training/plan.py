"""What a run will hold, before anything is built: its parameters, from an outline of the model without weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rayft.recipe import Recipe
from rayft.tasks.task import Pretrained
from rayft.training import engine, export, freeze


@dataclass(frozen=True)
class Parameters:
    """`trainable` learn in the first epoch, `most` in the last (gradual unfreezing); `total` are all, adapters too."""

    trainable: int
    most: int
    total: int

    @property
    def frozen(self) -> int:
        return self.total - self.trainable

    def state_bytes(self, recipe: Recipe, stage: int) -> int:
        """Bytes of weights, gradients and optimizer state per worker, at the end of the run."""
        return engine.state_bytes(recipe, stage, self.most, self.total - self.most)

    def zero_stage(self, recipe: Recipe, memory: int | None) -> int:
        """The stage of the whole run, for workers that have `memory` bytes each."""
        return engine.zero_stage(recipe, self.most, self.total - self.most, memory)


def parameters(recipe: Recipe, base: Pretrained, facts: dict[str, Any], given: Any, epochs: int) -> Parameters:
    """What learns and what stays in a run of `epochs` epochs; `given` is the processor.

    Raises ModelError where the model can't be built as the recipe asks, or a freezing depth or pattern does not fit it.
    Of a Hub id whose adapters are trained, a new head is not counted among what learns.
    """
    with _quiet():
        network = recipe.task.load(replace(base, meta=True), facts, given)
        if recipe.model.lora is not None:
            new = export.new_parameters(network)
            network = freeze.adapted(network, recipe, recipe.task.blocks(network), new)
        blocks = recipe.task.blocks(network)
        sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
        first, last = (
            sum(sizes[name] for name in freeze.freeze(network, recipe.model, blocks, epoch).trainable)
            for epoch in (0, max(0, epochs - 1))
        )
    return Parameters(first, last, sum(sizes.values()))


def blocks(recipe: Recipe, base: Pretrained, facts: dict[str, Any], given: Any) -> int:
    """How many blocks the model has, which freezing depth counts; `given` is the processor."""
    with _quiet():
        return len(recipe.task.blocks(recipe.task.load(replace(base, meta=True), facts, given)).blocks)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars and what libraries warn of among themselves away from the user."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
