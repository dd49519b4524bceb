"""Face recognition: embeddings in which pictures of one person lie close together, also of people never seen.

One row of pictures of faces, which lie beside a metadata.csv with these columns:

    {"file_name": "train/001/neutral.jpg", "identity": "001"}

The embedding is the backbone's pooled output at length 1, trained by ArcFace on the identities of the training rows.
Validation and test rows are of other people, so that the scores are those of verification: of all pairs of pictures,
which are of one person.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayft.errors import DataError
from rayft.models import without_weights
from rayft.tasks.cells import quoted
from rayft.tasks.charts import roc
from rayft.tasks.face_recognition import arcface, verification
from rayft.tasks.images import (
    NARROWING,
    Augment,
    as_wide,
    augmented,
    load_image_processor,
    normalised,
    picture_shape,
    pixels,
)
from rayft.tasks.labels import in_order, label_name
from rayft.tasks.later import torch, transformers
from rayft.tasks.loading import from_pretrained
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task

USAGE = """\
The pooled output, brought to length 1, is the embedding of a face; the cosine of two says how alike they are.

```python
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

folder = "."  # of this file
processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def embed(*paths):
    pictures = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths]
    with torch.inference_mode():
        pooled = model(**processor(pictures, return_tensors="pt")).pooler_output
    return torch.nn.functional.normalize(pooled.flatten(1))
```

`threshold` among the scores is the similarity from which on two pictures are told to be of one person, at equal rates
of both errors. Only for pictures of people who agreed to this use.
"""


class FaceRecognition(Task):
    """Embeddings in which pictures of one person lie together, by ArcFace (Deng et al. 2019)."""

    # It needs no threshold: each pair's place counts, where the others hang on a few pairs beside one.
    first_metric: ClassVar[str] = "auc"
    lower_is_better: ClassVar[frozenset[str]] = Task.lower_is_better | {"eer"}
    cut_flatters: ClassVar[str] = (
        "rows cut from train show people who are trained on: of others, whom the model is for, scores are lower"
    )

    type: Literal["face-recognition"] = "face-recognition"
    """Whose face it is, also of people never seen."""
    image: str = "file_name"
    """The column of the pictures: a path, beside a metadata file or absolute, an URL, or a file's bytes."""
    identity: str = "identity"
    """The column that says which person it is, by a name or number."""
    scale: float = Field(default=64.0, gt=0)
    """What cosines are multiplied by in the loss: 64 in the paper; the fewer identities, the less."""
    margin: float = Field(default=0.5, ge=0, lt=1.5)
    """The angle in radians by which a picture has to be closer to its person than to others."""
    augment: Augment | None = None
    """How training pictures are varied from epoch to epoch; null: they are not."""

    @property
    def varies(self) -> bool:
        return self.augment is not None

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        return (self.image, self.identity) if labelled else (self.image,)

    def file_columns(self) -> tuple[str, ...]:
        return (self.image,)

    def fact_columns(self) -> tuple[str, ...]:
        return (self.identity,)

    def processor(self, model: Pretrained) -> Any:
        """The image processor."""
        return load_image_processor(model)

    def facts(self, rows: Iterable[Columns]) -> dict[str, Any]:
        """{"identities": names of the people in the training rows, in the order of their indices}"""
        found = in_order(name for batch in rows for name in map(label_name, batch.get(self.identity, ())) if name)
        if len(found) < 2:
            only = f"only {quoted(found[0])}" if found else "nobody"
            raise DataError(
                f"column `{self.identity}` of the training rows names {only}; telling people apart takes two at least"
            )
        return {"identities": found}

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """`pixels` are 8-bit channels of `shape` (channels, height, width); `label` is null of people unknown."""
        return pa.schema([("pixels", pa.binary()), ("shape", pa.list_(pa.int32())), ("label", pa.int32())])

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """One feature per row; references are identity names, also of people who are not among the facts."""
        index = {name: number for number, name in enumerate(facts["identities"])}
        encoded = Encoded({"pixels": [], "shape": [], "label": []}, [], [], [] if evaluation and labelled else None)
        for row, cell in enumerate(rows[self.image]):
            name = label_name(rows[self.identity][row]) if labelled else None
            if labelled and name is None:
                encoded.bad[row] = (
                    f"`{self.identity}` is {quoted(rows[self.identity][row])}; it needs a person's name or number"
                )
                continue
            try:
                picture = pixels(self.image, cell, processor)
            except ValueError as fault:
                encoded.bad[row] = str(fault)
                continue
            feature = {"pixels": picture.tobytes(), "shape": list(picture.shape), "label": index.get(name or "")}
            for column, values in encoded.features.items():
                values.append(feature[column])
            encoded.rows.append(row)
            encoded.lengths.append(1)
            if encoded.references is not None:
                encoded.references.append(name)
        return encoded

    def check_references(self, references: Iterable[Any]) -> None:
        verification.check(list(references))

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """The backbone, and ArcFace's directions: an earlier export's for the same people, else drawn anew."""
        from rayft.tasks.face_recognition.recogniser import Recogniser

        backbone: Any = from_pretrained(transformers.AutoModel, model)
        width = arcface.width_of(backbone, picture_shape(processor), model.path)
        heads, drawn = arcface.directions(model, facts["identities"], width)
        network: Any = Recogniser(backbone, heads)
        new = () if without_weights(model.path) else tuple(f"backbone.{name}" for name in backbone.rayft_drawn)
        network.rayft_drawn = (*new, "arcface.weight") if drawn else new
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
        labels         (n,) int64 indices of people; -100 of those who are not among the training rows
        """
        labels = [arcface.UNKNOWN if label is None else label for label in features["label"]]
        return {
            "pixel_values": normalised(features["pixels"], features["shape"], processor),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }

    def items(self, batch: Batch) -> int:
        """Rows whose person is among the training rows: people never seen have no loss."""
        return int((batch["labels"] != arcface.UNKNOWN).sum())

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        return model(pixel_values=as_wide(batch["pixel_values"], model))

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """ArcFace, summed over the rows whose person is among the training rows."""
        return arcface.arcface_loss(outputs["cosines"], batch["labels"], self.scale, self.margin, label_smoothing)

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"embedding": floats to six digits, of length 1}"""
        rows = outputs["embeddings"].detach().tolist()
        return [{"embedding": [float(f"{value:.6g}") for value in row]} for row in rows]

    def metrics(self) -> tuple[str, ...]:
        return ("auc", "accuracy", "eer", "threshold")

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """What `verification.scores` says of all pairs of rows; DataError where one kind of them is lacking."""
        return verification.scores(*_asked(predictions, references))

    def pictures(self, predictions: list[Prediction], references: list[Any]) -> dict[str, bytes]:
        """The ROC curve of verification."""
        return {"roc": roc(*_asked(predictions, references))}

    def pipeline(self) -> str | None:
        return "image-feature-extraction"

    def usage(self) -> str:
        return f"{USAGE}\n\n{NARROWING}"

    def export(self, folder: str, model: torch.nn.Module, processor: Any, facts: dict[str, Any]) -> None:
        """Writes ArcFace's directions, from which training goes on; transformers doesn't read them."""
        heads: Any = model.get_submodule("arcface")
        arcface.save(folder, heads, facts["identities"])


def _asked(predictions: list[Prediction], references: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair of pictures whether it is of one person, and how similar they are."""
    asked = verification.pairs(references)
    embeddings = np.asarray([prediction["embedding"] for prediction in predictions], np.float32)
    return asked.same, verification.similarities(embeddings, asked)
