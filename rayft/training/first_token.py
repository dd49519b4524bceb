"""What the last block need not compute: where a head reads the first token alone, the others stop there.

Keys and values of the last block are needed of every token; its query, its attention and all that follows, of those
alone that somebody reads. A classifier of the BERT kind reads one. Its logits stay the same, up to rounding, for about
a sixth of the last block's arithmetic: of six blocks that all learn an eighth less, of the upper two alone two fifths.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from rayft.tasks.stacked import Blocks
from rayft.tasks.task import Task

# transformers writes these attentions alike, line by line: `self` makes query, key and value, `output` adds its input.
ALIKE = ("bert", "camembert", "data2vec", "electra", "ernie", "roberta", "roc_bert", "xlm_roberta")
# Attentions whose mask is a tensor with a place for each query, or none.
IMPLEMENTATIONS = ("eager", "sdpa")


def read_first(task: Task, network: Any, blocks: Blocks) -> bool:
    """From now on the last block of `network` gives the first token's state alone: n rows, 1 token, width.

    False, and nothing changes, where the task's head reads more or the architecture is none that this is known of.
    Weights, their names and what is exported stay as they are.
    """
    if not task.reads_first:
        return False
    attention: Any = getattr(network.get_submodule(blocks.blocks[-1]), "attention", None) if blocks.blocks else None
    inner: Any = getattr(attention, "self", None)
    family = type(inner).__module__.removeprefix("transformers.models.").partition(".")[0]
    if (
        family not in ALIKE
        or not type(inner).__name__.endswith("SelfAttention")
        or inner.config._attn_implementation not in IMPLEMENTATIONS
    ):
        return False
    attention.forward = _First(attention)
    return True


class _First:
    """The forward pass of an attention of which the first token's output alone is read."""

    def __init__(self, attention: Any) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.attention = attention
        inner = attention.self
        eager = sys.modules[type(inner).__module__].eager_attention_forward
        self.function = ALL_ATTENTION_FUNCTIONS.get_interface(inner.config._attn_implementation, eager)

    def __call__(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (n, tokens, width), attention_mask (n, 1, tokens or 1, tokens) -> (n, 1, width), weights."""
        kwargs.pop("past_key_values", None)
        inner, first = self.attention.self, hidden_states[:, :1]
        query, key, value = (
            made.unflatten(-1, (-1, inner.attention_head_size)).transpose(1, 2)
            for made in (inner.query(first), inner.key(hidden_states), inner.value(hidden_states))
        )
        given, weights = self.function(
            inner,
            query,
            key,
            value,
            None if attention_mask is None else attention_mask[:, :, :1],
            dropout=inner.dropout.p if inner.training else 0.0,
            scaling=inner.scaling,
            **kwargs,
        )
        return self.attention.output(given.flatten(2), first), weights
