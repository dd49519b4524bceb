"""From pydantic's complaints to sentences with the place, the value, what fits and the nearest name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rayft.fields import faults


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: Annotated[int, Field(strict=True, ge=1)] = 1
    rate: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.5
    kind: Literal["linear", "cosine"] = "linear"
    names: list[Annotated[str, Field(min_length=1)]] = []

    @field_validator("size")
    @classmethod
    def _not_thirteen(cls, value: int) -> int:
        if value == 13:
            raise ValueError("Thirteen brings bad luck.")
        return value


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    inner: Inner = Inner()
    many: dict[str, Inner] = {}
    one_or_more: Inner | list[Inner] | None = None
    on: Annotated[bool, Field(strict=True)] = False


SCHEMA = Outer.model_json_schema()


def told(data: dict[str, Any]) -> list[str]:
    try:
        Outer.model_validate(data)
    except ValidationError as error:
        return [str(fault) for _, fault in faults.translate(error.errors(), data, SCHEMA)]
    return []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"size": "two"}, "inner.size: not a whole number, got 'two'; a whole number of at least 1 fits"),
        ({"size": 1.5}, "inner.size: not a whole number, got 1.5; a whole number of at least 1 fits"),
        ({"size": None}, "inner.size: not a whole number, got null; a whole number of at least 1 fits"),
        ({"size": 0}, "inner.size: too small, got 0; a whole number of at least 1 fits"),
        ({"size": 13}, "inner.size: thirteen brings bad luck, got 13"),
        ({"rate": True}, "inner.rate: not a number, got true; a number above 0 and at most 1 fits"),
        ({"rate": 2}, "inner.rate: too large, got 2; a number above 0 and at most 1 fits"),
        (
            {"kind": "linaer"},
            "inner.kind: not a known choice, got 'linaer'; `linear` or `cosine` fits; did you mean `linear`?",
        ),
        ({"names": "a"}, "inner.names: not a list, got 'a'; a list of text fits"),
        ({"names": ["a", 3]}, "inner.names.1: not text, got 3; text fits, so put it in quotes: '3'"),
        (
            {"names": [{"words": None}]},
            (
                'inner.names.0: not text, got {"words": null}; text fits; where this is meant as text, put it in '
                "quotes, in two pairs on a command line: '\"...\"'"
            ),
        ),
        ({"names": [""]}, "inner.names.0: empty, got ''; text fits"),
        ({"sise": 2}, "inner.sise: unknown key, got 2; did you mean `inner.size`?"),
        ({"zzz": 2}, "inner.zzz: unknown key, got 2; known here: size, rate, kind, names"),
    ],
)
def test_each_fault_is_one_sentence(given: dict[str, Any], sentence: str) -> None:
    assert told({"name": "n", "inner": given}) == [sentence]


@pytest.mark.parametrize(
    ("data", "sentences"),
    [
        ({}, ["name: missing; text fits"]),
        ({"name": "n", "on": "yes"}, ["on: not true or false, got 'yes'; `true` or `false` fits"]),
        ({"name": "n", "inner": 3}, ["inner: not a section, got 3; a section with size, rate, kind, names fits"]),
        (
            {"name": "n", "many": {"a.b": {"size": 0}}},
            ["many.a.b.size: too small, got 0; a whole number of at least 1 fits"],
        ),
        (
            {"name": "n", "one_or_more": [{"size": 0}]},
            ["one_or_more.0.size: too small, got 0; a whole number of at least 1 fits"],
        ),
        (
            {"name": "n", "one_or_more": {"size": 0, "kind": 1}},
            [
                "one_or_more.size: too small, got 0; a whole number of at least 1 fits",
                "one_or_more.kind: not a known choice, got 1; `linear` or `cosine` fits",
            ],
        ),
    ],
)
def test_places_are_those_of_the_file(data: dict[str, Any], sentences: list[str]) -> None:
    assert told(data) == sentences


def test_nothing_of_pydantic_shows() -> None:
    data = {"inner": {"size": "x", "rate": [], "kind": 3, "names": {}, "y": 1}, "many": 3, "one_or_more": 7, "on": 2}
    text = "\n".join(told(data))
    assert text.count("\n") == 8
    assert "pydantic" not in text
    assert "http" not in text
    assert "Input" not in text


def test_the_names_of_a_section_are_told_once() -> None:
    assert told({"name": "n", "yyy": 1, "zzz": 2, "inner": {"yyy": 3, "zzz": 4, "sise": 5}}) == [
        "inner.yyy: unknown key, got 3; known here: size, rate, kind, names",
        "inner.zzz: unknown key, got 4",
        "inner.sise: unknown key, got 5; did you mean `inner.size`?",
        "yyy: unknown key, got 1; known here: name, inner, many, one_or_more, on",
        "zzz: unknown key, got 2",
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("size",), "inner.size"),
        (("inner", "Size"), "inner.size"),
        (("inner", "rates"), "inner.rate"),
        (("nam",), "name"),
        (("inner", "on"), "on"),
        (("qqq",), None),
    ],
)
def test_the_nearest_name_may_lie_in_another_section(path: tuple[str, ...], name: str | None) -> None:
    assert faults.nearest(path, SCHEMA) == name


def test_names_are_all_dotted_names() -> None:
    assert {"name", "inner", "inner.size", "inner.names", "one_or_more.kind", "on"} <= set(faults.names(SCHEMA))


@pytest.mark.parametrize(
    ("path", "known"),
    [
        (("inner", "size"), True),
        (("many", "x", "size"), True),
        (("one_or_more", "0", "size"), True),
        (("inner", "x"), False),
    ],
)
def test_fields_are_found_by_their_path(path: tuple[str, ...], known: bool) -> None:
    assert any(True for _ in faults.at(SCHEMA, path)) == known


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (5e-5, "5e-05"),
        ("a", "'a'"),
        ([1, "é"], '[1, "é"]'),
        ("s3://key:secret@bucket/a", "'s3://***@bucket/a'"),
        ({"path": "https://me:pw@host/x"}, '{"path": "https://***@host/x"}'),
        ("x" * 200, "'" + "x" * 75 + " ..."),
    ],
)
def test_values_are_shown_short_and_without_passwords(value: Any, text: str) -> None:
    assert faults.show(value) == text
