from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from rayft.errors import DataError
from rayft.tasks.audio_classification import AudioClassification
from rayft.tasks.task import Pretrained
from speech_models import DIGITS, make_listener


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tmp_path_factory.mktemp("model"))
    make_listener(folder, 1)
    return AudioClassification().processor(Pretrained(folder))


def sound(folder: Path, name: str, seconds: float) -> str:
    path = folder / name
    soundfile.write(path, np.random.default_rng(0).normal(size=round(seconds * 16_000)) * 0.1, 16_000)
    return str(path)


def test_long_sounds_are_cut_short_ones_left_out_and_the_rest_refused(processor: Any, tmp_path: Path) -> None:
    task = AudioClassification(max_seconds=1, min_seconds=0.5)
    rows = {
        "file_name": [
            sound(tmp_path, "fits.wav", 0.75),
            sound(tmp_path, "long.wav", 2),
            sound(tmp_path, "short.wav", 0.25),
            sound(tmp_path, "empty.wav", 0),
            "/no/such.wav",
            DIGITS["file_name"][0],
        ],
        "label": ["a", "b", "a", "a", "a", "other"],
    }
    made = task.encode(rows, processor, {"labels": ["a", "b"]}, evaluation=True)
    assert made.rows == [0, 1]
    assert made.references == ["a", "b"]
    assert made.truncated == [1]
    assert made.lengths == [38, 50]  # of 20 ms
    assert [len(content) for content in made.features["samples"]] == [2 * 12_000, 2 * 16_000]
    assert made.dropped == {2: "shorter than task.min_seconds"}
    assert sorted(made.bad) == [3, 4, 5]
    assert "empty.wav holds no samples" in made.bad[3]
    assert "there is no file /no/such.wav" in made.bad[4]
    assert made.bad[5] == "label 'other' is not one of a, b"
    assert task.limit() == 50


def test_other_rates_are_refused_where_that_is_asked(processor: Any) -> None:
    made = AudioClassification(on_mismatch="refuse").encode(
        DIGITS, processor, {"labels": ["0", "3", "6"]}, evaluation=False
    )
    assert sorted(made.bad) == [0, 1, 2]
    assert made.bad[0].endswith("has 1 channel at 8000 Hz; 1 channel at 16000 Hz fits, or task.on_mismatch=convert")


def test_labels_are_numbers_in_their_order() -> None:
    rows: list[dict[str, list[Any]]] = [{"label": [10, 9.0]}, {"label": ["2", None]}]
    assert AudioClassification().facts(rows) == {"labels": ["2", "9", "10"]}
    with pytest.raises(DataError, match="holds only the label '2'"):
        AudioClassification().facts([{"label": [2, 2]}])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"labels": ["a"]}, "two different names"),
        ({"labels": ["a", "b", "a"]}, "two different names"),
        ({"min_seconds": 2, "max_seconds": 1}, "min_seconds 2 is not below max_seconds 1"),
        ({"min_seconds": 0.01}, "greater than or equal to 0.025"),
    ],
)
def test_fields_that_exclude_each_other_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        AudioClassification(**fields)


def test_scores() -> None:
    given = [{"label": label, "score": 0.5} for label in ("a", "a", "b", "b")]
    scores = AudioClassification().score(given, ["a", "b", "b", "b"])
    assert scores == {"accuracy": 0.75, "f1_macro": pytest.approx((2 / 3 + 4 / 5) / 2)}
