"""Collectives between the workers of one machine through memory that they share: gloo sends every byte through sockets.

What is short goes through `links.py`, and so do the memory's barriers. DeepSpeed's collectives over CPU tensors come
here (`install`); what does not fit goes on to the process group. Sums are taken in the order of the ranks, so they are
the same on every run of as many workers.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rayft.training.links import SHORT, Links, connected, listening

MEMORY = Path("/dev/shm")
ROOM = 32 << 20  # bytes of shared memory for a group at most
SLOT = 2 << 20  # bytes of one slot: more would leave the processor's caches, and less have more barriers


class Done:
    """A collective that is over when it returns."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class SharedMemory:
    """Slots of memory, two sets of one for each rank, which all ranks of the world see.

    A set is written again only two pieces later: a rank that has passed the barrier between has read what it needs.
    Every rank has to make the same calls, as with any collective. `memory` is one dimension of uint8.
    """

    def __init__(self, memory: torch.Tensor, rank: int, world: int, links: Links) -> None:
        self.rank, self.world, self.links = rank, world, links
        self.sets = memory.view(2, world, -1)
        self.turn = 0
        self.seconds = 0.0  # in calls so far, waiting for the other ranks included

    def reduce(self, tensor: torch.Tensor, largest: bool = False) -> None:
        """Replaces the tensor (contiguous, on the CPU) by the sum of all ranks', or a short one by the largest."""
        if not short(tensor):
            return self.all_reduce([tensor])
        begun = time.perf_counter()
        self.links.reduce(tensor, largest)
        self.seconds += time.perf_counter() - begun
        return None

    def gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """Fills `output` with every rank's `tensor`, one after another; both contiguous, on the CPU, of one dtype."""
        if not short(tensor):
            return self.all_gather(output, tensor)
        begun = time.perf_counter()
        self.links.gather(output, tensor)
        self.seconds += time.perf_counter() - begun
        return None

    def all_reduce(self, tensors: list[torch.Tensor]) -> None:
        """Replaces each tensor (contiguous, on the CPU, of one dtype) by the sum of all ranks'."""
        begun = time.perf_counter()
        for views in self._pieces([tensor.view(-1) for tensor in tensors]):
            slots = self._share(views)
            elements = sum(view.numel() for view in views)
            # Each rank sums a part of the piece, into the first slot: of that part no other rank reads any slot.
            first, last = elements * self.rank // self.world, elements * (self.rank + 1) // self.world
            _sum(slots[:, first:last], slots[0, first:last])
            self.links.barrier()
            _copy(slots[0].split([*_sizes(views), slots.shape[1] - elements])[: len(views)], views)
        self.seconds += time.perf_counter() - begun

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """The same for any size, through memory."""
        begun = time.perf_counter()
        whole, done = output.view(self.world, -1), 0
        for (view,) in self._pieces([tensor.view(-1)]):
            slots, after = self._share([view]), done + view.numel()
            whole[:, done:after] = slots[:, : view.numel()]
            done = after
        self.seconds += time.perf_counter() - begun

    def _pieces(self, flats: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """What fits into a slot at a time, as views."""
        room = size = self.sets.shape[2] // flats[0].element_size()
        views: list[torch.Tensor] = []
        for flat in flats:
            at = 0
            while at < flat.numel():
                views.append(flat[at : at + room])
                at += views[-1].numel()
                room -= views[-1].numel()
                if room == 0:
                    yield views
                    views, room = [], size
        if views:
            yield views

    def _share(self, views: list[torch.Tensor]) -> torch.Tensor:
        """Every rank's views, (world, elements), once all have written theirs."""
        self.turn ^= 1
        slots = self.sets[self.turn].view(views[0].dtype)
        _copy(views, slots[self.rank].split([*_sizes(views), slots.shape[1] - sum(_sizes(views))])[: len(views)])
        self.links.barrier()
        return slots


def _sizes(views: list[torch.Tensor]) -> list[int]:
    return [view.numel() for view in views]


def _copy(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _sum(addends: torch.Tensor, into: torch.Tensor) -> None:
    """The sum over the first dimension, in its order; `into` may be one of the addends."""
    if len(addends) == 2:
        torch.add(addends[0], addends[1], out=into)
    else:
        into.copy_(sum(addends[1:], addends[0].clone()))


def opened(folder: Path = MEMORY) -> SharedMemory | None:
    """Memory for the world's ranks, all on this machine; collective. None where there is no room for it.

    Its files are unlinked before this returns, so that nothing is left behind by processes that are killed.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    size = min(SLOT, ROOM // (2 * world)) // mmap.PAGESIZE * mmap.PAGESIZE * 2 * world
    home, listener = folder / f"rayft-{uuid.uuid4().hex[:12]}", None
    if rank == 0:
        with contextlib.suppress(OSError):
            home.mkdir(mode=0o700)
            with (home / "memory").open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would show later, as a signal
            listener = listening(home, rank, world)
    told = [str(home) if listener is not None else None]
    dist.broadcast_object_list(told, src=0)
    if told[0] is None:
        shutil.rmtree(home, ignore_errors=True)
        return None
    home = Path(told[0])
    memory = torch.from_file(str(home / "memory"), shared=True, size=size, dtype=torch.uint8)
    links = connected(home, listener or listening(home, rank, world))
    links.barrier()
    if rank == 0:
        shutil.rmtree(home)
    links.barrier()
    return SharedMemory(memory, rank, world, links)


def sum_gradients(shared: SharedMemory, parameters: Iterable[torch.Tensor]) -> None:
    """Replaces the gradients of `parameters`, those that have none included, by their sums over the ranks."""
    alike: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:  # a rank whose rows did not need it; another's may have
            parameter.grad = torch.zeros_like(parameter)
        if not parameter.grad.is_contiguous():
            parameter.grad = parameter.grad.contiguous()
        alike.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in alike.values():
        shared.all_reduce(gradients)


def install(backend: Any, shared: SharedMemory) -> None:
    """Makes `backend`, that of DeepSpeed's collectives, use memory and links for tensors of the whole world."""
    plain = {name: getattr(backend, name) for name in ("all_reduce", "all_gather_into_tensor")}

    def whole(group: Any, *tensors: torch.Tensor) -> bool:
        alone = group is not None and dist.get_world_size(group) != shared.world
        return not alone and all(tensor.is_contiguous() and tensor.numel() for tensor in tensors)

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        fits = op.name in (("SUM", "MAX") if short(tensor) else ("SUM",))
        if not fits or not whole(group, tensor):
            return plain["all_reduce"](tensor, op, group, async_op)
        shared.reduce(tensor, largest=op.name == "MAX")
        return Done()

    def gather(
        output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if not whole(group, output_tensor, input_tensor):
            return plain["all_gather_into_tensor"](output_tensor, input_tensor, group, async_op)
        shared.gather(output_tensor, input_tensor)
        return Done()

    backend.all_reduce, backend.all_gather_into_tensor = all_reduce, gather


def short(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() <= SHORT
