"""Which rows are in which global batch: a function of (seed, epoch), never of the cluster.

    chunks (row groups), permuted per epoch:   c7 c2 c9 c0 ...
    cut into windows of whole global batches:  [ window 0 ][ window 1 ] ... [ last ]
    a window's rows, shuffled, sorted by length, about, cut into global batches, and these shuffled again
    a global batch's rows, dealt to the ranks: rank r of n takes r, r+n, ...; where a task couples rows, groups of them

Rows of like length meet in a batch, so that little is padding and no rank waits for a longer share, unless the recipe
has it otherwise (`data.group_by_length`). The number of ranks comes in only at the last line. Random numbers are raw
64-bit words of Philox, which neither numpy's version nor the platform changes, unlike the results of
`Generator.permutation`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rayft.errors import DataError

WINDOW_ROWS = 4096  # enough rows of like length to meet; small enough to be read whole by one task
WINDOW_BYTES = 64 * 2**20
ALIKE = 20  # lengths that differ by one part of so many count as equal
WINDOWS = 1024  # of an epoch, about, where the bytes allow: each costs 1 ms when an execution starts

_UNIT = 2**16  # what a length of 1 is scaled to, before it is put into a class
# What random numbers are drawn for: streams that never overlap.
_CHUNKS, _ROWS, _INCOMPLETE, _BATCHES, _VARY, _LENGTHS = range(6)


class Chunk(NamedTuple):
    """A row group of a shard: the unit that is read."""

    shard: int
    group: int
    rows: int


class Piece(NamedTuple):
    """Rows `start` to `stop` (exclusive) of a row group."""

    shard: int
    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Consecutive rows of an epoch that one task reads; `first_step` counts optimizer steps within the epoch from 0."""

    epoch: int
    index: int
    pieces: tuple[Piece, ...]
    first_step: int
    steps: int

    @property
    def rows(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass(frozen=True)
class Part:
    """The steps `start` to `stop` (exclusive), counted within the window, that are still to be made of it."""

    window: Window
    start: int
    stop: int


@dataclass(frozen=True)
class Position:
    """`step` optimizer steps of epoch `epoch` are done (both from 0)."""

    epoch: int = 0
    step: int = 0


class Order:
    """The order of one split's rows. Plain data: it may be sent to any process and says the same there.

    A window has about `window_rows` rows, more where an epoch would have too many windows, fewer where rows are large:
    `bytes_per_row` caps it at 64 MiB. It holds at least one global batch. `chunks` are kept as an array of shape
    (chunks, 3), since a billion rows have two million: every worker holds them, and those of an epoch still to come.
    `group` consecutive rows of a global batch go to one rank, in one micro-batch: see `Task.coupled`. Without `alike`
    the rows of a batch are of any lengths.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk] | np.ndarray,
        global_batch_size: int,
        seed: int,
        shuffle: bool = True,
        window_rows: int = WINDOW_ROWS,
        bytes_per_row: float = 0.0,
        group: int = 1,
        alike: bool = True,
    ):
        given = np.asarray(chunks, np.int32).reshape(-1, 3)
        self.chunks = given[given[:, 2] > 0]
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle, self.alike = shuffle, alike
        self.group = group
        self.rows = int(self.chunks[:, 2].sum(dtype=np.int64))
        if not self.rows:
            raise DataError("the training split has no rows left after preparation")
        window_rows = max(window_rows, math.ceil(self.rows / WINDOWS))
        if bytes_per_row:
            window_rows = min(window_rows, int(WINDOW_BYTES / bytes_per_row))
        self.steps_per_window = max(1, window_rows // global_batch_size)
        self.window_rows = self.steps_per_window * global_batch_size
        self.steps_per_epoch = math.ceil(self.rows / global_batch_size)
        self.windows_per_epoch = math.ceil(self.rows / self.window_rows)

    # Positions

    def step(self, position: Position) -> int:
        """Optimizer steps done at `position`, over all epochs."""
        return position.epoch * self.steps_per_epoch + position.step

    def position(self, step: int) -> Position:
        """The position after `step` optimizer steps; an epoch's end is the next one's start."""
        return Position(*divmod(step, self.steps_per_epoch))

    def window_at(self, step: int) -> tuple[int, int]:
        """The index of the window that holds step `step` of an epoch, and the step's place in it."""
        return divmod(step, self.steps_per_window)

    # Windows

    def windows(self, epoch: int) -> tuple[Window, ...]:
        """All windows of an epoch, in order."""
        return tuple(part.window for part in self.parts(Position(epoch), (epoch + 1) * self.steps_per_epoch))

    def parts(self, start: Position, total_steps: int) -> Iterator[Part]:
        """What is still to be read of a run of `total_steps` optimizer steps that stands at `start`."""
        step = self.step(start)
        epoch, layout = -1, _Layout(self.chunks[:0], self.window_rows)
        while step < total_steps:
            position = self.position(step)
            if position.epoch != epoch:
                epoch, layout = position.epoch, self._layout(position.epoch)
            index, offset = self.window_at(position.step)
            first = index * self.steps_per_window
            steps = min(self.steps_per_window, self.steps_per_epoch - first)
            stop = min(steps, offset + total_steps - step)
            yield Part(Window(epoch, index, layout.pieces(index), first, steps), offset, stop)
            step += stop - offset

    def _layout(self, epoch: int) -> _Layout:
        chunks = self.chunks
        if self.shuffle:
            chunks = chunks[_permutation(len(chunks), self.seed, _CHUNKS, epoch)]
        return _Layout(chunks, self.window_rows)

    def batches(self, window: Window, lengths: np.ndarray) -> list[np.ndarray]:
        """The rows of each of the window's global batches, in the order of its steps: see `batches`."""
        return batches(window, lengths, self.global_batch_size, self.seed, self.shuffle, self.alike)


def batches(
    window: Window, lengths: np.ndarray, size: int, seed: int, shuffle: bool, alike: bool = True
) -> list[np.ndarray]:
    """The rows of each of a window's global batches of `size` rows, as indices into the window.

    `lengths` holds each row's length in tokens (or frames, ...): integers of shape (rows of the window,). With `alike`
    those of a batch are nearly the same.
    """
    rows, key = len(lengths), (window.epoch, window.index)
    if not shuffle:
        return np.split(np.arange(rows), range(size, rows, size))
    ordered = _permutation(rows, seed, _ROWS, *key)
    if alike:
        classes = _classes(lengths[ordered], int(_philox(seed, _LENGTHS, *key).random_raw()))
        ordered = ordered[np.argsort(classes, kind="stable")]
    # The epoch's incomplete batch lies anywhere among the lengths: at their end it would always get the longest.
    sizes = np.full(window.steps, size)
    sizes[_permutation(window.steps, seed, _INCOMPLETE, *key)[0]] -= window.steps * size - rows
    cut = np.split(ordered, np.cumsum(sizes)[:-1])
    return [cut[i] for i in _permutation(window.steps, seed, _BATCHES, *key)]


def _classes(lengths: np.ndarray, draw: int) -> np.ndarray:
    """For each length the number of its class: lengths of a class differ by a twentieth at most.

    Where each row has a length of its own, as sounds have, sorting by the length itself would give the same batches in
    every epoch. Where the classes begin is drawn: `draw` is a random word. In integers, so that no platform differs.
    """
    scaled = lengths.astype(np.int64) * (_UNIT + draw % (_UNIT // ALIKE))
    bounds = [_UNIT]
    while bounds[-1] <= scaled.max(initial=0):
        bounds.append(bounds[-1] + bounds[-1] // ALIKE)
    return np.searchsorted(np.array(bounds), scaled, side="right")


class _Layout:
    """The chunks of an epoch in their order, cut into windows."""

    def __init__(self, chunks: np.ndarray, window_rows: int):
        self._chunks = chunks
        self._window_rows = window_rows
        self._ends = np.cumsum(chunks[:, 2], dtype=np.int64)

    def pieces(self, index: int) -> tuple[Piece, ...]:
        """The parts of chunks that window `index` covers."""
        begin, end = index * self._window_rows, (index + 1) * self._window_rows
        pieces = []
        for i in range(int(np.searchsorted(self._ends, begin, side="right")), len(self._chunks)):
            chunk = Chunk(*self._chunks[i].tolist())
            first = int(self._ends[i]) - chunk.rows
            if first >= end:
                break
            pieces.append(Piece(chunk.shard, chunk.group, max(0, begin - first), min(chunk.rows, end - first)))
        return tuple(pieces)


def share(rows: int, world: int, rank: int, group: int = 1) -> np.ndarray:
    """The places that rank `rank` of `world` takes of a global batch of `rows` rows, which it gets in whole groups."""
    places = np.arange(rows)
    return places[places // group % world == rank]


def micro_batches(rows: int, world: int, rank: int, micro_batch_size: int, group: int = 1) -> tuple[slice, ...]:
    """Cuts a rank's share of a global batch of `rows` rows into micro-batches of nearly as many whole groups.

    Every rank makes as many as the one with the largest share, so that all meet in the same collective operations;
    those that have no row for it get an empty slice. `micro_batch_size` holds one group at least.
    """
    groups, held = math.ceil(rows / group), len(share(rows, world, rank, group))
    own = len(range(rank, groups, world))
    count = max(1, math.ceil(math.ceil(groups / world) / (micro_batch_size // group)))
    size, larger = divmod(own, count)
    ends = [min(held, (size * i + min(i, larger)) * group) for i in range(count + 1)]
    return tuple(slice(begin, end) for begin, end in itertools.pairwise(ends))


def row_generator(seed: int, epoch: int, row_id: int) -> np.random.Generator:
    """The random numbers of one row in one epoch."""
    return np.random.Generator(_philox(seed, _VARY, epoch, row_id))


def _permutation(count: int, seed: int, *key: int) -> np.ndarray:
    return np.argsort(_philox(seed, *key).random_raw(count), kind="stable")


def _philox(seed: int, *key: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))
