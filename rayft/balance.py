"""How often which label occurs in which split, and which of them no training row has."""

from __future__ import annotations

from typing import Any

from rayft.recipe import Recipe
from rayft.tasks.cells import short

NAMED = 8  # of the labels that are not seen, so many by name


def balance(recipe: Recipe, prepared: Any) -> dict[str, int] | None:
    """How many features of a prepared split have which label; None where the task has none."""
    names = recipe.task.balance_columns()
    if not names:
        return None
    from rayft.data.read import columns

    counts: dict[str, int] = {}
    for batch in columns(prepared.folder, prepared.manifest.shards, names):
        for label, count in recipe.task.balance(batch, prepared.manifest.facts).items():
            counts[label] = counts.get(label, 0) + count
    return counts


def unseen(facts: dict[str, Any], balances: dict[str, dict[str, int] | None]) -> list[str]:
    """A warning where the facts or another split have labels that no training row has; `balances` are by split."""
    train = balances.get("train")
    if not train:
        return []
    known = [*facts.get("labels", ()), *(label for counts in balances.values() for label in counts or ())]
    lacking = [label for label in dict.fromkeys(known) if label not in train]
    if not lacking:
        return []
    more = f" and {len(lacking) - NAMED:,} more" if len(lacking) > NAMED else ""
    named, them = (", ".join(map(short, lacking[:NAMED])) + more, "them") if lacking[1:] else (short(lacking[0]), "it")
    return [f"no training row has the label{'s' * (them == 'them')} {named}; the model can't learn to give {them}"]
