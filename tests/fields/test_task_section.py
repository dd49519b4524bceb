"""The `task:` section: which task, and what is wrong with its fields."""

from __future__ import annotations

from typing import Any

import pytest

from rayft import tasks
from rayft.errors import RecipeError
from rayft.recipe import Recipe


def faults_of(section: Any) -> list[str]:
    data = {"name": "n", "task": section, "model": {"path": "m"}, "data": {"train": "a"}, "train": {"epochs": 1}}
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(data)
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_is_found_by_its_type(name: str) -> None:
    data = {"name": "n", "task": {"type": name}, "model": {"path": "m"}, "data": {"train": "a"}, "train": {"epochs": 1}}
    recipe = Recipe.parse(data)
    assert isinstance(recipe.task, tasks.find(name))
    assert Recipe.parse(recipe.dump()) == recipe


def test_unknown_types_get_the_nearest_and_all_that_are_known() -> None:
    (fault,) = faults_of({"type": "text-clasification", "label": "kind"})
    assert fault.startswith("task.type: unknown task, got 'text-clasification'; ")
    assert fault.endswith("did you mean `text-classification`?")
    assert all(f"`{name}`" in fault for name in tasks.names())


@pytest.mark.parametrize("name", [3, None, "task", "../errors", ["a"]])
def test_what_names_no_task_is_refused(name: Any) -> None:
    (fault,) = faults_of({"type": name})
    assert fault.startswith("task.type: unknown task, got ")


@pytest.mark.parametrize(
    ("section", "start"),
    [
        (None, "task: not a section, got null; a section with `type` fits"),
        ("text-classification", "task: not a section, got 'text-classification'"),
        ({}, "task.type: missing; "),
        ({"label": "kind"}, "task.type: missing; "),
    ],
)
def test_a_section_without_a_type_is_refused(section: Any, start: str) -> None:
    (fault,) = faults_of(section)
    assert fault.startswith(start)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_length": "128"}, "task.max_length: not a whole number, got '128'; a whole number of at least 4 fits"),
        ({"max_length": True}, "task.max_length: not a whole number, got true"),
        ({"max_length": 64.0}, "task.max_length: not a whole number, got 64.0"),
        ({"max_length": 1}, "task.max_length: too small, got 1; a whole number of at least 4 fits"),
        ({"multi_label": "yes"}, "task.multi_label: not true or false, got 'yes'; `true` or `false` fits"),
        ({"multi_label": 1}, "task.multi_label: not true or false, got 1"),
        ({"text": 3}, "task.text: not text, got 3; text fits, so put it in quotes: '3'"),
        ({"lable": "kind"}, "task.lable: unknown key, got 'kind'; did you mean `task.label`?"),
        ({"labels": ["one"]}, "task: labels needs at least 2 names, got 1"),
    ],
)
def test_faults_in_a_task_s_fields_are_told_like_any_other(fields: dict[str, Any], said: str) -> None:
    (fault,) = faults_of({"type": "text-classification", **fields})
    assert fault.startswith(said)


def test_all_faults_of_a_section_are_told() -> None:
    found = faults_of({"type": "text-classification", "max_length": "128", "lable": "x", "text": 3, "multi_label": 0})
    assert len(found) == 4
