"""What tasks share: how a pretrained model and its tokenizer are loaded, and how rows of tokens become tensors."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from safetensors import SafetensorError

from rayft.errors import ModelError
from rayft.models import hub_answers, without_weights
from rayft.tasks.drawing import draw_parameters, drawing_one_by_one
from rayft.tasks.generation import saveable
from rayft.tasks.later import torch, transformers
from rayft.tasks.task import Batch, Columns, Pretrained

FOLDER = "a folder as `save_pretrained` writes it fits"
# What transformers 5.23 says -> the reason in our words and what would fit.
SIGNS = (
    ("custom code", "it brings code of its own", "read that code, then set model.trust_remote_code=true"),
    (
        "Unrecognized configuration class",
        "its kind of model has no head for this task",
        "a model that transformers has such a head for fits",
    ),
    (
        "does not recognize this architecture",
        f"its config.json has a model_type that transformers {version('transformers')} doesn't know",
        "a known one fits, or a model with code of its own",
    ),
    (
        "the package for FlashAttention",
        "model.attention asks for flash attention, which is not installed where it is loaded",
        "model.attention=sdpa fits, or there `pip install flash-attn --no-build-isolation`, which takes nvcc",
    ),
    ("Unrecognized model", "it has no config.json with a model_type", FOLDER),
    (
        "Couldn't instantiate the backend tokenizer",
        "it has no tokenizer files that can be read",
        "a folder with tokenizer.json fits",
    ),
)
NO_HUB = (
    "the Hub doesn't answer, and its cache on this machine lacks the files",
    "a local folder or a model that was fetched before fits",
)
# Their position ids begin behind the padding token's index; see `padding_idx + 1` in transformers/models.
OFFSET_POSITIONS = frozenset(
    {"camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "xmod"}
)


def load_config(model: Pretrained, **fields: Any) -> Any:
    """The model's config with `fields` set; ModelError where there is none that transformers knows."""
    with told(model, "config"):
        return transformers.AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code, **fields
        )


def load_part(auto: Any, model: Pretrained, part: str) -> Any:
    """What `auto` (a feature extractor's or tokenizer's auto class) loads for the model; ModelError names the part."""
    with told(model, part):
        return auto.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def load_tokenizer(
    model: Pretrained, max_length: int, offsets_for: str | None = None, *, words: bool = False, pads: bool = True
) -> Any:
    """The tokenizer; `offsets_for` is what needs to know which characters a token covers.

    Where it `pads` it has a token for that, and does so on the right. With `words` it will be given words: one for
    which a blank belongs to the word behind it puts it there.

    ModelError where the model has fewer positions than `max_length`, or the tokenizer no such offsets or token.
    """
    config = load_config(model)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    if "roberta" in config.model_type or config.model_type in OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    if 0 < positions < max_length:  # XLNet says -1, and means no limit
        raise ModelError(f"task.max_length is {max_length}, but {model.path} has only {positions} positions")
    with told(model, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        if words and getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                model.path,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                add_prefix_space=True,
            )
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes where there are no files
            raise ValueError(SIGNS[-1][0])
    if offsets_for is not None and not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {model.path} tells no offsets, which {offsets_for} needs; one with tokenizer.json fits"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    if tokenizer.pad_token is None and pads:
        raise ModelError(
            f"the tokenizer of {model.path} has neither a token to pad with nor an end of sequence; `pad_token` in its "
            "tokenizer_config.json says which one pads"
        )
    if pads:
        pad_on(tokenizer, "right")
    return tokenizer


def pad_on(tokenizer: Any, side: str) -> None:
    """Makes the tokenizer pad on `side`, now and when it is saved and loaded again."""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side


def from_pretrained(auto: Any, model: Pretrained, **config_fields: Any) -> torch.nn.Module:
    """Loads `model` through the transformers auto class `auto`, with `config_fields` set on its config.

    Parameters that the checkpoint lacks are drawn anew from (seed, module's name), so that they depend neither on
    ranks, nor on the order of loading, nor on the ZeRO stage; `rayft_drawn` of the model names them. Of a folder with a
    config alone all are drawn, and `rayft_drawn` names the head's. ModelError where it can't be loaded.
    """
    config = load_config(model, **config_fields)
    keep_blocks(config)
    set_dropout(config, model.dropout)
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype), "trust_remote_code": model.trust_remote_code}
    if model.attention and not (model.meta and "flash" in model.attention):  # that is installed where GPUs are
        options["attn_implementation"] = model.attention
    if model.quantize and not model.meta:  # an outline counts the weights, however wide they are
        options |= _in_four_bits(model)
    with told(model, "weights"):
        if model.meta:
            with torch.device("meta"):
                outline = auto.from_config(config, **options).to("meta")  # some constructors insist on memory
            outline.rayft_drawn = _head(outline) if without_weights(model.path) else _lacking(outline, model.path)
            return outline
        if without_weights(model.path):
            with torch.random.fork_rng(devices=[]):  # some parameters keep what their constructor drew (weight norms)
                torch.manual_seed(model.seed)
                network = auto.from_config(config, **options)
            draw_parameters(network, [name for name, _ in network.named_parameters()], model.seed)
            network.rayft_drawn = _head(network)
            saveable(network)
            return network
        with drawing_one_by_one(model.seed):
            network, info = auto.from_pretrained(
                model.path,
                revision=model.revision,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    if model.quantize == "4bit, and back":
        network = network.dequantize(dtype=options["dtype"])
    _refuse_quantized(model, network, _drawn(info))
    # What was drawn is the head: adapters must train it whole.
    network.rayft_drawn = draw_parameters(network, _drawn(info), model.seed)
    saveable(network)
    return network


def keep_blocks(config: Any) -> None:
    """Sets on a model's config that no whole blocks are left out while it learns (LayerDrop).

    Which are, every process would draw on its own, and then exchange gradients that the others don't have.
    """
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)


