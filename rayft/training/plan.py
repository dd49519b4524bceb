"""How many parameters a run trains, before anything is built: from an outline of the model without weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from rayft.errors import ModelError
from rayft.recipe import Recipe
from rayft.tasks.loading import dropouts, require_bitsandbytes
from rayft.tasks.task import Pretrained
from rayft.training import batch_norm, export, freeze
from rayft.training.footprint import Parameters


def parameters(recipe: Recipe, base: Pretrained, facts: dict[str, Any], given: Any, epochs: int) -> Parameters:
    """What learns and what stays in a run of `epochs` epochs; `given` is the processor.

    Raises ModelError where the model can't be built as the recipe asks, a freezing depth or pattern does not fit it, or
    it has no BatchNorm to learn. Of a Hub id whose adapters are trained, a new head is not counted among what learns.
    """
    if base.quantize:
        require_bitsandbytes()
    with _quiet():
        network = recipe.task.load(replace(base, meta=True), facts, given)
        narrow = _linear(network) if base.quantize else 0
        drops = bool(dropouts(network.config)) if hasattr(network, "config") else True
        if recipe.model.lora is not None:
            new = export.new_parameters(network)
            network = freeze.adapted(network, recipe, recipe.task.blocks(network), new)
        blocks = recipe.task.blocks(network)
        sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
        first, last = (
            sum(sizes[name] for name in freeze.freeze(network, recipe.model, blocks, epoch).trainable)
            for epoch in (0, max(0, epochs - 1))
        )
        freeze.train_mode(network, blocks, batch_norm=True)
        norms, rows = sum(1 for _ in batch_norm.learning(network)), recipe.model.batch_norm_rows
        if rows is not None and norms == 0:
            raise ModelError(f"model.batch_norm_rows: {rows}, and no BatchNorm learns in this model; null fits")
    return Parameters(first, last, sum(sizes.values()), narrow, norms, drops)


def _linear(network: Any) -> int:
    """Weights of linear layers but for the last one, which stays as it is: those that are kept in 4 bits."""
    last = network.get_output_embeddings()
    linear = (module for module in network.modules() if isinstance(module, torch.nn.Linear) and module is not last)
    return sum(module.weight.numel() for module in linear)


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
