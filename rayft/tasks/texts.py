"""What tasks on a text or a pair of texts share: rows of text to rows of tokens, and a truth for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rayft.tasks.task import Columns, Encoded, check_text


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


def tokenize(tokenizer: Any, texts: Sequence[list[str]], max_length: int) -> tuple[dict[str, list[Any]], list[int]]:
    """Token columns of one or two columns of texts, and the places of the rows that were cut to `max_length`.

    The first pass does not truncate: it is what tells, for every kind of tokenizer, which rows have to be cut.
    """
    if not texts[0]:
        return {"input_ids": []}, []
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
