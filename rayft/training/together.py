"""All ranks wait for the last one, outside of any collective: as long as it takes, where one works for all or others.

A collective is given up after `failure.timeout_s` and a minute. Here the driver alone decides who stands still.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

AS_LONG = timedelta(days=30)
_CAME = "rayft/came"  # counts the ranks that have come, of all waits of the group


def together() -> None:
    """Returns when every rank has called it; the ranks call it in the same order."""
    # A connection of its own: who waits on one holds it, and the threads of the process group use theirs.
    given: Any = dist.distributed_c10d._get_default_store()
    store, world = given.clone(), dist.get_world_size()
    came = store.add(_CAME, 1)
    all_here = f"rayft/all-here-{(came - 1) // world}"
    if came % world == 0:
        store.set(all_here, "yes")
    else:
        store.wait([all_here], AS_LONG)
