"""Conversations: what a cell may hold, how a chat template writes it, and which characters the assistant wrote."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

from rayft.tasks.texts import broken

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Who speaks in ShareGPT's form of a conversation, {"from", "value"}, by the roles of chat templates.
SPEAKERS = {"human": "user", "gpt": "assistant"} | {role: role for role in ("user", "assistant", "system", "tool")}

Span = tuple[int, int]  # characters of a text, the end left out

_writing = threading.Lock()  # transformers compiles a template once, and what it notes in there is of one conversation


def conversation(value: Any) -> list[dict[str, Any]]:
    """The messages in a cell by `role` and `content`, without their nulls; ValueError says what is missing.

    ShareGPT's `from` and `value` are understood too.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"the text is not JSON ({error})") from None
        if fault := broken(value):
            raise ValueError(f"the JSON {fault}")
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        given = "an empty list" if isinstance(value, list | tuple | np.ndarray) else f"a {type(value).__name__}"
        raise ValueError(f"{given} is no conversation; a list of messages with `role` and `content` is needed")
    messages = []
    for number, message in enumerate(value, start=1):
        kept = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        if "role" not in kept and kept.keys() >= {"from", "value"}:
            kept = {**kept, "role": _role(number, kept.pop("from")), "content": kept.pop("value")}
        if not isinstance(kept.get("role"), str) or not kept.keys() & {"content", "tool_calls"}:
            has = ", ".join(f"`{key}`" for key in kept) or "none"
            raise ValueError(f"message {number} needs `role` and `content`; its fields are {has}")
        messages.append(kept)
    return messages


def _role(number: int, speaker: Any) -> str:
    if speaker not in SPEAKERS:
        raise ValueError(f"message {number} is from {speaker!r}; {', '.join(SPEAKERS)} fit, or `role` and `content`")
    return SPEAKERS[speaker]


def rendered(tokenizer: Any, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        with _writing:
            return str(tokenizer.apply_chat_template(messages, **options))
    except (TypeError, jinja2.TemplateError) as fault:
        raise ValueError(f"the chat template refuses it: {fault}") from None


def assistant_spans(tokenizer: Any, messages: list[dict[str, Any]]) -> list[tuple[str, list[Span]]]:
    """The conversation as text with the spans that the assistant wrote, the end of its turn included.

    They are those between the template's generation markers. A template without them shows them by what a turn adds to
    the conversation before it. Where the conversation goes on otherwise than it stood after a turn (templates that
    leave out past reasoning), each turn comes by itself, as the model would have met it. ValueError where a turn does
    not continue the prompt for it.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    if MARKERS.search(template):
        options = {"chat_template": template, "return_assistant_tokens_mask": True, **tokenizer.special_tokens_map}
        try:
            with _writing:
                shown: Any = render_jinja_template([messages], **options)
        except (TypeError, jinja2.TemplateError) as fault:
            raise ValueError(f"the chat template refuses it: {fault}") from None
        return [(shown[0][0], shown[1][0])]
    whole = rendered(tokenizer, messages)
    turns: list[tuple[str, Span]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise ValueError("it begins with the assistant, whose words this chat template doesn't tell from the rest")
        before = rendered(tokenizer, messages[:number], add_generation_prompt=True)
        through = rendered(tokenizer, messages[: number + 1])
        if not through.startswith(before):
            raise ValueError(
                f"message {number + 1} does not continue the chat template's prompt for it, so that its tokens can't be"
                " told from the rest; put {% generation %} markers into the template (task.chat_template)"
            )
        end = len(through)
        if tokenizer.eos_token and through.rstrip().endswith(tokenizer.eos_token):
            end = len(through.rstrip())  # the line break behind the end of a turn is never generated
        turns.append((through, (len(before), end)))
    if all(whole.startswith(through) for through, _ in turns):
        return [(whole, [span for _, span in turns])]
    return [(through, [span]) for through, span in turns]


def within(tokens: list[Span], spans: list[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens have characters in a span. Where a tokenizer trims blanks, a blank token is only its end."""
    starts, ends = np.asarray(tokens, np.int64).reshape(-1, 2).T
    found = np.zeros(len(tokens), bool)
    for first, last in spans:
        found |= (ends > first) & ((starts < last) | ((starts == ends) & (ends == last)))
    return found
