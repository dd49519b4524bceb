"""Collectives through memory that the workers of one machine share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from group import run_group

SIZES = (3, 70_001, 1, 1_000_003, 0, 12)  # tensors of one call: several in a slot, and some larger than one


def on_a_worker(folder: str) -> dict[str, Any]:
    import deepspeed.comm
    import torch
    import torch.distributed as dist

    from rayft.training import engine, shared

    installed, rank, world = engine._shared is not None, dist.get_rank(), dist.get_world_size()
    shared.ROOM = 4 << 20
    memory = shared.opened(Path(folder))
    assert memory is not None
    found: dict[str, Any] = {"installed": installed, "left": [path.name for path in Path(folder).iterdir()]}

    def drawn(of: int, size: int) -> torch.Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(of))

    for _ in range(3):  # both sets of slots, more than once
        tensors = [drawn(rank, size) for size in SIZES]
        memory.all_reduce(tensors)
        whole = torch.empty(world * SIZES[3])
        memory.all_gather(whole, drawn(rank, SIZES[3]))
    in_order = [drawn(0, size) for size in SIZES]
    for of in range(1, world):
        in_order = [total + drawn(of, size) for total, size in zip(in_order, SIZES, strict=True)]
    found["sums"] = all(map(torch.equal, tensors, in_order))
    found["gathered"] = torch.equal(whole, torch.cat([drawn(of, SIZES[3]) for of in range(world)]))

    one, other = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    one.grad = torch.full((3, 2), float(rank)).T
    if rank == 0:
        other.grad = torch.ones(2, 3)
    shared.sum_gradients(memory, [one, other])
    found["gradients"] = [one.grad.unique().tolist(), other.grad.unique().tolist()]

    through = torch.full((50_000,), float(rank + 1))  # DeepSpeed's own collectives, which go through memory now
    before = engine._shared.turn if engine._shared is not None else 0
    deepspeed.comm.all_reduce(through)
    largest = torch.full((50_000,), float(rank))
    deepspeed.comm.all_reduce(largest, op=deepspeed.comm.ReduceOp.MAX)
    found["through"] = [through.unique().tolist(), largest.unique().tolist(), engine._shared.turn != before]
    found["nowhere"] = shared.opened(Path(folder) / "missing")
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_of_one_machine_sum_and_gather_in_their_order_and_leave_no_file(world: int, tmp_path: Path) -> None:
    for found in run_group(on_a_worker, world, str(tmp_path)):
        assert found == {
            "installed": True,
            "left": [],
            "sums": True,
            "gathered": True,
            "gradients": [[sum(range(world))], [1.0]],
            "through": [[world * (world + 1) / 2], [world - 1], True],
            "nowhere": None,
        }
