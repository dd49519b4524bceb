"""Packing: every sequence once, whole, in few rows, and the same rows each time."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pytest

from rayft.data.pack import pack, packed_table


def lengths_like_text(count: int, capacity: int) -> list[int]:
    drawn = np.random.default_rng(0).lognormal(mean=4.5, sigma=0.9, size=count)
    return np.clip(drawn, 2, capacity).astype(int).tolist()


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 997])
def test_every_sequence_is_packed_once_and_no_bin_overflows(count: int, in_order: bool) -> None:
    lengths = lengths_like_text(count, 512)
    bins = pack(lengths, 512, in_order=in_order)
    assert sorted(index for members in bins for index in members) == list(range(count))
    assert all(0 < sum(lengths[index] for index in members) <= 512 for members in bins)


def test_best_fit_leaves_little_room() -> None:
    lengths = lengths_like_text(20_000, 1024)
    least = -(-sum(lengths) // 1024)
    assert len(pack(lengths, 1024)) <= 1.002 * least


def test_best_fit_takes_the_fullest_bin_that_fits() -> None:
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack([2, 3, 4, 5, 6], 10) == [[3, 1, 0], [4, 2]]


def test_bins_begin_with_their_longest_and_follow_the_order_given() -> None:
    lengths = lengths_like_text(500, 256)
    bins = pack(lengths, 256)
    assert all(lengths[members[0]] == max(lengths[index] for index in members) for members in bins)
    assert [members[0] for members in bins] == sorted(members[0] for members in bins)
    assert pack(np.asarray(lengths), 256) == bins  # type: ignore[arg-type]


def test_bins_of_a_random_order_are_in_random_order() -> None:
    lengths = lengths_like_text(20_000, 512)
    members = [len(each) for each in pack(lengths, 512)]
    half = len(members) // 2
    assert np.mean(members[:half]) == pytest.approx(np.mean(members[half:]), rel=0.03)


def test_in_order_keeps_the_order_of_the_sequences() -> None:
    assert pack([5, 5, 1, 9, 2, 8], 10, in_order=True) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("lengths", [[3, 11], [3, -1]])
def test_a_length_that_no_row_holds_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="sequence 1 has length"):
        pack(lengths, 10)


def test_the_time_grows_little_faster_than_the_sequences() -> None:
    def seconds(count: int) -> float:
        lengths = lengths_like_text(count, 2048)
        start = time.process_time()
        pack(lengths, 2048)
        return time.process_time() - start

    few, many = (min(seconds(count) for _ in range(3)) for count in (8_000, 80_000))
    assert many < 40 * max(few, 0.002)  # 10 times the sequences; a quadratic way takes 100 times


def table_of(sequences: list[list[int]], kind: pa.DataType | None = None) -> pa.Table:
    kind = kind or pa.list_(pa.int32())
    return pa.table(
        {
            "input_ids": pa.array(sequences, type=kind),
            "labels": pa.array([[-value for value in sequence] for sequence in sequences], type=kind),
            "row_id": pa.array([100 + index for index in range(len(sequences))], type=pa.int64()),
            "length": pa.array([len(sequence) for sequence in sequences], type=pa.int32()),
            "note": pa.array([f"n{index}" for index in range(len(sequences))]),
        }
    )


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int32())])
def test_packed_rows_hold_the_sequences_of_their_bin_in_its_order(kind: pa.DataType) -> None:
    table = table_of([[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]], kind)
    packed = packed_table(table, [[3, 1], [0], [2]])
    assert packed.to_pylist() == [
        {"input_ids": [7, 8, 9, 10, 4], "labels": [-7, -8, -9, -10, -4], "row_id": 103, "length": 5, "note": "n3",
         "sequence_lengths": [4, 1], "row_ids": [103, 101]},
        {"input_ids": [1, 2, 3], "labels": [-1, -2, -3], "row_id": 100, "length": 3, "note": "n0",
         "sequence_lengths": [3], "row_ids": [100]},
        {"input_ids": [5, 6], "labels": [-5, -6], "row_id": 102, "length": 2, "note": "n2",
         "sequence_lengths": [2], "row_ids": [102]},
    ]  # fmt: skip
    assert packed.schema.field("input_ids").type == kind
    assert packed.schema.field("length").type == pa.int32()
    assert packed.schema.field("sequence_lengths").type == pa.list_(pa.int32())
    assert packed.schema.field("row_ids").type == pa.list_(pa.int64())


def test_slices_and_chunks_of_a_table_pack_like_a_fresh_one() -> None:
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 99, size=rng.integers(0, 9)).tolist() for _ in range(60)]
    fresh = table_of(sequences)
    chunked = pa.concat_tables([fresh.slice(0, 17), fresh.slice(17, 20), fresh.slice(37)])
    bins = pack([len(sequence) for sequence in sequences], 16)
    expected = packed_table(fresh, bins)
    assert packed_table(chunked, bins).equals(expected)
    assert packed_table(table_of([[1], *sequences]).slice(1).drop_columns(["row_id", "note"]), bins).equals(
        expected.drop_columns(["row_id", "note", "row_ids"])
    )
    assert [sum(row) for row in expected.column("sequence_lengths").to_pylist()] == expected.column(
        "length"
    ).to_pylist()


def test_no_bins_give_an_empty_table_of_the_same_columns() -> None:
    packed = packed_table(table_of([[1, 2]]), [])
    assert packed.num_rows == 0
    assert packed.column_names == ["input_ids", "labels", "row_id", "length", "note", "sequence_lengths", "row_ids"]


def test_list_columns_that_differ_in_length_are_refused() -> None:
    table = pa.table({"input_ids": pa.array([[1, 2]]), "labels": pa.array([[1]])})
    with pytest.raises(ValueError, match="`labels`"):
        packed_table(table, [[0]])
    with pytest.raises(ValueError, match="no list column"):
        packed_table(pa.table({"row_id": [1]}), [[0]])
