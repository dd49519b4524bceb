"""What a worker tells the driver while it works, and what it is told: a thread apart from training.

The training thread only says where it stands (`at`), which costs nothing. The watch carries that to the driver's board
each second, or less often where workers are many, so that the driver knows who stands still, and brings back its order,
if there is one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions

BEAT_S = 1.0
PULSES_PER_S = 500  # of all workers together; a board answers 1,200 to 3,500 (tests/benchmarks/growth.py, two cores)
ANSWER_S = 30.0

LEAVE = "leave"  # the order to save a checkpoint after this step, and to return


def beat_s(world: int) -> float:
    """Seconds between two pulses of one of `world` workers."""
    return max(BEAT_S, world / PULSES_PER_S)


class Watch:
    """One worker's, of `world`. `board` is the driver's actor, or None where nobody watches.

    `asked` answers whether somebody else wants the worker to leave, None where nobody does.
    """

    def __init__(self, board: Any, rank: int, world: int = 1, asked: Callable[[], str | None] = lambda: None) -> None:
        self.board, self.rank, self.asked = board, rank, asked
        self._ordered = False
        self._beat_s = beat_s(world)
        self._place: dict[str, Any] = {"count": 0, "step": None, "doing": "starting"}
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

    def _beat(self) -> None:
        context = ray.get_runtime_context()
        own = {"node": ray.util.get_node_ip_address(), "node_id": context.get_node_id(), "pid": os.getpid()}
        while not self._over.wait(self._beat_s):
            try:
                order = ray.get(self.board.pulse.remote(self.rank, {**self._place, **own}), timeout=ANSWER_S)
            except ray.exceptions.GetTimeoutError:  # cut off, or a busy machine
                continue
            except ray.exceptions.RayError:  # the driver is gone, and Ray ends this process too
                return
            self._ordered = order == LEAVE
