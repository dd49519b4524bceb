"""Checkpoints that are written while training goes on: what a rank holds is copied, and a thread writes the copy.

    every rank   copies its pieces to host memory, and returns to training; a thread writes tensors, then their index
    rank 0       its thread waits until every rank's index is there, gathers them, and then writes the commit marker

No rank talks to another: what they agree on is what lies in storage. At most one checkpoint is on its way at a time.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from rayft import attempts, storage
from rayft.errors import TrainingError
from rayft.training import checkpoint, checkpoints
from rayft.training.metrics import Metrics

LOOK_S = 0.2  # between two looks of rank 0 for the indexes of the others


class Saver:
    """Saves for one rank below `<run>/checkpoints`; `committed(step)` is called on rank 0 after each commit.

    `keep` checkpoints stay besides the best; `timeout_s` is how long rank 0 waits for the other ranks' files.
    """

    def __init__(
        self,
        run: str,
        attempt: int,
        keep: int,
        timeout_s: float,
        metrics: Metrics | None,
        committed: Callable[[int], None],
    ) -> None:
        self.run, self.attempt, self.keep, self.timeout_s = run, attempt, keep, timeout_s
        self.folder = storage.join(run, "checkpoints")
        self.metrics, self.committed = metrics, committed
        self.begun = 0.0  # when the newest save began, by time.monotonic
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, engine: Any, state: dict[str, Any], statistics: dict[str, torch.Tensor]) -> None:
        """Copies what this rank holds and begins to write it; waits first for the checkpoint before this one.

        `state` is plain data with `step` and `best`, `statistics` are buffers that training changes; every rank gives
        them, rank 0 writes them.
        """
        self.finish()
        self.begun = time.monotonic()
        path = storage.join(self.folder, checkpoints.folder_name(state["step"], self.attempt))
        index = checkpoint.snapshot(engine, statistics, self.rank, self.world, self._buffers)
        written = json.dumps({**state, "world": self.world, "shapes": checkpoint.shapes(engine, statistics)})
        best = state["best"]["checkpoint"] if state["best"] else None
        marker = {"step": state["step"], "world": self.world, "best": best}
        self._thread = threading.Thread(target=self._write, args=(path, index, written, marker), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what the writing has met so far."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Waits until what was saved is written, on rank 0 until it is committed; raises what went wrong."""
        self.wait()
        self.check()

    def release(self) -> None:
        """Gives the copies' memory back; the next engine holds other pieces."""
        self.finish()
        self._buffers.clear()

    def _write(self, path: str, index: list[dict[str, Any]], state: str, marker: dict[str, Any]) -> None:
        try:
            if self.rank == 0:
                storage.write_text(storage.join(path, "state.json"), state)
            checkpoint.write(path, self.rank, index, self._buffers)
            if self.rank == 0:
                self._commit(path, marker)
        except Exception as error:  # noqa: BLE001 # the training thread raises it at the next step
            self._failure = error

    def _commit(self, path: str, marker: dict[str, Any]) -> None:
        self._wait(path)
        checkpoint.gather(path, self.world)
        attempts.hold(self.run, self.attempt)
        if self.metrics is not None:
            self.metrics.sync()
        storage.commit(path, marker)
        self.committed(marker["step"])
        attempts.hold(self.run, self.attempt)
        checkpoints.prune(self.folder, self.keep)

    def _wait(self, path: str) -> None:
        """Until every rank's index is there."""
        until = time.monotonic() + self.timeout_s
        missing = set(range(self.world))
        while missing:
            there = {entry.path.rpartition("/")[2] for entry in storage.listing(path)}
            missing = {rank for rank in missing if checkpoint.rank_files(rank)[1] not in there}
            if missing and time.monotonic() > until:
                raise TrainingError(
                    f"{path}: rank {min(missing)} has not written its part of the checkpoint within "
                    f"{self.timeout_s:g} s (failure.timeout_s)"
                )
            if missing:
                time.sleep(LOOK_S)
