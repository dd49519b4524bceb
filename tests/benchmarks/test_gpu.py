"""The benchmark on a GPU refuses at once what it could not answer in the end."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


def test_steps_of_which_none_would_count_are_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    benchmark = importlib.import_module("gpu")
    monkeypatch.setattr(benchmark, "data", lambda folder: pytest.fail("it has begun"))
    with pytest.raises(SystemExit, match=r"steps=5: rates leave out the first 5 steps; 6 or more fit"):
        benchmark.main("steps=5", "small")
