"""What a model writes on from a prompt, always the most likely token."""

from __future__ import annotations

import math
from typing import Any

from rayft.tasks.generation import greedy
from rayft.tasks.later import torch


def continuations(
    network: Any, prompts: list[list[int]], tokenizer: Any, max_new_tokens: int, device: torch.device
) -> list[str]:
    """One text per prompt, without the prompt and without special tokens.

    Where prompt and continuation are more than the model's positions, the prompt loses its beginning. With weights that
    are sharded over processes (ZeRO-3) all of them have to call this as often; each goes on until the last has ended.
    """
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None) or math.inf
    new = int(min(max_new_tokens, limit - 1))
    kept = [ids[-int(min(len(ids), limit - new)) :] for ids in prompts]
    width = max(len(ids) for ids in kept)
    tokens = torch.full((len(kept), width), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(tokens)
    for place, ids in enumerate(kept):
        tokens[place, width - len(ids) :] = torch.tensor(ids)
        mask[place, width - len(ids) :] = 1
    with torch.no_grad(), greedy(network) as writer:
        written = writer.generate(
            tokens.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=new,
            synced_gpus=any(hasattr(parameter, "ds_id") for parameter in network.parameters()),
        )
    return list(tokenizer.batch_decode(written[:, width:], skip_special_tokens=True))
