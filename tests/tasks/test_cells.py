"""Cells: lists that are written as text, and what a message repeats of a cell."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.tasks.cells import in_brackets, list_in, quoted, short


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("['a', 'b']", ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ("""['it\\'s', "b's", ' ']""", ["it's", "b's", " "]),
        (" [1, 0] ", [1, 0]),
        ("[1.0, true]", [1.0, True]),
        ("[]", []),
        ("['a' 'b']", None),
        ("['a'\n 'b', 'c']", None),
        ("[1 0 1]", None),
        ("[a, b]", None),
        ("[nan, 'a']", None),
        ("['a']['b']", None),
        ("[" * 100_000 + "]" * 100_000, None),
    ],
)
def test_a_list_in_text_is_what_json_or_python_wrote(text: str, held: Any) -> None:
    assert in_brackets(text)
    assert list_in(text) == held


@pytest.mark.parametrize("cell", ["a", "", "[", "['a'", "(1, 2)", "{'a': 1}", None, ["a"], 3])
def test_other_cells_hold_no_list_in_text(cell: Any) -> None:
    assert not in_brackets(cell)


def test_a_message_repeats_the_beginning_of_a_long_cell() -> None:
    assert quoted("a" * 78) == f"'{'a' * 78}'"
    assert quoted("a" * 79) == f"'{'a' * 75} ..."
    assert short("a" * 80) == "a" * 80
    assert len(quoted([{"a": "b" * 1000}] * 1000)) == 80
