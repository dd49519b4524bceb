"""What tasks on pictures share: a cell's picture at the size a model takes, how it is varied, and pictures as tensors.

A prepared row holds 8-bit channels at the model's size, before they are scaled: a few kilobytes, which training may
still flip, cut and colour, and which the processor only has to normalise.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from rayft.errors import ModelError
from rayft.tasks.files import file_bytes, file_name
from rayft.tasks.later import torch, transformers
from rayft.tasks.loading import told
from rayft.tasks.task import Pretrained

PACKAGES = {"PIL": "Pillow", "matplotlib": "matplotlib"}
SIZES = ((32, 48), (64, 40))  # pictures of which a processor has to make one size


class Augment(BaseModel):
    """How a training row is varied, by random numbers of its own in each epoch. Chances and shares lie in [0, 1].

    flip, flip_vertical   the chance of a mirror image
    crop                  a part of at least this share of the area, blown up to the whole (1: all of it)
    rotate                up to so many degrees to either side
    brightness, contrast, saturation   a factor of up to this much more or less than 1
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: float = Field(default=0.5, ge=0, le=1)
    flip_vertical: float = Field(default=0.0, ge=0, le=1)
    crop: float = Field(default=1.0, gt=0, le=1)
    rotate: float = Field(default=0.0, ge=0, le=180)
    brightness: float = Field(default=0.0, ge=0, lt=1)
    contrast: float = Field(default=0.0, ge=0, lt=1)
    saturation: float = Field(default=0.0, ge=0, lt=1)


def load_image_processor(model: Pretrained) -> Any:
    """The image processor, on Pillow and so the same on every machine.

    ModelError where there is none, where it doesn't bring pictures to one size, or where packages are missing.
    """
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ModelError(f"tasks on pictures need {' and '.join(missing)}: pip install 'rayft[images]'")
    with told(model, "image processor"):
        processor = transformers.AutoImageProcessor.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code, backend="pil"
        )
    shapes = [_at_size(np.zeros((*size, 3), np.uint8), processor).shape for size in SIZES]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"the image processor of {model.path} brings pictures to different sizes (one of {SIZES[0]} to "
            f"{shapes[0]}); one that resizes to a fixed size fits"
        )
    return processor


def pixels(column: str, value: Any, processor: Any) -> np.ndarray:
    """The picture in a cell as (channels, height, width) uint8 at the model's size; ValueError says what is wrong."""
    return _at_size(opened(column, value), processor)


def opened(column: str, value: Any) -> Any:
    """The picture in a cell, upright and in RGB, as Pillow has it; ValueError says what is wrong."""
    from PIL import Image, ImageOps

    content = file_bytes(column, value)
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as file:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return ImageOps.exif_transpose(file).convert("RGB")
    except Image.DecompressionBombWarning:
        raise ValueError(f"`{column}`: {file_name(value)} has too many pixels for a picture to train on") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as fault:
        reason = next(iter(str(fault).splitlines()), type(fault).__name__).split(" <")[0].rstrip(".")
        raise ValueError(f"`{column}`: {file_name(value)} is no whole picture: {reason}") from None


def picture_shape(processor: Any) -> tuple[int, ...]:
    """(channels, height, width) of the pictures that a processor of `load_image_processor` makes."""
    return _at_size(np.zeros((*SIZES[0], 3), np.uint8), processor).shape


def _at_size(picture: Any, processor: Any) -> np.ndarray:
    made: np.ndarray = processor(images=[picture], do_rescale=False, do_normalize=False, return_tensors="np")[
        "pixel_values"
    ][0]
    return made


def normalised(rows: list[bytes], shapes: list[list[int]], processor: Any) -> torch.Tensor:
    """(n, channels, height, width) float32, scaled and normalised as the processor does it."""
    pictures = [np.frombuffer(row, np.uint8).reshape(shape) for row, shape in zip(rows, shapes, strict=True)]
    made = processor(
        images=pictures,
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=False,
        input_data_format="channels_first",
        return_tensors="pt",
    )
    values: torch.Tensor = made["pixel_values"].float()
    return values


def as_wide(pictures: torch.Tensor, model: Any) -> torch.Tensor:
    """`pictures` in the dtype of the model's weights: outside of training, nothing but this narrows them."""
    dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
    return pictures.to(dtype)


def augmented(row: bytes, shape: list[int], how: Augment, rng: np.random.Generator) -> bytes:
    """A picture of the same shape that `how` makes of `row`; every way draws its numbers, used or not."""
    from PIL import Image, ImageEnhance

    channels = np.frombuffer(row, np.uint8).reshape(shape)
    picture = Image.fromarray(np.ascontiguousarray(channels.transpose(1, 2, 0)))
    width, height = picture.size
    flip, flip_vertical, angle, area, left, top, *factors = rng.random(9).tolist()
    if how.rotate:
        picture = picture.rotate((2 * angle - 1) * how.rotate, Image.Resampling.BILINEAR)
    if how.crop < 1:
        side = (how.crop + (1 - how.crop) * area) ** 0.5
        x, y = left * (1 - side) * width, top * (1 - side) * height
        box = (x, y, x + side * width, y + side * height)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR, box=box)
    if flip < how.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if flip_vertical < how.flip_vertical:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind, most, draw in zip(kinds, (how.brightness, how.contrast, how.saturation), factors, strict=True):
        if most:
            picture = kind(picture).enhance(1 + most * (2 * draw - 1))
    return np.asarray(picture).transpose(2, 0, 1).tobytes()
