"""What of a run's data works and is hardly meant: too many labels, labels that are written in two ways, a cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from rayft.recipe import Recipe
from rayft.tasks.cells import quoted
from rayft.tasks.labels import NUMBER

MANY = 10  # of so few labels it is not asked whether they are labels
NAMED = 3  # groups of labels alike that are named
MISSING = ("nan", "null")  # how other programs write that there is no value


def doubts(recipe: Recipe, train: Any) -> list[str]:
    """Sentences about the prepared split `train` and the recipe."""
    manifest = train.manifest
    names = manifest.facts.get("labels", ())
    found = [*too_many(names, manifest.source_rows + manifest.cut), *alike(names), *missing(names)]
    if recipe.data.validation is None and recipe.task.cut_flatters:
        found.append(f"data.validation: not given, and {recipe.task.cut_flatters}")
    return found


def too_many(names: Sequence[str], rows: int) -> list[str]:
    """Where there are more labels than half the rows, as of a column of texts or ids."""
    if len(names) <= MANY or 2 * len(names) <= rows:
        return []
    such = ", ".join(map(quoted, names[:2]))
    return [f"labels: {len(names):,} for {rows:,} training rows, such as {such}; is that the column of the labels?"]


def alike(names: Sequence[str]) -> list[str]:
    """Where labels differ in capitals, blanks or the form of a number alone: Spam and spam, 1 and 1.0."""
    groups = defaultdict(list)
    for name in names:
        groups[_plain(name)].append(name)
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return []
    named = "; ".join(", ".join(map(quoted, group)) for group in islice(several, NAMED))
    more = f" and {len(several) - NAMED:,} more" if len(several) > NAMED else ""
    return [f"labels that differ only in how they are written count as different ones: {named}{more}"]


def missing(names: Iterable[str]) -> list[str]:
    """Where labels look like values that are missing."""
    fits = "counts as any other; where it means that there is none, leave its rows out"
    return [f"labels: {quoted(name)} {fits}" for name in names if name.lower() in MISSING]


def _plain(name: str) -> str | float:
    """What is equal for labels that differ only in how they are written."""
    return float(name) if NUMBER.fullmatch(name) else " ".join(name.split()).casefold()
