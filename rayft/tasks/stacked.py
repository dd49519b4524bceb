"""Which modules of a network are its blocks, counted from the input side, and which lie below them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Blocks:
    """Names of modules, as `named_modules` gives them: what freezing depth counts, from the input side.

    `embeddings` are the modules (or single parameters) below the first block; `blocks` the repeated blocks in order.
    `beside` are modules outside the blocks that go with one of them, as (name, its index). Of a model with an encoder
    and a decoder, the first `encoder` blocks are the encoder's; else that is 0. All other parameters lie above the
    blocks: final norms, poolers, heads. The first `fixed` blocks never learn, whatever a recipe says.
    """

    embeddings: tuple[str, ...]
    blocks: tuple[str, ...]
    beside: tuple[tuple[str, int], ...] = ()
    encoder: int = 0
    fixed: int = 0

    def chained(self, depth: int) -> int:
        """How many of the first `depth` blocks follow each other, each on what the one before it gives."""
        return min(depth, self.encoder or depth)


# Registered before the blocks, used after them (OPT).
_ABOVE = ("final_layer_norm", "project_out")
# Registered beside the blocks or behind them, used below the first one (BART) or by all of them (DeBERTa, MPNet, BEiT).
_BELOW = ("layernorm_embedding", "rel_embeddings", "LayerNorm", "relative_attention_bias", "relative_position_bias")


def stacked_blocks(model: Any) -> Blocks:
    """The largest outermost `ModuleList` of modules of one kind, and the modules registered before it on the way to it.

    Of a model with an encoder and a decoder, the encoder's list and then the decoder's; what lies between them, such
    as the decoder's embeddings, goes with the decoder's first block. Lists of the same length beside the blocks' own
    (XLM's attentions and feed-forward layers) go with them one by one. Tried on the architectures of
    tests/tasks/test_architectures.py; a task whose model differs overrides `blocks`.
    """
    lists = list(_outermost_lists(model, ""))
    if not lists:
        return Blocks((), ())
    sides: dict[str, list[tuple[str, Any]]] = {"encoder": [], "decoder": []}
    for name, members in lists:
        side = next((part for part in name.split(".") if part in sides), None)
        if side is not None:
            sides[side].append((name, members))
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and all(sides.values()):
        (lower, below), (upper, above) = (max(found, key=_size) for found in sides.values())
        between = [
            (name, len(below)) for name in dict.fromkeys((*_before(model, upper), lower.rpartition(".")[0])) if name
        ]
        names = tuple(
            f"{name}.{index}" for name, count in ((lower, below), (upper, above)) for index in range(len(count))
        )
        return Blocks(tuple(_before(model, lower)), names, (*_parallel(model, lower), *between), len(below))
    name, members = max(lists, key=_size)
    names = tuple(f"{name}.{index}" for index in range(len(members)))
    parallel = _parallel(model, name)
    lists_beside = {beside.rpartition(".")[0] for beside, _ in parallel}
    return Blocks(tuple(below for below in _before(model, name) if below not in lists_beside), names, parallel)


def _size(found: tuple[str, Any]) -> int:
    """Parameters of a list of blocks, partitioned or not."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in found[1].parameters())


def _before(model: Any, name: str) -> list[str]:
    """Modules with parameters, and single parameters, registered before module `name` or what holds it."""
    before: list[str] = []
    module, prefix = model, ""
    for part in name.split("."):
        # A stable layer norm is the one after the blocks (wav2vec 2.0).
        stable = getattr(getattr(module, "config", None), "do_stable_layer_norm", False)
        above = (*_ABOVE, "layer_norm") if stable else _ABOVE
        for child, value in module.named_children():
            if child == part:
                break
            if child not in above and any(True for _ in value.parameters()):
                before.append(prefix + child)
        before.extend(prefix + parameter for parameter, _ in module.named_parameters(recurse=False))
        holder, module, prefix = (module, prefix), getattr(module, part), f"{prefix}{part}."
    beside, prefix = holder
    return before + [
        prefix + child for child, _ in beside.named_children() if child in _BELOW and prefix + child not in before
    ]


def _parallel(model: Any, name: str) -> tuple[tuple[str, int], ...]:
    """The members of lists beside list `name` that are as long, each with its index."""
    import torch

    holder, _, own = name.rpartition(".")
    parent = model.get_submodule(holder)
    prefix = f"{holder}." if holder else ""
    return tuple(
        (f"{prefix}{other}.{index}", index)
        for other, members in parent.named_children()
        if other != own and isinstance(members, torch.nn.ModuleList) and len(members) == len(getattr(parent, own))
        for index in range(len(members))
    )


def _outermost_lists(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_children():
        if _alike(child):
            if any(True for _ in child.parameters()):
                yield prefix + name, child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def _alike(module: Any) -> bool:
    """Is it a list of two modules or more that are of one kind?

    The last word of a class's name says its kind: blocks may be attention layers and Mamba layers by turns. What is
    merely done one after the other, has to be of one class.
    """
    import torch

    if isinstance(module, torch.nn.ModuleList):
        kinds = {re.split("(?=[A-Z])", type(member).__name__)[-1] for member in module}
    elif isinstance(module, torch.nn.Sequential):
        kinds = {type(member).__qualname__ for member in module}
    else:
        return False
    return len(module) > 1 and len(kinds) == 1
