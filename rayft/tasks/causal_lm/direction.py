"""Does a model read from left to right, with a head that tells the next token? Known from its config alone."""

from __future__ import annotations

from typing import Any

from rayft.errors import ModelError
from rayft.tasks.later import transformers

TO_THE_RIGHT = "causal-lm needs a left-to-right model, such as GPT-2 or Llama"


def refuse_unfit(config: Any, path: str) -> None:
    """ModelError where the model with this config reads both ways, or has no head that tells the next token."""
    own = getattr(config, "auto_map", None) or {}  # of a model that brings code of its own
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own:
        raise ModelError(f"{path} ({config.model_type}) has no head that tells the next token; {TO_THE_RIGHT}")
    if reads_both_ways(config):
        raise ModelError(f"{path} ({config.model_type}) reads both ways; {TO_THE_RIGHT}")


def reads_both_ways(config: Any) -> bool:
    """Whether a token sees those behind it. Of an encoder with a decoder (BART) the decoder alone is loaded."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    match config.model_type:
        case "xlnet":
            return bool(config.attn_type == "bi")
        case "xlm":
            return not config.causal
        case "cpmant":
            return True
        case kind:
            encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind == "bert-generation"
            return encoder and not config.is_encoder_decoder and getattr(config, "is_decoder", None) is False
