"""The operations of which model FLOPs utilization is a share: no more than a pass needs, however a model is trained."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.flops import per_token


@pytest.mark.parametrize(
    ("fields", "operations"),
    [
        ({}, 6000),
        ({"trained": 0.25}, 3000),
        ({"trained": 0.25, "stored": True}, 1500),
        ({"trained": 1.0, "stored": True}, 6000),  # nothing is frozen
        ({"adapters": 10.0}, 4060),
    ],
)
def test_only_what_a_pass_needs_is_counted(fields: dict[str, Any], operations: float) -> None:
    assert per_token(1000.0, **fields) == operations
