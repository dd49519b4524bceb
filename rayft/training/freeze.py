"""What learns and what stays: freezing by depth and pattern, gradual unfreezing, adapters, learning rates by depth.

Depth counts from the input side, by the blocks that the task names: depth 0 freezes nothing, depth N the embeddings and
the first N blocks, "all" everything but what lies above the blocks. It is applied before the engine is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from rayft.errors import ModelError
from rayft.recipe import Lora, Model, Recipe, Train
from rayft.tasks.stacked import Blocks


@dataclass(frozen=True)
class Learning:
    """Which parameters learn: `trainable` maps each name to the block it belongs to (-1: below, len(blocks): above)."""

    trainable: dict[str, int]
    frozen: tuple[str, ...]
    depth: int


def block_of(name: str, blocks: Blocks) -> int:
    """The index of the block that parameter `name` goes with; -1 for the embeddings, len(blocks.blocks) above them."""
    for index, block in enumerate(blocks.blocks):
        if name.startswith(block + "."):
            return index
    if any(name == below or name.startswith(below + ".") for below in blocks.embeddings):
        return -1
    for beside, index in blocks.beside:
        if name == beside or name.startswith(beside + "."):
            return index
    return len(blocks.blocks)


def depth_at(model: Model, epoch: int, blocks: Blocks) -> int:
    """The freezing depth in `epoch` (0-based): one block less every `unfreeze_every` epochs, down to what is fixed."""
    if model.freeze is None:
        return blocks.fixed
    depth = len(blocks.blocks) if model.freeze.layers == "all" else model.freeze.layers
    return max(blocks.fixed, depth - epoch // model.unfreeze_every if model.unfreeze_every else depth)


def freeze(network: torch.nn.Module, model: Model, blocks: Blocks, epoch: int = 0) -> Learning:
    """Sets `requires_grad` for `epoch`, and says what learns.

    Raises ModelError where the depth exceeds the model's blocks, a pattern matches nothing, or nothing is left.
    A tied tensor has one name, that of its first holder, so it is frozen with the embeddings.
    """
    if model.freeze is not None and model.freeze.layers and not blocks.blocks:
        raise ModelError(
            f"model.freeze.layers: {model.freeze.layers} counts blocks, and none were found in this model (it may use "
            "one block again and again); use patterns"
        )
    depth = depth_at(model, epoch, blocks)
    if depth > len(blocks.blocks):
        raise ModelError(
            f"model.freeze.layers: {depth} is more than the model's {len(blocks.blocks)} blocks; "
            f"0 to {len(blocks.blocks)}, or `all`, fits"
        )
    names = [name for name, _ in network.named_parameters()]
    matched = _matching(network, model.freeze.patterns if model.freeze else ())
    trainable: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        block = block_of(name, blocks)
        if model.lora is not None:
            learns = parameter.requires_grad  # the adapter's own choice: its matrices and the new head
        else:
            learns = parameter.is_floating_point() and not (depth > 0 and block < depth) and name not in matched
            parameter.requires_grad_(learns)
        if learns:
            trainable[name] = block
    if not trainable:
        raise ModelError("model.freeze: nothing is left to train; freeze fewer layers or patterns")
    return Learning(trainable, tuple(name for name in names if name not in trainable), depth)


def _matching(network: torch.nn.Module, patterns: Iterable[str]) -> set[str]:
    """Parameters that a shell-style pattern matches, by any of their names or by the module that holds them.

    The answer names a tied tensor by its first holder, as `named_parameters` does.
    """
    first = {parameter: name for name, parameter in network.named_parameters()}
    names = {name: first[parameter] for name, parameter in network.named_parameters(remove_duplicate=False)}
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")}
        if not found:
            from difflib import get_close_matches

            near = get_close_matches(pattern, names, 1, 0.3)
            hint = f"; a name it could match is `{near[0]}`" if near else ""
            raise ModelError(f"model.freeze.patterns: {pattern!r} matches no parameter{hint}")
        matched |= {names[name] for name in found}
    return matched


def train_mode(network: torch.nn.Module, blocks: Blocks, batch_norm: bool = False) -> None:
    """Training mode for what learns, evaluation mode for modules that hold nothing but frozen parameters.

    So are modules without parameters (a dropout) that lie between frozen embeddings and the blocks, whose input is then
    fixed too. Where the first block is frozen as well, nothing below it is random: see `_holders`. A block that holds
    an adapter trains as a whole. BatchNorm keeps its running statistics, unless `batch_norm` lets it learn too.
    """
    network.train()
    adapted = [network.get_submodule(block) for block in blocks.blocks]
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
    for block in adapted:
        if any(parameter.requires_grad and "lora_" in name for name, parameter in block.named_parameters()):
            block.train()
    place = {name: block_of(name, blocks) for name, _ in network.named_parameters()}
    learns = {place[name] for name, parameter in network.named_parameters() if parameter.requires_grad}
    if -1 in place.values() and -1 not in learns:
        for module in _without_parameters_below(network, blocks):
            module.eval()
    if 0 in place.values() and not learns & {-1, 0}:
        for module in _holders(network, blocks):
            module.training = False  # its own, not that of what it holds
    for module in network.modules():
        if not batch_norm and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def _holders(network: torch.nn.Module, blocks: Blocks) -> Iterator[torch.nn.Module]:
    """The modules around the list of blocks, but the whole network, and what is without parameters beside the list.

    They drop out embeddings, mask spans of them (SpecAugment) and leave out whole blocks (LayerDrop) in training mode,
    and would do so to the frozen ones, whose output has to depend on the row alone.
    """
    path = blocks.blocks[0].split(".")[:-1]
    holders = [network.get_submodule(".".join(path[:length])) for length in range(1, len(path))]
    yield from holders
    for child in holders[-1].children() if holders else ():
        if not any(True for _ in child.parameters()):
            yield child


def _without_parameters_below(network: torch.nn.Module, blocks: Blocks) -> Iterator[torch.nn.Module]:
    """Modules without parameters that were registered before the list of blocks, beside it or beside what holds it."""
    path = blocks.blocks[0].split(".")[:-1] if blocks.blocks else []
    holder = network
    for part in path:
        for name, child in holder.named_children():
            if name == part:
                break
            if not any(True for _ in child.parameters()):
                yield child
        holder = holder.get_submodule(part)


def store_frozen_in(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keeps frozen matrices in `dtype`: mixed precision needs full precision only for what learns.

    Norms and biases stay: they are small, and layer_norm on the CPU takes no weight narrower than its input.
    """
    for parameter in network.parameters():
        if not parameter.requires_grad and parameter.is_floating_point() and parameter.dim() > 1:
            parameter.data = parameter.data.to(dtype)


