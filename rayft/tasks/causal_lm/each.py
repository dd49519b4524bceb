"""Attention of packed sequences one by one, where a mask would have it computed between all tokens of a row.

A row of 512 tokens with two sequences has a quarter of its pairs of tokens in the two triangles that count. Flash
attention leaves out the others on GPUs; here the processor does, with torch's own attention over each sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from rayft.tasks.causal_lm.apart import run_twin
from rayft.tasks.later import torch, transformers

NAME = "each_sequence"  # of the attention, among those that transformers knows


def attend_each(network: Any) -> bool:
    """Has `network`, whose attention keeps packed sequences apart, compute it for each of them; whether it can.

    That takes attention as "sdpa", and that all of a model's layers hand mask and states to transformers' interface and
    ask for nothing more: a twin shows what they hand on.
    """
    if network.config._attn_implementation != "sdpa" or not network._can_set_attn_implementation():
        return False
    made = torch.zeros(1, dtype=torch.int64, device="meta")
    handed: list[bool] = []

    def seen(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **more: Any) -> tuple[Any, None]:
        handed.append(attention_mask is made and not _added(more))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    _register(seen, lambda **_: made)
    try:
        run_twin(network, lambda positions: positions, NAME)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    finally:
        make_known()
    if not all(handed) or len(handed) != network.config.get_text_config().num_hidden_layers:
        return False
    network.set_attn_implementation(NAME)
    return True


def make_known() -> None:
    """Tells transformers of the attention: also in a process that has got its network from another."""
    _register(*_uncompiled())


def attend_on(network: Any, device: torch.device) -> None:
    """Gets a network ready to read rows on `device`. On a GPU it attends as "sdpa" from now on, which compiles whole.

    Where a network will read is not known yet when it is loaded.
    """
    if network.config._attn_implementation != NAME:
        return
    if device.type == "cpu":
        make_known()
    else:
        network.set_attn_implementation("sdpa")


@functools.cache
def _uncompiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """In a compiled model attention and mask are computed as they are: other lengths would be another program."""
    return torch.compiler.disable(_attention), torch.compiler.disable(_mask)


def _register(attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    transformers.AttentionInterface.register(NAME, attention)
    transformers.AttentionMaskInterface.register(NAME, mask)


def _added(more: dict[str, Any]) -> bool:
    """Whether a layer asks for more than attention: a bias, a cap, sinks."""
    return any(more.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))


def _mask(**asked: Any) -> torch.Tensor | None:
    """The lengths of all sequences, one row's after another's, (sequences,) int64; or sdpa's mask.

    The lengths say all where each token sees those before it in its sequence, and nothing else.
    """
    made = None
    plain = asked["device"].type == "cpu" and not asked["use_vmap"] and asked["attention_mask"] is None
    packed = not asked.get("allow_is_causal_skip", True) and asked["q_length"] == asked["kv_length"]
    if plain and packed:
        made = _lengths(asked["mask_function"], asked["batch_size"], asked["q_length"])
    return transformers.masking_utils.sdpa_mask(**asked) if made is None else made


def _lengths(sees: Callable[..., torch.Tensor], rows: int, tokens: int) -> torch.Tensor | None:
    """The sequences' lengths by `sees(row, head, token, other)`; None where windows or images cut across them."""
    row, token = torch.arange(rows)[:, None], torch.arange(tokens)
    begins = torch.ones(rows, tokens, dtype=torch.bool)
    begins[:, 1:] = ~sees(row, 0, token[1:], token[:-1])
    rows_of, first = begins.nonzero(as_tuple=True)
    lengths = torch.diff(rows_of * tokens + first, append=torch.tensor([rows * tokens]))
    back = sees(rows_of, 0, first + lengths - 1, first)  # else a window cuts the sequence
    ahead = sees(row, 0, token[:-1], token[1:])  # as the tokens of an image do
    return lengths if bool(back.all()) and not bool(ahead.any()) else None


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """(n, l, heads, width) of query (n, heads, l, width); key and value may have fewer heads, each for several."""
    if attention_mask is None or attention_mask.dim() > 1:
        plain = transformers.integrations.sdpa_attention.sdpa_attention_forward
        result: tuple[torch.Tensor, None] = plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return result
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows = []
    # `unbind` and `split`, since their backward passes join all parts at once.
    for own, *states in zip(
        _by_row(attention_mask.tolist(), query.shape[2]), query.unbind(), key.unbind(), value.unbind(), strict=True
    ):
        sequences = zip(*(one.split(own, dim=1) for one in states), strict=True)
        rows.append(torch.cat([_causal(q, k, v, dropout, scaling) for q, k, v in sequences], dim=1))
    return torch.stack(rows).transpose(1, 2).contiguous(), None


def _by_row(lengths: list[int], tokens: int) -> list[list[int]]:
    """Lengths that add up to as many tokens as a row has, row by row."""
    rows: list[list[int]] = [[]]
    for length in lengths:
        if sum(rows[-1]) == tokens:
            rows.append([])
        rows[-1].append(length)
    return rows


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None
) -> torch.Tensor:
    """Attention of one sequence: (heads, length, width) of each."""
    made: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], dropout_p=dropout, is_causal=True, scale=scaling
    )
    return made[0]
