"""A task is found by its file's name; nothing registers at import."""

from __future__ import annotations

import importlib
import pkgutil

from rayft.tasks.task import Task

PARTS = (
    "task",
    "stacked",
    "later",
    "generation",
    "drawing",
    "loading",
    "cells",
    "labels",
    "logits",
    "texts",
    "files",
    "images",
    "charts",
    "sound",
    "listening",
    "padded_norm",
)  # what tasks are built from


def names() -> tuple[str, ...]:
    """The known task types as a recipe writes them (`text-classification`), sorted; imports none of them."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name.replace("_", "-") for name in found if name not in PARTS))


def find(name: str) -> type[Task]:
    """The task class of type `name`; raises KeyError with the name when there is none."""
    if name not in names():
        raise KeyError(name)
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    )