def adapted(network: torch.nn.Module, recipe: Recipe, blocks: Blocks, new: Iterable[str]) -> torch.nn.Module:
    """`adapt` as the recipe says: blocks below the freezing depth get no adapters."""
    if recipe.model.lora is None:
        return network
    below = blocks.blocks[: depth_at(recipe.model, 0, blocks)]
    return adapt(network, recipe.model.lora, new, recipe.train.seed, below)


def adapt(
    network: torch.nn.Module, lora: Lora, new: Iterable[str], seed: int, below: Sequence[str] = ()
) -> torch.nn.Module:
    """Wraps `network` with low-rank adapters (Hu et al. 2021, by peft); what is `new` to the checkpoint learns whole.

    Modules `below` get none. Adapter matrices are drawn from (seed, name). What learns is float32, whatever the dtype
    of the model below.
    """
    from peft import LoraConfig, get_peft_model

    heads = _heads(network, new)
    targets = list(lora.targets) if lora.targets else _linear_names(network, heads)
    if below:
        targets = _above(network, targets, below)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=heads or None,
        fan_in_fan_out=_transposed(network, targets),
    )
    try:
        wrapped: torch.nn.Module = get_peft_model(network, config)
    except ValueError as error:
        raise ModelError(f"model.lora.targets: {error}") from error
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # not sharded yet, at any stage
            if "lora_A" in name or "lora_embedding_B" in name:  # their partners are zero
                _draw_adapter(parameter, name, seed)
    return wrapped


