"""Entities in rows of tags, and their scores, as CoNLL's evaluation and seqeval define them.

An entity is a run of words: B and S begin one, E and S end one, and so does a change of what is marked; I after O
begins one too. A tag that is no such letter and has none before a dash marks what it names.
"""

from __future__ import annotations

from collections.abc import Sequence

OUTSIDE = "O"
INSIDE = ("B", "I", "E", "S")
Entity = tuple[str, int, int]


def entities(tags: Sequence[str]) -> list[Entity]:
    """(what it is, its first word, the word after its last), in their order."""
    found: list[Entity] = []
    before, kind = OUTSIDE, ""
    for word, tag in enumerate(tags):
        prefix, _, named = tag.partition("-")
        own = named or ("" if prefix in INSIDE else prefix)
        if prefix != OUTSIDE:
            if prefix in ("B", "S") or before in ("E", "S", OUTSIDE) or own != kind:
                found.append((own, word, word + 1))
            else:
                found[-1] = (own, found[-1][1], word + 1)
        before, kind = prefix if named or prefix in (*INSIDE, OUTSIDE) else "", own
    return found


def scores(given: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """f1, precision and recall over all entities, which count only whole and of the right kind; accuracy of words."""
    right = guessed = there = words = same = 0
    for tags, truth in zip(given, true, strict=True):
        own, others = set(entities(tags)), set(entities(truth))
        right, guessed, there = right + len(own & others), guessed + len(own), there + len(others)
        words, same = words + len(truth), same + sum(a == b for a, b in zip(tags, truth, strict=True))
    return {
        "f1": 2 * right / (guessed + there) if right else 0.0,
        "precision": right / guessed if guessed else 0.0,
        "recall": right / there if there else 0.0,
        "accuracy": same / words if words else 0.0,
    }
