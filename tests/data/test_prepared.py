"""What a prepared split tells of its rows."""

from __future__ import annotations

import pytest

from rayft.data.prepared import Manifest


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (
            1,
            ["1 row was cut", "1 of 1,003 rows were truncated", "1 row was dropped: no words", "1 bad row was skipped"],
        ),
        (2, ["2 rows were cut", "2 of 1,003 rows were", "2 rows were dropped: no words", "2 bad rows were skipped"]),
    ],
)
def test_one_row_is_told_as_one(count: int, told: list[str]) -> None:
    bad = {"count": count, "examples": ["a.csv:7: not UTF-8"]}
    counts = {"cut": count, "truncated": count, "dropped": {"no words": count}, "bad": bad, "source_rows": 1003}
    notes = Manifest.model_construct(**counts).notes("validation")
    assert all(part in note for part, note in zip(told, notes, strict=True))


def test_files_that_gave_no_rows_are_told_by_their_endings() -> None:
    nothing = {"truncated": 0, "dropped": {}, "bad": {"count": 0}, "source_rows": 3}
    notes = Manifest.model_construct(**nothing, passed_over={".m4a": 1200, ".heic": 2}).notes("train")
    assert notes == ["train: files there that give no rows were passed over: 1,200 .m4a, 2 .heic"]
