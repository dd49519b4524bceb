"""Text classification: one label, or any number of them, for a text or a pair of texts.

One row of the SMS spam collection:

    {"text": "Ok lar... Joking wif u oni...", "label": "ham"}

A pair has its second text in another column (`text_pair: hypothesis`); with `multi_label` the label column holds a list
of names, also as JSON or Python writes it, or one text that separates them by `|`, and an empty one means that no label
applies. Labels are names: 3 and 3.0 are "3", true is "true".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from rayft.errors import DataError
from rayft.tasks.cells import in_brackets, list_in, quoted
from rayft.tasks.labels import fit_head, in_order, index_of, known_labels, label_name, shown
from rayft.tasks.later import torch, transformers
from rayft.tasks.loading import from_pretrained, load_config, padded
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task
from rayft.tasks.texts import classifying_tokenizer, encode_texts


class TextClassification(Task):
    """One label, or any number of them, for a text or a pair of texts."""

    first_metric: ClassVar[str] = "accuracy"
    reads_first: ClassVar[bool] = True

    type: Literal["text-classification"] = "text-classification"
    """Which label, or labels, a text or a pair of texts has."""
    text: str = "text"
    """The column of the texts."""
    text_pair: str | None = None
    """The column of the second texts, where rows are pairs; null: they are not."""
    label: str = "label"
    """The column of the labels; with `multi_label` it holds lists of names, or names with | between them."""
    multi_label: bool = False
    """Whether a row may have any number of labels, none too, instead of one."""
    labels: tuple[str, ...] | None = None
    """The label names in the order of their indices; null: those of the training rows, sorted. With `multi_label` a
    row may then be a list of as many zeros and ones."""
    max_length: int = Field(default=128, ge=4)
    """Tokens of a text, or of both of a pair; what is longer is cut."""

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """YAML reads `[0, 1]` as numbers; they name the same labels as the numbers in the data do."""
        return [label_name(entry) for entry in value] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _enough_labels(self) -> TextClassification:
        if self.labels is not None:
            least = 1 if self.multi_label else 2
            if len(self.labels) < least:
                raise ValueError(f"labels needs at least {least} names, got {len(self.labels)}")
            if len(set(self.labels)) < len(self.labels):
                raise ValueError(f"labels names {next(x for x in self.labels if self.labels.count(x) > 1)!r} twice")
        return self

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        texts = (self.text,) if self.text_pair is None else (self.text, self.text_pair)
        return (*texts, self.label) if labelled else texts

    def fact_columns(self) -> tuple[str, ...]:
        return () if self.labels is not None else (self.label,)

    def processor(self, model: Pretrained) -> Any:
        """The tokenizer; its `model_max_length` is the task's, so that a pipeline truncates at the same place."""
        return classifying_tokenizer(model, self.max_length)

    def facts(self, rows: Iterable[Columns]) -> dict[str, Any]:
        """{"labels": names in the order of their indices}: numbers in numerical order, other names alphabetically."""
        if self.labels is not None:
            return {"labels": list(self.labels)}
        found: set[str] = set()
        widths: set[int] = set()  # of lists of zeros and ones
        unread = ""  # a bad row, which is told with its place where there are others
        for batch in rows:
            for value in batch[self.label]:
                held = _listed(value)
                if held is not None and not self.multi_label:
                    raise DataError(
                        f"column `{self.label}` holds lists of labels; set task.multi_label=true to train on them"
                    )
                if held is not None or label_name(value) is not None:  # an empty cell says nothing
                    widths.add(_width(held))
                try:
                    found.update(self._parse(value if held is None else held) or ())
                except ValueError as fault:
                    unread = str(fault)
        if len(widths) == 1 and min(widths) > 1:
            raise DataError(
                f"column `{self.label}` holds lists of {min(widths)} zeros and ones; name what these stand for, in "
                "their order, in task.labels, or write lists of the names that apply"
            )
        if len(found) < (1 if self.multi_label else 2):
            only = f"only the label {quoted(found.pop())}" if found else "no label"
            poor = f"column `{self.label}` of the training rows holds {only}; a classifier needs more to tell apart"
            raise DataError(unread or poor)
        return {"labels": in_order(found)}

    def balance_columns(self) -> tuple[str, ...]:
        return ("label",)

    def balance(self, features: Columns, facts: dict[str, Any]) -> dict[str, int]:
        """Rows by label name; with `multi_label` a row counts for each of its labels."""
        given = features["label"]
        indices = [index for row in given for index in row] if self.multi_label else given
        counts = np.bincount(np.asarray(indices, np.int64), minlength=len(facts["labels"])).tolist()
        return {name: count for name, count in zip(facts["labels"], counts, strict=True) if count}

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """`token_type_ids` exist for pairs alone and are null where the tokenizer makes none; `label` is an index, or
        with `multi_label` the ascending indices that apply. The label is null in rows without truth."""
        fields = [pa.field("input_ids", pa.list_(pa.int32()))]
        if self.text_pair is not None:
            fields.append(pa.field("token_type_ids", pa.list_(pa.int8())))
        fields.append(pa.field("label", pa.list_(pa.int32()) if self.multi_label else pa.int32()))
        return pa.schema(fields)

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """One feature per row; references are label names, with `multi_label` lists of them in the facts' order."""
        names: list[str] = facts["labels"]
        index = {name: number for number, name in enumerate(names)}

        def truth(row: int) -> Any:
            return self._index(rows[self.label][row], index) if labelled else None

        made = encode_texts(rows, self.columns(labelled=False), processor, self.max_length, truth)
        if not evaluation or not labelled:
            return made
        labels = made.features["label"]
        references = [[names[i] for i in label] if self.multi_label else names[label] for label in labels]
        return replace(made, references=references)

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """A head that was trained on the same label names is kept, in the facts' order; any other is drawn anew."""
        names: list[str] = facts["labels"]
        network = from_pretrained(
            transformers.AutoModelForSequenceClassification,
            model,
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
            problem_type="multi_label_classification" if self.multi_label else "single_label_classification",
            pad_token_id=processor.pad_token_id,
        )
        fit_head(network, known_labels(load_config(model)), names, model.seed)
        return network

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        """Padded to the longest of n features, l tokens, on the side that suits the model.

        input_ids, attention_mask   (n, l) int64
        token_type_ids              (n, l) int64, for pairs where the tokenizer makes them
        labels                      (n,) int64 indices, or with `multi_label` (n, number of labels) float32 of 0 and 1;
                                    absent where the features have no truth
        """
        batch = padded(features, processor)
        labels = features["label"]
        if any(label is None for label in labels):
            return batch
        if self.multi_label:
            batch["labels"] = torch.zeros(len(labels), len(facts["labels"]))
            for row, label in enumerate(labels):
                batch["labels"][row, torch.as_tensor(np.asarray(label, dtype=np.int64))] = 1.0
        else:
            batch["labels"] = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        return batch

    def items(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["input_ids"])

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        return model(**{name: value for name, value in batch.items() if name != "labels"})

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross entropy summed over rows; with `multi_label` a row's is the mean binary cross entropy of its labels."""
        logits, labels = outputs.logits.float(), batch["labels"]
        if not self.multi_label:
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        targets = labels * (1 - label_smoothing) + label_smoothing / 2
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1).sum()

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"label", "score"}: the most probable; with `multi_label` {"labels", "scores"}: those above one half."""
        names: list[str] = facts["labels"]
        logits = outputs.logits.detach().float()
        if not self.multi_label:
            scores, indices = (found.tolist() for found in logits.softmax(dim=-1).max(dim=-1))
            return [{"label": names[index], "score": score} for index, score in zip(indices, scores, strict=True)]
        rows = [
            [(name, score) for name, score in zip(names, row, strict=True) if score > 0.5]
            for row in logits.sigmoid().tolist()
        ]
        return [{"labels": [name for name, _ in row], "scores": [score for _, score in row]} for row in rows]

    def metrics(self) -> tuple[str, ...]:
        return ("accuracy", *(("f1_micro", "f1_macro") if self.multi_label else ("f1_macro", "matthews")))

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """accuracy, f1_macro (over the labels that were predicted or true) and matthews, Matthews' correlation.

        With `multi_label`: accuracy (all labels of a row right), f1_micro and f1_macro. All are shares of 1; matthews
        lies between -1 and 1.
        """
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
        from sklearn.preprocessing import MultiLabelBinarizer

        truth: Any = references
        given: Any = [prediction["labels" if self.multi_label else "label"] for prediction in predictions]
        if not self.multi_label:
            return {
                "accuracy": float(accuracy_score(truth, given)),
                "f1_macro": float(f1_score(truth, given, average="macro", zero_division=0)),
                "matthews": float(matthews_corrcoef(truth, given)),
            }
        seen = sorted({name for row in [*truth, *given] for name in row})
        if not seen:  # scikit-learn refuses a matrix without columns
            return {"accuracy": 1.0, "f1_micro": 0.0, "f1_macro": 0.0}
        binarizer = MultiLabelBinarizer(classes=seen)
        truth, given = binarizer.fit_transform(truth), binarizer.transform(given)
        # Not scikit-learn's f1_score: to it one column alone is a choice of two, of which "no label" is one.
        right, named = 2 * (truth & given).sum(axis=0), truth.sum(axis=0) + given.sum(axis=0)
        return {
            "accuracy": float((truth == given).all(axis=1).mean()),
            "f1_micro": float(right.sum() / named.sum()),
            "f1_macro": float((right / named).mean()),
        }

    def pipeline(self) -> str | None:
        return "text-classification"

    def _parse(self, value: Any) -> list[str] | None:
        """The names in a cell of the label column, or None where it is empty (with `multi_label`: missing).

        ValueError where text in brackets is no list.
        """
        if not self.multi_label:
            name = label_name(value)
            return None if name is None else [name]
        held = _listed(value)
        if held is None and in_brackets(value):
            raise ValueError(f"`{self.label}` is {quoted(value)}, which is no list; ['one', 'two'] or one|two fits")
        if held is None and isinstance(value, str):
            held = value.split("|")
        elif held is None:
            held = [value] if label_name(value) else None
        elif self.labels and _width(held) == len(self.labels) and not {"0", "1"} & set(self.labels):
            return [name for name, applies in zip(self.labels, held, strict=True) if applies]
        return None if held is None else [name for name in map(label_name, held) if name]

    def _index(self, value: Any, index: dict[str, int]) -> int | list[int]:
        """The label's index, or with `multi_label` the ascending indices; ValueError says what is wrong."""
        parsed = self._parse(value)
        if parsed is None:
            raise ValueError(f"`{self.label}` has no label; it needs one of {shown(index)}")
        found = [index_of(name, index, "label") for name in parsed]
        return sorted(set(found)) if self.multi_label else found[0]


def _listed(value: Any) -> list[Any] | None:
    """The entries of a cell that is a list, or text that is one; None: it is none."""
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    return list_in(value) if in_brackets(value) else None


def _width(held: list[Any] | None) -> int:
    """How many zeros and ones a list has; 0 where it is none or holds others."""
    return len(held) if held and all(entry in (0, 1) for entry in held) else 0
