"""A trial of a sweep: what it makes of a damaged checkpoint of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import small
from rayft import storage
from rayft.errors import Damaged
from rayft.recipe import Recipe
from rayft.training import checkpoints
from rayft.trial import Evaluated, Trial


def saved(folder: Path, step: int) -> str:
    path = str(folder / "checkpoints" / checkpoints.folder_name(step, 1))
    storage.commit(path, {"step": step, "best": None})
    return path


def trial(plain: dict[str, Any]) -> Trial:
    made = object.__new__(Trial)
    made.sweep, made.config, made._trial_info = Recipe.parse(plain), {"number": 0, "fields": {}}, None
    made.begun = time.monotonic()
    return made


def test_a_trial_whose_checkpoint_is_damaged_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trial(small.recipe(tmp_path, "nowhere"))
    folder = tmp_path / "runs" / "small" / "trials" / "00000"
    before, newest = saved(folder, 1), saved(folder, 2)

    def work(self: Trial, fields: dict[str, Any]) -> Iterator[Evaluated]:
        start = checkpoints.newest(f"{self.folder}/checkpoints")
        if start == newest:
            raise Damaged(newest, f"{newest}/rank-00000.safetensors", "is missing")
        assert start == before
        yield Evaluated(3, 30, 0.5, 0.5, {})

    monkeypatch.setattr(Trial, "_work", work)
    made._start(made.config)
    assert made.step()["step"] == 3


def test_a_trial_whose_rows_are_damaged_fails_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trial(small.recipe(tmp_path, "nowhere"))

    def work(self: Trial, fields: dict[str, Any]) -> Iterator[Evaluated]:
        raise Damaged("prepared/key", "prepared/key/1.parquet", "is missing")
        yield

    monkeypatch.setattr(Trial, "_work", work)
    made._start(made.config)
    told = made.step()
    assert (told["error"], told["done"]) == ("prepared/key/1.parquet: is missing", True)
