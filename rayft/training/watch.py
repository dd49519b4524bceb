"""What a worker tells the driver while it works, and what it is told: a thread apart from training.

The training thread only says where it stands (`at`), which costs nothing. The watch carries that to the driver's board
each second, or less often where workers are many, so that the driver knows who stands still, and brings back its order,
if there is one. How far a library has come that is called once, for minutes, the thread can't tell (`busy`): there the
process counts as moving while it computes, reads or writes, or gets on with a copy.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
import ray.exceptions

from rayft import storage

BEAT_S = 1.0
PULSES_PER_S = 500  # of all workers together; a board answers 1,200 to 3,500 (tests/benchmarks/growth.py, two cores)
ANSWER_S = 30.0

# What a process does at least that works: what its other threads do while it waits is a tenth of it.
CPU_SHARE = 0.1  # of one processor
BLOCKS_PER_S = 128  # of 512 bytes, from and to disks

LEAVE = "leave"  # the order to save a checkpoint after this step, and to return


def beat_s(world: int) -> float:
    """Seconds between two pulses of one of `world` workers."""
    return max(BEAT_S, world / PULSES_PER_S)


class Used(NamedTuple):
    """What this process has used so far, at `time.monotonic`; `blocks` of 512 bytes, `pieces` as in `storage.Moved`."""

    at: float
    cpu_s: float
    blocks: int
    pieces: int

    @classmethod
    def now(cls) -> Used:
        used = resource.getrusage(resource.RUSAGE_SELF)
        blocks = used.ru_inblock + used.ru_oublock
        return cls(time.monotonic(), used.ru_utime + used.ru_stime, blocks, storage.Moved.pieces)


def works(before: Used, after: Used) -> bool:
    """Has the process done between the two what takes more than waiting?

    A copy to object storage through a narrow line takes neither a tenth of a processor nor a disk.
    """
    seconds = after.at - before.at
    computes = after.cpu_s - before.cpu_s >= CPU_SHARE * seconds
    reads_or_writes = after.blocks - before.blocks >= BLOCKS_PER_S * seconds
    return computes or reads_or_writes or after.pieces > before.pieces


class Watch:
    """One worker's, of `world`. `board` is the driver's actor, or None where nobody watches.

    `asked` answers whether somebody else wants the worker to leave, None where nobody does.
    """

    def __init__(self, board: Any, rank: int, world: int = 1, asked: Callable[[], str | None] = lambda: None) -> None:
        self.board, self.rank, self.asked = board, rank, asked
        self._ordered = False
        self._beat_s = beat_s(world)
        self._place: dict[str, Any] = {"count": 0, "step": None, "doing": "starting"}
        self._busy, self._worked = False, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Watch:
        if self.board is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @property
    def leave(self) -> bool:
        """Is this worker to save a checkpoint after this step, and to return?"""
        return self._ordered or self.asked() is not None

    def at(self, doing: str, step: int | None = None) -> None:
        """The training thread has come to `doing` in optimizer step `step` (1-based; None: as before)."""
        place = self._place
        self._place = {
            "count": place["count"] + 1,
            "step": place["step"] if step is None else step,
            "doing": doing,
        }

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """The training thread does inside what may take longer than `failure.timeout_s`, and says nothing meanwhile."""
        self.at(doing)
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _beat(self) -> None:
        context = ray.get_runtime_context()
        own = {"node": ray.util.get_node_ip_address(), "node_id": context.get_node_id(), "pid": os.getpid()}
        before = Used.now()
        while not self._over.wait(self._beat_s):
            before, last = Used.now(), before
            self._worked += self._busy and works(last, before)
            place = {**self._place, "worked": self._worked, **own}
            try:
                order = ray.get(self.board.pulse.remote(self.rank, place), timeout=ANSWER_S)
            except ray.exceptions.GetTimeoutError:  # cut off, or a busy machine
                continue
            except ray.exceptions.RayError:  # the driver is gone, and Ray ends this process too
                return
            self._ordered = order == LEAVE
