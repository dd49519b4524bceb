"""Cells of a table: the list that one holds as text, and how a message quotes one."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from contextlib import suppress
from itertools import pairwise
from typing import Any

QUOTED = 80  # characters of a cell that a message repeats
_QUOTES = re.compile(r"['\"]\s+['\"]")
_UNREADABLE = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)


def quoted(value: Any) -> str:
    """A cell as a message quotes it: of a long one the beginning."""
    return short(repr(value))


def short(text: str) -> str:
    """A text that a message names: of a long one the beginning."""
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 4]} ..."


def in_brackets(value: Any) -> bool:
    """Whether a cell is text that seems to hold a list."""
    return isinstance(value, str) and (text := value.strip())[:1] == "[" and text[-1:] == "]"


def list_in(text: str) -> list[Any] | None:
    """The list that a text in brackets is, in JSON or as Python writes it (and pandas in a CSV file); None: it is none.

    ['a' 'b'], as NumPy writes two texts, is none: Python would take it for the one text 'ab'.
    """
    found: Any = None
    with suppress(*_UNREADABLE):
        found = json.loads(text)
    if found is None and not side_by_side(text):
        with suppress(*_UNREADABLE):
            found = ast.literal_eval(text.strip())
    return found if isinstance(found, list) else None


def side_by_side(text: str) -> bool:
    """Whether two literals of text stand side by side, without a comma between them."""
    if not _QUOTES.search(text):  # nearly always, and much sooner known
        return False
    kinds: list[int] = []
    with suppress(SyntaxError, tokenize.TokenError):
        kinds.extend(token.type for token in tokenize.generate_tokens(io.StringIO(text).readline))
    written = [kind for kind in kinds if kind != tokenize.NL]
    return any(one == other == tokenize.STRING for one, other in pairwise(written))
