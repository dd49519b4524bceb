"""From a pretrained model to an engine: adapters, freezing, a checkpoint's weights, ZeRO, a checkpoint's moments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from rayft.recipe import Recipe
from rayft.tasks.stacked import Blocks
from rayft.tasks.task import Pretrained
from rayft.training import checkpoint, engine, export, freeze, prefix, repeatable
from rayft.training.batch_norm import BatchNorms
from rayft.training.first_token import read_first
from rayft.training.standin import Prefix
from rayft.training.together import together


def pretrained(recipe: Recipe, path: str) -> Pretrained:
    """How a task loads the recipe's base model from the resolved `path`.

    Weights that learn are float32. Those below adapters never do, and are kept in the recipe's dtype.
    """
    model = recipe.model
    return Pretrained(
        path=path,
        revision=model.revision,
        dtype=model.dtype if model.lora is not None else "float32",
        attention=model.attention,
        quantize=model.quantize,
        dropout=model.dropout,
        trust_remote_code=model.trust_remote_code,
        seed=recipe.train.seed,
    )


@dataclass(frozen=True)
class Assembled:
    """`prefix` stands in for the frozen blocks, where what they give could be stored."""

    engine: Any
    blocks: Blocks
    norms: BatchNorms
    prefix: Prefix | None


def assemble(
    recipe: Recipe,
    load: Callable[[], Any],
    own: Callable[[Any], None],
    epoch: int,
    cohorts: dict[str, int],
    start: str | None,
) -> Assembled:
    """The network that `load` makes, frozen as at `epoch`, in an engine, with the state of the checkpoint `start`.

    `own` makes tensors that learn writable, where `load` maps them. `cohorts` gets, for each parameter that learns, the
    epoch in which it began to, unless it has it.
    """
    repeatable.heed()
    task, stage = recipe.task, int(recipe.deepspeed.zero_stage)
    config = engine.deepspeed_config(recipe, stage)
    sharding = _shard_while_loading(config) if stage == 3 else None
    network: Any = load()
    if recipe.model.lora is not None:
        network = freeze.adapted(network, recipe, task.blocks(network), export.new_parameters(network))
    blocks = task.blocks(network)
    learning = freeze.freeze(network, recipe.model, blocks, epoch)
    first = read_first(task, network, blocks)
    own(network)
    for name in learning.trainable:
        cohorts.setdefault(name, epoch)
    if recipe.model.dtype != "float32" and stage < 3:
        freeze.store_frozen_in(network, getattr(torch, recipe.model.dtype))
    if recipe.model.gradient_checkpointing:
        checkpoint_activations(network)
    with checkpoint.Checkpoint(start) if start else nullcontext() as saved:
        if saved:
            saved.fetch(network)
            together()  # whoever fetches, or reads more slowly, is not waited for in a collective
            saved.load_weights(network)
        freeze.train_mode(network, blocks, batch_norm=True)
        norms = BatchNorms(network, recipe.model.batch_norm_rows)
        groups = freeze.parameter_groups(network, learning, len(blocks.blocks), recipe.train, cohorts)
        standing = None
        if prefix.impossible(recipe, learning.depth) is None:
            standing = Prefix(network, blocks, task.steady(learning.depth), first)
        together()
        made = engine.build(network, groups, config)
        if recipe.model.compile:
            made.module.compile()
        if saved:
            saved.load_moments(made)
    together()
    del sharding
    return Assembled(made, blocks, norms, standing)


def checkpoint_activations(network: Any) -> None:
    """Has the blocks' activations computed again in the backward pass, those of frozen blocks not at all.

    transformers has the embeddings' output require gradients then, for a way of checkpointing that is not used here:
    the backward pass would go through all that is frozen.
    """
    network.activation_checkpointing_enable({"use_reentrant": False})
    if hasattr(network, "disable_input_require_grads"):
        network.disable_input_require_grads()


def _shard_while_loading(config: dict[str, Any]) -> Any:
    """While this object lives, transformers builds models sharded: no rank holds one whole."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)
