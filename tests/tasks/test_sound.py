"""What a cell with a sound becomes, and each thing that can be wrong with it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from rayft.errors import ModelError
from rayft.tasks.sound import Wanted, need, read_sound
from speech_models import SOUNDS

WANTED = Wanted("audio", 16_000, 10.0, convert=True)
STRICT = Wanted("audio", 16_000, 10.0, convert=False)


def wav(samples: Any, rate: int = 16_000, subtype: str | None = "PCM_16", kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples), rate, format=kind, subtype=subtype)
    return file.getvalue()


def mp3(samples: Any, rate: int = 16_000) -> bytes:
    return wav(samples, rate, None, "MP3")


def tone(rate: int, seconds: float = 1.0, pitch: float = 440.0) -> Any:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)


def test_sixteen_bits_at_the_rate_stay_as_they_are() -> None:
    samples = np.array([0, 1, -1, 32767, -32768, 1234], np.int16)
    found = read_sound(wav(samples), STRICT)
    assert found.samples.dtype == np.int16
    assert found.samples.tolist() == samples.tolist()
    assert found.seconds == 6 / 16_000


def test_channels_are_averaged() -> None:
    stereo = np.stack([np.full(800, 1000), np.full(800, 3000)], axis=1).astype(np.int16)
    assert read_sound(wav(stereo), WANTED).samples.tolist() == [2000] * 800


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100])
def test_a_tone_keeps_its_pitch_and_length_at_another_rate(rate: int) -> None:
    found = read_sound(wav(tone(rate), rate), WANTED)
    assert found.seconds == 1.0
    assert len(found.samples) == 16_000
    spectrum = np.abs(np.fft.rfft(found.samples))
    assert int(spectrum.argmax()) == 440  # one second: a bin is one hertz
    inner = slice(1000, -1000)
    expected = 32768 * tone(16_000)
    assert np.abs(found.samples[inner] - expected[inner]).max() < 0.01 * 32768


def test_a_recording_comes_as_bytes_or_path_alike() -> None:
    path = SOUNDS / "0_george_7.flac"
    one, other = read_sound(str(path), WANTED), read_sound({"bytes": path.read_bytes(), "path": None}, WANTED)
    assert one.samples.tolist() == other.samples.tolist()
    info = soundfile.info(path)
    assert one.seconds == info.frames / info.samplerate
    assert len(one.samples) == 2 * info.frames


def test_only_what_is_wanted_of_a_long_sound_is_read() -> None:
    found = read_sound(wav(tone(8_000, 3.0), 8_000), Wanted("audio", 16_000, 1.5, convert=True))
    assert (len(found.samples), found.seconds) == (24_000, 3.0)


@pytest.mark.parametrize("tag", [b"", b"ID3\x03\0\0\0\0\0\x0a" + bytes(10)], ids=["bare", "tagged"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_an_mp3_is_read_with_a_tag_and_without(tag: bytes, rate: int) -> None:
    """In memory the decoder knows one by its tag alone."""
    found = read_sound(tag + mp3(tone(rate), rate), WANTED)
    assert (len(found.samples), found.seconds) == (16_000, 1.0)


@pytest.mark.parametrize("made", [wav, mp3])
def test_a_file_that_was_cut_is_named_and_its_text_not_learnt_from_half_of_the_sound(made: Any) -> None:
    content = made(tone(16_000, 4.0))
    for wanted in (WANTED, Wanted("audio", 16_000, 3.0, convert=True)):
        with pytest.raises(
            ValueError, match=r"`audio`: it was cut: it ends after [12]\.\d\d s, and its header promises more"
        ):
            read_sound(content[: len(content) // 2], wanted)
    assert len(read_sound(content[: len(content) // 2], Wanted("audio", 16_000, 1.0, convert=True)).samples) == 16_000


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x80000000, 0x7FFFF000, 32_000 + 44])
def test_a_wav_whose_header_is_a_pipe_s_or_a_few_bytes_off_is_whole(size: int) -> None:
    content = bytearray(wav(tone(16_000)))
    place = content.find(b"data") + 4
    content[place : place + 4] = size.to_bytes(4, "little")
    assert len(read_sound(bytes(content), WANTED).samples) == 16_000


@pytest.mark.parametrize(
    ("content", "wanted", "says"),
    [
        (wav([]), WANTED, "`audio`: it holds no samples; it needs a sound"),
        (b"RIFFbut no sound", WANTED, "`audio`: it can't be decoded as sound"),
        (wav(tone(16_000))[:30], WANTED, "`audio`: it can't be decoded as sound"),
        (wav([0.0, float("nan")], subtype="FLOAT"), WANTED, "no finite numbers"),
        (wav(np.zeros((16, 2))), STRICT, "it has 2 channels at 16000 Hz; 1 channel at 16000 Hz fits"),
        (wav(tone(8_000), 8_000), STRICT, "it has 1 channel at 8000 Hz; 1 channel at 16000 Hz fits"),
        (b"", WANTED, "`audio`"),
        (None, WANTED, "`audio` is None"),
        (str(Path("/no/such.wav")), WANTED, "`audio`: there is no file /no/such.wav"),
    ],
    ids=["no samples", "no sound", "cut", "no numbers", "stereo", "slow", "no bytes", "nothing", "no file"],
)
def test_what_is_no_fitting_sound_is_named(content: Any, wanted: Wanted, says: str) -> None:
    with pytest.raises(ValueError, match="`audio`") as caught:
        read_sound(content, wanted)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_the_extra() -> None:
    need("soundfile")
    with pytest.raises(ModelError, match=r"need the package no_such_package; try `pip install 'rayft\[audio\]'`"):
        need("soundfile", "no_such_package")
