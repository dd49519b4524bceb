"""Which settings a model writes with: its own, as they can be saved."""

from __future__ import annotations

import re
from typing import Any


def saveable(network: Any) -> None:
    """Mends settings of a generating model that `save_pretrained` would refuse, as their author seems to mean them.

    Transformers 5.23 loads them with a warning, and refuses to save them once anything in them has changed. Where
    `do_sample` is left out, values that only sampling uses ask for it, but for a temperature of 0; what is unfit
    otherwise has had no effect, and is unset.
    """
    settings = getattr(network, "generation_config", None)
    if settings is None or not (unfit := _unfit(settings)):
        return
    if settings.do_sample is None and settings.temperature != 0:
        settings.do_sample = True
        if _unfit(settings) == unfit:
            settings.do_sample = None
    for name in _unfit(settings):
        setattr(settings, name, None)


def _unfit(settings: Any) -> list[str]:
    """Names of the values that don't go with the others."""
    try:
        settings.validate(strict=True)
    except ValueError as fault:
        return re.findall(r"^- `(\w+)`: ", str(fault), re.MULTILINE)
    return []
