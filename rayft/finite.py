"""Values as JSON can hold them: it has no words for NaN and the infinities."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """`value`, which may be nested, with null in their place."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
