"""Every path that a recipe names, and which of them lie on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rayft.filesystems import is_local, local
from rayft.recipe import Recipe


@dataclass(frozen=True)
class Place:
    """A path in a recipe: `field` is its dotted name, `where` the keys that lead to it in the recipe's plain form."""

    field: str
    where: tuple[str | int, ...]
    path: str

    @property
    def model(self) -> bool:
        return self.field.endswith("model.path")


def places(recipe: Recipe) -> Iterator[Place]:
    """Every path that a run of the recipe reads or writes: storage, rows and model, and a sweep's choices of them."""
    yield Place("storage", ("storage",), recipe.storage)
    for split in ("train", "validation", "test"):
        for number, source in enumerate(getattr(recipe.data, split) or ()):
            yield Place(f"data.{split}", ("data", split, number, "path"), source.path)
    yield Place("model.path", ("model", "path"), recipe.model.path)
    for field, space in recipe.tune.search.items() if recipe.tune else ():
        if field in ("model.path", "data.train", "data.validation", "data.test"):
            key = "choice" if space.choice else "grid"
            for number, value in enumerate(space.choices):
                yield from _chosen(f"tune.search.{field}", ("tune", "search", field, key, number), value)


def _chosen(field: str, where: tuple[str | int, ...], value: Any) -> Iterator[Place]:
    """The paths of one choice, which is as free in its form as the field: a path, a source with its own, or several."""
    if isinstance(value, str):
        yield Place(field, where, value)
    elif isinstance(value, dict):
        yield from _chosen(field, (*where, "path"), value.get("path"))
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _chosen(field, (*where, number), one)


def local_paths(recipe: Recipe) -> list[Place]:
    """The recipe's paths on this machine: storage, rows, and models where they are folders."""
    return [one for one in places(recipe) if is_local(one.path) and (not one.model or os.path.isdir(local(one.path)))]
