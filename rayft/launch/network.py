"""The process group: how workers find each other, and which network interface each of them binds.

That is decided here without torch, which only the workers have to import: the driver of a run may do without.

gloo takes the interface to which the host's name resolves, which on many machines is the loopback, and a group over
several nodes fails. The names of interfaces differ between nodes, so each worker looks up its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

LEAVE_S = 10.0  # for the workers to take the group down: where NCCL waits for a lost one they are ended without


def own_interface(address: str) -> str | None:
    """The name of this machine's interface with that address; None where no interface has it (behind a NAT, say)."""
    import psutil

    return next(
        (name for name, held in psutil.net_if_addrs().items() if any(one.address == address for one in held)), None
    )


def bind() -> None:
    """On a worker, before the group is made: tells gloo and NCCL the interface, unless the environment does."""
    name = own_interface(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this very name, not all that begin so


def join(address: str, port: int, rank: int, world_size: int, backend: str, timeout_s: int) -> None:
    """On a worker: makes it rank `rank` of the group whose rank 0 is at `address` and `port`, as Ray Train would."""
    from ray.train.torch import config

    bind()
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, world_size, "env://", timeout_s)


def leave(world_size: int) -> None:
    """On a worker: takes its part of the group down."""
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=world_size > 1)


class _Backend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        size, own = len(worker_group), (backend_config.backend, backend_config.timeout_s)
        address, port = worker_group.execute_single(0, get_address_and_port)
        ray.get(
            [worker_group.execute_single_async(rank, join, address, port, rank, size, *own) for rank in range(size)]
        )

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        ray.wait(worker_group.execute_async(leave, len(worker_group)), num_returns=len(worker_group), timeout=LEAVE_S)


@dataclass
class GroupConfig(BackendConfig):
    """What Ray Train's TorchConfig says: `backend` "gloo" or "nccl", and how long a collective may take."""

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> Any:
        return _Backend
