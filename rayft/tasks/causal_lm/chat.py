"""Conversations: what a cell may hold, how a chat template writes it, and which characters the assistant wrote."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

from rayft.tasks.cells import quoted
from rayft.tasks.texts import broken

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

ROLES = ("user", "assistant", "system", "tool")  # of chat templates
# Who speaks in ShareGPT's form of a conversation, {"from", "value"}, by these roles.
SPEAKERS = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
NAMED = 3  # roles, in the reason why a conversation is left out
EMPTY = {"role": "assistant", "content": ""}

Span = tuple[int, int]  # characters of a text, the end left out

_writing = threading.Lock()  # transformers compiles a template once, and what it notes in there is of one conversation


def tools_in(value: Any) -> list[dict[str, Any]] | None:
    """The tools in a cell, a list of definitions or such a list as JSON, without fields that are null as `conversation`
    leaves them out; None where it holds none. ValueError says what is wrong."""
    if isinstance(value, str):
        value = _read(value) if value.strip() else None
    held = _without_nulls(value)
    if held is not None and not (isinstance(held, list) and all(isinstance(tool, dict) for tool in held)):
        raise ValueError(f"{quoted(value)} is no list of tools; their definitions are needed")
    return held or None


def _read(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the text is not JSON ({error})") from None
    if fault := broken(value):
        raise ValueError(f"the JSON {fault}")
    return value


def conversation(value: Any) -> list[dict[str, Any]]:
    """The messages in a cell by `role` and `content` (text); ValueError says what is wrong.

    ShareGPT's `from` and `value` are understood too, content that comes in parts, and a known role in capitals. Fields
    that are null are left out at every depth, a call's arguments too: Arrow gives each message and each call the fields
    of all others, and the same rows are to teach the same in every format.
    """
    value = _read(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        given = "an empty list" if isinstance(value, list | tuple | np.ndarray) else f"a {type(value).__name__}"
        raise ValueError(f"{given} is no conversation; a list of messages with `role` and `content` is needed")
    messages = []
    for number, message in enumerate(value, start=1):
        kept: dict[str, Any] = _without_nulls(message) if isinstance(message, dict) else {}
        if "role" not in kept and kept.keys() >= {"from", "value"}:
            kept = {**kept, "role": _speaker(number, kept.pop("from")), "content": kept.pop("value")}
        if not isinstance(kept.get("role"), str) or not kept.keys() & {"content", "tool_calls"}:
            has = ", ".join(f"`{key}`" for key in kept) or "none"
            raise ValueError(f"message {number} needs `role` and `content`; its fields are {has}")
        if kept["role"].lower() in ROLES:
            kept["role"] = kept["role"].lower()
        if "content" in kept:
            kept["content"] = _content(number, kept["content"])
        if kept.get("weight", 1) not in (0, 1):
            raise ValueError(f"message {number} has `weight` {quoted(kept['weight'])}; 0 (not learned) and 1 fit")
        messages.append(kept)
    return messages


def muted(message: dict[str, Any]) -> bool:
    """Whether a message is a turn of the assistant's that is not to be learned, as OpenAI and ShareGPT mark it."""
    return message["role"] == "assistant" and message.get("weight") == 0


def _without_nulls(value: Any) -> Any:
    """Without the fields that are null, at every depth; what is null in a list stays."""
    if isinstance(value, dict):
        return {name: _without_nulls(held) for name, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list | tuple | np.ndarray) else value


def _speaker(number: int, given: Any) -> str:
    known = SPEAKERS.get(given.lower()) if isinstance(given, str) else None
    if known is None:
        raise ValueError(f"message {number} is from {given!r}; {', '.join(SPEAKERS)} fit, or `role` and `content`")
    return known


def _content(number: int, given: Any) -> str:
    """Content as one text, which may come in parts: [{"type": "text", "text": "hi"}]."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list | tuple | np.ndarray):
        raise ValueError(f"message {number} has `content` of type {type(given).__name__}; causal-lm reads text")
    texts = []
    for part in given:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = (isinstance(part, dict) and part.get("type")) or type(part).__name__
            raise ValueError(f"message {number} holds a part of type {kind}; causal-lm reads text")
        texts.append(text)
    return "".join(texts)


def why_silent(messages: list[dict[str, Any]]) -> str:
    """Why there is nothing to learn from in a conversation, in few different sentences."""
    roles = sorted({message["role"] for message in messages})
    if any(map(muted, messages)) and all(muted(turn) for turn in messages if turn["role"] == EMPTY["role"]):
        return "weight 0 for every turn of the assistant's"
    if EMPTY["role"] in roles:
        return "no words in the assistant's turns, as the chat template writes them"
    if set(roles) <= {*ROLES}:
        return "no assistant turn"
    return "no assistant turn; " + (f"roles are {', '.join(roles)}" if len(roles) <= NAMED else "many other roles")


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template, with the tools that it is to show the assistant; it may have another for these."""

    tokenizer: Any
    tools: list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        return str(self.tokenizer.get_chat_template(tools=self.tools))


