"""Image classification: one label for a picture.

One row of pictures of blood cells, which lie in a folder per class (or beside a metadata.csv with these columns):

    {"file_name": "train/WBC/BloodImage_00001_1.jpg", "label": "WBC"}

A cell may also hold the picture's bytes, or what a data set of the Hub holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import field_validator

from rayft.errors import DataError
from rayft.tasks.cells import quoted
from rayft.tasks.charts import confusion_matrix
from rayft.tasks.images import NARROWING, Augment, as_wide, augmented, load_image_processor, normalised, pixels
from rayft.tasks.labels import LabelNames, fit_head, in_order, index_of, known_labels, label_name, shown
from rayft.tasks.later import torch, transformers
from rayft.tasks.loading import from_pretrained, load_config
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task


class ImageClassification(Task):
    """One label for a picture."""

    first_metric: ClassVar[str] = "accuracy"

    type: Literal["image-classification"] = "image-classification"
    """Which label a picture has."""
    image: str = "file_name"
    """The column of the pictures: a path, beside a metadata file or absolute, an URL, or a file's bytes."""
    label: str = "label"
    """The column of the label names; where a folder holds a class, this is its name."""
    labels: LabelNames | None = None
    """The label names in the order of their indices; null: those of the training rows, sorted."""
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """The weight of classes in the loss. balanced: all alike, however many rows they have; null: rows alike.

    {name: weight} gives single ones theirs, 1 to the rest. They are scaled to a mean of 1 over the training rows.
    """
    augment: Augment | None = None
    """How training pictures are varied from epoch to epoch; null: they are not."""

    @field_validator("class_weights")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if isinstance(value, dict) and any(weight <= 0 for weight in value.values()):
            raise ValueError("class_weights needs a number above 0 for each class it names")
        return value

    @property
    def varies(self) -> bool:
        return self.augment is not None

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        return (self.image, self.label) if labelled else (self.image,)

    def file_columns(self) -> tuple[str, ...]:
        return (self.image,)

    def fact_columns(self) -> tuple[str, ...]:
        return () if self.labels is not None and self.class_weights is None else (self.label,)

    def processor(self, model: Pretrained) -> Any:
        """The image processor."""
        return load_image_processor(model)

    def facts(self, rows: Iterable[Columns]) -> dict[str, Any]:
        """{"labels": names in the order of their indices, "weights": of each class where classes have weights}."""
        counts = Counter(name for batch in rows for name in map(label_name, batch.get(self.label, ())) if name)
        names = list(self.labels) if self.labels is not None else in_order(counts)
        if len(names) < 2:
            only = f"only the label {quoted(names[0])}" if names else "no label"
            raise DataError(
                f"column `{self.label}` of the training rows holds {only}; a classifier needs more to tell apart"
            )
        return (
            {"labels": names}
            if self.class_weights is None
            else {"labels": names, "weights": self._weights(counts, names)}
        )

    def _weights(self, counts: Counter[str], names: list[str]) -> list[float]:
        if self.class_weights == "balanced":
            raw = [1 / counts[name] if counts[name] else 0.0 for name in names]
        else:
            given = dict(self.class_weights or {})
            if unknown := sorted(set(given) - set(names)):
                raise DataError(f"task.class_weights names {', '.join(unknown)}; the labels are {shown(names)}")
            raw = [given.get(name, 1.0) for name in names]
        seen = [counts[name] for name in names]
        mean = sum(weight * count for weight, count in zip(raw, seen, strict=True)) / max(1, sum(seen))
        return [weight / mean for weight in raw]

    def balance_columns(self) -> tuple[str, ...]:
        return ("label",)

    def balance(self, features: Columns, facts: dict[str, Any]) -> dict[str, int]:
        """Rows by label name."""
        counts = np.bincount(np.asarray(features["label"], np.int64), minlength=len(facts["labels"])).tolist()
        return {name: count for name, count in zip(facts["labels"], counts, strict=True) if count}

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """`pixels` are 8-bit channels of `shape` (channels, height, width); `label` is null in rows without truth."""
        return pa.schema([("pixels", pa.binary()), ("shape", pa.list_(pa.int32())), ("label", pa.int32())])

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """One feature per row; references are label names."""
        names: list[str] = facts["labels"]
        index = {name: number for number, name in enumerate(names)}
        encoded = Encoded({"pixels": [], "shape": [], "label": []}, [], [], [] if evaluation and labelled else None)
        for row, cell in enumerate(rows[self.image]):
            try:
                label = self._index(rows[self.label][row], index) if labelled else None
                picture = pixels(self.image, cell, processor)
            except ValueError as fault:
                encoded.bad[row] = str(fault)
                continue
            feature = {"pixels": picture.tobytes(), "shape": list(picture.shape), "label": label}
            for name, values in encoded.features.items():
                values.append(feature[name])
            encoded.rows.append(row)
            encoded.lengths.append(1)
            if encoded.references is not None and label is not None:
                encoded.references.append(names[label])
        return encoded

    def _index(self, value: Any, index: dict[str, int]) -> int:
        name = label_name(value)
        if name is None:
            raise ValueError(f"`{self.label}` has no label; it needs one of {shown(index)}")
        return index_of(name, index, "label")

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """A head that was trained on the same label names is kept, in the facts' order; any other is drawn anew."""
        names: list[str] = facts["labels"]
        network = from_pretrained(
            transformers.AutoModelForImageClassification,
            model,
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        )
        fit_head(network, known_labels(load_config(model)), names, model.seed)
        return network

    def vary(self, features: Columns, rng: np.random.Generator) -> Columns:
        """The picture as `augment` asks for it."""
        if self.augment is None:
            return features
        row = augmented(features["pixels"][0], features["shape"][0], self.augment, rng)
        return {**features, "pixels": [row]}

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        """
        pixel_values   (n, channels, height, width) float32
        labels         (n,) int64 indices; absent where the features have no truth
        weights        (n,) float32, of each row in the loss; absent where classes have none
        """
        batch: Batch = {"pixel_values": normalised(features["pixels"], features["shape"], processor)}
        if any(label is None for label in features["label"]):
            return batch
        batch["labels"] = torch.as_tensor(np.asarray(features["label"], np.int64))
        if "weights" in facts:
            batch["weights"] = torch.tensor(facts["weights"], dtype=torch.float32)[batch["labels"]]
        return batch

    def items(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["pixel_values"])

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        return model(pixel_values=as_wide(batch["pixel_values"], model))

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross entropy times the weight of the row's class, summed over rows."""
        losses = torch.nn.functional.cross_entropy(
            outputs.logits.float(), batch["labels"], reduction="none", label_smoothing=label_smoothing
        )
        return (losses * batch["weights"]).sum() if "weights" in batch else losses.sum()

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"label", "score"}: the most probable."""
        scores, indices = (found.tolist() for found in outputs.logits.detach().float().softmax(dim=-1).max(dim=-1))
        return [{"label": facts["labels"][index], "score": score} for index, score in zip(indices, scores, strict=True)]

    def metrics(self) -> tuple[str, ...]:
        return ("accuracy", "f1_macro")

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """accuracy, and f1_macro over the labels that were predicted or true; both are shares of 1."""
        from sklearn.metrics import accuracy_score, f1_score

        given = [prediction["label"] for prediction in predictions]
        return {
            "accuracy": float(accuracy_score(references, given)),
            "f1_macro": float(f1_score(references, given, average="macro", zero_division=0)),
        }

    def pictures(self, predictions: list[Prediction], references: list[Any]) -> dict[str, bytes]:
        """The confusion matrix."""
        return {"confusion_matrix": confusion_matrix(references, [one["label"] for one in predictions])}

    def pipeline(self) -> str | None:
        return "image-classification"

    def usage(self) -> str:
        return NARROWING
