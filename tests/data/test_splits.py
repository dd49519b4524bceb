"""How a split is cut into work and shards, and what identifies its processor."""

from __future__ import annotations

from pathlib import Path

from rayft.data.pieces import Fragment
from rayft.data.splits import (
    BLOB_BYTES,
    LEAST_BLOB,
    MOST_SHARDS,
    OWN_BLOB_BYTES,
    SHARD_BYTES,
    UNIT_BYTES,
    blob_of,
    groups_of,
    processor_hash,
    rows_of,
    shards_of,
    units_of,
)
from rayft.tasks.task import Pretrained, Task

MIB = 1 << 20


def pieces(*sizes: int) -> list[Fragment]:
    return [Fragment(f"{file}.csv", "csv", file, 0, "", size) for file, size in enumerate(sizes)]


def test_small_files_are_read_together_and_large_ones_alone() -> None:
    some = pieces(*[UNIT_BYTES // 3] * 4, 5 * UNIT_BYTES, 1, 1)
    assert [[piece.file for piece in unit] for unit in units_of(some)] == [[0, 1, 2], [3], [4], [5, 6]]
    assert [[piece.file for piece in unit] for unit in units_of(pieces(0, 0, UNIT_BYTES))] == [[0, 1, 2]]
    assert units_of([]) == []


def test_shards_follow_from_the_bytes() -> None:
    assert shards_of(pieces(0)) == 1
    assert shards_of(pieces(SHARD_BYTES)) == 1
    assert shards_of(pieces(SHARD_BYTES, 1)) == 2
    assert shards_of(pieces(SHARD_BYTES * 10**6)) == MOST_SHARDS


def test_each_processor_gets_some_of_the_rows_to_encode() -> None:
    most = BLOB_BYTES
    assert blob_of(pieces(8 * most, 8 * most), 4, most) == most
    assert blob_of(pieces(4 * most, 4 * most), 8, most) == most // 2
    assert blob_of(pieces(most), 64, most) == LEAST_BLOB
    assert blob_of(pieces(8 * most), 2, OWN_BLOB_BYTES) == OWN_BLOB_BYTES


def test_groups_keep_the_order_of_files_and_a_large_one_to_itself() -> None:
    half = SHARD_BYTES // 2
    assert groups_of(pieces(1, 1, SHARD_BYTES, half, half, half, 1)) == (
        (0, False),
        (0, False),
        (1, True),
        (2, False),
        (2, False),
        (3, False),
        (3, False),
    )


def test_fragments_of_one_file_share_its_group() -> None:
    parts = [Fragment("a.parquet", "parquet", 0, 0, "", SHARD_BYTES, part=(i, i + 1)) for i in range(3)]
    assert groups_of([*parts, Fragment("b.csv", "csv", 1, 0, "", 1)]) == ((0, True), (1, False))


def test_rows_are_known_only_if_every_fragment_says_them() -> None:
    known = Fragment("a.parquet", "parquet", 0, 0, "", 1, rows=5)
    assert rows_of([known, known]) == 10
    assert rows_of([known, *pieces(1)]) is None


def test_the_processor_is_its_files_and_neither_weights_nor_folder(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "tokenizer").mkdir(parents=True)
        (tmp_path / folder / "tokenizer" / "vocab.txt").write_text("one two")
        (tmp_path / folder / "model.safetensors").write_text(folder)

    def known(folder: str) -> str:
        return processor_hash(Task(type="any"), Pretrained(str(tmp_path / folder)))

    assert known("a") == known("b")
    (tmp_path / "b" / "tokenizer" / "vocab.txt").write_text("one three")
    assert known("a") != known("b")
