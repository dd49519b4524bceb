"""Sequence regression: a number for a text or for a pair of texts, such as how alike two sentences are.

One row, of sums for schoolchildren with the number of calculations that they take:

    {"question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of …", "steps": 2}

A pair has its second text in another column (`text_pair: sentence2`). The model answers in the unit of the numbers,
which are learned as they are: numbers of about unit size learn best.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayft.tasks.cells import quoted
from rayft.tasks.labels import fit_head, known_labels
from rayft.tasks.later import torch, transformers
from rayft.tasks.loading import from_pretrained, load_config, padded
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task
from rayft.tasks.texts import classifying_tokenizer, encode_texts

NAMES = ["score"]  # what the head's only output is called
MOST = 1e38  # as much as float32 holds


class SequenceRegression(Task):
    """A number for a text or a pair of texts, in the unit of the data."""

    lower_is_better: ClassVar[frozenset[str]] = Task.lower_is_better | {"mse"}
    first_metric: ClassVar[str] = "spearman"
    reads_first: ClassVar[bool] = True
    smooths: ClassVar[bool] = False

    type: Literal["sequence-regression"] = "sequence-regression"
    """Which number a text or a pair of texts has."""
    text: str = "text"
    """The column of the texts."""
    text_pair: str | None = None
    """The column of the second texts, where rows are pairs; null: they are not."""
    target: str = "score"
    """The column of the numbers; those of about unit size learn best."""
    max_length: int = Field(default=128, ge=4)
    """Tokens of a text, or of both of a pair; what is longer is cut."""

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        texts = (self.text,) if self.text_pair is None else (self.text, self.text_pair)
        return (*texts, self.target) if labelled else texts

    def processor(self, model: Pretrained) -> Any:
        """The tokenizer; its `model_max_length` is the task's, so that a pipeline truncates at the same place."""
        return classifying_tokenizer(model, self.max_length)

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """`token_type_ids` exist for pairs alone and are null where the tokenizer makes none; `label` is the number,
        null in rows without truth."""
        fields = [pa.field("input_ids", pa.list_(pa.int32()))]
        if self.text_pair is not None:
            fields.append(pa.field("token_type_ids", pa.list_(pa.int8())))
        return pa.schema([*fields, pa.field("label", pa.float64())])

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """One feature per row; references are the numbers."""

        def truth(row: int) -> float | None:
            return number(rows[self.target][row], self.target) if labelled else None

        made = encode_texts(rows, self.columns(labelled=False), processor, self.max_length, truth)
        return replace(made, references=list(made.features["label"])) if evaluation and labelled else made

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """A head with one output is kept; any other is drawn anew."""
        network = from_pretrained(
            transformers.AutoModelForSequenceClassification,
            model,
            id2label=dict(enumerate(NAMES)),
            label2id={name: place for place, name in enumerate(NAMES)},
            problem_type="regression",
            pad_token_id=processor.pad_token_id,
        )
        before = known_labels(load_config(model))
        fit_head(network, NAMES if len(before) == 1 else before, NAMES, model.seed)
        return network

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        """Padded to the longest of n features, l tokens, on the side that suits the model.

        input_ids, attention_mask   (n, l) int64
        token_type_ids              (n, l) int64, for pairs where the tokenizer makes them
        labels                      (n,) float32; absent where the features have no truth
        """
        batch = padded(features, processor)
        if all(label is not None for label in features["label"]):
            batch["labels"] = torch.as_tensor(np.asarray(features["label"], np.float32))
        return batch

    def items(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["input_ids"])

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        return model(**{name: value for name, value in batch.items() if name != "labels"})

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """The squared error summed over rows."""
        return torch.nn.functional.mse_loss(outputs.logits.float().squeeze(-1), batch["labels"], reduction="sum")

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"score"}: the number."""
        return [{"score": score} for score in outputs.logits.detach().float().squeeze(-1).tolist()]

    def metrics(self) -> tuple[str, ...]:
        return ("spearman", "pearson", "mse")

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """spearman and pearson, correlations between -1 and 1 (0 where all numbers are equal), and mse."""
        given = np.asarray([prediction["score"] for prediction in predictions])
        truth = np.asarray(references, dtype=np.float64)
        return {
            "spearman": correlation(ranks(given), ranks(truth)),
            "pearson": correlation(given, truth),
            "mse": float(np.mean((given - truth) ** 2)),
        }

    def pipeline(self) -> str | None:
        """Its `score` is the number: transformers 5.23 applies no function where the config says "regression"; others
        do as much with function_to_apply="none"."""
        return "text-classification"


def number(value: Any, column: str) -> float:
    """A cell as a number; text that reads as one is one. ValueError says what is wrong with it."""
    try:
        found = math.nan if value is None or isinstance(value, bool | np.bool_) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not abs(found) < MOST:
        raise ValueError(f"`{column}` is {quoted(value)}; it needs a finite number")
    return found


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary, or there is one row alone."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:  # their mean may be rounded, so that something is left of them
        return 0.0
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / size if size > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 in ascending order; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
