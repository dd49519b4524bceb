"""Logits for some tokens alone: a vocabulary is wide, and of prompts and unmasked words no logits are needed."""

from __future__ import annotations

from typing import Any

from rayft.tasks.later import torch


def logits_of(model: Any, asked: torch.Tensor, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    """(tokens that are asked for, vocabulary) logits of `model` over `inputs`, in the order of `asked`.

    `asked` is (n, l) booleans. The layer that gives the logits sees the hidden states of those tokens only; a model
    whose layer can't be found, or is given something else than (n, l, width), computes all; the others are left out.
    """
    head: Any = getattr(model, "module", model).get_output_embeddings()
    hook = head.register_forward_pre_hook(_chosen(asked)) if head is not None else None
    try:
        logits: torch.Tensor = model(**inputs, **more).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits if logits.dim() == 2 else logits[asked]


def _chosen(asked: torch.Tensor) -> Any:
    def chosen(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = given[0]
        return (hidden[asked], *given[1:]) if hidden.shape[:2] == asked.shape else None

    return chosen
