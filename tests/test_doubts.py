"""What of a run's data works and is hardly meant."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rayft.doubts import alike, doubts, missing, too_many
from rayft.recipe import Recipe

MANY = [f"text {number}" for number in range(80)]


def told(kind: str, facts: dict[str, Any], rows: int, **data: str) -> list[str]:
    plain = {
        "name": "a",
        "task": {"type": kind},
        "model": {"path": "m"},
        "data": {"train": "t.csv", **data},
        "train": {"epochs": 1},
    }
    manifest = SimpleNamespace(facts=facts, source_rows=rows - rows // 10, cut=rows // 10)
    return doubts(Recipe.parse(plain), SimpleNamespace(manifest=manifest))


def test_as_many_labels_as_rows_are_no_labels() -> None:
    (sentence,) = told("text-classification", {"labels": MANY}, 80)
    assert sentence == (
        "labels: 80 for 80 training rows, such as 'text 0', 'text 1'; is that the column of the labels?"
    )
    assert told("text-classification", {"labels": MANY}, 160) == []
    assert told("text-classification", {"labels": ["a", "b"]}, 2) == []
    assert told("causal-lm", {}, 80) == []
    assert len(too_many(["long " * 1000] * 11, 11)[0]) < 260


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["Spam", "ham", "spam"], "'Spam', 'spam'"),
        (["not spam", "not  Spam", "spam"], "'not spam', 'not  Spam'"),
        (["0", "0.0", "1", "1.0", "10"], "'0', '0.0'; '1', '1.0'"),
        (["a", "A", "b", "B", "c", "C", "d", "D", "e", "E"], "'a', 'A'; 'b', 'B'; 'c', 'C' and 2 more"),
        (["spam", "ham", "1", "10", "A", "A-", "nan"], None),
    ],
)
def test_labels_that_differ_in_how_they_are_written_are_told(names: list[str], groups: str | None) -> None:
    start = "labels that differ only in how they are written count as different ones: "
    assert alike(names) == ([start + groups] if groups else [])
    assert told("text-classification", {"labels": names}, 1000)[: bool(groups)] == alike(names)


def test_labels_that_look_like_a_missing_value_are_told() -> None:
    sentence = "labels: 'NaN' counts as any other; where it means that there is none, leave its rows out"
    assert missing(["ham", "NaN", "none"]) == [sentence]
    assert told("text-classification", {"labels": ["NaN", "ham"]}, 1000) == [sentence]


def test_faces_cut_from_train_are_of_people_who_are_trained_on() -> None:
    (sentence,) = told("face-recognition", {"identities": ["a", "b"]}, 80)
    assert sentence.startswith("data.validation: not given, and rows cut from train show people who are trained on")
    assert told("face-recognition", {"identities": ["a", "b"]}, 80, validation="v.csv") == []