def _in_four_bits(model: Pretrained) -> dict[str, Any]:
    """How `from_pretrained` keeps linear layers in 4 bits: NormalFloat with quantized constants, as in QLoRA (Dettmers
    et al. 2023), computing in the weights' dtype. ModelError where bitsandbytes is missing."""
    require_bitsandbytes()
    if without_weights(model.path):
        raise ModelError(f"model.quantize: {model.path} is a config without weights to put in 4 bits; null fits")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
    )
    options: dict[str, Any] = {"quantization_config": config}
    if model.quantize != "4bit":  # at their whole width they may be too many for the GPU
        options["device_map"] = {"": "cpu"}
    return options


def require_bitsandbytes() -> None:
    """ModelError where a package that keeps weights in 4 bits is missing."""
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"model.quantize needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed;"
            " `pip install 'rayft[quantize]'` fits, or null"
        )


def _refuse_quantized(model: Pretrained, network: Any, drawn: set[str]) -> None:
    """ModelError where parameters that are to be drawn anew, and to learn, were put into 4 bits."""
    narrow = [name for name, value in network.named_parameters() if name in drawn and not value.is_floating_point()]
    if narrow:
        raise ModelError(
            f"model.quantize: {model.path} lacks {', '.join(narrow[:3])}, which can't learn in 4 bits; null fits"
        )


@contextlib.contextmanager
def told(model: Pretrained, part: str) -> Iterator[None]:
    """Makes what the libraries raise while `part` of the model is loaded a ModelError of one sentence."""
    answers = os.path.isdir(model.path) or hub_answers()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as fault:
        first = next(iter(str(fault).strip().splitlines()), "").rstrip(".")
        plain = (f"{type(fault).__name__}: {first}", f"{'' if os.path.isdir(model.path) else 'a Hub id or '}{FOLDER}")
        reason, fits = next(((reason, fits) for sign, reason, fits in SIGNS if sign in str(fault)), plain)
        if isinstance(fault, OSError) and not answers:
            reason, fits = NO_HUB
        raise ModelError(f"model.path: the {part} of `{model.path}` can't be loaded, {reason}; {fits}") from fault


def _head(network: Any) -> tuple[str, ...]:
    """Names of the parameters that lie outside the base model: what a task's own class adds to it."""
    base = f"{network.base_model_prefix}."
    return tuple(name for name, _ in network.named_parameters() if not name.startswith(base))


def _lacking(network: Any, path: str) -> tuple[str, ...]:
    """Names of parameters that the weights in folder `path` lack, by their shapes alone; () for a Hub id, unseen."""
    from transformers.modeling_utils import load_state_dict

    files = sorted(os.listdir(path)) if os.path.isdir(path) else []
    weights = [file for file in files if file.endswith(".safetensors")] or [
        file for file in files if file.startswith("pytorch_model") and file.endswith(".bin")
    ]
    if not weights:
        return ()
    stored: dict[str, Any] = {}
    for file in weights:
        stored |= load_state_dict(os.path.join(path, file), map_location="meta")
    _, info = type(network).from_pretrained(
        None,
        config=network.config,
        state_dict=stored,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    lacking = _drawn(info)
    return tuple(name for name, _ in network.named_parameters() if name in lacking)


def _drawn(info: dict[str, Any]) -> set[str]:
    """Of what `from_pretrained` tells about loading, the names of what the weights lack or have in another shape."""
    return {*info["missing_keys"], *(entry[0] for entry in info.get("mismatched_keys", ()))}


def set_dropout(config: Any, rate: float | None) -> None:
    """Sets every dropout probability that the config knows; None leaves them."""
    if rate is not None:
        for holder, name in dropouts(config):
            setattr(holder, name, rate)


def dropouts(config: Any) -> list[tuple[Any, str]]:
    """The dropout probabilities that a config knows, each as the config that holds it, which may be nested, and its
    name."""
    found = []
    for name, value in vars(config).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found += dropouts(value)
        elif (number and ("dropout" in name or name.endswith("_pdrop"))) or (
            value is None and name == "classifier_dropout"
        ):
            found.append((config, name))
    return found


def pad(rows: Sequence[Any], value: int, side: str = "right") -> torch.Tensor:
    """Rows of numbers of any length as (rows, longest) int64, filled up on `side`."""
    longest = max(len(row) for row in rows)
    padded = np.full((len(rows), longest), value, dtype=np.int64)
    for place, row in enumerate(rows):
        first = longest - len(row) if side == "left" else 0
        padded[place, first : first + len(row)] = row
    return torch.from_numpy(padded)


def padded(features: Columns, tokenizer: Any) -> Batch:
    """`input_ids`, `attention_mask` and, where the features have them, `token_type_ids`: each (n, longest) int64.

    They are filled up on the side where the tokenizer pads.
    """
    ids, side = features["input_ids"], tokenizer.padding_side
    batch = {
        "input_ids": pad(ids, tokenizer.pad_token_id, side),
        "attention_mask": pad([np.ones(len(row)) for row in ids], 0, side),
    }
    if features.get("token_type_ids", [None])[0] is not None:
        batch["token_type_ids"] = pad(features["token_type_ids"], tokenizer.pad_token_type_id, side)
    return batch
