"""Short messages between the ranks of one machine."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from group import run_group
from rayft.training.links import Links


def on_a_worker(folder: str) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from rayft.training import links, shared

    rank, world = dist.get_rank(), dist.get_world_size()
    memory = shared.opened(Path(folder))
    assert memory is not None
    found: dict[str, Any] = {}
    found["said"] = [memory.links.exchange(f"{rank} in turn {turn}".encode()) for turn in range(3)]
    longest = bytes([rank]) * links.SHORT
    found["long"] = [[part[0] for part in memory.links.exchange(longest)] for _ in range(50)]
    counts = torch.tensor([[rank, 2**40], [1, -rank]])
    memory.reduce(counts)
    found["counts"] = counts.tolist()
    losses = torch.tensor(0.1 * (rank + 1), dtype=torch.float64)
    memory.reduce(losses)
    found["losses"] = losses.item()
    half = torch.full((3,), rank + 0.5, dtype=torch.bfloat16)
    memory.reduce(half, largest=True)
    found["largest"] = half.tolist()
    gathered = torch.empty(world, 2, dtype=torch.int32)
    memory.gather(gathered, torch.tensor([rank, -rank], dtype=torch.int32))
    found["gathered"] = gathered.tolist()
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_hear_each_other_in_their_order(world: int, tmp_path: Path) -> None:
    in_order = 0.1
    for of in range(1, world):
        in_order += 0.1 * (of + 1)
    for found in run_group(on_a_worker, world, str(tmp_path)):
        assert found == {
            "said": [[f"{rank} in turn {turn}".encode() for rank in range(world)] for turn in range(3)],
            "long": [list(range(world))] * 50,
            "counts": [[sum(range(world)), world * 2**40], [world, -sum(range(world))]],
            "losses": in_order,
            "largest": [world - 0.5] * 3,
            "gathered": [[rank, -rank] for rank in range(world)],
        }


def test_a_rank_that_is_killed_is_an_error_for_those_that_wait() -> None:
    own, its = socket.socketpair()
    comes_and_waits = f"import socket as s; s.socket(fileno={its.fileno()}).recv(1); print(1, flush=True); input()"
    with ThreadPoolExecutor(1) as pool, own:
        with subprocess.Popen(
            [sys.executable, "-c", comes_and_waits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[its.fileno()],
        ) as other:
            its.close()
            waiting = pool.submit(Links({1: own}, 0).barrier)
            assert other.stdout is not None
            assert other.stdout.readline() == b"1\n"
            other.kill()
        with pytest.raises(ConnectionError, match="Connection closed by peer: rank 1"):
            waiting.result()
        with pytest.raises(ConnectionError):
            Links({1: own}, 0).barrier()
