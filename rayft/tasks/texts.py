"""What tasks on a text or a pair of texts share: rows of text to rows of tokens, and a truth for each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from rayft.errors import ModelError
from rayft.tasks.later import transformers
from rayft.tasks.loading import load_config, load_tokenizer, pad_on
from rayft.tasks.task import Columns, Encoded, Pretrained, check_text

# Their classifiers read places of a row by what `summary_type` says, and know nothing of padding.
SUMMARISING = frozenset({"flaubert", "xlm", "xlnet"})


def classifying_tokenizer(model: Pretrained, max_length: int) -> Any:
    """The tokenizer of a model that tells something of a text, for texts of up to `max_length` tokens.

    A model with a decoder (BART, T5) answers at the last end of sequence, and refuses a batch whose rows hold more and
    fewer of them: to it what users write is never a special token. ModelError where the answer would depend on how
    far a row is padded.
    """
    config, tokenizer = load_config(model), load_tokenizer(model, max_length)
    tokenizer.model_max_length = max_length
    if getattr(config, "is_encoder_decoder", False):
        tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True  # now, and when saved
    if config.model_type in SUMMARISING and config.summary_type != "first":
        # XLNet's positions are relative, so that padding before a text changes nothing else.
        fits = ("first", "last") if config.model_type == "xlnet" else ("first",)
        if config.summary_type not in fits:
            raise ModelError(
                f"{model.path} ({config.model_type}) sums a text up by {config.summary_type!r} of its places, padding "
                f"among them; {' or '.join(fits)} as `summary_type` in its config.json fits"
            )
        pad_on(tokenizer, "left")
    return tokenizer


def encode_texts(
    rows: Columns, columns: Sequence[str], tokenizer: Any, max_length: int, truth: Callable[[int], Any]
) -> Encoded:
    """One feature for each row whose one or two `columns` hold text and whose truth can be told.

    `truth` gives a row's `label`, or None where none is asked for; it raises ValueError with a sentence for `bad`.
    Columns: `input_ids`, for a pair `token_type_ids` (null where the tokenizer makes none), and `label`.
    """
    bad: dict[int, str] = {}
    labels: dict[int, Any] = {}  # of each usable row
    for row in range(len(rows[columns[0]])):
        try:
            for column in columns:
                check_text(column, rows[column][row])
            labels[row] = truth(row)
        except ValueError as fault:
            bad[row] = str(fault)
    usable = list(labels)
    tokens, cut = tokenize(tokenizer, [[rows[column][row] for row in usable] for column in columns], max_length)
    ids = tokens["input_ids"]
    features: Columns = {"input_ids": ids}
    if len(columns) > 1:
        features["token_type_ids"] = tokens.get("token_type_ids", [None] * len(ids))
    features["label"] = list(labels.values())
    return Encoded(features, usable, [len(row) for row in ids], truncated=[usable[place] for place in cut], bad=bad)


def broken(value: Any) -> str | None:
    """What is wrong with the texts in a cell: a lone surrogate is half a character, and no tokenizer takes it.

    JSON may hold one, where a text was cut within an emoji. None where all is well.
    """
    if isinstance(value, str):
        if value.isascii():
            return None
        try:
            value.encode()
        except UnicodeEncodeError as fault:
            return f"holds \\u{ord(value[fault.start]):04x}, which is half a character; text needs whole ones"
        return None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if parts and isinstance(next(iter(parts)), int | float):  # numbers, of which there may be many
        return None
    return next(filter(None, map(broken, parts)), None)


def tokenize(tokenizer: Any, texts: Sequence[list[str]], max_length: int) -> tuple[dict[str, list[Any]], list[int]]:
    """Token columns of one or two columns of texts, and the places of the rows that were cut to `max_length`.

    Where the tokenizer has to be called, there are two passes: the first does not truncate, and tells which rows have
    to be cut.
    """
    if not texts[0]:
        return {"input_ids": []}, []
    if is_backend(tokenizer):
        return _in_one_pass(tokenizer, texts, max_length)
    options = {"padding": False, "return_attention_mask": False, "verbose": False}
    if len(texts) == 1:
        options["return_token_type_ids"] = False  # nobody asks for them
    tokens = dict(tokenizer(*texts, truncation=False, **options))
    cut = [place for place, ids in enumerate(tokens["input_ids"]) if len(ids) > max_length]
    if cut:
        short = tokenizer(
            *([column[p] for p in cut] for column in texts), truncation=True, max_length=max_length, **options
        )
        for name, values in tokens.items():
            for place, value in zip(cut, short[name], strict=True):
                values[place] = value
    return tokens, cut


def input_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The uncut token ids of each text, with the special tokens that the tokenizer puts around it."""
    if not texts:
        return []
    if is_backend(tokenizer):
        return [encoding.ids for encoding in _encodings(tokenizer, texts)]
    ids: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    return ids


def is_backend(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer does no more than call its backend, the Rust library, and copy what that gives.

    The copying takes a third of the time. Some classes do more: they switch languages or write around the text.
    """
    kind, backend = type(tokenizer), transformers.PreTrainedTokenizerFast
    return (
        isinstance(tokenizer, backend)
        and kind.__call__ is backend.__call__
        and kind._encode_plus is backend._encode_plus
        and not hasattr(tokenizer, "_switch_to_input_mode")
    )


def _in_one_pass(tokenizer: Any, texts: Sequence[list[str]], max_length: int) -> tuple[dict[str, list[Any]], list[int]]:
    """What `tokenize` gives: what was cut off a text remains in its encoding as an overflow."""
    encodings = _encodings(tokenizer, texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)), max_length)
    ids = [encoding.ids for encoding in encodings]
    tokens = {"input_ids": ids}
    if len(texts) > 1 and "token_type_ids" in tokenizer.model_input_names:
        tokens["token_type_ids"] = [encoding.type_ids for encoding in encodings]
    full = (place for place, own in enumerate(ids) if len(own) >= max_length)
    return tokens, [place for place in full if encodings[place].overflowing]


def _encodings(tokenizer: Any, texts: list[Any], max_length: int | None = None) -> list[Any]:
    """Texts or pairs by the backend, set up as a call of the tokenizer would."""
    base: Any = importlib.import_module("transformers.tokenization_utils_base")
    cuts = base.TruncationStrategy.DO_NOT_TRUNCATE if max_length is None else base.TruncationStrategy.LONGEST_FIRST
    tokenizer.set_truncation_and_padding(base.PaddingStrategy.DO_NOT_PAD, cuts, max_length, 0, None, None)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings: list[Any] = backend.encode_batch_fast(texts)
    return encodings
