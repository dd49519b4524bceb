"""What a prepared split is: its manifest, and the folder that it lies in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rayft import storage


class Manifest(BaseModel):
    """What was prepared.

    order        "hash" or "source"
    rows         prepared rows: features, or packed rows
    source_rows  rows of the source that were taken, those that were dropped too
    tokens       sum of the prepared rows' lengths; `longest` is the largest of them
    lengths      [upper bound, count] of the features' lengths, before packing
    dropped      reason -> rows that gave no feature
    bad          {"count", "examples"} of the rows that were skipped
    shards       [{"path" below the prepared folder, "rows", "row_groups": rows of each, "bytes" in memory, "checksum"}]
    cut          rows that were cut from train for validation, told in both splits
    passed_over  ending -> files beside the rows' files that gave no rows
    absent       what `where` asks for and no row has, as sentences
    """

    model_config = ConfigDict(frozen=True)

    key: str
    split: str
    order: str
    rows: int
    source_rows: int
    tokens: int
    longest: int
    lengths: list[tuple[int, int]]
    truncated: int
    dropped: dict[str, int]
    bad: dict[str, Any]
    facts: dict[str, Any]
    shards: list[dict[str, Any]]
    cut: int = 0
    passed_over: dict[str, int] = {}
    absent: list[str] = []

    def notes(self, split: str) -> list[str]:
        """What a user should know about how the rows became what they are."""
        found = [f"{split}: {sentence}" for sentence in self.absent]
        if self.cut and split == "validation":
            found.append(f"validation: not given, so {_rows(self.cut)} cut from train by a hash of their place")
        if self.truncated:
            found.append(f"{split}: {self.truncated:,} of {_rows(self.source_rows)} truncated to what fits")
        found += [f"{split}: {_rows(count)} dropped: {reason}" for reason, count in sorted(self.dropped.items())]
        if self.bad["count"]:
            found.append(f"{split}: {_rows(self.bad['count'], kind='bad ')} skipped, such as {self.bad['examples'][0]}")
        if self.passed_over:
            files = ", ".join(f"{count:,} {ending}" for ending, count in self.passed_over.items())
            found.append(f"{split}: files there that give no rows were passed over: {files}")
        return found


def _rows(count: int, kind: str = "") -> str:
    """`1 row was`, `2,300 rows were`."""
    return f"{count:,} {kind}row was" if count == 1 else f"{count:,} {kind}rows were"


@dataclass(frozen=True)
class Prepared:
    """A prepared split; `folder` is `<storage>/prepared/<key>`."""

    folder: str
    manifest: Manifest

    @classmethod
    def open(cls, folder: str) -> Prepared:
        return cls(folder, Manifest.model_validate(storage.read_json(storage.join(folder, "manifest.json"))))

    def discard(self) -> None:
        """Deletes its shards, so that they are prepared anew; what was computed from their rows stays.

        Rows are numbered alike under one key, so that the states of frozen blocks go with the new shards too.
        """
        storage.delete(storage.join(self.folder, "manifest.json"))
        for attempt in {shard["path"].partition("/")[0] for shard in self.manifest.shards}:
            storage.delete(storage.join(self.folder, attempt))

    @classmethod
    def find(cls, folder: str) -> Prepared | None:
        """None where no preparation was committed, or its manifest is damaged."""
        try:
            return cls(folder, Manifest.model_validate(storage.read_object(storage.join(folder, "manifest.json"))))
        except ValidationError:
            return None
