"""Scattering and gathering: exact sums, and streams that are found again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayft.data.shards import Counts, Encoder, _gathered, _loaded, _streams, bound
from rayft.data.source import BadRow
from rayft.tasks.task import Pretrained
from rayft.tasks.text_classification import TextClassification


def test_bounds_of_lengths_are_powers_of_two_and_what_lies_between() -> None:
    found = [bound(length) for length in range(1, 5000)]
    assert sorted(set(found)) == [
        1,
        2,
        3,
        4,
        *(step for power in range(2, 12) for step in (3 << power - 1, 2 << power)),
        6144,
    ]
    assert all(length <= top for length, top in enumerate(found, 1))
    assert found == sorted(found)


def test_streams_hold_each_shards_rows_in_their_order_and_nothing_else(tmp_path: Path) -> None:
    shards = np.array([7, 0, 7, 3, 0, 7], np.int64)
    table = pa.table({"words": [[i] * i for i in range(6)], "text": [None, *"bcdef"]})
    content, pieces = _streams(table, shards)
    path = tmp_path / "scratch.arrow"
    path.write_bytes(content)
    assert [shard for shard, *_ in pieces] == [0, 3, 7]
    for shard, offset, length in pieces:
        assert (
            _gathered([(str(path), offset, length)]).to_pylist()
            == table.take(np.flatnonzero(shards == shard)).to_pylist()
        )
    assert _gathered([(str(path), offset, length) for _, offset, length in pieces]).num_rows == 6


def test_counts_add_up_in_any_order_and_keep_the_first_bad_rows() -> None:
    parts = []
    for file in range(4):
        part = Counts(source_rows=10, truncated=1)
        part.dropped.update(["short"] * file)
        for row in range(5):
            part.add_bad(file, BadRow(f"{file}.csv", row, "broken"))
        parts.append(part)
    forwards, backwards = Counts(), Counts()
    for part in parts:
        forwards.add(part)
    for part in reversed(parts):
        backwards.add(part)
    assert forwards == backwards
    assert (forwards.source_rows, forwards.truncated, forwards.dropped["short"], forwards.bad) == (40, 4, 6, 20)
    assert [text for *_, text in forwards.examples] == [
        f"{file}.csv row {row}: broken" for file in (0, 1) for row in range(1, 6)
    ]


class Slow(TextClassification):
    """Whose processors say who made them, and how many are being made at once."""

    def processor(self, model: Pretrained) -> Any:
        inside.append(threading.get_ident())
        most.append(len(inside))
        turn.wait(0.05)
        inside.remove(threading.get_ident())
        return threading.get_ident()


inside, most, turn = list[int](), list[int](), threading.Event()


def test_each_thread_has_a_processor_of_its_own_made_once_while_no_other_is() -> None:
    encoder = Encoder(Slow(), Pretrained("model"), "model", "its hash", {})
    together = threading.Barrier(3)

    def loaded(_: int) -> list[int]:
        together.wait()
        return [_loaded(encoder) for _ in range(5)] + [threading.get_ident()]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(loaded, range(3)))
    assert all(len(set(own)) == 1 for own in found)
    assert len({own[0] for own in found}) == 3
    assert most == [1, 1, 1]
