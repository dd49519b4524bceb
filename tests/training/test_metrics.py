"""metrics.jsonl has each step and each evaluation once, wherever a run was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayft.training.metrics import Metrics

STEPS = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
EVALUATED, FINAL = {"step": 3, "eval_loss": 0.5}, {"step": 3, "eval_loss": 0.5, "test_loss": 0.6}


@pytest.mark.parametrize(
    ("written", "step", "pending", "kept"),
    [
        ([*STEPS, EVALUATED], 3, False, [*STEPS, EVALUATED]),
        ([*STEPS, EVALUATED], 2, False, STEPS[:2]),
        # Evaluated after the checkpoint that asks for it, and so again.
        ([*STEPS, EVALUATED], 3, True, STEPS),
        # Without a test split the two lines are equal.
        ([*STEPS, EVALUATED, EVALUATED], 3, False, [*STEPS, EVALUATED]),
        # Ended but for its result, which it then tells again.
        ([*STEPS, EVALUATED, FINAL], 3, False, [*STEPS, EVALUATED]),
        ([{"step": 1, "eval_loss": 0.5}, *STEPS], 3, True, [{"step": 1, "eval_loss": 0.5}, *STEPS]),
    ],
)
def test_what_is_written_again_stands_once(
    written: list[dict[str, Any]], step: int, pending: bool, kept: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    half = '{"step": 3, "los'
    path.write_text("".join(json.dumps(row) + "\n" for row in written) + half, encoding="utf-8")
    metrics = Metrics(str(tmp_path), step, pending)
    metrics.close()
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == kept
