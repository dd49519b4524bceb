"""What the frozen blocks of a model give for every row of a prepared split: computed once, stored, mapped into memory.

    <prepared split>/frozen/<key>/manifest.json      written last; what has none does not exist
                                  <attempt>/0.bin    the states of part 0, one row after the other
                                  <attempt>/0.npz    their rows' numbers in the split, sizes and checksums

The key is a hash of all that the states depend on, so a changed model can't meet stale ones. They lie below the split
that they belong to, and go when it goes. Files are mapped: processes of a machine share one copy of what they read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import tempfile
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers

from rayft import storage
from rayft.copies import local_copy
from rayft.errors import Damaged
from rayft.filesystems import local
from rayft.recipe import Recipe

FORMAT = 1
UNUSED_S = 86_400.0  # copies of states from object storage that nobody has wanted for so long make room


@dataclass(frozen=True)
class Part:
    """The states that one process has computed: files below the folder, and what they hold.

    `rest` is the shape of a row's states after its first dimension, which may differ from row to row; `seconds` of
    computing, for all `rows` of the part.
    """

    data: str
    index: str
    rows: int
    bytes: int
    dtype: str
    rest: tuple[int, ...]
    seconds: float


def states_folder(prepared: str, recipe: Recipe, identity: str, depth: int, stage: int, first: bool) -> str:
    """Where the states at `depth` of the split in folder `prepared` belong; `identity` is the base model's.

    `first`: those of each row's first token alone.
    """
    depends = {
        "format": FORMAT,
        "model": identity,
        "depth": depth,
        "dtype": recipe.model.dtype,
        # Frozen weights that are sharded while they are loaded stay float32.
        "narrow": recipe.model.dtype != "float32" and stage < 3,
        "attention": recipe.model.attention,
        **({"first": True} if first else {}),
        # Below adapters norms and biases are narrow too.
        **({"adapters": True} if recipe.model.lora is not None and recipe.model.dtype != "float32" else {}),
        **({"quantize": recipe.model.quantize} if recipe.model.quantize else {}),
        "versions": [str(torch.__version__), transformers.__version__],
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
    return storage.join(prepared, "frozen", key)


def found(folder: str) -> dict[str, Any] | None:
    """The manifest of the states in `folder`: {"rows", "bytes", "seconds", "parts"}; None where there are none."""
    return storage.read_object(storage.join(folder, "manifest.json"))


def commit(folder: str, parts: Sequence[Part]) -> dict[str, Any]:
    """Makes the states count, unless another process was first; their manifest. `parts` together hold every row."""
    before = found(folder)
    if before is not None:
        for part in parts:
            storage.delete(storage.join(folder, part.data.rpartition("/")[0]))
        return before
    rows, seconds = sum(part.rows for part in parts), sum(part.seconds for part in parts)
    size = sum(part.bytes for part in parts)
    manifest = {"rows": rows, "bytes": size, "seconds": seconds, "parts": [asdict(part) for part in parts if part.rows]}
    storage.write_json(storage.join(folder, "manifest.json"), manifest)
    return manifest


class Writer:
    """Writes one part of the states in `folder`: `add` row by row, then `close`. `attempt` is a name of its own."""

    def __init__(self, folder: str, attempt: str, number: int) -> None:
        self.folder, self.name = folder, f"{attempt}/{number}"
        self._target = storage.join(folder, f"{self.name}.bin")
        scratch = os.path.join(tempfile.gettempdir(), f"rayft-{attempt}-{number}-{uuid.uuid4().hex}.bin")
        self._path = local(self._target) if storage.is_local(folder) else scratch
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        self._file: BinaryIO = open(self._path, "wb")  # noqa: SIM115 # closed by `close`
        self._numbers: list[int] = []
        self._sizes: list[int] = []
        self._checksums: list[int] = []
        self._kind: tuple[str, tuple[int, ...]] = ("float32", ())

    def add(self, number: int, state: torch.Tensor) -> None:
        """The state of the row with that number in the split; a tensor on the CPU, of one dimension or more."""
        content = state.contiguous().view(torch.uint8).numpy().tobytes()
        self._file.write(content)
        self._numbers.append(number)
        self._sizes.append(state.shape[0])
        self._checksums.append(zlib.crc32(content))
        self._kind = (str(state.dtype).removeprefix("torch."), tuple(state.shape[1:]))

    def close(self, seconds: float) -> Part:
        """Puts the part where it belongs; `seconds` is how long its computing took."""
        self._file.close()
        size = os.path.getsize(self._path)
        if not storage.is_local(self.folder):
            storage.upload(self._path, self._target)
            os.unlink(self._path)
        index = io.BytesIO()
        np.savez(
            index,
            number=np.array(self._numbers, np.int64),
            size=np.array(self._sizes, np.int32),
            checksum=np.array(self._checksums, np.uint32),
        )
        storage.write_bytes(storage.join(self.folder, f"{self.name}.npz"), index.getvalue())
        dtype, rest = self._kind
        return Part(f"{self.name}.bin", f"{self.name}.npz", len(self._numbers), size, dtype, rest, seconds)

    def discard(self) -> None:
        """Removes what was written."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def new_attempt() -> str:
    return uuid.uuid4().hex[:12]


