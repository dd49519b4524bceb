"""Checkpoints as fragments: each rank writes the pieces it holds, a reader takes the ranges it needs.

`checkpoints/step-000200-a2/` holds, per rank, a safetensors file and an index that addresses every piece by
(parameter, start, length); beside them `state.json`, `index.json`, in which rank 0 gathers the ranks' indexes, so that
n readers make n requests and not n for each rank, and `COMMITTED`, written last. Only what is trained is stored, in
float32, so that no format depends on the number of workers or the ZeRO stage. Frozen tensors come from the base model.
`saver.py` writes them beside training.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rayft import storage
from rayft.copies import borrowed
from rayft.errors import CheckpointError, Damaged, StorageError, StorageMissing
from rayft.filesystems import local
from rayft.training import checkpoints
from rayft.training.engine import Piece, inner_optimizer, pieces, shape_of
from rayft.training.loss_scale import gradient_scaler

KINDS = ("master", "exp_avg", "exp_avg_sq")
INDEX = "index.json"  # of all ranks
_READERS = 8


def snapshot(
    engine: Any, statistics: dict[str, torch.Tensor], rank: int, world: int, buffers: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """Copies what this rank writes into host memory; the index of it. Talks to no other rank.

    `statistics` are buffers of the model that training changes, the same on every rank: rank 0 writes them.
    `buffers` is filled with flat float32 tensors named "<piece>.<kind>"; those of an earlier call are used again.
    """
    index: list[dict[str, Any]] = []
    inner = inner_optimizer(engine)
    for number, piece in enumerate(pieces(engine)):
        begin, end = _owned(engine, piece, rank, world)
        if begin == end:
            continue
        step = inner.state[piece.flat]["step"]
        views = (piece.master, piece.moment(engine, "exp_avg"), piece.moment(engine, "exp_avg_sq"))
        for kind, view in zip(KINDS, views, strict=True):
            name = f"{number}.{kind}"
            if name not in buffers:
                buffers[name] = torch.empty(end - begin, dtype=torch.float32, pin_memory=view.is_cuda)
            buffers[name].copy_(view[begin:end].detach())
        index.append(
            {"key": number, "name": piece.name, "start": piece.start + begin, "length": end - begin, "step": int(step)}
        )
    for name, value in statistics.items() if rank == 0 else ():
        buffers[f"{name}.{KINDS[0]}"] = value.detach().view(-1).to("cpu", torch.float32, copy=True)
        index.append({"key": name, "name": name, "start": 0, "length": value.numel(), "step": 0})
    return index


def shapes(engine: Any, statistics: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The whole shape of every parameter and statistic that a checkpoint holds."""
    learns = {n: shape_of(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    return learns | {name: tuple(value.shape) for name, value in statistics.items()}


def write(path: str, rank: int, index: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> None:
    """Writes a rank's tensors, and when they are there its index. StorageError where they can't be written."""
    tensors_name, index_name = rank_files(rank)
    with _written_to(path) as local:
        file = Path(local) / tensors_name
        try:
            save_file(tensors, str(file))
        except SafetensorError as error:
            raise StorageError(_unwritten(file, str(error))) from None
        checksum = _sha256(file)
        if local != path:
            storage.upload(str(file), storage.join(path, tensors_name))
        storage.write_json(storage.join(path, index_name), {"pieces": index, "sha256": checksum})


def rank_files(rank: int) -> tuple[str, str]:
    """The names of a rank's tensors and of their index, which is written after them."""
    return f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"


def gather(path: str, world: int) -> None:
    """Writes the ranks' indexes, which have to be there, as one file."""
    storage.write_text(storage.join(path, INDEX), json.dumps(_gathered(path, world), separators=(",", ":")))


def _gathered(path: str, world: int) -> dict[str, Any]:
    """The ranks' indexes in one: each name once, an entry as [its name's place, start, length, key, step]."""
    names: dict[str, int] = {}
    ranks = []
    for index in _indexes(path, world):
        rows = [
            [names.setdefault(entry["name"], len(names)), *(entry[key] for key in ("start", "length", "key", "step"))]
            for entry in index["pieces"]
        ]
        ranks.append({"sha256": index["sha256"], "pieces": rows})
    return {"names": list(names), "ranks": ranks}


def _indexes(path: str, world: int) -> list[dict[str, Any]]:
    """What every rank has written of its tensors, some read at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda rank: checkpoints.read_json(path, rank_files(rank)[1]), range(world)))


def _unwritten(file: Path, why: str) -> str:
    full = "os error 28" in why or "os error 122" in why  # ENOSPC, EDQUOT
    reason = f"the disk of {file.parent} is full; free some space" if full else why.strip().splitlines()[0]
    return f"{file}: writing failed, {reason}"


@contextmanager
def _written_to(path: str) -> Iterator[str]:
    """A local folder to write to: `path` itself where it is local."""
    if storage.is_local(path):
        Path(path).mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="rayft-checkpoint-") as local:
        yield local


def _owned(engine: Any, piece: Piece, rank: int, world: int) -> tuple[int, int]:
    """The part of a piece that this rank writes: at stage 0, where all hold everything, the rank's slice."""
    if engine.zero_optimization_stage() > 0:
        return 0, piece.length
    return piece.length * rank // world, piece.length * (rank + 1) // world


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Checkpoint:
    """A committed checkpoint, read by ranges. Use as a context manager: what is needed of a remote one is copied first.

    Ranks of one machine share the copies, which go when the last of them leaves. A file of it that is missing or not as
    it was written is Damaged: the state at once, index and tensors when they are first needed (what a rank doesn't need
    it neither copies nor checks).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.state: dict[str, Any] = checkpoints.state(path)
        self._checksums: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._copies = ExitStack()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._copies.close()

    @cached_property
    def _pieces(self) -> dict[str, list[tuple[int, int, str, int, int]]]:
        """Of each parameter (start, length, file, key there, optimizer steps); reads the checksums along."""
        if storage.exists(storage.join(self.path, INDEX)):
            index = checkpoints.read_json(self.path, INDEX)
        else:  # written before there was one
            index = _gathered(self.path, self.state["world"])
        found: dict[str, list[tuple[int, int, str, int, int]]] = {name: [] for name in index["names"]}
        names = index["names"]
        for rank, own in enumerate(index["ranks"]):
            tensors = rank_files(rank)[0]
            self._checksums[tensors] = own["sha256"]
            for name, start, length, key, step in own["pieces"]:
                found[names[name]].append((start, length, tensors, key, step))
        return found

    def _tensors(self, name: str) -> Any:
        """The open safetensors file; its content is compared with the checksum once, before anything is taken."""
        if name not in self._open:
            file = storage.join(self.path, name)
            if storage.is_local(self.path):
                self._check(name, file)
            else:
                file = self._copies.enter_context(borrowed(self._checksums[name], partial(self._fetch, name)))
            self._open[name] = safe_open(local(file), framework="pt")
        return self._open[name]

    def _fetch(self, name: str, file: str) -> None:
        try:
            storage.fetch(storage.join(self.path, name), file)
        except StorageMissing:
            raise self._damaged(name, "is missing") from None
        self._check(name, file)

    def _check(self, name: str, file: str) -> None:
        try:
            same = _sha256(Path(local(file))) == self._checksums[name]
        except FileNotFoundError:
            raise self._damaged(name, "is missing") from None
        if not same:
            raise self._damaged(name, "is not as it was written (its SHA-256 differs)")

    def _damaged(self, name: str, what: str) -> Damaged:
        return Damaged(self.path, storage.join(self.path, name), what)

    @property
    def names(self) -> set[str]:
        """The parameters it holds."""
        return set(self._pieces)

    def step_of(self, name: str) -> int:
        """How many optimizer steps parameter `name` has seen."""
        return self._pieces[name][0][4]

    def read(self, name: str, kind: str, start: int, length: int) -> torch.Tensor:
        """Elements [start, start + length) of the flattened parameter: its `master` or a moment, float32 on the CPU."""
        result = torch.empty(length, dtype=torch.float32)
        filled = 0
        for begin, size, file, key, _ in self._pieces[name]:
            low, high = max(start, begin), min(start + length, begin + size)
            if low >= high:
                continue
            stored = self._tensors(file).get_slice(f"{key}.{kind}")
            result[low - start : high - start] = stored[low - begin : high - begin]
            filled += high - low
        if filled != length:
            raise Damaged(self.path, self.path, f"{name} lacks {length - filled} of {length} elements")
        return result

    def fetch(self, network: torch.nn.Module) -> None:
        """Copies and checks what `load_weights` will read on this rank: that may take long, and no other rank waits."""
        for name, parameter in _places(network).items():
            if _writes(parameter):
                for _, _, file, _, _ in self._pieces.get(name, ()):
                    self._tensors(file)

    def load_weights(self, network: torch.nn.Module) -> None:
        """Copies the stored weights into `network`. Collective at ZeRO-3: after `fetch`, and when all ranks have."""
        places = _places(network)
        unknown = self.names - set(places)
        if unknown:
            raise CheckpointError(
                f"{self.path}: it holds {min(unknown)} and {len(unknown) - 1} more that the model lacks"
            )
        for name, parameter in places.items():
            if name not in self._pieces:
                continue
            shape = shape_of(parameter)
            if list(shape) != list(self.state["shapes"][name]):
                raise CheckpointError(
                    f"{self.path}: {name} has shape {self.state['shapes'][name]}, the model {list(shape)}"
                )
            with _whole(parameter) as mine, torch.no_grad():
                if mine:
                    value = self.read(name, "master", 0, int(torch.Size(shape).numel())).view(shape)
                    parameter.data.copy_(value.to(parameter.dtype))

    def load_moments(self, engine: Any) -> None:
        """Sets the optimizer's moments and step counters of everything the checkpoint knows; the rest stays at zero."""
        inner = inner_optimizer(engine)
        for piece in pieces(engine):
            if piece.name in self._pieces:
                for kind in KINDS[1:]:
                    value = self.read(piece.name, kind, piece.start, piece.length)
                    piece.moment(engine, kind).copy_(value)
                counter = inner.state[piece.flat]["step"]  # of all pieces of one tensor
                counter.fill_(max(int(counter), self.step_of(piece.name)))
        scaler = gradient_scaler(engine)
        if scaler is not None and self.state.get("loss_scale"):
            scaler.load_state_dict(self.state["loss_scale"])


def _places(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What stored tensors are laid over, by name."""
    return dict([*network.named_parameters(), *network.named_buffers()])


def _writes(parameter: Any) -> bool:
    """Does this rank write the parameter? Rank 0 alone does where it is partitioned."""
    return not hasattr(parameter, "ds_id") or dist.get_rank() == 0


@contextmanager
def _whole(parameter: Any) -> Iterator[bool]:
    """The parameter whole; True on the ranks that should write it."""
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield _writes(parameter)


def loss_scale(engine: Any) -> dict[str, Any] | None:
    """The scaler's state, to be stored with a checkpoint."""
    scaler = gradient_scaler(engine)
    return scaler.state_dict() if scaler is not None else None
