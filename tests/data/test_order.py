"""The order of rows is a function of (seed, epoch), and deals every row exactly once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rayft.data.order import (
    WINDOW_BYTES,
    WINDOWS,
    Chunk,
    Order,
    Position,
    Window,
    _classes,
    micro_batches,
    row_generator,
    share,
)
from rayft.errors import DataError

ROWS = (1, 3, 517, 1037, 5000)
SIZES = (8, 32)
PINNED = [[1, 9, 6, 3], [2, 7, 4, 15], [0, 8, 5, 16], [11], [19, 13, 10, 18], [12, 20, 17, 14]]
PINNED_ROW = 14011143217252783218


def make(
    rows: int, size: int = 8, *, shuffle: bool = True, seed: int = 3, window_rows: int = 4096, group: int = 100
) -> Order:
    """An order over shards of three row groups each."""
    groups = [min(group, rows - first) for first in range(0, rows, group)]
    chunks = [Chunk(i // 3, i % 3, count) for i, count in enumerate(groups)]
    return Order(chunks, size, seed, shuffle, window_rows)


def row_numbers(order: Order, window: Window) -> np.ndarray:
    """For each row of a window its number in the source."""
    firsts = dict(zip(((s, g) for s, g, _ in order.chunks.tolist()), np.cumsum([0, *order.chunks[:, 2]]), strict=False))
    return np.concatenate([firsts[p.shard, p.group] + np.arange(p.start, p.stop) for p in window.pieces])


def length_of(rows: np.ndarray) -> np.ndarray:
    return (rows * 7919) % 97


def epoch_batches(order: Order, epoch: int) -> list[np.ndarray]:
    batches = []
    for window in order.windows(epoch):
        rows = row_numbers(order, window)
        batches += [rows[batch] for batch in order.batches(window, length_of(rows))]
    return batches


@pytest.mark.parametrize(("rows", "size", "shuffle"), [*itertools.product(ROWS, SIZES, (True, False))])
def test_every_row_is_in_an_epoch_once_and_one_batch_at_most_is_incomplete(rows: int, size: int, shuffle: bool) -> None:
    order = make(rows, size, shuffle=shuffle, window_rows=256)
    batches = epoch_batches(order, 1)
    assert len(batches) == order.steps_per_epoch == -(-rows // size)
    assert sorted(np.concatenate(batches)) == list(range(rows))
    assert sorted(len(batch) for batch in batches)[1:] == [size] * (len(batches) - 1)


@pytest.mark.parametrize("rows", ROWS)
def test_windows_are_whole_global_batches_and_meet_without_a_gap(rows: int) -> None:
    order = make(rows, 32, window_rows=300)
    windows = order.windows(0)
    assert order.window_rows == 288
    assert [w.rows for w in windows[:-1]] == [288] * (len(windows) - 1)
    assert len(windows) == order.windows_per_epoch
    assert [w.first_step for w in windows] == list(itertools.accumulate((w.steps for w in windows[:-1]), initial=0))
    for step in range(order.steps_per_epoch):
        index, offset = order.window_at(step)
        assert windows[index].first_step + offset == step
        assert offset < windows[index].steps


def test_unshuffled_keeps_the_source_order() -> None:
    order = make(1037, 32, shuffle=False, window_rows=256)
    assert np.concatenate(epoch_batches(order, 2)).tolist() == list(range(1037))


def test_epochs_and_seeds_differ_and_repeat_themselves() -> None:
    def flat(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_batches(make(517, seed=seed, window_rows=128), epoch)).tolist()

    assert flat(3, 0) == flat(3, 0)
    assert len({tuple(flat(seed, epoch)) for seed in (0, 3) for epoch in (0, 1, 2)}) == 6


def test_the_order_is_pinned() -> None:
    """A change here makes every run that was begun before it resume wrongly."""
    order = make(21, 4, group=5, window_rows=12)
    assert [batch.tolist() for batch in epoch_batches(order, 1)] == PINNED
    assert row_generator(3, 1, 5 << 40 | 7).bit_generator.random_raw() == PINNED_ROW


def test_rows_of_like_length_meet_and_no_length_comes_first() -> None:
    order = make(4096, 32)
    batches = epoch_batches(order, 0)
    spread = [np.ptp(length_of(batch)) for batch in batches]
    assert max(spread) <= 8
    assert np.mean(spread) < 5
    means = np.array([length_of(batch).mean() for batch in batches])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.25


def test_ungrouped_batches_hold_rows_of_all_lengths() -> None:
    order = make(4096, 32)
    order.alike = False
    batches = epoch_batches(order, 0)
    assert sorted(np.concatenate(batches)) == list(range(4096))
    assert min(np.ptp(length_of(batch)) for batch in batches) > 48
    assert np.std([length_of(batch).mean() for batch in batches]) < 1.3 * 28 / np.sqrt(32)  # as of rows drawn at random


def test_rows_of_lengths_of_their_own_meet_others_in_each_epoch() -> None:
    order, pairs = make(1024, 16), []
    for epoch in range(4):
        (window,) = order.windows(epoch)
        rows = row_numbers(order, window)
        batches = [rows[batch] for batch in order.batches(window, 4000 + 10 * rows)]
        pairs.append({pair for batch in batches for pair in itertools.combinations(sorted(batch.tolist()), 2)})
    assert all(len(one & other) < len(one) / 2 for one, other in itertools.combinations(pairs, 2))


def test_short_lengths_are_classes_of_their_own() -> None:
    for draw in (0, 1, 2**63, 2**64 - 1):
        assert len(set(_classes(np.arange(1, 21), draw))) == 20


def test_lengths_of_a_class_differ_by_a_twentieth_at_most() -> None:
    lengths = np.arange(1, 40_000)
    for draw in (0, 12345, 2**64 - 1):
        classes = _classes(lengths, draw)
        assert np.all(np.diff(classes) >= 0)
        for number in np.unique(classes):
            own = lengths[classes == number]
            assert own.max() <= own.min() * 21 / 20


def test_the_incomplete_batch_is_not_always_the_longest_rows() -> None:
    order = make(4 * 32 + 5, 32)
    means = [length_of(min(epoch_batches(order, epoch), key=len)).mean() for epoch in range(20)]
    assert min(means) < 20
    assert max(means) > 75


@pytest.mark.parametrize(("rows", "size"), [*itertools.product(ROWS, SIZES)])
def test_global_batches_are_the_same_sets_on_any_number_of_ranks(rows: int, size: int) -> None:
    for batch in epoch_batches(make(rows, size), 0):
        for world in (1, 2, 3, 4, 7):
            shares = [batch[share(len(batch), world, rank)] for rank in range(world)]
            assert sorted(np.concatenate(shares)) == sorted(batch)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (3, 8), (517, 32), (1037, 8)])
def test_what_remains_at_any_position_is_the_tail_of_the_untouched_run(rows: int, size: int) -> None:
    order = make(rows, size, window_rows=64)
    total = 2 * order.steps_per_epoch + order.steps_per_epoch // 2

    def steps(start: Position) -> list[tuple[int, int, int]]:
        return [(p.window.epoch, p.window.index, s) for p in order.parts(start, total) for s in range(p.start, p.stop)]

    whole = steps(Position())
    assert len(whole) == total
    for done in {0, 1, total // 3, order.steps_per_epoch, total - 1, total}:
        assert order.step(order.position(done)) == done
        assert steps(order.position(done)) == whole[done:]


def test_an_epochs_end_is_the_next_epochs_start() -> None:
    order = make(517, 32)
    assert order.position(order.steps_per_epoch) == Position(1, 0)
    assert list(order.parts(Position(0, order.steps_per_epoch), 20)) == list(order.parts(Position(1, 0), 20))


def test_windows_of_large_rows_are_capped_in_bytes() -> None:
    chunks = [Chunk(0, i, 100) for i in range(100)]
    assert Order(chunks, 32, 0, bytes_per_row=WINDOW_BYTES / 100).window_rows == 96
    assert Order(chunks, 32, 0, bytes_per_row=WINDOW_BYTES).window_rows == 32
    assert Order(chunks, 32, 0, bytes_per_row=100).window_rows == 4096


def test_windows_of_many_rows_grow_so_that_an_epoch_has_few() -> None:
    order = Order([Chunk(0, i, 100_000) for i in range(400)], 32, 0, bytes_per_row=100)
    assert order.windows_per_epoch < 1.01 * WINDOWS
    assert order.window_rows % 32 == 0


def test_a_split_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match="no rows"):
        Order([Chunk(0, 0, 0)], 8, 0)


@pytest.mark.parametrize(
    ("rows", "world", "size", "sizes"),
    [
        (32, 1, 16, [[16, 16]]),
        (32, 2, 16, [[16], [16]]),
        (32, 3, 4, [[4, 4, 3], [4, 4, 3], [4, 3, 3]]),
        (3, 4, 16, [[1], [1], [1], [0]]),
        (5, 2, 1, [[1, 1, 1], [1, 1, 0]]),
        (1, 3, 8, [[1], [0], [0]]),
        (9, 2, 4, [[3, 2], [2, 2]]),
    ],
)
def test_every_rank_makes_as_many_micro_batches(rows: int, world: int, size: int, sizes: list[list[int]]) -> None:
    cuts = [micro_batches(rows, world, rank, size) for rank in range(world)]
    assert [[s.stop - s.start for s in cut] for cut in cuts] == sizes
    for rank, cut in enumerate(cuts):
        own = list(range(rank, rows, world))
        assert [row for s in cut for row in own[s]] == own


@pytest.mark.parametrize(("rows", "group"), [(22, 4), (2, 4), (32, 16), (9, 3), (1, 2)])
def test_groups_stay_whole_on_one_rank_and_in_one_micro_batch(rows: int, group: int) -> None:
    groups = {tuple(range(first, min(rows, first + group))) for first in range(0, rows, group)}
    for world, size in itertools.product((1, 2, 3, 5), (group, group + 1, 2 * group, 100)):
        found, counts = [], set()
        for rank in range(world):
            own = share(rows, world, rank, group)
            cuts = micro_batches(rows, world, rank, size, group)
            counts.add(len(cuts))
            assert np.concatenate([own[cut] for cut in cuts]).tolist() == own.tolist()
            for cut in cuts:
                part = own[cut].tolist()
                assert len(part) <= size
                found += [tuple(part[first : first + group]) for first in range(0, len(part), group)]
        assert len(counts) == 1
        assert len(found) == len(groups)
        assert set(found) == groups


def test_a_rows_random_numbers_depend_on_seed_epoch_and_row() -> None:
    draws = {
        tuple(row_generator(*key).integers(0, 2**62, 2).tolist())
        for key in itertools.product((0, 1), (0, 1), (0, 1, 2**40))
    }
    assert len(draws) == 12
