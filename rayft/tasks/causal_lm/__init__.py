"""Causal language modelling: plain text, prompts with completions, or conversations.

One row of MedQuAD, for `prompt: question` and `completion: answer`:

    {"question": "What are the symptoms of Adult Acute Lymphoblastic Leukemia ?",
     "answer": "Signs and symptoms of adult ALL include fever, feeling tired, and easy bruising or bleeding. …"}

The loss is taken over every token of a text, over the completion and the end-of-sequence token behind it, or over the
assistant's turns of a conversation. A conversation is a list of {"role", "content"}, or that list as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, field_validator, model_validator
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.generic import is_flash_attention_requested

from rayft.errors import ModelError
from rayft.tasks.causal_lm.apart import keeps_apart
from rayft.tasks.causal_lm.chat import assistant_spans, conversation, rendered, within
from rayft.tasks.causal_lm.greedy import continuations
from rayft.tasks.causal_lm.likelihood import IGNORED, per_row, summed_loss
from rayft.tasks.causal_lm.words import ended, filled, pieces, tokenized
from rayft.tasks.loading import from_pretrained, load_config, load_tokenizer
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task

NOTHING = {"text": "empty, or a single token", "prompt": "empty completion", "messages": "no assistant turn"}

Sample = tuple[list[int], list[int]]  # token ids and their labels, not shifted


class CausalLM(Task):
    """Exactly one of `text`, `prompt` with `completion`, and `messages`; `text: text` where none is given.

    The first three are columns, or format strings over several columns: "### Instruction:\\n{instruction}\\n{input}".
    `chat_template`, a Jinja template or a file that holds one, replaces the tokenizer's; the file is read when the
    recipe is, so that a resolved recipe holds the template itself. A text longer than `max_length` tokens gives several
    features, each of which begins with the last token of the one before, so that every token is predicted once; a
    completion or conversation is cut. `pack` joins short sequences to rows of `max_length` tokens, in which none sees
    another. `train_on_prompt` takes the loss over the prompt and the user's turns too.
    """

    first_metric: ClassVar[str] = "perplexity"

    type: Literal["causal-lm"] = "causal-lm"
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    chat_template: str | None = None
    max_length: int = Field(default=1024, ge=2)
    pack: bool = True
    train_on_prompt: bool = False
    max_new_tokens: int = Field(default=128, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _text_by_default(cls, given: Any) -> Any:
        forms = ("text", "prompt", "completion", "messages")
        if isinstance(given, dict) and all(given.get(form) is None for form in forms):
            return {**given, "text": "text"}
        return given

    @field_validator("text", "prompt", "completion")
    @classmethod
    def _names_columns(cls, form: str | None) -> str | None:
        if form is not None and not any(name for _, name in pieces(form)):
            raise ValueError(f"{form!r} names no column; write a column's name, or {{column}} within a text")
        return form

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, template: str | None) -> str | None:
        if template is None or "{{" in template or "{%" in template:
            return template
        try:
            return Path(template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise ValueError(
                f"{template!r} is neither a Jinja template nor a file that can be read ({fault})"
            ) from None

    @model_validator(mode="after")
    def _one_form(self) -> CausalLM:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together; give both, or `text`, or `messages`")
        given = [name for name in ("text", "prompt", "messages") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; keep one of them")
        if self.chat_template is not None and self.messages is None:
            raise ValueError("chat_template is for conversations; give their column as `messages`, or leave it out")
        return self

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        if self.messages is not None:
            return (self.messages,)
        forms = (self.text, self.prompt, self.completion if labelled else None)
        names = (name for form in forms if form is not None for _, name in pieces(form) if name is not None)
        return tuple(dict.fromkeys(names))

    def processor(self, model: Pretrained) -> Any:
        """The tokenizer, with a padding token and, for conversations, a chat template.

        ModelError where the model reads both ways, has fewer positions than `max_length`, or can't tell turns apart.
        """
        config = load_config(model)
        if getattr(config, "is_decoder", None) is False and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            raise ModelError(
                f"{model.path} ({config.model_type}) reads both ways; causal-lm needs a left-to-right model"
            )
        tokenizer = load_tokenizer(model, self.max_length, None if self.messages is None else "task.messages")
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        if self.messages is not None and not tokenizer.chat_template:
            raise ModelError(f"the tokenizer of {model.path} has no chat template; give one as task.chat_template")
        return tokenizer

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """`labels` are as long as `input_ids` and not shifted; -100 where the loss is not taken."""
        return pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])

    def packs(self) -> int | None:
        return self.max_length if self.pack else None

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """Features with something to learn from; references are None, since the labels are the truth.

        labelled=False gives prompts for `generate`, of at most the last `max_length` tokens: the text, the prompt, or
        the conversation up to the assistant's last turn.
        """
        bad: dict[int, str] = {}
        dropped: dict[int, str] = {}
        truncated: dict[int, None] = {}
        features: Columns = {"input_ids": [], "labels": []}
        sources: list[int] = []
        for row, (ids, labels) in self._samples(rows, processor, labelled, bad):
            kept = [cut for cut in self._cut(ids, labels, labelled) if cut[0] and (learnable(cut[1]) or not labelled)]
            for part, targets in kept:
                features["input_ids"].append(part)
                features["labels"].append(targets)
                sources.append(row)
            if not kept:
                dropped[row] = self._why_nothing(labels, labelled)
            elif len(ids) > self.max_length and (self.text is None or not labelled):
                truncated[row] = None
        for row in sources:  # another turn of the same conversation was kept
            dropped.pop(row, None)
        references = [None] * len(sources) if evaluation else None
        lengths = [len(ids) for ids in features["input_ids"]]
        return Encoded(features, sources, lengths, references, list(truncated), dropped, bad)

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """The model as it is; generation stops at the tokenizer's end of sequence too.

        ModelError where `pack` is on and the model would let packed sequences see each other.
        """
        network: Any = from_pretrained(AutoModelForCausalLM, model)
        if self.pack and not keeps_apart(network):
            kind = network.config.model_type
            raise ModelError(f"{model.path} ({kind}) can't keep packed sequences apart; set task.pack=false")
        if len(processor) > network.get_input_embeddings().num_embeddings:
            known = network.get_input_embeddings().num_embeddings
            raise ModelError(f"the tokenizer of {model.path} has {len(processor)} tokens, but the model only {known}")
        settings = network.generation_config
        if processor.eos_token_id is not None:
            ends = settings.eos_token_id
            ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
            ends = list(dict.fromkeys([*ends, processor.eos_token_id]))
            settings.eos_token_id = ends[0] if len(ends) == 1 else ends
        if settings.pad_token_id is None:
            settings.pad_token_id = processor.pad_token_id
        return network

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        """Padded on the right to the longest of n features, l tokens; all tensors (n, l) int64.

        input_ids
        targets         the token that each one predicts, -100 where none: the labels, shifted
        attention_mask  1 for tokens, 0 for padding; absent for packed features
        position_ids    for packed features (`sequence_lengths` is among them): they start again at each sequence, and
                        at the padding, which is how models tell sequences apart
        """
        ids = features["input_ids"]
        shape = (len(ids), max(len(row) for row in ids))
        tokens = np.full(shape, processor.pad_token_id or 0, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for place, row in enumerate(ids):
            tokens[place, : len(row)] = row
            targets[place, : len(row) - 1] = features["labels"][place][1:]
            mask[place, : len(row)] = 1
        batch = {"input_ids": tokens, "targets": targets}
        if "sequence_lengths" in features:
            batch["position_ids"] = positions = np.empty(shape, dtype=np.int64)
            for place, lengths in enumerate(features["sequence_lengths"]):
                bounds = np.cumsum([*lengths, shape[1] - len(ids[place])])
                starts = np.repeat(np.concatenate([[0], bounds[:-1]]), np.diff(bounds, prepend=0))
                positions[place] = np.arange(shape[1]) - starts
                targets[place, bounds[:-1] - 1] = IGNORED  # the last token of one sequence is not to predict the next
        else:
            batch["attention_mask"] = mask
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def items(self, batch: Batch) -> int:
        """Tokens that are predicted."""
        return int((batch["targets"] != IGNORED).sum())

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        """`outputs.logits` is (n, l, vocabulary)."""
        inputs = {name: value for name, value in batch.items() if name != "targets"}
        # Flash attention tells packed sequences apart in a single row only.
        flat = "position_ids" in inputs and is_flash_attention_requested(inner(model).config)
        if flat:
            inputs = {name: value.reshape(1, -1) for name, value in inputs.items()}
        outputs = model(**inputs, use_cache=False)
        if flat:
            outputs.logits = outputs.logits.reshape(*batch["input_ids"].shape, -1)
        return outputs

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross entropy, summed over the predicted tokens."""
        return summed_loss(outputs.logits, batch["targets"], label_smoothing)

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"nll", "tokens", "correct"}: the summed negative log-likelihood in nats, and how many tokens were predicted
        and how many of these were the most likely."""
        nll, correct = per_row(outputs.logits, batch["targets"])
        tokens = (batch["targets"] != IGNORED).sum(dim=1)
        return [
            {"nll": loss, "tokens": count, "correct": right}
            for loss, count, right in zip(nll.tolist(), tokens.tolist(), correct.tolist(), strict=True)
        ]

    def generate(
        self, model: torch.nn.Module, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"text"}: the greedy continuation of each prompt, without the prompt and without special tokens.

        Where prompt and continuation are more than the model's positions, the prompt loses its beginning.
        """
        prompts = [list(ids) for ids in features["input_ids"]]
        device = batch["input_ids"].device
        return [{"text": text} for text in continuations(inner(model), prompts, processor, self.max_new_tokens, device)]

    def combine(self, parts: list[Prediction]) -> Prediction:
        """Sums over the windows of a text or the turns of a conversation."""
        if "text" in parts[0]:
            return parts[0]
        return {name: sum(part[name] for part in parts) for name in ("nll", "tokens", "correct")}

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """perplexity (per token of this tokenizer) and token_accuracy (a share of 1), over all predicted tokens."""
        total = self.combine(predictions)
        tokens = max(1, total["tokens"])
        # math.exp knows no number above e^709
        return {"perplexity": math.exp(min(total["nll"] / tokens, 700.0)), "token_accuracy": total["correct"] / tokens}

    def pipeline(self) -> str | None:
        return "text-generation"

    def _samples(
        self, rows: Columns, tokenizer: Any, labelled: bool, bad: dict[int, str]
    ) -> Iterator[tuple[int, Sample]]:
        """(row, sample) for all rows that don't go to `bad`, in their order; uncut."""
        if self.messages is not None:
            for row, value in enumerate(rows[self.messages]):
                try:
                    yield from ((row, sample) for sample in self._conversation(value, tokenizer, labelled))
                except ValueError as fault:
                    bad[row] = f"`{self.messages}`: {fault}"
            return
        forms = [form for form in (self.text, self.prompt, self.completion if labelled else None) if form is not None]
        texts: dict[int, list[str]] = {}
        for row in range(len(next(iter(rows.values()), []))):
            try:
                texts[row] = [filled(form, rows, row) for form in forms]
            except ValueError as fault:
                bad[row] = str(fault)
        whole = tokenized(tokenizer, ["".join(parts) for parts in texts.values()], end=labelled)
        if not labelled or self.text is not None:
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
            asked = prompt if self.train_on_prompt else [IGNORED] * len(prompt)
            labels = [*asked, *answer] if completion else [IGNORED] * (len(prompt) + len(answer))
            yield row, ([*prompt, *answer], labels)

    def _conversation(self, value: Any, tokenizer: Any, labelled: bool) -> Iterator[Sample]:
        """One sample, or where the template shows a turn otherwise once it is past, one per assistant turn."""
        messages = conversation(value)
        if not labelled:
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise ValueError("there is no turn to answer")
            text = rendered(tokenizer, messages, add_generation_prompt=True)
            shown: list[tuple[str, list[tuple[int, int]]]] = [(text, [])]
        elif self.train_on_prompt:
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

    def _cut(self, ids: list[int], labels: list[int], labelled: bool) -> list[Sample]:
        """A sample as features of at most `max_length` tokens."""
        size = self.max_length
        if not labelled:
            return [(ids[-size:], labels[-size:])]
        starts = range(0, max(1, len(ids) - 1), size - 1) if self.text is not None else (0,)
        return [(ids[start : start + size], labels[start : start + size]) for start in starts]

    def _why_nothing(self, labels: list[int], labelled: bool) -> str:
        if not labelled:
            return "a prompt without tokens"
        if learnable(labels):
            return f"nothing to learn from within the first {self.max_length} tokens"
        return next(reason for form, reason in NOTHING.items() if getattr(self, form) is not None)


def learnable(labels: list[int]) -> bool:
    """Whether any token is predicted: nothing comes before the first."""
    return any(label != IGNORED for label in labels[1:])


def inner(model: Any) -> Any:
    """The transformers model (or its adapters' wrapper) within a training engine, or `model` itself."""
    return getattr(model, "module", model)