class States:
    """The states of a split, by the rows' numbers in it. Files in object storage are copied to this machine first."""

    def __init__(self, folder: str) -> None:
        """Raises Damaged where files are missing or not as they were written."""
        self.folder = folder
        manifest = found(folder)
        here = local(folder) if storage.is_local(folder) else local_copy(folder, "states", UNUSED_S)
        if manifest is None or here is None:
            raise Damaged(folder, folder, "is missing")
        self.seconds_per_row = manifest["seconds"] / max(1, manifest["rows"])
        parts = manifest["parts"]
        self.dtype = getattr(torch, parts[0]["dtype"])
        self.rest = tuple(parts[0]["rest"])
        self._row_bytes = math.prod(self.rest) * self.dtype.itemsize
        self._part = np.zeros(manifest["rows"], np.int16)
        self._size = np.zeros(manifest["rows"], np.int32)
        self._checksum = np.zeros(manifest["rows"], np.uint32)
        self._offset = np.zeros(manifest["rows"], np.int64)
        self._sound = np.zeros(manifest["rows"], bool)  # was its checksum right?
        self._data = [self._open(here, number, part) for number, part in enumerate(parts)]
        self.ragged = bool((self._size != self._size[0]).any())

    def _open(self, here: str, number: int, part: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        path = storage.join(here, part["data"])
        try:
            with np.load(io.BytesIO(storage.read_bytes(storage.join(here, part["index"])))) as index:
                rows, size = index["number"], index["size"]
                self._part[rows], self._size[rows], self._checksum[rows] = number, size, index["checksum"]
            ends = np.cumsum(size.astype(np.int64) * self._row_bytes)
            self._offset[rows] = ends - size.astype(np.int64) * self._row_bytes
            data = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise Damaged(self.folder, path, f"can't be read ({type(error).__name__})") from None
        if len(data) != part["bytes"] or (len(ends) and ends[-1] != len(data)):
            raise Damaged(self.folder, path, "has another size than it was written with")
        return data

    def rows(self, numbers: Sequence[int], pinned: bool = False) -> torch.Tensor:
        """(rows, largest size, *rest) in the states' dtype, zeros behind smaller ones; `pinned`: on their way to a GPU.

        Damaged where a checksum fails, which is looked at when a row is read for the first time.
        """
        longest = int(self._size[list(numbers)].max())
        out = torch.empty((len(numbers), longest, *self.rest), dtype=self.dtype, pin_memory=pinned)
        content = out.view(len(numbers), -1).view(torch.uint8).numpy()
        for place, number in enumerate(numbers):
            size = int(self._size[number]) * self._row_bytes
            self._read(number, content[place, :size])
            content[place, size:] = 0
        return out

    def _read(self, number: int, into: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        begin = int(self._offset[number])
        into[:] = self._data[self._part[number]][begin : begin + len(into)]
        if self._sound[number]:
            return
        if zlib.crc32(into.data) != self._checksum[number]:
            raise Damaged(self.folder, f"the states of row {number} in {self.folder}", "are not as they were written")
        self._sound[number] = True
