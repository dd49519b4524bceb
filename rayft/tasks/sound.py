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
SPARE_S = 0.1  # a decoder's delay, or a header that is a few bytes off: more than that is missing where a file was cut
_STREAMED = 0x7FFFF000  # from here on a WAV's size is one that a pipe's writer couldn't know
_NO_TAG = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)  # an ID3 tag that says nothing


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
        with soundfile.SoundFile(io.BytesIO(_recognised(content))) as file:
            rate, channels, total = file.samplerate, file.channels, file.frames
            asked = min(round(total * _promised(content)), math.ceil(wanted.seconds * rate))
            found = file.read(min(total, asked), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as fault:
        raise ValueError(f"{name} can't be decoded as sound ({fault.error_string.rstrip('.')}); {DECODED}") from None
    if not len(found):
        raise ValueError(f"{name} holds no samples; it needs a sound")
    if asked - len(found) > SPARE_S * rate:
        raise ValueError(f"{name} was cut: it ends after {len(found) / rate:.2f} s, and its header promises more")
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


def _recognised(content: bytes) -> bytes:
    """The content of a file, such that its decoder knows what it is: an MP3 in memory by its tag alone."""
    bare = len(content) > 1 and content[0] == 0xFF and content[1] & 0xE0 == 0xE0 and content[1] & 0x06
    return _NO_TAG + content if bare else content


def _promised(content: bytes) -> float:
    """How many times the samples that a WAV file holds its header promises: 1 where they are all there.

    The decoder takes what is there for the whole. 1 for other kinds of files, whose decoders tell.
    """
    place = 12 if content[:4] == b"RIFF" and content[8:12] == b"WAVE" else len(content)
    while place + 8 < len(content):
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        if content[place : place + 4] == b"data":
            return max(1.0, size / (len(content) - place - 8)) if size < _STREAMED else 1.0
        place += 8 + size + size % 2
    return 1.0
