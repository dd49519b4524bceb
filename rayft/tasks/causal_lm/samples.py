"""From rows to token ids and to what of them is learned: texts, prompts with completions, conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rayft.tasks.causal_lm.chat import assistant_spans, conversation, rendered, within
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
    chat: bool
    train_on_prompt: bool

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        """The columns that the form names; those of prompts alone without labels."""
        if self.messages is not None:
            return (self.messages,)
        forms = (self.text, self.prompt, self.completion if labelled else None)
        names = (name for form in forms if form is not None for _, name in pieces(form) if name is not None)
        return tuple(dict.fromkeys(names))


def samples(
    form: Form, rows: Columns, tokenizer: Any, labelled: bool, bad: dict[int, str]
) -> Iterator[tuple[int, Sample]]:
    """(row, sample) for all rows that don't go to `bad`, in their order; uncut. Without labels they are prompts."""
    if form.messages is not None:
        for row, value in enumerate(rows[form.messages]):
            try:
                messages = conversation(value)
                yield from ((row, sample) for sample in _conversation(form, messages, tokenizer, labelled))
            except ValueError as fault:
                bad[row] = f"`{form.messages}`: {fault}"
        return
    texts = _texts(form, rows, labelled, bad)
    if form.chat:
        yield from _turns(form, texts, tokenizer, labelled, bad)
        return
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


def _turns(
    form: Form, texts: dict[int, list[str]], tokenizer: Any, labelled: bool, bad: dict[int, str]
) -> Iterator[tuple[int, Sample]]:
    """Prompts as a user's turn, completions as the assistant's answer."""
    for row, parts in texts.items():
        turns = zip(("user", "assistant"), parts, strict=False)
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            for ids, labels in _conversation(form, messages, tokenizer, labelled):
                empty = labelled and not parts[1].strip()
                yield row, (ids, [IGNORED] * len(ids) if empty else labels)
        except ValueError as fault:
            bad[row] = f"`{form.prompt}`: {fault}"


def _conversation(form: Form, messages: list[dict[str, Any]], tokenizer: Any, labelled: bool) -> Iterator[Sample]:
    """One sample, or where the template shows a turn otherwise once it is past, one per assistant turn."""
    if not labelled:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError("there is no turn to answer")
        text = rendered(tokenizer, messages, add_generation_prompt=True)
        shown: list[tuple[str, list[tuple[int, int]]]] = [(text, [])]
    elif form.train_on_prompt:
        text = rendered(tokenizer, messages)
        shown = [(text, [(0, len(text))])]
    else:
        shown = assistant_spans(tokenizer, messages)
    for text, spans in shown:
        # The template writes the beginning and end of a sequence itself.
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        inside = [any(within(offset, span) for span in spans) for offset in found["offset_mapping"]]
        ids = found["input_ids"]
        yield ids, [token if label else IGNORED for token, label in zip(ids, inside, strict=True)]
