"""Causal language modelling: plain text, prompts with completions, or conversations.

One row of MedQuAD, for `prompt: question` and `completion: answer`:

    {"question": "What are the symptoms of Adult Acute Lymphoblastic Leukemia ?",
     "answer": "Signs and symptoms of adult ALL include fever, feeling tired, and easy bruising or bleeding. …"}

The loss is taken over every token of a text, over the completion and the end-of-sequence token behind it, or over the
assistant's turns of a conversation. A conversation is a list of {"role", "content"} or of ShareGPT's {"from",
"value"}, or such a list as JSON; of its turns those with "weight": 0 are read and not learned.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from rayft.errors import DataError, ModelError
from rayft.tasks.causal_lm.answers import Asking, exact_match
from rayft.tasks.causal_lm.apart import keeps_apart
from rayft.tasks.causal_lm.chat import conversation, why_silent
from rayft.tasks.causal_lm.direction import refuse_unfit
from rayft.tasks.causal_lm.each import attend_each, attend_on
from rayft.tasks.causal_lm.greedy import continuations
from rayft.tasks.causal_lm.likelihood import IGNORED, learnable, per_token, summed_loss
from rayft.tasks.causal_lm.samples import Form, Sample, samples
from rayft.tasks.causal_lm.words import pieces
from rayft.tasks.later import torch, transformers
from rayft.tasks.loading import from_pretrained, load_config, load_tokenizer
from rayft.tasks.logits import logits_of
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task

NOTHING = {"text": "empty, or a single token", "prompt": "empty completion"}


class CausalLM(Task):
    """Exactly one of `text`, `prompt` with `completion`, and `messages`; `text: text` where none is given.

    The first three are columns, or format strings over several: "### Instruction:\\n{instruction}\\n{input}".
    """

    first_metric: ClassVar[str] = "perplexity"

    type: Literal["causal-lm"] = "causal-lm"
    """Which token comes next: of texts, completions of prompts, or the assistant's turns of conversations."""
    text: str | None = None
    """The column of texts, or a format string, of which every token is learned."""
    prompt: str | None = None
    """The column of what a completion follows, or a format string; learned with `train_on_prompt` alone."""
    completion: str | None = None
    """The column of what is written behind a prompt, or a format string."""
    messages: str | None = None
    """The column of conversations: lists of {role, content}, or of ShareGPT's {from, value}, or such a list as JSON."""
    tools: str | None = None
    """The column of the tools that the assistant may call, a list of definitions or such a list as JSON, which the chat
    template shows it; null: there are none."""
    chat: bool = False
    """Whether a prompt becomes a user's turn and its completion the assistant's, as the chat template writes them."""
    chat_template: str | None = None
    """A Jinja template, or a file with one that is read when the recipe is; null: the tokenizer's own."""
    max_length: int = Field(default=1024, ge=2)
    """Tokens that are read at a time; a longer text gives several features, a completion or conversation is cut."""
    pack: bool = True
    """Whether short sequences are joined to rows of `max_length` tokens, in which none sees another."""
    train_on_prompt: bool = False
    """Whether prompts, and all but the assistant's turns of a conversation, are learned too."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens that are written at most for a prediction, or for an answer that is counted."""
    answer_after: str | None = Field(default=None, min_length=1)
    """The mark before an answer: evaluation writes on from prompts and counts right answers. Null: it doesn't."""
    answer_share: float = Field(default=1.0, gt=0, le=1)
    """The share of the rows whose answers are counted, since writing is dear; always the same ones."""

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
        if self.tools is not None and self.messages is None:
            raise ValueError("tools are for conversations; give their column as `messages`, or leave it out")
        if self.chat and self.prompt is None:
            raise ValueError("chat makes turns of prompt and completion; give both, or leave it out")
        if self.chat_template is not None and self.messages is None and not self.chat:
            raise ValueError(
                "chat_template is for conversations; give their column as `messages`, or `chat: true`, or leave it out"
            )
        if self.answer_after is not None and self.text is not None:
            raise ValueError("answer_after looks into completions, and a text has none; leave it out")
        if self.answer_after is None and self.answer_share != 1.0:
            raise ValueError("answer_share is for answers that are counted; give answer_after, or leave it out")
        return self

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        return self._form.columns(labelled)

    def processor(self, model: Pretrained) -> Any:
        """The tokenizer, for conversations with a chat template; what pads is masked, so that any token will do.

        ModelError where the model does not write from left to right, has fewer positions than `max_length`, or can't
        tell turns apart.
        """
        refuse_unfit(load_config(model), model.path)
        turns = "task.messages" if self.messages is not None else "task.chat" if self.chat else None
        tokenizer = load_tokenizer(model, self.max_length, turns, pads=False)
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        if turns is not None and not tokenizer.chat_template:
            raise ModelError(f"the tokenizer of {model.path} has no chat template; give one as task.chat_template")
        return tokenizer

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """`labels` are as long as `input_ids` and not shifted; -100 where the loss is not taken.

        For evaluation with `answer_after`, `prompt_ids` are what is written on from; none where nothing is.
        """
        names = ["input_ids", "labels", *(["prompt_ids"] if evaluation and self.answer_after else [])]
        return pa.schema([(name, pa.list_(pa.int32())) for name in names])

    def packs(self) -> int | None:
        return self.max_length if self.pack else None

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """Features with something to learn from; references are None, since the labels are the truth, or the right
        answer where the model is asked for it.

        labelled=False gives prompts for `generate`, of at most the last `max_length` tokens: the text, the prompt, or
        the conversation up to the assistant's last turn.
        """
        bad: dict[int, str] = {}
        dropped: dict[int, str] = {}
        truncated: dict[int, None] = {}
        features: Columns = {"input_ids": [], "labels": []}
        sources: list[int] = []
        for row, (ids, labels) in samples(self._form, rows, processor, labelled, bad):
            kept = [cut for cut in self._cut(ids, labels, labelled) if cut[0] and (learnable(cut[1]) or not labelled)]
            for part, targets in kept:
                features["input_ids"].append(part)
                features["labels"].append(targets)
                sources.append(row)
            if not kept:
                dropped[row] = self._why_nothing(rows, row, labels, labelled)
            elif len(ids) > self.max_length and (self.text is None or not labelled):
                truncated[row] = None
        for row in sources:  # another turn of the same conversation was kept
            dropped.pop(row, None)
        lengths = [len(ids) for ids in features["input_ids"]]
        made = Encoded(features, sources, lengths, None, list(truncated), dropped, bad)
        if evaluation and labelled and self.answer_after is not None:
            asking = Asking(self.answer_after, self.answer_share, self.max_length)
            return asking.joined(made, rows, self._form, processor)
        if evaluation and self.answer_after is not None:
            features["prompt_ids"] = [[] for _ in sources]
        return replace(made, references=[None] * len(sources)) if evaluation else made

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """The model as it is; generation stops at the tokenizer's end of sequence too.

        ModelError where `pack` is on and the model would let packed sequences see each other.
        """
        network: Any = from_pretrained(transformers.AutoModelForCausalLM, model)
        if self.pack and not keeps_apart(network):
            kind = network.config.model_type
            raise ModelError(f"{model.path} ({kind}) can't keep packed sequences apart; set task.pack=false")
        if self.pack:
            attend_each(network)
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

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """(predicted tokens, vocabulary) logits: for prompts and padding none are computed."""
        from transformers.utils.generic import is_flash_attention_requested

        attend_on(inner(model), batch["input_ids"].device)
        inputs = {name: value for name, value in batch.items() if name != "targets"}
        asked = batch["targets"] != IGNORED
        # Flash attention tells packed sequences apart in a single row only.
        if "position_ids" in inputs and is_flash_attention_requested(inner(model).config):
            inputs = {name: value.reshape(1, -1) for name, value in inputs.items()}
            asked = asked.reshape(1, -1)
        return logits_of(model, asked, inputs, use_cache=False)

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross entropy, summed over the predicted tokens."""
        targets = batch["targets"]
        return summed_loss(outputs, targets[targets != IGNORED], label_smoothing)

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"nll", "tokens", "correct"}: the summed negative log-likelihood in nats, and how many tokens were predicted
        and how many of these were the most likely."""
        asked = batch["targets"] != IGNORED
        nll, right = per_token(outputs, batch["targets"][asked])
        counts = asked.sum(dim=1).tolist()
        # All rows' at once: each number that is read from a GPU is waited for.
        sums, hits = (torch.stack([row.sum() for row in values.split(counts)]).tolist() for values in (nll, right))
        return [
            {"nll": loss, "tokens": count, "correct": hit} for loss, hit, count in zip(sums, hits, counts, strict=True)
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

    def asked(self, features: Columns) -> tuple[list[int], Columns]:
        """The prompts of the rows whose answers are counted."""
        prompts = features.get("prompt_ids", [])
        places = [place for place, ids in enumerate(prompts) if len(ids)]
        ids = [list(prompts[place]) for place in places]
        return places, {"input_ids": ids, "labels": [[IGNORED] * len(row) for row in ids]}

    def combine(self, parts: list[Prediction]) -> Prediction:
        """Sums over the windows of a text or the turns of a conversation, and what was written."""
        sums = {name: sum(part[name] for part in parts) for name in ("nll", "tokens", "correct") if name in parts[0]}
        written = [part["text"] for part in parts if "text" in part]
        return sums | ({"text": written[-1]} if written else {})

    def metrics(self) -> tuple[str, ...]:
        return ("perplexity", "token_accuracy", *(("exact_match", "asked") if self.answer_after is not None else ()))

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """perplexity (per token of this tokenizer) and token_accuracy (a share of 1), over all predicted tokens; with
        `answer_after` exact_match, the share of right answers among those asked for, whose number is `asked`."""
        total = self.combine(predictions)
        tokens = max(1, total["tokens"])
        # math.exp knows no number above e^709
        scores = {
            "perplexity": math.exp(min(total["nll"] / tokens, 700.0)),
            "token_accuracy": total["correct"] / tokens,
        }
        if self.answer_after is None:
            return scores
        pairs = zip(predictions, references, strict=True)
        written = [(found["text"], truth) for found, truth in pairs if "text" in found]
        if not written:
            raise DataError(
                f"task.answer_share is {self.answer_share:g}, which chose none of the {len(predictions):,} rows that"
                " are scored; a larger share fits"
            )
        return {**scores, "exact_match": exact_match(written, self.answer_after), "asked": float(len(written))}

    def pipeline(self) -> str | None:
        return "text-generation"

    @property
    def _form(self) -> Form:
        fields = (self.text, self.prompt, self.completion, self.messages, self.tools)
        return Form(*fields, self.chat, self.train_on_prompt)

    def _cut(self, ids: list[int], labels: list[int], labelled: bool) -> list[Sample]:
        """A sample as features of at most `max_length` tokens; a text's share one, so that all are predicted once."""
        size = self.max_length
        if not labelled:
            return [(ids[-size:], labels[-size:])]
        starts = range(0, max(1, len(ids) - 1), size - 1) if self.text is not None else (0,)
        return [(ids[start : start + size], labels[start : start + size]) for start in starts]

    def _why_nothing(self, rows: Columns, row: int, labels: list[int], labelled: bool) -> str:
        if not labelled:
            return "a prompt without tokens"
        if learnable(labels):
            return f"nothing to learn from within the first {self.max_length} tokens"
        if self.messages is not None:
            return why_silent(conversation(rows[self.messages][row]))
        return next(reason for form, reason in NOTHING.items() if getattr(self, form) is not None)


def inner(model: Any) -> Any:
    """The transformers model (or its adapters' wrapper) within a training engine, or `model` itself."""
    return getattr(model, "module", model)
