"""Labels by split: those that no training row has are told."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.balance import unseen

TRAIN = {"ham": 9, "spam": 3}
MANY = [f"l{number}" for number in range(20)]


@pytest.mark.parametrize(
    ("facts", "balances", "told"),
    [
        ({"labels": ["ham", "spam"]}, {"train": TRAIN, "validation": {"ham": 1}}, None),
        ({"labels": ["ham", "spam"]}, {"train": None, "validation": None}, None),
        ({"labels": ["ham", "hmm", "spam"]}, {"train": TRAIN}, "label hmm; the model can't learn to give it"),
        ({}, {"train": TRAIN, "test": {"a": 1}, "validation": {"b": 1}}, "labels a, b; the model can't learn to give"),
        ({"labels": MANY}, {"train": {"l0": 1}}, "labels l1, l2, l3, l4, l5, l6, l7, l8 and 11 more; the model"),
    ],
)  # fmt: skip
def test_labels_that_no_training_row_has_are_told(facts: Any, balances: Any, told: str | None) -> None:
    assert [text.startswith(f"no training row has the {told}") for text in unseen(facts, balances)] == [True] * bool(
        told
    )