def rendered(template: Template, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    options = {"tools": template.tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    return str(_written(lambda told: template.tokenizer.apply_chat_template(told, **options), messages))


def _written(write: Callable[[list[dict[str, Any]]], Any], messages: list[dict[str, Any]]) -> Any:
    """What `write` makes of messages with a chat template; ValueError where that refuses them.

    A message that only calls tools has no content. Templates that know nothing of tools join it to other text: they are
    given an empty one, but only after the others, some of which look whether there is any, have had it without.
    """
    try:
        with _writing:
            return write(messages)
    except (TypeError, jinja2.TemplateError) as fault:
        if all("content" in message for message in messages):
            raise ValueError(f"the chat template refuses it: {fault}") from None
    return _written(write, [message if "content" in message else {**message, "content": ""} for message in messages])


def assistant_spans(template: Template, messages: list[dict[str, Any]]) -> list[tuple[str, list[Span]]]:
    """The conversation as text with the spans that the assistant wrote, the end of its turn included.

    They are those between the template's generation markers. A template without them shows them by what a turn adds to
    the conversation before it. Where the conversation goes on otherwise than it stood after a turn (templates that
    leave out past reasoning), each turn comes by itself, as the model would have met it. A turn that the template
    writes like an empty one has no span: it would teach to end at once. Nor has one with `weight` 0. ValueError where a
    turn does not continue the prompt for it.
    """
    spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    silent = [n for n in spoken if muted(messages[n]) or _is_silent(template, messages[: n + 1])]
    if MARKERS.search(template.text):
        return [_between_markers(template, messages, silent)]
    whole = rendered(template, messages)
    turns: list[tuple[str, Span]] = []
    for number in spoken:
        if number in silent:
            continue
        if number == 0:
            raise ValueError("it begins with the assistant, whose words this chat template doesn't tell from the rest")
        before = rendered(template, messages[:number], add_generation_prompt=True)
        through = rendered(template, messages[: number + 1])
        if not through.startswith(before):
            raise ValueError(
                f"message {number + 1} does not continue the chat template's prompt for it, so that its tokens can't be"
                " told from the rest; put {% generation %} markers into the template (task.chat_template)"
            )
        end = len(through)
        ending = template.tokenizer.eos_token
        if ending and through.rstrip().endswith(ending):
            end = len(through.rstrip())  # the line break behind the end of a turn is never generated
        turns.append((through, (len(before), end)))
    if all(whole.startswith(through) for through, _ in turns):
        return [(whole, [span for _, span in turns])]
    return [(through, [span]) for through, span in turns]


def _is_silent(template: Template, messages: list[dict[str, Any]]) -> bool:
    """Whether the template writes the last turn, the assistant's, as it writes an empty one.

    That need not be empty: many templates write tool calls or reasoning, and as many don't.
    """
    last = messages[-1]
    if last.get("content", "").strip():
        return False
    try:
        empty = rendered(template, [*messages[:-1], EMPTY])
    except ValueError:  # it refuses an empty turn: what it makes of this one is more, or a ValueError too
        return False
    return last == EMPTY or rendered(template, messages) == empty


def _between_markers(template: Template, messages: list[dict[str, Any]], silent: list[int]) -> tuple[str, list[Span]]:
    """The conversation as text, and the spans between its markers but for those of the `silent` turns."""
    text, spans = _marked(template, messages)
    left_out: set[int] = set()
    for number in silent:
        first = len(_marked(template, messages[:number])[1]) if number else 0
        left_out.update(range(first, len(_marked(template, messages[: number + 1])[1])))
    return text, [span for place, span in enumerate(spans) if place not in left_out]


def _marked(template: Template, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {"chat_template": template.text, "tools": template.tools}
    options |= {"return_assistant_tokens_mask": True, **template.tokenizer.special_tokens_map}
    shown = _written(lambda told: render_jinja_template([told], **options), messages)
    return shown[0][0], shown[1][0]


def within(tokens: list[Span], spans: list[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens have characters in a span. Where a tokenizer trims blanks, a blank token is only its end."""
    starts, ends = np.asarray(tokens, np.int64).reshape(-1, 2).T
    found = np.zeros(len(tokens), bool)
    for first, last in spans:
        found |= (ends > first) & ((starts < last) | ((starts == ends) & (ends == last)))
    return found
