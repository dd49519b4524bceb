"""torch and transformers for tasks, imported when something of them is first used.

A recipe is read and refused with its task's fields alone, and that should take no longer than reading it: the two
imports cost four seconds, which then pass beside the start of Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["torch", "transformers"]


class _Later:
    """Stands for a module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import torch
    import transformers
else:
    torch, transformers = _Later("torch"), _Later("transformers")
