"""The YAML that a recipe is written in, and overrides."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rayft import document
from rayft.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("1.0e-5", 1e-5),
        (".5", 0.5),
        ("3", 3),
        ("-3", -3),
        ("1_000", 1000),
        ("0", 0),
        ("007", "007"),
        ("1:30", "1:30"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("'3'", "3"),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("[1, a, {b: 2.5}]", [1, "a", {"b": 2.5}]),
    ],
)
def test_scalars_are_read_by_the_newer_rules(text: str, value: Any) -> None:
    read = document.read(f"key: {text}")
    assert read.faults == []
    assert read.value == {"key": value}
    assert type(read.value["key"]) is type(value)


@pytest.mark.parametrize(
    "value", ["1e-4", "on", "no", "true", "3", "007", "1:30", "null", "", "2024-01-01", "a: b", "é", "a\nb"]
)
def test_text_stays_text_when_written_and_read(value: str) -> None:
    assert document.read(document.write({"key": value})).value == {"key": value}


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("text", ["spam{}", "{}spam", "{}", "a{}b", "a {} b", "a\n{}b"])
def test_the_breaks_of_other_alphabets_stay_what_they_are(text: str, character: str) -> None:
    value = text.format(character)
    for one_line in (False, True):
        written = document.write({value: [value]}, one_line)
        assert document.read(written).value == {value: [value]}
        assert character not in written  # which a reader of YAML 1.1 and one of 1.2 take for two different things


def test_lines_are_those_of_the_keys() -> None:
    read = document.read("a: 1\nb:\n  c:\n    - x\n    - d: 2\n\ne: 3\n")
    assert read.lines == {"a": 1, "b": 2, "b.c": 3, "b.c.0": 4, "b.c.1": 5, "b.c.1.d": 5, "e": 7}


def test_duplicate_keys_are_refused_with_both_lines() -> None:
    read = document.read("a:\n  b: 1\n  c: 2\n  b: 3\n")
    assert [str(fault) for fault in read.faults] == ["a.b (line 4): given twice, first in line 2"]


def test_keys_are_text_as_written() -> None:
    assert document.read("{2024: a, null: b, 1.0: c}").value == {"2024": "a", "null": "b", "1.0": "c"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2", "line 1"),
        ("a: b: c", "the text (line 1): not valid YAML (mapping values are not allowed here)"),
        ("a:\n\t- b", "line 2"),
        ("a: !!python/name:os.system ''", "a (line 1): the tag !!python/name:os.system is not read"),
        ("a: !!int x", "a (line 1): the tag !!int is not read"),
        ("a: &a [*a]", "a.0 (line 1): an alias that contains itself"),
        ("? [a]\n: b", "the text (line 1): a key that is not plain text"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_what_is_not_plain_yaml_is_a_fault_with_its_line(text: str, said: str) -> None:
    read = document.read(text)
    assert len(read.faults) == 1
    assert said in str(read.faults[0])


def test_anchors_may_be_shared() -> None:
    assert document.read("a: &x {b: 1}\nc: *x\n").value == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("model.freeze=null", "model.freeze", None),
        ("model.freeze=", "model.freeze", None),
        ("name=a=b", "name", "a=b"),
        ("data.train=[a.csv, b.csv]", "data.train", ["a.csv", "b.csv"]),
        ("cluster.workers={min: 1, max: 4}", "cluster.workers", {"min": 1, "max": 4}),
        ("train.evaluate_every=500 steps", "train.evaluate_every", "500 steps"),
    ],
)
def test_override_is_a_dotted_name_and_a_yaml_value(text: str, name: str, value: Any) -> None:
    assert document.parse_override(text) == (name, value)


@pytest.mark.parametrize("text", ["train.epochs", "=3", "train..epochs=3", ".epochs=3", "", "train.epochs=[1"])
def test_bad_override_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        document.parse_override(text)


@pytest.mark.parametrize(
    ("before", "name", "value", "after"),
    [
        ({}, "a.b.c", 1, {"a": {"b": {"c": 1}}}),
        ({"model": {"freeze": None}}, "model.freeze.layers", 2, {"model": {"freeze": {"layers": 2}}}),
        ({"model": {"freeze": 4}}, "model.freeze.layers", 2, {"model": {"freeze": {"layers": 2}}}),
        (
            {"model": {"freeze": ["a.*"]}},
            "model.freeze.layers",
            2,
            {"model": {"freeze": {"patterns": ["a.*"], "layers": 2}}},
        ),
        ({"data": {"train": "a"}}, "data.train.weight", 2, {"data": {"train": {"path": "a", "weight": 2}}}),
        ({"a": [{"b": 1}, {"b": 2}]}, "a.1.b", 3, {"a": [{"b": 1}, {"b": 3}]}),
        ({}, "tune.search.train.seed", {"choice": [0]}, {"tune": {"search": {"train.seed": {"choice": [0]}}}}),
        ({}, "data.columns.my.text", "text", {"data": {"columns": {"my.text": "text"}}}),
    ],
)
def test_fields_are_set_by_their_dotted_names(before: Any, name: str, value: Any, after: Any) -> None:
    document.set_field(before, name, value)
    assert before == after


def test_a_place_that_a_list_lacks_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"a\.2\.b: `a` is a list, got '2'; a number from 0 to 0 fits there"):
        document.set_field({"a": [{"b": 1}]}, "a.2.b", 3)
