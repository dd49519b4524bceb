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
# What a processor does behind resizing and cutting: left to `normalised`, so that it isn't done twice.
LATER = ("do_rescale", "do_normalize", "do_flip_channel_order", "include_top")
ROUNDING = 2 / 255  # of the whole range: two steps of 8 bits
LEAST_WIDE = 1 << 12  # 16 bits that stay below are 12 or fewer: cameras and scanners keep these in files of 16
_BITS, _MOST = 258, 281  # TIFF's BitsPerSample and MaxSampleValue
NARROWING = (
    "Of grey pictures with more than 8 bits, as scans are, the upper 8 were trained on: values of 16 bits were divided "
    'by 256, those of a TIFF file that says 12 bits by 16. Pillow\'s `convert("RGB")`, which pipelines call, cuts all '
    "above 255 off instead, so narrow such pictures before."
)


class Augment(BaseModel):
    """How a training row is varied, by random numbers of its own in each epoch. Chances and shares lie in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    flip: float = Field(default=0.5, ge=0, le=1)
    """The chance that left and right are exchanged."""
    flip_vertical: float = Field(default=0.0, ge=0, le=1)
    """The chance that top and bottom are exchanged."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """A part of at least this share of the area is blown up to the whole; 1: all of it stays."""
    rotate: float = Field(default=0.0, ge=0, le=180)
    """Turns by up to so many degrees to either side."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """How much the factor of the brightness may be above or below 1."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """How much the factor of the contrast may be above or below 1."""
    saturation: float = Field(default=0.0, ge=0, lt=1)
    """How much the factor of the colours' strength may be above or below 1."""


def load_image_processor(model: Pretrained) -> Any:
    """The image processor, on Pillow and so the same on every machine.

    ModelError where there is none, where packages are missing, or where it makes no pictures of one size that come out
    the same in two steps.
    """
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ModelError(f"tasks on pictures need {' and '.join(missing)}: pip install 'rayft[images]'")
    with told(model, "image processor"):
        processor = transformers.AutoImageProcessor.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code, backend="pil"
        )
    _refuse_unfit(processor, model.path)
    return processor


def _refuse_unfit(processor: Any, path: str) -> None:
    """ModelError where rows that are prepared and then normalised would not be what the processor makes at once."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    try:
        at_size = [_at_size(picture, processor) for picture in pictures]
        if at_size[0].shape != at_size[1].shape:
            raise ModelError(
                f"the image processor of {path} brings pictures to different sizes (one of {SIZES[0]} to "
                f"{at_size[0].shape}); one that resizes to a fixed size fits"
            )
        twice = _normalised(at_size[:1], processor, "np")[0]
        once = processor(images=pictures[:1], return_tensors="np")["pixel_values"][0]
        same = at_size[0].dtype == np.uint8 and at_size[0].ndim == 3 and twice.shape == once.shape
        same = same and bool(np.abs(twice - once).max() <= ROUNDING * np.ptp(once))
    except ModelError:
        raise
    except Exception as fault:  # whatever it does without
        said = next(iter(str(fault).splitlines()), "").split(" [")[0]
        reason = f"{type(fault).__name__}: {said}".rstrip(".: ")
        raise ModelError(
            f"the image processor of {path} makes no picture of a fixed size ({reason}); a ViT's or a ResNet's does"
        ) from fault
    if not same:
        raise ModelError(
            f"the image processor of {path} does more than resize, cut, rescale, normalise and turn channels round; a "
            "ViT's or a ResNet's does no more"
        )


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
            picture = ImageOps.exif_transpose(file)
            wide, bits = picture.mode.startswith(("I", "F")), _said_bits(file)
            picture = picture if wide else picture.convert("RGB")
    except Image.DecompressionBombWarning:
        raise ValueError(f"`{column}`: {file_name(value)} has too many pixels for a picture to train on") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as fault:
        reason = next(iter(str(fault).splitlines()), type(fault).__name__).split(" <")[0].rstrip(".")
        raise ValueError(f"`{column}`: {file_name(value)} is no whole picture: {reason}") from None
    return _narrowed(picture, bits, f"`{column}`: {file_name(value)}") if wide else picture


def _said_bits(file: Any) -> int | None:
    """How many bits a file says its grey values use; None where it only says in how many they are kept.

    A MaxSampleValue that is no depth's highest value is a statistic of the one picture.
    """
    tags = getattr(file, "tag_v2", {})
    kept, most = max(tags.get(_BITS) or (16,)), max(tags.get(_MOST) or (0,))
    if most in {(1 << bits) - 1 for bits in range(8, 17)}:
        return int(most).bit_length()
    return kept if kept < 16 else None


def _narrowed(picture: Any, bits: int | None, name: str) -> Any:
    """The upper 8 of the `bits` that a grey value has, as in scans; ValueError where values are none of 16 bits.

    Pillow's own `convert` would cut everything above 255 off. Where the file says no `bits` they are 16, and values
    that use the lowest part of these alone are refused: 12 bits would come out nearly black.
    """
    from PIL import Image

    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() >= 1 << 16:
        raise ValueError(
            f"{name} has grey values from {values.min():g} to {values.max():g} "
            f"({'fractions' if picture.mode == 'F' else '32 bits'}); whole numbers of 8 or 16 bits fit"
        )
    most = int(values.max())
    if bits is None and 0 < most < LEAST_WIDE:
        raise ValueError(
            f"{name} has grey values up to {most} in 16 bits, nearly black, and doesn't say that it uses fewer bits; "
            "rescale such pictures to 8 bits, or to all of 16"
        )
    if bits is not None and most >> bits:
        raise ValueError(f"{name} has grey values up to {most}, and says that it uses {bits} bits")
    return Image.fromarray((values >> ((bits or 16) - 8)).astype(np.uint8)).convert("RGB")


def picture_shape(processor: Any) -> tuple[int, ...]:
    """(channels, height, width) of the pictures that a processor of `load_image_processor` makes."""
    return _at_size(np.zeros((*SIZES[0], 3), np.uint8), processor).shape


def _at_size(picture: Any, processor: Any) -> np.ndarray:
    left_out = {step: False for step in LATER if hasattr(processor, step)}
    made: np.ndarray = processor(images=[picture], **left_out, return_tensors="np")["pixel_values"][0]
    return made


def normalised(rows: list[bytes], shapes: list[list[int]], processor: Any) -> torch.Tensor:
    """(n, channels, height, width) float32, scaled and normalised as the processor does it."""
    pictures = [np.frombuffer(row, np.uint8).reshape(shape) for row, shape in zip(rows, shapes, strict=True)]
    values: torch.Tensor = _normalised(pictures, processor, "pt").float()
    return values


def _normalised(pictures: list[np.ndarray], processor: Any, tensors: str) -> Any:
    made = processor(
        images=pictures,
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=False,
        input_data_format="channels_first",
        return_tensors=tensors,
    )
    return made["pixel_values"]


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
