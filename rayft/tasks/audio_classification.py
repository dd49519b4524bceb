"""Audio classification: one label for a sound.

One row of the spoken digits, for `label: digit`:

    {"file_name": "/data/sounds/7_theo_12.flac", "digit": "7", "speaker": "theo", "accent": "neutral"}

A folder per class works too: its rows are {"file_name", "label"}. A sound is mixed down to one channel and resampled to
the model's rate, unless `on_mismatch: refuse` asks to refuse what does not fit; it is kept as 16-bit samples, and the
model's own feature extractor reads them in each batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from rayft.errors import DataError
from rayft.tasks.cells import quoted
from rayft.tasks.labels import LabelNames, fit_head, in_order, index_of, known_labels, label_name, shown
from rayft.tasks.later import torch, transformers
from rayft.tasks.listening import ignore_padding, inputs, listen, load_extractor
from rayft.tasks.loading import from_pretrained, load_config
from rayft.tasks.sound import FRAME_S, Wanted, read_sound
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task


class AudioClassification(Task):
    """One label for a sound."""

    first_metric: ClassVar[str] = "accuracy"

    type: Literal["audio-classification"] = "audio-classification"
    """Which label a sound has."""
    audio: str = "file_name"
    """The column of the sounds: a path, beside a metadata file or absolute, an URL, or a file's bytes."""
    label: str = "label"
    """The column of the label names; where a folder holds a class, this is its name."""
    labels: LabelNames | None = None
    """The label names in the order of their indices; null: those of the training rows, sorted."""
    min_seconds: float = Field(default=0.1, ge=0.025)
    """Sounds that are shorter are left out."""
    max_seconds: float = Field(default=10.0, gt=0)
    """What lasts longer is cut there."""
    on_mismatch: Literal["convert", "refuse"] = "convert"
    """What is done with a sound of several channels, or of another rate than the model's; refuse: its row is bad."""

    @model_validator(mode="after")
    def _sensible(self) -> AudioClassification:
        if self.min_seconds >= self.max_seconds:
            raise ValueError(f"min_seconds {self.min_seconds:g} is not below max_seconds {self.max_seconds:g}")
        return self

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        return (self.audio, self.label) if labelled else (self.audio,)

    def file_columns(self) -> tuple[str, ...]:
        return (self.audio,)

    def fact_columns(self) -> tuple[str, ...]:
        return () if self.labels is not None else (self.label,)

    def limit(self) -> int:
        """In frames of `FRAME_S`."""
        return math.ceil(self.max_seconds / FRAME_S)

    def processor(self, model: Pretrained) -> Any:
        """The feature extractor."""
        return load_extractor(model, self.max_seconds)

    def facts(self, rows: Iterable[Columns]) -> dict[str, Any]:
        """{"labels": names in the order of their indices}: numbers in numerical order, other names alphabetically."""
        if self.labels is not None:
            return {"labels": list(self.labels)}
        found = {name for batch in rows for value in batch[self.label] if (name := label_name(value)) is not None}
        if len(found) < 2:
            only = f"only the label {quoted(found.pop())}" if found else "no label"
            raise DataError(
                f"column `{self.label}` of the training rows holds {only}; a classifier needs more to tell apart"
            )
        return {"labels": in_order(found)}

    def balance_columns(self) -> tuple[str, ...]:
        return ("label",)

    def balance(self, features: Columns, facts: dict[str, Any]) -> dict[str, int]:
        """Rows by label name."""
        counts = np.bincount(np.asarray(features["label"], np.int64), minlength=len(facts["labels"])).tolist()
        return {name: count for name, count in zip(facts["labels"], counts, strict=True) if count}

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """`samples` are int16, at the model's rate; `label` is an index, null in rows without truth."""
        return pa.schema([("samples", pa.binary()), ("label", pa.int32())])

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """One feature per row; references are label names. Lengths are in frames of `FRAME_S`."""
        names: list[str] = facts["labels"]
        index = {name: number for number, name in enumerate(names)}
        wanted = Wanted(self.audio, processor.sampling_rate, self.max_seconds, self.on_mismatch == "convert")
        references: list[Any] | None = [] if evaluation and labelled else None
        made = Encoded({"samples": [], "label": []}, [], [], references)
        for row, value in enumerate(rows[self.audio]):
            try:
                label = self._index(rows[self.label][row], index) if labelled else None
                sound = read_sound(value, wanted)
            except ValueError as fault:
                made.bad[row] = str(fault)
                continue
            if sound.seconds < self.min_seconds:
                made.dropped[row] = "shorter than task.min_seconds"
                continue
            if sound.seconds > self.max_seconds:
                made.truncated.append(row)
            made.features["samples"].append(sound.samples.tobytes())
            made.features["label"].append(label)
            made.rows.append(row)
            made.lengths.append(sound.frames(wanted.rate))
            if made.references is not None and label is not None:
                made.references.append(names[label])
        return made

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """A head that was trained on the same label names is kept, in the facts' order; any other is drawn anew."""
        names: list[str] = facts["labels"]
        config = load_config(model)
        network = from_pretrained(
            transformers.AutoModelForAudioClassification,
            model,
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        )
        fit_head(network, known_labels(config), names, model.seed)
        ignore_padding(network)
        return network

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        """What `inputs` makes of n sounds, and labels (n,) int64, absent where the features have no truth."""
        batch = inputs(processor, features["samples"])
        if all(label is not None for label in features["label"]):
            batch["labels"] = torch.as_tensor(np.asarray(features["label"], dtype=np.int64))
        return batch

    def items(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["labels"])

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        return listen(model, batch)

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross entropy summed over rows."""
        return torch.nn.functional.cross_entropy(
            outputs.logits.float(), batch["labels"], reduction="sum", label_smoothing=label_smoothing
        )

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"label", "score"}: the most probable."""
        names: list[str] = facts["labels"]
        scores, indices = (found.tolist() for found in outputs.logits.detach().float().softmax(dim=-1).max(dim=-1))
        return [{"label": names[index], "score": score} for index, score in zip(indices, scores, strict=True)]

    def metrics(self) -> tuple[str, ...]:
        return ("accuracy", "f1_macro")

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """accuracy and f1_macro (over the labels that were predicted or true), shares of 1."""
        from sklearn.metrics import accuracy_score, f1_score

        given = [prediction["label"] for prediction in predictions]
        return {
            "accuracy": float(accuracy_score(references, given)),
            "f1_macro": float(f1_score(references, given, average="macro", zero_division=0)),
        }

    def pipeline(self) -> str | None:
        return "audio-classification"

    def _index(self, value: Any, index: dict[str, int]) -> int:
        """The label's index; ValueError says what is wrong."""
        name = label_name(value)
        if name is None:
            raise ValueError(f"`{self.label}` has no label; it needs one of {shown(index)}")
        return index_of(name, index, "label")
