"""A question and its context as windows of the tokenizer's, and where in them an answer lies."""

from __future__ import annotations

from typing import Any

import numpy as np


class Window:
    """One window: the tokens of a question and of a part of its context.

    input_ids, token_type_ids  as the model takes them
    tokens                     indices of the context's tokens in the window
    starts, ends               of these tokens, the characters of the row's context that they cover
    """

    def __init__(
        self,
        *,
        input_ids: list[int],
        token_type_ids: list[int] | None,
        offsets: Any,
        in_context: Any,
        null_token: int | None,
        text: str,
        is_first: bool,
        is_last: bool,
    ):
        self.input_ids = input_ids
        self.token_type_ids = token_type_ids
        self.tokens = np.flatnonzero(in_context)
        self.starts, self.ends = offsets[self.tokens, 0], offsets[self.tokens, 1]
        self.null_position = input_ids.index(null_token) if null_token in input_ids else 0
        self._text = text
        self._is_first = is_first
        self._is_last = is_last

    def find(self, answer: str, begin: int) -> tuple[int, int] | None:
        """The first and last token of the answer that begins at character `begin`; None where it isn't all in here.

        A window that is the text's first or last may miss characters there that give no token.
        """
        begin += len(answer) - len(answer.lstrip())
        end = begin + len(answer.strip())
        if (begin < self.starts[0] and not self._is_first) or (end > self.ends[-1] and not self._is_last):
            return None
        first = int(np.searchsorted(self.ends, begin, side="right"))
        last = int(np.searchsorted(self.starts, end, side="left")) - 1
        return (int(self.tokens[first]), int(self.tokens[last])) if first <= last else None

    def feature(self, span: tuple[int | None, int | None] | None) -> dict[str, Any]:
        """The columns of `QuestionAnswering.arrow_schema(True)`; without a span the answer is not in this window."""
        start, end = span or (self.null_position, self.null_position)
        base, stop = int(self.starts[0]), int(self.ends[-1])
        offsets = np.full((len(self.input_ids), 2), -1, dtype=np.int32)
        offsets[self.tokens] = np.stack([self.starts - base, self.ends - base], axis=1)
        return {
            "input_ids": self.input_ids,
            "token_type_ids": self.token_type_ids,
            "start_position": start,
            "end_position": end,
            "null_position": self.null_position,
            "offsets": offsets.ravel().tolist(),
            "context": self._text[base:stop],
            "context_start": base,
        }


def too_long(questions: list[str], tokenizer: Any, max_length: int, stride: int) -> list[bool]:
    """For each question, whether its windows hold no more of the context than their overlap, so that none moves on."""
    if not questions:
        return []
    tokens = tokenizer(questions, add_special_tokens=False, return_attention_mask=False, verbose=False)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    return [room - len(ids) <= stride for ids in tokens["input_ids"]]


def cut(questions: list[str], contexts: list[str], tokenizer: Any, max_length: int, stride: int) -> list[list[Window]]:
    """The windows of each pair in the order of its text, `max_length` tokens each, of which two share `stride`."""
    windows: list[list[Window]] = [[] for _ in questions]
    if not questions:
        return windows
    tokens = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        padding=False,
    )
    origin = tokens["overflow_to_sample_mapping"]
    for number, pair in enumerate(origin):
        window = Window(
            input_ids=tokens["input_ids"][number],
            token_type_ids=tokens["token_type_ids"][number] if "token_type_ids" in tokens else None,
            offsets=np.asarray(tokens["offset_mapping"][number]),
            in_context=np.asarray([part == 1 for part in tokens.sequence_ids(number)]),
            null_token=tokenizer.cls_token_id,
            text=contexts[pair],
            is_first=not windows[pair],
            is_last=number + 1 == len(origin) or origin[number + 1] != pair,
        )
        windows[pair].append(window)
    return windows
