"""Class labels that a data set keeps as numbers, as the names that its features give them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

METADATA = b"huggingface"  # the key under which the library `datasets` keeps its features in a Parquet file


def names_in(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """`names` of the features in a Parquet file's schema metadata; nothing where it has none."""
    text = (metadata or {}).get(METADATA)
    return names((json.loads(text).get("info") or {}).get("features")) if text else {}


def names(features: Any) -> dict[str, list[str]]:
    """Column -> the names of its class labels, for columns of class labels or of lists of them.

    `features` are those of `datasets` as plain values: {"label": {"_type": "ClassLabel", "names": ["ham", "spam"]}}.
    """
    found = {column: _names_of(feature) for column, feature in (features or {}).items()}
    return {column: known for column, known in found.items() if known is not None}


def _names_of(feature: Any) -> list[str] | None:
    if isinstance(feature, list):  # how older versions write a list of something
        return _names_of(feature[0]) if feature else None
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        listed: list[str] | None = feature.get("names")
        return listed
    return _names_of(feature["feature"]) if "_type" in feature and "feature" in feature else None


def named(row: dict[str, Any], known: Mapping[str, list[str]]) -> dict[str, Any]:
    """The row with class labels as their names, by `names`; ValueError for a number that none belongs to."""
    return {column: _named(value, known[column]) if column in known else value for column, value in row.items()}


def _named(value: Any, known: list[str]) -> Any:
    """-1 means that a row is not labelled: None."""
    if isinstance(value, list):
        return [_named(entry, known) for entry in value]
    if not isinstance(value, int) or value < 0:
        return None if isinstance(value, int) else value
    if value >= len(known):
        raise ValueError(f"class label {value} has no name; the data set's features name {len(known)}")
    return known[value]
