"""Extractive question answering: the span of a context that answers a question, or that there is none (SQuAD 1 and 2).

One row of XQuAD (English):

    {"id": "56beb4343aeaaa14008c925b", "question": "How many points did the Panthers defense surrender?",
     "context": "The Panthers defense gave up just 308 points, ranking sixth in the league, while also leading …",
     "answers": {"text": ["308"], "answer_start": [34]}}

`answers` may also be a list of {"text", "answer_start"}, or either of them as a string of JSON. A context that is too
long is read in windows that overlap by `stride` tokens: each is a feature, and the best answer of all windows is the
row's. With `unanswerable` a row may have no answer; a window without the answer is trained to point at its first token.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationInfo, field_validator, model_validator

from rayft.tasks.later import torch, transformers
from rayft.tasks.loading import from_pretrained, load_tokenizer, pad, padded
from rayft.tasks.question_answering.squad import parse_answers, scores
from rayft.tasks.question_answering.windows import cut, too_long
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task, check_text

BEST = 20  # spans kept of each window, as in the scripts that came with SQuAD
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class QuestionAnswering(Task):
    """The span of a context that answers a question."""

    first_metric: ClassVar[str] = "f1"

    type: Literal["question-answering"] = "question-answering"
    """Which span of a context answers a question."""
    question: str = "question"
    """The column of the questions."""
    context: str = "context"
    """The column of the texts that hold the answers."""
    answers: str = "answers"
    """The column of the answers as SQuAD has them: {"text": […], "answer_start": […]}, or a list of such pairs."""
    max_length: int = Field(default=384, ge=16)
    """Tokens of a window: the question and a part of its context."""
    stride: int = Field(default=128, ge=0, validate_default=True)
    """Tokens that two windows of one context share."""
    unanswerable: bool = False
    """Whether rows may have no answer, as in SQuAD 2; false: such rows are bad ones."""
    null_threshold: float = 0.0
    """How much higher the score of "no answer" has to be than the best answer's, in logits, for it to be given."""
    max_answer_length: int = Field(default=30, ge=1)
    """Tokens that an answer which is given may have."""

    @field_validator("stride")
    @classmethod
    def _leaves_room(cls, value: int, info: ValidationInfo) -> int:
        window = info.data.get("max_length", value + 1)
        if value >= window:
            raise ValueError(f"must be less than max_length, which is {window}, or windows would not move on")
        return value

    @model_validator(mode="after")
    def _threshold_of_something(self) -> QuestionAnswering:
        if self.null_threshold and not self.unanswerable:
            raise ValueError("null_threshold is for questions without an answer; set unanswerable, or leave it out")
        return self

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        return (self.question, self.context, self.answers) if labelled else (self.question, self.context)

    def processor(self, model: Pretrained) -> Any:
        """The tokenizer; its `model_max_length` is the task's, so that a pipeline cuts windows of the same size."""
        tokenizer = load_tokenizer(model, self.max_length, offsets_for="question-answering")
        tokenizer.model_max_length = self.max_length
        return tokenizer

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """Positions are token indices in the window and null without truth; `token_type_ids` null where not made.

        For evaluation also: null_position, the token that stands for "no answer"; offsets, two per token, the
        characters of `context` that it covers, -1 for tokens outside it; `context`, the part of the row's context that
        this window covers; context_start, where in the row's context that part begins.
        """
        fields = [
            pa.field("input_ids", pa.list_(pa.int32())),
            pa.field("token_type_ids", pa.list_(pa.int8())),
            pa.field("start_position", pa.int32()),
            pa.field("end_position", pa.int32()),
        ]
        if evaluation:
            fields += [
                pa.field("null_position", pa.int32()),
                pa.field("offsets", pa.list_(pa.int32())),
                pa.field("context", pa.string()),
                pa.field("context_start", pa.int32()),
            ]
        return pa.schema(fields)

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """One feature per window; references are the texts of its answers, the same for each window of a row.

        Dropped are rows whose question leaves no more room than the stride, and, in training, rows of which no window
        holds the whole answer.
        """
        schema = self.arrow_schema(evaluation)
        encoded = Encoded({name: [] for name in schema.names}, [], [], [] if evaluation and labelled else None)
        truths = self._truths(rows, labelled, encoded.bad)
        questions = {row: rows[self.question][row].strip() for row in truths}
        over = too_long(list(questions.values()), processor, self.max_length, self.stride)
        for row in [row for row, long in zip(truths, over, strict=True) if long]:
            encoded.dropped[row] = "the question leaves no more room for the context than the stride"
            del questions[row]
        contexts = [rows[self.context][row] for row in questions]
        cuts = cut(list(questions.values()), contexts, processor, self.max_length, self.stride)
        for row, windows in zip(questions, cuts, strict=True):
            if not all(len(window.tokens) for window in windows):
                encoded.bad[row] = f"`{self.context}` holds nothing that the tokenizer reads; it needs text"
                continue
            spans = [window.find(*truths[row][0]) if truths[row] else None for window in windows]
            if not evaluation and truths[row] and not any(spans):
                encoded.dropped[row] = "no window holds the whole answer"
                continue
            for window, span in zip(windows, spans, strict=True):
                for name, value in window.feature(span if labelled else (None, None)).items():
                    if name in encoded.features:
                        encoded.features[name].append(value)
                encoded.rows.append(row)
                encoded.lengths.append(len(window.input_ids))
                if encoded.references is not None:
                    encoded.references.append([text for text, _ in truths[row]])
        return encoded

    def _truths(self, rows: Columns, labelled: bool, bad: dict[int, str]) -> dict[int, list[tuple[str, int]]]:
        """The answers of each row that keeps the contract; what is wrong with the others goes into `bad`."""
        truths: dict[int, list[tuple[str, int]]] = {}
        for row, (question, context) in enumerate(zip(rows[self.question], rows[self.context], strict=True)):
            try:
                for column, text in ((self.question, question), (self.context, context)):
                    check_text(column, text)
                answers = parse_answers(rows[self.answers][row], context) if labelled else []
            except ValueError as fault:
                bad[row] = str(fault)
                continue
            if labelled and not answers and not self.unanswerable:
                bad[row] = f"`{self.answers}` has no answer; task.unanswerable=true trains on such questions"
            else:
                truths[row] = answers
        return truths

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """The two outputs are named, so that a classifier's number of labels does not become this head's width."""
        return from_pretrained(
            transformers.AutoModelForQuestionAnswering,
            model,
            id2label={0: "start", 1: "end"},
            label2id={"start": 0, "end": 1},
            problem_type=None,
            pad_token_id=processor.pad_token_id,
        )

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        """Padded on the right to the longest of n features, l tokens.

        input_ids, attention_mask       (n, l) int64
        token_type_ids                  (n, l) int64, where the tokenizer makes them
        start_positions, end_positions  (n,) int64; absent where the features have no truth
        context_mask                    (n, l) bool, tokens an answer may hold, and
        null_positions                  (n,) int64; both from features for evaluation alone
        """
        batch = padded(features, processor)
        if not any(position is None for position in features["start_position"]):
            for name in ("start_position", "end_position"):
                batch[f"{name}s"] = torch.as_tensor(np.asarray(features[name], dtype=np.int64))
        if "offsets" in features:
            batch["context_mask"] = (
                pad([np.diff(np.reshape(row, (-1, 2)))[:, 0] > 0 for row in features["offsets"]], 0) > 0
            )
            batch["null_positions"] = torch.as_tensor(np.asarray(features["null_position"], dtype=np.int64))
        return batch

    def items(self, batch: Batch) -> int:
        """Features, that is windows."""
        return len(batch["input_ids"])

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        return model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """The mean of the cross entropies of start and end, summed over features.

        Padding is no candidate: a feature's loss must not depend on how long the others of its batch are.
        """
        real = batch["attention_mask"].bool()
        total = torch.zeros((), device=real.device)
        for name in ("start", "end"):
            logits = getattr(outputs, f"{name}_logits").float()
            scores = logits.masked_fill(~real, torch.finfo(torch.float32).min).log_softmax(dim=1)
            hit = scores.gather(1, batch[f"{name}_positions"][:, None])[:, 0]
            spread = scores.masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1)
            total = total - ((1 - label_smoothing) * hit + label_smoothing * spread).sum() / 2
        return total

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """For each window {"answer", "null", "spans"}.

        The text of its best span; the score of "no answer"; and the best spans as [start, end, score], best first, in
        characters of the row's context. Scores are sums of logits.
        """
        start, end = (getattr(outputs, f"{name}_logits").detach().float() for name in ("start", "end"))
        at = batch["null_positions"][:, None]
        null = (start.gather(1, at) + end.gather(1, at))[:, 0].tolist()
        start, end = (logits.masked_fill(~batch["context_mask"], -math.inf) for logits in (start, end))
        longest = min(self.max_answer_length, start.shape[1])
        # (n, l, longest): entry [i, j, k] scores the span of window i from token j to token j + k
        ends = torch.nn.functional.pad(end, (0, longest - 1), value=-math.inf).unfold(1, longest, 1)
        scores, places = (start[:, :, None] + ends).flatten(1).topk(min(BEST, start.shape[1] * longest), dim=1)
        firsts = places // longest
        found = zip(scores.tolist(), firsts.tolist(), (firsts + places % longest).tolist(), strict=True)
        predictions = []
        for window, spans in enumerate(found):
            text, offsets = features["context"][window], np.reshape(features["offsets"][window], (-1, 2))
            best = []
            for score, first, last in zip(*spans, strict=True):
                if score == -math.inf:  # fewer spans than asked for; the rest may lie in another window's padding
                    break
                left, right = int(offsets[first, 0]), int(offsets[last, 1])
                answer = text[left:right]
                if answer.strip():
                    left += len(answer) - len(answer.lstrip())
                    best.append((left, left + len(answer.strip()), score))
            base = int(features["context_start"][window])
            predictions.append(
                {
                    "answer": text[slice(*best[0][:2])] if best else "",
                    "null": null[window],
                    "spans": [[base + left, base + right, score] for left, right, score in best],
                }
            )
        return predictions

    def combine(self, parts: list[Prediction]) -> Prediction:
        """{"answer", "score", "start", "end"}: the best span of all windows, and its share among the best spans.

        "No answer" is as good as it is in the window that believes in it least. It is "" from 0 to 0.
        """
        best = max((part for part in parts if part["spans"]), key=lambda part: part["spans"][0][2], default=None)
        null = min(part["null"] for part in parts)
        if best is None:
            return {"answer": "", "score": 1.0, "start": 0, "end": 0}
        scores: dict[tuple[int, int], float] = {}
        for left, right, score in (span for part in parts for span in part["spans"]):
            scores[left, right] = max(score, scores.get((left, right), -math.inf))
        rivals = sorted(scores.values(), reverse=True)[:BEST] + ([null] if self.unanswerable else [])
        left, right, chosen = best["spans"][0]
        answer = best["answer"]
        if self.unanswerable and null - chosen > self.null_threshold:
            answer, left, right, chosen = "", 0, 0, null
        total = sum(math.exp(score - max(rivals)) for score in rivals)
        return {"answer": answer, "score": math.exp(chosen - max(rivals)) / total, "start": left, "end": right}

    def metrics(self) -> tuple[str, ...]:
        parts = ("has_answer_f1", "has_answer_exact_match", "no_answer_accuracy")
        return ("f1", "exact_match", *(parts if self.unanswerable else ()))

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """SQuAD's f1 and exact_match, from 0 to 100; with `unanswerable` by whether a row has an answer, too."""
        return scores([prediction["answer"] for prediction in predictions], references, self.unanswerable)
