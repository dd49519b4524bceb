"""Does a model keep packed sequences apart? Seen without running it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from rayft.tasks.later import torch, transformers

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class _Asked(Exception):
    pass


def keeps_apart(network: Any) -> bool:
    """Whether the model's attention ends where position ids start again.

    Models with a recurrent state don't, and others only if they hand their position ids to the maker of the mask: a
    twin shows whether it is asked about packed sequences.
    """
    kinds = set(getattr(network.config.get_text_config(), "layer_types", None) or ())
    if network._is_stateful or not kinds <= ATTENTION_LAYERS:
        return False

    def asked(_: Any) -> Any:
        raise _Asked

    try:
        run_twin(network, asked)
    except _Asked:
        return True
    except (TypeError, ValueError, RuntimeError):
        return False
    return False


def run_twin(network: Any, packed: Callable[[Any], Any], attention: str | None = None) -> None:
    """Gives four tokens to a twin of `network` on the meta device, where nothing is stored or computed.

    `packed` answers from position ids which sequence each token belongs to; `attention` replaces the model's. Raises
    whatever the twin does.
    """
    config = copy.deepcopy(network.config)
    config.pad_token_id = None  # with it GPT-2 looks for padding among the ids, which have no values here
    config._attn_implementation = attention or config._attn_implementation
    makers: Any = transformers.masking_utils
    original = makers.find_packed_sequence_indices
    makers.find_packed_sequence_indices = packed
    try:
        with torch.device("meta"), torch.no_grad():
            ids = torch.zeros(1, 4, dtype=torch.int64)
            type(network)(config)(input_ids=ids, position_ids=ids, use_cache=False)
    finally:
        makers.find_packed_sequence_indices = original
