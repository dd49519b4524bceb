"""What a split is made of, what its preparation depends on, and how its rows are cut into work and shards.

All of it is plain arithmetic over the listing, before anything is started.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayft import storage
from rayft.data import named
from rayft.data.pieces import Fragment, fragments, identity
from rayft.data.scan import Scan
from rayft.recipe import Recipe, Source
from rayft.tasks.task import Pretrained, Task

# Part of every key: goes up when anything in preparation or in a task changes what the same rows are prepared to.
FORMAT = 5

SHARD_BYTES = 16 << 20  # of the source; each shard is sorted in one worker's memory
MOST_SHARDS = 4096
LEAST_BLOB = 512 << 10
BLOB_BYTES = 8 << 20  # that goes to another process
OWN_BLOB_BYTES = 2 << 20  # in this one, where a piece costs little and all wait for the last
UNIT_BYTES = 8 << 20  # small files are read together
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".index.json", ".md")


@dataclass(frozen=True)
class Split:
    """What a split is to be made of; `files` identifies the pictures or sounds that its tables name."""

    name: str
    sources: tuple[Source, ...]
    pieces: tuple[Fragment, ...]
    evaluation: bool
    in_order: bool
    cut: bool  # it is a part of train's rows
    files: str = ""


def splits_of(recipe: Recipe, wanted: Sequence[str], with_train: bool) -> dict[str, Split]:
    """What the wanted splits (and train, where it has to be known) are made of."""
    data = recipe.data
    found: dict[str, Split] = {}
    for name in ("train", "validation", "test"):
        sources = {"train": data.train, "validation": data.validation, "test": data.test}[name]
        if name == "validation" and sources is None and name in wanted:
            train = found["train"]
            found[name] = Split(name, data.train, train.pieces, True, True, True, train.files)
        elif sources is not None and (name in wanted or (name == "train" and with_train)):
            pieces = fragments(sources, name)
            files = named.identity(pieces, sources, data.columns, recipe.task.file_columns())
            in_order = name != "train" or not data.shuffle
            found[name] = Split(name, sources, pieces, name != "train", in_order, False, files)
    return found


def facts_key(recipe: Recipe, train: Split, cut: bool) -> str:
    """Of what facts and cut depend on: the training rows and the task."""
    parts = [FORMAT, identity(train.pieces, train.sources), sorted(recipe.data.columns.items()), cut]
    return _hash([*parts, recipe.task.model_dump(mode="json")])


def split_key(recipe: Recipe, split: Split, known: Scan, processor: str) -> str:
    """A hash of everything that the prepared split depends on, and of nothing else."""
    return _hash(
        {
            "format": FORMAT,
            "rows": identity(split.pieces, split.sources),
            "files": split.files,
            "columns": sorted(recipe.data.columns.items()),
            "on_bad_row": recipe.data.on_bad_row,
            "task": recipe.task.model_dump(mode="json"),
            "processor": processor,
            "facts": known.facts,
            "evaluation": split.evaluation,
            "in_order": split.in_order,
            "packs": None if split.evaluation else recipe.task.packs(),
            "cut": [known.threshold, split.cut] if split.name == "train" or split.cut else None,
        }
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def processor_hash(task: Task, model: Pretrained) -> str:
    """What identifies the processor of `model`: the files of its folder that are no weights, or as it is saved."""
    if os.path.isdir(model.path):
        return _files_hash(model.path)
    with tempfile.TemporaryDirectory(prefix="rayft-processor-") as folder:
        task.processor(model).save_pretrained(folder)
        return _files_hash(folder)


def _files_hash(folder: str) -> str:
    total = hashlib.sha256()
    for entry in storage.expand(folder):
        if not entry.path.endswith(_WEIGHTS):
            total.update(f"{os.path.relpath(entry.path, folder)}\0{storage.content_hash(entry)}\0".encode())
    return total.hexdigest()


def rows_of(pieces: Sequence[Fragment]) -> int | None:
    """How many rows the fragments hold, where all of them say so."""
    counts = [piece.rows for piece in pieces if piece.rows is not None]
    return sum(counts) if len(counts) == len(pieces) else None


def passed_over(pieces: Sequence[Fragment]) -> dict[str, int]:
    """Ending -> files beside those of the rows that give none, the most frequent first."""
    found = Counter[str]()
    for piece in pieces:
        found.update(dict(piece.passed_over))
    return dict(found.most_common())


def units_of(pieces: Sequence[Fragment]) -> list[list[Fragment]]:
    """Fragments to read in one go: a large one alone, small ones together."""
    units: list[list[Fragment]] = []
    size = 0
    for piece in pieces:
        if not units or size + piece.size > UNIT_BYTES:
            units.append([])
            size = 0
        units[-1].append(piece)
        size += piece.size
    return units


def groups_of(pieces: Sequence[Fragment]) -> tuple[tuple[int, bool], ...]:
    """Of each file, in the source's order: the group of files that share a shard, and whether it is alone there."""
    sizes: dict[int, int] = defaultdict(int)
    for piece in pieces:
        sizes[piece.file] += piece.size
    groups: list[tuple[int, bool]] = []
    group = filled = 0
    for file in sorted(sizes):
        alone = sizes[file] >= SHARD_BYTES
        if filled and (alone or filled >= SHARD_BYTES):
            group, filled = group + 1, 0
        groups.append((group, alone))
        filled += sizes[file]
        if alone:
            group, filled = group + 1, 0
    return tuple(groups)


def blob_of(pieces: Sequence[Fragment], encoders: int, most: int) -> int:
    """Bytes of rows to encode at once, at most `most`: few enough that two such pieces, or more, go to each encoder."""
    return max(LEAST_BLOB, min(most, sum(piece.size for piece in pieces) // (2 * encoders)))


def shards_of(pieces: Sequence[Fragment]) -> int:
    """The number of shards in the order of the hash."""
    return max(1, min(MOST_SHARDS, -(-sum(piece.size for piece in pieces) // SHARD_BYTES)))
