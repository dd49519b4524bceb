"""What a run says of its time and memory is its own."""

from __future__ import annotations

import pytest
import torch

from rayft.training.timing import Timing


@pytest.mark.parametrize("initialized", [False, True])
def test_the_peak_of_a_gpus_memory_is_that_of_this_run(initialized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a process without a GPU, or before its first use, asks nothing of CUDA."""
    reset: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reset.append(True))
    Timing()
    assert reset == [True] * initialized
