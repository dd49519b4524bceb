"""Rows of words as tokens, cut at words where they are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Window:
    """Some words of a row, from word `first` on.

    ids      of all tokens, special ones too
    places   for each word, where its first piece stands among them; -1 where the tokenizer reads nothing of it
    short    a word alone had more pieces than there is room for
    """

    first: int
    ids: list[int]
    places: list[int]
    short: bool = False


def cut(texts: Sequence[list[str]], tokenizer: Any, max_length: int) -> list[list[Window]]:
    """For each row of words its windows, of `max_length` tokens at most; together they hold every word once."""
    if not texts:
        return []
    found = []
    options = {"is_split_into_words": True, "padding": False, "return_attention_mask": False, "verbose": False}
    whole = tokenizer(list(texts), truncation=False, **options)
    for row, words in enumerate(texts):
        window = _window(whole, row, 0, len(words))
        if len(window.ids) <= max_length:
            found.append([window])
            continue
        pieces = [0] * len(words)
        for word in whole.word_ids(row):
            if word is not None:
                pieces[word] += 1
        room = max_length - (len(window.ids) - sum(pieces))
        starts = _starts(pieces, room)
        parts = [words[first:last] for first, last in zip(starts, [*starts[1:], len(words)], strict=True)]
        made = tokenizer(parts, truncation=True, max_length=max_length, **options)
        found.append(
            [
                _window(
                    made, number, first, len(part), any(count > room for count in pieces[first : first + len(part)])
                )
                for number, (first, part) in enumerate(zip(starts, parts, strict=True))
            ]
        )
    return found


def _starts(pieces: list[int], room: int) -> list[int]:
    """The first words of windows that hold as many words as have `room` pieces together, one at least."""
    starts, used = [0], 0
    for word, count in enumerate(pieces):
        if used and used + count > room:
            starts.append(word)
            used = 0
        used += count
    return starts


def _window(made: Any, row: int, first: int, words: int, short: bool = False) -> Window:
    places = [-1] * words
    for place, word in reversed(list(enumerate(made.word_ids(row)))):
        if word is not None:
            places[word] = place
    return Window(first, list(made["input_ids"][row]), places, short)
