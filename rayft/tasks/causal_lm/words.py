"""From a row's columns to text, and from text to token ids with a beginning and an end."""

from __future__ import annotations

from functools import lru_cache
from string import Formatter
from typing import Any

import numpy as np

from rayft.tasks.task import Columns
from rayft.tasks.texts import input_ids


@lru_cache
def pieces(form: str) -> tuple[tuple[str, str | None], ...]:
    """A column's name, or a format string, as (text, column after it); ValueError where it is neither."""
    if "{" not in form:
        return (("", form),)
    parsed = list(Formatter().parse(form))
    if any(name == "" or spec or conversion for _, name, spec, conversion in parsed):
        raise ValueError(f"{form!r} may hold columns' names in braces, and nothing else in them")
    return tuple((text, name) for text, name, _, _ in parsed)


def filled(form: str, rows: Columns, row: int) -> str:
    """`form` with the row's values; numbers are written out, and nulls are empty unless all values are null."""
    names = [name for _, name in pieces(form) if name is not None]
    values = {name: rows[name][row] for name in names}
    if all(value is None for value in values.values()):
        are = "is" if len(values) == 1 else "are"
        raise ValueError(f"{' and '.join(f'`{name}`' for name in values)} {are} null; text is needed")
    for name, value in values.items():
        if isinstance(value, list | tuple | np.ndarray) and len(value) and isinstance(value[0], dict):
            raise ValueError(
                f"`{name}` holds messages; text is needed, or one column with the whole conversation (task.messages)"
            )
        if not isinstance(value, str | int | float | None):
            raise ValueError(f"`{name}` is a {type(value).__name__}; text is needed")
    return "".join(
        text + ("" if name is None or values[name] is None else str(values[name])) for text, name in pieces(form)
    )


def ended(ids: list[int], eos: int | None) -> list[int]:
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def tokenized(tokenizer: Any, texts: list[str], *, end: bool) -> list[list[int]]:
    """Token ids with the special tokens that the tokenizer puts around a text; the end of sequence always or never.

    Special tokens that a text itself begins or ends with are not doubled.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    found = []
    for text, whole in zip(texts, input_ids(tokenizer, texts), strict=True):
        ids = whole
        own_end = eos is not None and text.endswith(tokenizer.eos_token)
        if bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token):
            ids = ids[1:]
        if eos is not None and len(ids) > 1 and ids[-1] == eos and (not own_end or ids[-2] == eos):
            ids = ids[:-1]
        found.append(ended(ids, eos) if end else ids)
    return found
