"""The samples of a sound: decoded, mixed down to one channel, at the rate that a model was trained with."""

from __future__ import annotations

import importlib.util
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayft.errors import ModelError
from rayft.tasks.files import file_bytes, file_name

FRAME_S = 0.02  # what the length of a sound is counted in: no model here makes its frames shorter
DECODED = "WAV, FLAC, OGG and MP3 fit"


@dataclass(frozen=True)
class Wanted:
    """What a task makes of a cell: samples per second, at most `seconds` of them; with `convert` from any number of
    channels and any rate, else only from one channel at that rate."""

    column: str
    rate: int
    seconds: float
    convert: bool


@dataclass(frozen=True)
class Sound:
    """`samples` as (n,) int16, at most as long as was wanted; `seconds` is how long the whole file lasts."""

    samples: np.ndarray[Any, np.dtype[np.int16]]
    seconds: float

    def frames(self, rate: int) -> int:
        """Its length in frames of `FRAME_S`, one at least."""
        return max(1, round(len(self.samples) / rate / FRAME_S))


def need(*packages: str) -> None:
    """ModelError where a package that tasks with sounds need is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"tasks with sounds need the package {package}; try `pip install 'rayft[audio]'`")


def read_sound(value: Any, wanted: Wanted) -> Sound:
    """The sound in a cell; ValueError, whose sentence is for `Encoded.bad`, where there is none that fits.

    Several channels are averaged; another rate is resampled by a polyphase filter. 16-bit samples that need neither
    stay as they are.
    """
    import soundfile

    content = file_bytes(wanted.column, value)
    name = f"`{wanted.column}`: {file_name(value)}"
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, channels, total = file.samplerate, file.channels, file.frames
            found = file.read(min(total, math.ceil(wanted.seconds * rate)), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as fault:
        raise ValueError(f"{name} can't be decoded as sound ({fault.error_string.rstrip('.')}); {DECODED}") from None
    if not len(found):
        raise ValueError(f"{name} holds no samples; it needs a sound")
    if not wanted.convert and (channels, rate) != (1, wanted.rate):
        raise ValueError(
            f"{name} has {channels} channel{'s' * (channels > 1)} at {rate} Hz; 1 channel at {wanted.rate} Hz fits, "
            "or task.on_mismatch=convert"
        )
    mono = found.mean(axis=1)
    if not np.isfinite(mono).all():
        raise ValueError(f"{name} holds samples that are no finite numbers; it needs a sound")
    if rate != wanted.rate:
        from scipy.signal import resample_poly

        common = math.gcd(rate, wanted.rate)
        mono = resample_poly(mono, wanted.rate // common, rate // common)
    most = round(wanted.seconds * wanted.rate)
    samples = np.clip(np.rint(mono[:most] * 32768), -32768, 32767).astype(np.int16)
    return Sound(samples, total / rate)
