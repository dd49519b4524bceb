"""Where a step's time goes."""

from __future__ import annotations

import time

import pytest

from rayft.training.laps import PARTS, Laps


def test_what_was_exchanged_inside_a_part_counts_as_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    now, exchanged = 0.0, 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    laps = Laps(lambda: exchanged)
    laps.to("wait")
    now = 1.0
    laps.to("backward")
    now, exchanged = 6.0, 2.0  # two of the five seconds were an exchange
    laps.to("collective")
    now, exchanged = 7.0, 2.5
    laps.to(None)
    now = 100.0  # an evaluation belongs to no step
    laps.to("optimizer")
    now = 103.0
    laps.to(None)
    assert dict(laps.seconds) == {"wait": 1.0, "backward": 3.0, "collective": 3.0, "optimizer": 3.0}
    shares = laps.shares()
    assert list(shares) == [f"step_{part}" for part in PARTS]
    assert shares["step_backward"] == shares["step_collective"] == 0.3
    assert shares["step_forward"] == 0.0
    assert sum(shares.values()) == pytest.approx(1.0)


def test_a_run_without_steps_has_no_shares() -> None:
    assert set(Laps().shares().values()) == {0.0}
