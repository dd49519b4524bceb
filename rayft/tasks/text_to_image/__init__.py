"""Which picture a text describes: Stable Diffusion learns a style, or a subject.

A row of Blobmoji as it comes:

    {"file_name": "emoji_u1f45f.png", "text": "running shoe, blob emoji style"}

The denoiser learns to tell what noise was laid over a picture (Ho et al. 2020, Denoising Diffusion Probabilistic
Models; Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models). The encoders of pictures and
texts stay as they are; what they give for a row never changes, so it is stored where that pays.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayft.tasks.charts import grid
from rayft.tasks.images import opened
from rayft.tasks.later import torch
from rayft.tasks.stacked import Blocks
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task, check_text
from rayft.tasks.text_to_image.processor import Prompter, load_prompter

SHOWN = 16  # pictures in the grid of an evaluation


class TextToImage(Task):
    """The denoiser of a Stable Diffusion pipeline, on pictures with their texts; its encoders always stay.

    How large an error is hangs on how much noise there is, far more than on the model. So a row is scored at several
    amounts of noise, which lie evenly over all of them; in training it has one.
    """

    first_metric: ClassVar[str] = "mse"
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "mse"})
    smooths: ClassVar[bool] = False

    type: Literal["text-to-image"] = "text-to-image"
    """Which picture a text describes: a style or a subject."""
    image: str = "file_name"
    """The column of the pictures: a path, beside a metadata file or absolute, an URL, or a file's bytes."""
    text: str = "text"
    """The column of what the pictures show."""
    size: int | None = Field(default=None, ge=8)
    """The side in pixels of the square that is cut around a picture's middle; null: what the model was trained on."""
    snr_gamma: float | None = Field(default=None, gt=0)
    """Weighs steps with little noise down in the loss; null: all count alike.

    Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting Strategy, who take 5.
    """
    score_draws: int = Field(default=4, ge=1)
    """Amounts of noise at which a row is scored."""
    sample_share: float = Field(default=0.0, ge=0, le=1)
    """The share of the rows that is drawn after each evaluation, chosen by a hash of what they hold."""
    sample_steps: int = Field(default=25, ge=1)
    """Steps in which a picture is drawn; more are slower and finer."""
    guidance: float = Field(default=7.5, ge=1)
    """How much a picture that is drawn follows its text; 1: as it was trained.

    Ho and Salimans 2022, Classifier-Free Diffusion Guidance.
    """

    @property
    def varies(self) -> bool:
        """Noise, and how much of it, is drawn for each row and epoch."""
        return True

    def steady(self, depth: int) -> int:
        """Noise comes in behind the encoders, which are the first block."""
        return min(depth, 1)

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        return (self.image, self.text) if labelled else (self.text,)

    def file_columns(self) -> tuple[str, ...]:
        return (self.image,)

    def processor(self, model: Pretrained) -> Prompter:
        """The tokenizer, and the size and schedule of the model."""
        return load_prompter(model, self.size)

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """`pixels` are 8-bit channels (3, size, size), null in rows without a picture; `draw` seeds a row's noise, and
        for evaluation `draws` is how often it is drawn."""
        draws = [("draws", pa.int32())] if evaluation else []
        return pa.schema([("pixels", pa.binary()), ("input_ids", pa.list_(pa.int32())), ("draw", pa.int64()), *draws])

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """One feature per row; references are the texts."""
        encoded = Encoded({"pixels": [], "input_ids": [], "draw": []}, [], [], [] if evaluation and labelled else None)
        for row, text in enumerate(rows[self.text]):
            try:
                check_text(self.text, text)
                picture = processor.pixels(opened(self.image, rows[self.image][row])) if labelled else None
            except ValueError as fault:
                encoded.bad[row] = str(fault)
                continue
            ids, cut = processor.ids(text)
            content = hashlib.sha256(text.encode() + (picture or b"")).digest()
            feature = {"pixels": picture, "input_ids": ids, "draw": int.from_bytes(content[:8], "little") >> 1}
            for name, values in encoded.features.items():
                values.append(feature[name])
            if cut:
                encoded.truncated.append(row)
            encoded.rows.append(row)
            encoded.lengths.append(1)
            if encoded.references is not None:
                encoded.references.append(text)
        if evaluation:
            encoded.features["draws"] = [self.score_draws] * len(encoded.rows)
        return encoded

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """Text encoder, autoencoder and denoiser as one network; what a folder has only configs of is drawn."""
        from rayft.tasks.text_to_image.network import load_diffusion

        return load_diffusion(model, processor, self.snr_gamma)

    def blocks(self, model: torch.nn.Module) -> Blocks:
        """The encoders of texts and pictures, which are fixed, then the denoiser's blocks: down, middle and up."""
        from rayft.tasks.text_to_image.network import Diffusion, diffusion_of

        name = next(name for name, module in model.named_modules() if isinstance(module, Diffusion))
        return diffusion_of(model).blocks(f"{name}." if name else "")

    def vary(self, features: Columns, rng: np.random.Generator) -> Columns:
        """Other noise, and another amount of it."""
        return {**features, "draw": [int(rng.integers(2**63 - 1))]}

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        """
        pixel_values   (n, 3, size, size) float32 from -1 to 1; absent where the features have no pictures
        input_ids      (n, positions) int64
        noise          (n, draws, channels, height, width) float32, of the latents' shape
        timesteps      (n, draws) int64: how much of the noise is laid over, from 0 (next to none) on
        """
        counts = features.get("draws", [1] * len(features["draw"]))
        drawn = [processor.drawn(draw, count) for draw, count in zip(features["draw"], counts, strict=True)]
        batch: Batch = {
            "input_ids": torch.tensor(features["input_ids"], dtype=torch.int64),
            "noise": torch.from_numpy(np.stack([noise for noise, _ in drawn])),
            "timesteps": torch.from_numpy(np.stack([timesteps for _, timesteps in drawn])),
        }
        if any(picture is None for picture in features["pixels"]):
            return batch
        shape = (-1, 3, processor.size, processor.size)
        channels = np.frombuffer(b"".join(features["pixels"]), np.uint8).reshape(shape)
        return {"pixel_values": torch.from_numpy(channels.astype(np.float32) / 127.5 - 1), **batch}

    def items(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["timesteps"])

    def padded(self, batch: Batch) -> int:
        """Nothing is padded."""
        return 0

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        """(squared error at each draw of a row, its weight in the loss), both (n, draws) float32."""
        return model(**batch)

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """The mean squared error of the denoiser's answer times the step's weight, of a row's draws their mean, summed
        over rows."""
        errors, weights = outputs
        return (errors * weights).mean(dim=1).sum()

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"mse"}: how far the denoiser's answer lies from the truth."""
        return [{"mse": error} for error in outputs[0].detach().mean(dim=1).tolist()]

    def asked(self, features: Columns) -> tuple[list[int], Columns]:
        """Pictures of a share of the rows, chosen by the hash of what they hold."""
        places = [place for place, draw in enumerate(features["draw"]) if draw < self.sample_share * 2**63]
        chosen = {name: [features[name][place] for place in places] for name in ("input_ids", "draw")}
        return places, {"pixels": [None] * len(places), **chosen} if places else {}

    def generate(
        self, model: torch.nn.Module, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"picture"}: a PNG's bytes."""
        from rayft.tasks.text_to_image.sampling import sampled

        pictures = sampled(model, batch, processor, self.sample_steps, self.guidance)
        return [{"picture": picture} for picture in pictures]

    def metrics(self) -> tuple[str, ...]:
        return ("mse",)

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """mse: the mean squared error of the denoiser's answer, at noise drawn once and for all for each row."""
        return {"mse": float(np.mean([prediction["mse"] for prediction in predictions]))}

    def pictures(self, predictions: list[Prediction], references: list[Any]) -> dict[str, bytes]:
        """Pictures that the model draws of some of the texts."""
        drawn = [
            (text, prediction["picture"])
            for prediction, text in zip(predictions, references, strict=True)
            if "picture" in prediction
        ]
        return {"samples": grid(drawn[:SHOWN])} if drawn else {}

    def usage(self) -> str:
        return (
            "```python\nfrom diffusers import DiffusionPipeline\n\n"
            'pipeline = DiffusionPipeline.from_pretrained("FOLDER")\n'
            'pipeline("running shoe, blob emoji style").images[0].save("picture.png")\n```'
        )