def _heads(network: torch.nn.Module, new: Iterable[str]) -> list[str]:
    """The outermost modules that hold parameters `new`, which learn as copies.

    A module with a tensor that is tied to one outside it is left out: its copy would be tied no more, and a copy of the
    embeddings is as large as they are. Of an encoder's head for its vocabulary that leaves all but the output layer.
    """
    holders: dict[int, set[str]] = {}  # of each tensor, its names
    for name, parameter in network.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), set()).add(name)
    tied = [names for names in holders.values() if len(names) > 1]
    found: list[str] = []
    for module in sorted({name.rpartition(".")[0] for name in new}):
        inside = module + "."
        whole = all(len({name.startswith(inside) for name in names}) == 1 for names in tied)
        if whole and not any(inside.startswith(head + ".") for head in found):
            found.append(module)
    return found


def _above(network: torch.nn.Module, targets: Sequence[str], below: Sequence[str]) -> list[str]:
    """The full names of the modules that `targets` mean, but for those inside the modules `below`."""
    ends = tuple("." + target for target in targets)
    meant = [name for name, _ in network.named_modules() if f".{name}".endswith(ends)]
    kept = [name for name in meant if not any(name.startswith(module + ".") for module in below)]
    if not kept:
        raise ModelError("model.freeze.layers: no module that `model.lora` adapts is left above that depth")
    return kept


def _transposed(network: torch.nn.Module, targets: list[str]) -> bool:
    """Do the targets keep their weights as (in, out), as GPT-2's Conv1D does?"""
    ends = tuple("." + target for target in targets)
    found = {type(module).__name__ for name, module in network.named_modules() if f".{name}".endswith(ends)}
    return "Conv1D" in found and "Linear" not in found


def _linear_names(network: torch.nn.Module, heads: list[str]) -> list[str]:
    """Last name parts of linear layers inside the blocks: peft's own shortcut counts heads and output layers too."""
    found = set()
    for name, module in network.named_modules():
        parts = name.split(".")
        repeated = any(part.isdigit() for part in parts)
        if (
            repeated
            and name not in heads
            and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        ):
            found.add(".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1])
    if not found:
        raise ModelError("model.lora: the model has no linear layers inside its blocks; name `targets`")
    return sorted(found)


def _draw_adapter(parameter: Any, name: str, seed: int) -> None:
    import hashlib
    import math

    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
    )
    bound = 1 / math.sqrt(parameter.shape[-1])
    with torch.no_grad():
        drawn = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
        parameter.copy_(drawn.to(parameter.dtype))


def parameter_groups(
    network: torch.nn.Module, learning: Learning, blocks: int, train: Train, cohorts: dict[str, int] | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups: one per (rate by depth, decay or none, cohort), each with `name`, `scale` and `weight_decay`.

    `scale` multiplies the scheduled learning rate: layer_lr_decay ** (blocks above it), 1 above the blocks (Howard and
    Ruder 2018). Biases and norms don't decay: parameters with one dimension and, as transformers' Trainer has it, those
    with "bias" in their name (tables of relative positions have two). A cohort is the epoch in which a parameter began
    to learn; it has a group of its own, since its optimizer counts its own steps.
    """
    groups: dict[tuple[float, float, int], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if name not in learning.trainable:
            continue
        scale = train.layer_lr_decay ** (blocks - learning.trainable[name])
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        decay = train.weight_decay if dimensions > 1 and "bias" not in name else 0.0
        cohort = (cohorts or {}).get(name, 0)
        group = groups.setdefault(
            (scale, decay, cohort),
            {
                "params": [],
                "name": f"scale {scale:.6g}, decay {decay:g}, cohort {cohort}",
                "scale": scale,
                "weight_decay": decay,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
