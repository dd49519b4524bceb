"""Which task a recipe's `task:` section asks for, and what is wrong with the section."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rayft import tasks
from rayft.errors import Fault
from rayft.fields import faults
from rayft.tasks.task import Task


def read(section: Any) -> tuple[Task | None, type[Task] | None, list[Fault], list[ErrorDetails]]:
    """(the task, its class, faults in which task it is, errors in its fields) of a recipe's `task:` section."""
    if section is None:
        return None, None, [Fault("task", "not a section", "null", f"a section with `type` fits: {known_types()}")], []
    if not isinstance(section, dict):
        fault = Fault("task", "not a section", faults.show(section), f"a section with `type` fits: {known_types()}")
        return None, None, [fault], []
    if "type" not in section:
        return None, None, [Fault("task.type", "missing", fits=f"{known_types()} fits")], []
    name = section["type"]
    try:
        kind = tasks.find(name if isinstance(name, str) else "")
    except KeyError:
        near = faults.closest(str(name), tasks.names())
        return None, None, [Fault("task.type", "unknown task", faults.show(name), f"{known_types()} fits", near)], []
    except ModuleNotFoundError as error:
        fits = f"install the package that has the module `{error.name}`"
        return None, None, [Fault("task.type", "a task that needs more than is installed", faults.show(name), fits)], []
    errors: list[ErrorDetails] = []
    task = None
    try:
        task = kind.model_validate(section)
    except ValidationError as error:
        errors = [_below_task(one) for one in error.errors(include_url=False)]
        section = {key: value for key, value in section.items() if not any(key in one["loc"] for one in errors)}
        with contextlib.suppress(ValidationError):  # a field is missing, or validators disagree
            task = kind.model_validate(section)
    errors += _coerced(section, task) if task else ()
    return (None if errors else task), kind, [], errors


def known_types() -> str:
    return ", ".join(f"`{name}`" for name in tasks.names())


def _below_task(error: ErrorDetails) -> ErrorDetails:
    return {**error, "loc": ("task", *error["loc"])}


def _coerced(section: Mapping[str, Any], task: Task) -> Iterator[ErrorDetails]:
    """Errors for the fields that pydantic made fit: tasks need not declare their fields strict."""
    kinds = {bool: "bool_type", int: "int_type", float: "float_type"}
    for name, given in section.items():
        taken = getattr(task, name, None)
        wide = type(given) is int and type(taken) is float
        if (
            type(taken) in kinds
            and type(given) in (str, bool, int, float)
            and type(given) is not type(taken)
            and not wide
        ):
            yield {"type": kinds[type(taken)], "loc": ("task", name), "msg": "", "input": given}
