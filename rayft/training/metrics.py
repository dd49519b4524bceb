"""What a run leaves to be read: metrics.jsonl and TensorBoard files, cut back to the position of a resumed run."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayft import storage


class Metrics:
    """Writes one object per step and per evaluation.

    On local storage the file grows with each; else it goes up at `sync`.
    """

    def __init__(self, run: str, step: int, pending: bool = False) -> None:
        """Keeps what was written up to `step` (inclusive) by earlier attempts, and drops the rest.

        Of what was evaluated at `step` the first line stays, since a run that ends there tells its scores once more;
        none does where that evaluation is `pending`.
        """
        self.remote = None if storage.is_local(run) else run
        self._temporary = tempfile.TemporaryDirectory(prefix="rayft-metrics-") if self.remote else None
        self.folder = Path(self._temporary.name if self._temporary else run)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "metrics.jsonl"
        source = storage.join(run, "metrics.jsonl")
        lines = storage.read_text(source).splitlines() if storage.exists(source) else []
        rows = [(line, json.loads(line)) for line in lines if _whole(line)]
        kept = [line for line, row in rows if row["step"] < step or (row["step"] == step and "loss" in row)]
        evaluated = [line for line, row in rows if row["step"] == step and "loss" not in row]
        storage.write_text(str(self.file), "".join(line + "\n" for line in kept + ([] if pending else evaluated[:1])))
        self._stream = self.file.open("a", encoding="utf-8")
        from torch.utils.tensorboard.writer import SummaryWriter

        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one object (it has `step`); its numbers go to TensorBoard too."""
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(
                    name.replace("_", "/", 1) if name.startswith("eval_") else f"train/{name}", value, row["step"]
                )

    def lines(self) -> Iterator[str]:
        """What was written so far, by earlier attempts too."""
        with self.file.open(encoding="utf-8") as file:
            yield from file

    def sync(self) -> None:
        """Makes everything so far visible where the run is stored, and there to stay: a commit refers to it."""
        self._board.flush()
        os.fsync(self._stream.fileno())
        if self.remote:
            storage.upload(str(self.folder), self.remote)

    def close(self) -> None:
        self.sync()
        self._stream.close()
        self._board.close()


def _whole(line: str) -> bool:
    """False for a line that a killed process left half-written."""
    try:
        return "step" in json.loads(line)
    except ValueError:
        return False
