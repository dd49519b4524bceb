"""The process group's network: every worker binds the interface that holds its own node's address.

gloo takes the interface to which the host's name resolves, which on many machines is the loopback, and a group over
several nodes fails. The names of interfaces differ between nodes, so each worker looks up its own.
"""

from __future__ import annotations

import os
from typing import Any

from rayft import ahead

with ahead.uncollected():  # the first that a controller or worker imports
    from ray.train.torch import TorchConfig


def own_interface(address: str) -> str | None:
    """The name of this machine's interface with that address; None where no interface has it (behind a NAT, say)."""
    import psutil

    return next(
        (name for name, held in psutil.net_if_addrs().items() if any(one.address == address for one in held)), None
    )


def bind() -> None:
    """On a worker, before the group is made: tells gloo and NCCL the interface, unless the environment does."""
    import ray

    name = own_interface(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this very name, not all that begin so


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(bind)
        super().on_start(worker_group, backend_config)


class GroupConfig(TorchConfig):
    """Ray Train's TorchConfig, with `bind` before the group is made."""

    @property
    def backend_cls(self) -> Any:
        return _Backend
