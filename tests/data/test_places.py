"""Places of rows: a good hash, exact shares, and choices that are independent of one another."""

from __future__ import annotations

import numpy as np
import pytest

from rayft.data.places import cut_hashes, cut_size, mix, places, smallest, times

IDS = np.arange(200_000, dtype=np.int64)


def test_mix_is_splitmix64() -> None:
    # The first outputs of the reference generator seeded with 0 and, for its second state, the increment.
    assert mix(np.array([0, 0x9E3779B97F4A7C15], np.uint64)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_places_of_neighbouring_rows_are_all_different_and_evenly_spread() -> None:
    found = mix(IDS)
    assert len(np.unique(found)) == len(IDS)
    for parts in (2, 7, 64):
        counts = np.bincount((found % np.uint64(parts)).astype(np.int64), minlength=parts)
        expected = len(IDS) / parts
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert abs(np.corrcoef(IDS, found.astype(np.float64))[0, 1]) < 0.01


def test_copies_of_a_row_have_places_of_their_own() -> None:
    zero, one, two = (places(IDS, np.full(len(IDS), copy)) for copy in range(3))
    assert np.array_equal(zero, mix(IDS))
    assert len(np.unique(np.concatenate([zero, one, two]))) == 3 * len(IDS)


@pytest.mark.parametrize(("weight", "seen"), [(1.0, {1}), (3.0, {3}), (0.3, {0, 1}), (2.75, {2, 3}), (1e-9, {0})])
def test_weights_are_kept_on_average(weight: float, seen: set[int]) -> None:
    found = times(IDS, weight)
    assert set(found.tolist()) == seen
    assert found.mean() == pytest.approx(weight, abs=0.005)


def test_the_cut_the_place_and_the_copies_of_a_row_are_independent() -> None:
    choices = [cut_hashes(IDS) < 2**63, mix(IDS) < 2**63, times(IDS, 0.5) == 1]
    assert np.abs(np.corrcoef(choices) - np.eye(3)).max() < 0.01


def test_smallest_keeps_the_smallest_whatever_the_order_they_come_in() -> None:
    hashes = cut_hashes(IDS)
    total = np.empty(0, np.uint64)
    for part in np.array_split(hashes, 17):
        total = smallest(np.concatenate([total, part]), 100)
    assert sorted(total.tolist()) == sorted(hashes.tolist())[:100]


@pytest.mark.parametrize(
    ("rows", "cut"), [(2, 1), (9, 1), (10, 1), (25, 2), (8_989, 898), (99_999, 9_999), (10**9, 10_000)]
)
def test_the_cut_is_a_tenth_up_to_ten_thousand(rows: int, cut: int) -> None:
    assert cut_size(rows) == cut
