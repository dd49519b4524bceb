"""From samples to what a speech model reads, so that no row's result depends on the rows that it shares a batch with.

Three kinds of extractor occur. Whisper's and the spectrogram transformer's give every sound one shape, padded to the
longest that they read. Others give as many samples (wav2vec2) or frames (wav2vec2-bert) as the sound has: these are
padded here and masked. One part of some wav2vec2 models hears padding all the same, the group normalisation in their
first layer, whose statistics run over time: `ignore_padding` takes them over the sound alone, so that a row in a batch
gets what it gets alone, where transformers' own batches differ from single rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayft.errors import ModelError
from rayft.tasks.later import torch, transformers
from rayft.tasks.loading import load_part
from rayft.tasks.sound import need
from rayft.tasks.task import Batch, Pretrained

READ = ("input_values", "input_features", "attention_mask", "decoder_input_ids")  # of a batch, by the model
LEAST_S = 0.5  # a batch is padded to this: models that mask spans of time while they learn need room for a span
LEAST_FRAMES = 50


def load_extractor(model: Pretrained, max_seconds: float) -> Any:
    """The model's feature extractor; ModelError where it takes no sounds, or reads less than `max_seconds`."""
    need("soundfile")
    extractor = load_part(transformers.AutoFeatureExtractor, model, "feature extractor")
    if not getattr(extractor, "sampling_rate", None):
        raise ModelError(f"model.path: the feature extractor of `{model.path}` takes no sounds; a speech model's fits")
    reads = seconds_read(extractor)
    if reads is not None and max_seconds > reads:
        raise ModelError(
            f"task.max_seconds is {max_seconds:g}, but {model.path} reads {reads:g} seconds; at most {reads:g} fits"
        )
    return extractor


def seconds_read(extractor: Any) -> float | None:
    """How much an extractor reads that pads every sound to one length; None for one that reads any length."""
    if hasattr(extractor, "chunk_length"):  # Whisper
        return float(extractor.chunk_length)
    if hasattr(extractor, "num_mel_bins") and hasattr(extractor, "max_length"):  # spectrogram transformer
        return float(extractor.max_length * 0.01)
    return None


def inputs(extractor: Any, sounds: Sequence[bytes]) -> Batch:
    """Sounds (int16 samples) as what the model reads.

    input_values     (n, samples) float32, for wav2vec2 and its kin; (n, frames, bins) for the spectrogram transformer
    input_features   (n, bins, frames) float32 for Whisper, (n, frames, bins) for wav2vec2-bert
    attention_mask   (n, samples or frames) int64, 1 where there is sound; absent where all have one length
    """
    name = extractor.model_input_names[0]
    fixed = seconds_read(extractor) is not None
    rows = []
    for content in sounds:
        samples = np.frombuffer(content, np.int16).astype(np.float32) / 32768
        made = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np")
        row = made[name][0]
        if not fixed and "attention_mask" in made:
            row = row[: int(made["attention_mask"][0].sum())]
        rows.append(row)
    if fixed:
        return {name: torch.from_numpy(np.stack(rows))}
    least = round(LEAST_S * extractor.sampling_rate) if rows[0].ndim == 1 else LEAST_FRAMES
    longest = max(least, *(len(row) for row in rows))
    values = np.full((len(rows), longest, *rows[0].shape[1:]), extractor.padding_value, np.float32)
    mask = np.zeros((len(rows), longest), np.int64)
    for place, row in enumerate(rows):
        values[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return {name: torch.from_numpy(values), "attention_mask": torch.from_numpy(mask)}


def listen(model: Any, batch: Batch) -> Any:
    """One forward pass; labels are left out. Inputs get the width of the weights."""
    from rayft.tasks.padded_norm import PaddedGroupNorm

    if model.training:  # spans of time that a model masks are drawn by numpy: from what seeds torch
        np.random.seed(int(torch.randint(2**31, ())))
    dtype = next(model.parameters()).dtype
    given = {name: batch[name] for name in READ if name in batch}
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    if "attention_mask" in given:
        for module in model.modules():
            if isinstance(module, PaddedGroupNorm):
                module.samples = given["attention_mask"].sum(dim=-1)
    return model(**given)


def ignore_padding(network: torch.nn.Module) -> None:
    """Makes the group normalisation over time of a wav2vec2's first layer leave out padding; others have none."""
    from rayft.tasks.padded_norm import PaddedGroupNorm

    for layer in network.modules():
        norm, convolution = getattr(layer, "layer_norm", None), getattr(layer, "conv", None)
        if type(norm) is torch.nn.GroupNorm and isinstance(convolution, torch.nn.Conv1d):
            norm.__class__ = PaddedGroupNorm
            norm.kernel, norm.stride = convolution.kernel_size[0], convolution.stride[0]  # type: ignore[assignment]
