"""Runs that `verify` compares get algorithms that repeat their sums, and no others do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rayft.fields.machines import Cluster
from rayft.launch.prestart import environment
from rayft.training import repeatable


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("asked", [False, True])
def test_only_workers_that_are_asked_take_algorithms_that_repeat_their_sums(
    asked: bool, as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in repeatable.ENVIRONMENT.items():
        if asked:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    told: dict[str, Any] = environment(Cluster(workers=1, gpus_per_worker=1))["env_vars"]
    assert (repeatable.ENVIRONMENT.items() <= told.items()) is asked
    assert (
        not repeatable.ENVIRONMENT.keys() & environment(Cluster(workers=2))["env_vars"].keys()
    )  # processors always do
    repeatable.heed()
    assert torch.are_deterministic_algorithms_enabled() is asked
    assert torch.is_deterministic_algorithms_warn_only_enabled() is asked  # what knows no other way still runs
