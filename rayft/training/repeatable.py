"""Equal to the bit, run after run, on GPUs: what `verify` has its runs' environment say, and what workers then do.

On a processor every run is; on a GPU some sums come out in another order each time, unless other algorithms are asked
for, which are slower (PyTorch's notes on reproducibility).
"""

from __future__ import annotations

import os

ENVIRONMENT = {"RAYFT_REPEATABLE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def said() -> dict[str, str]:
    """What workers have to be told, where this process's environment asks for it."""
    return ENVIRONMENT if _asked() else {}


def heed() -> None:
    """Has torch take algorithms that give equal sums, where the environment asks for it and there are any."""
    if _asked():
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)


def _asked() -> bool:
    return set(ENVIRONMENT.items()) <= set(os.environ.items())
