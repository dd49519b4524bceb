"""Where the files under cluster/ are, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
LOCK = CLUSTER / "requirements.lock"


def documents(file: str) -> list[dict[str, Any]]:
    """All YAML documents of `cluster/<file>`."""
    return [one for one in yaml.safe_load_all((CLUSTER / file).read_text()) if one is not None]


def document(file: str, kind: str, name: str | None = None) -> dict[str, Any]:
    """The only document of that kind, and of that name where one is given."""
    found = [one for one in documents(file) if one["kind"] == kind and name in (None, one["metadata"]["name"])]
    assert len(found) == 1, f"cluster/{file} has {len(found)} of {kind} {name or ''}"
    return found[0]


def locked() -> dict[str, str]:
    """Package, as PyPI normalises its name -> its version in the lock."""
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def nested(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in `value`, at any depth."""
    if isinstance(value, dict):
        yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from nested(child)
