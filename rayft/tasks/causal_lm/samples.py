"""From rows to token ids and to what of them is learned: texts, prompts with completions, conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayft.tasks.causal_lm.chat import Span, Template, assistant_spans, conversation, muted, rendered, tools_in, within
from rayft.tasks.causal_lm.likelihood import IGNORED
from rayft.tasks.causal_lm.words import ended, filled, pieces, tokenized
from rayft.tasks.task import Columns

Sample = tuple[list[int], list[int]]  # token ids and their labels, not shifted


@dataclass(frozen=True)
class Form:
    """What a row holds: the fields of the same names of the recipe's `task:` section."""

    text: str | None
    prompt: str | None
    completion: str | None
    messages: str | None
    tools: str | None
    chat: bool
    train_on_prompt: bool

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        """The columns that the form names; those of prompts alone without labels."""
        if self.messages is not None:
            return (self.messages,) if self.tools is None else (self.messages, self.tools)
        forms = (self.text, self.prompt, self.completion if labelled else None)
        names = (name for form in forms if form is not None for _, name in pieces(form) if name is not None)
        return tuple(dict.fromkeys(names))


def samples(
    form: Form, rows: Columns, tokenizer: Any, labelled: bool, bad: dict[int, str]
) -> Iterator[tuple[int, Sample]]:
    """(row, sample) for all rows that don't go to `bad`, in their order; uncut. Without labels they are prompts."""
    if form.messages is not None or form.chat:
        yield from _by_spans(tokenizer, list(_shown(form, rows, tokenizer, labelled, bad)))
        return
    texts = _texts(form, rows, labelled, bad)
    whole = tokenized(tokenizer, ["".join(parts) for parts in texts.values()], end=labelled)
    if not labelled or form.text is not None:
        for (row, parts), ids in zip(texts.items(), whole, strict=True):
            yield row, (ids, ids if labelled and parts[0].strip() else [IGNORED] * len(ids))
        return
    prompts = tokenized(tokenizer, [prompt for prompt, _ in texts.values()], end=False)
    for (row, (_, completion)), ids, prompt in zip(texts.items(), whole, prompts, strict=True):
        if ids[: len(prompt)] == prompt:
            answer = ids[len(prompt) :]
        else:  # a token spans both, but whoever generates gives the model the prompt's tokens alone
            own = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
            answer = ended(own, tokenizer.eos_token_id)
        asked = prompt if form.train_on_prompt else [IGNORED] * len(prompt)
        labels = [*asked, *answer] if completion else [IGNORED] * (len(prompt) + len(answer))
        yield row, ([*prompt, *answer], labels)


def truths(form: Form, rows: Columns) -> dict[int, str]:
    """What was to be written behind the prompt of each row: its completion, or the assistant's last words.

    Rows that are bad, or end before the assistant's turn, are not there.
    """
    found: dict[int, str] = {}
    for row in range(len(next(iter(rows.values()), []))):
        try:
            if form.messages is None:
                found[row] = filled(form.completion or "", rows, row)
            elif (last := conversation(rows[form.messages][row])[-1])["role"] == "assistant":
                found[row] = str(last.get("content"))
        except ValueError:  # told where samples are made of it
            continue
    return found


def _texts(form: Form, rows: Columns, labelled: bool, bad: dict[int, str]) -> dict[int, list[str]]:
    """Row -> its text, or its prompt and (with labels) its completion."""
    parts = [part for part in (form.text, form.prompt, form.completion if labelled else None) if part is not None]
    texts: dict[int, list[str]] = {}
    for row in range(len(next(iter(rows.values()), []))):
        try:
            texts[row] = [filled(part, rows, row) for part in parts]
        except ValueError as fault:
            bad[row] = str(fault)
    return texts


def _tools(form: Form, rows: Columns, bad: dict[int, str]) -> dict[int, list[dict[str, Any]] | None]:
    """Row -> the tools that its assistant may call."""
    found: dict[int, list[dict[str, Any]] | None] = {}
    for row, cell in enumerate([] if form.tools is None else rows[form.tools]):
        try:
            found[row] = tools_in(cell)
        except ValueError as fault:
            bad[row] = f"`{form.tools}`: {fault}"
    return found


def _shown(
    form: Form, rows: Columns, tokenizer: Any, labelled: bool, bad: dict[int, str]
) -> Iterator[tuple[int, str, list[Span]]]:
    """(row, conversation as the template writes it, what of it is learned) for all rows that don't go to `bad`."""
    if form.messages is not None:
        column: str | None = form.messages
        cells: dict[int, Any] = dict(enumerate(rows[form.messages]))
    else:  # prompts as a user's turn, completions as the assistant's answer
        column, cells = form.prompt, _texts(form, rows, labelled, bad)
    tools = _tools(form, rows, bad)
    for row, cell in cells.items():
        if row in bad:
            continue
        template = Template(tokenizer, tools.get(row))
        try:
            if form.messages is not None:
                messages, empty = conversation(cell), False
            else:
                turns = zip(("user", "assistant"), cell, strict=False)
                messages, empty = [{"role": role, "content": text} for role, text in turns], not cell[-1].strip()
            for text, spans in _written(form, messages, template, labelled):
                yield row, text, [] if empty and labelled else spans
        except ValueError as fault:
            bad[row] = f"`{column}`: {fault}"


def _written(
    form: Form, messages: list[dict[str, Any]], template: Template, labelled: bool
) -> list[tuple[str, list[Span]]]:
    """One text, or where the template shows a turn otherwise once it is past, one per assistant turn."""
    if not labelled:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError("there is no turn to answer")
        return [(rendered(template, messages, add_generation_prompt=True), [])]
    if form.train_on_prompt:
        if any(map(muted, messages)):
            raise ValueError("a turn has `weight` 0, but task.train_on_prompt learns all; leave one of them out")
        text = rendered(template, messages)
        return [(text, [(0, len(text))])]
    return assistant_spans(template, messages)


def _by_spans(tokenizer: Any, shown: list[tuple[int, str, list[Span]]]) -> Iterator[tuple[int, Sample]]:
    """Of each text the tokens, of which those in its spans are learned."""
    if not shown:
        return
    found = tokenizer(
        [text for _, text, _ in shown],
        add_special_tokens=False,  # the template writes the beginning and end of a sequence itself
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    for (row, _, spans), ids, offsets in zip(shown, found["input_ids"], found["offset_mapping"], strict=True):
        yield row, (ids, np.where(within(offsets, spans), ids, IGNORED).tolist())
