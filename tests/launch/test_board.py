"""Who stands still, as a table; and what the board keeps."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.launch import board
from rayft.launch.board import Board, Place, standstill


def place(rank: int, step: int | None = 7, doing: str = "waiting for rows", count: int = 40, **more: float) -> Place:
    silent, still = more.get("silent", 0.5), more.get("still", 0.5)
    return Place(rank, f"10.0.0.{rank}", f"n{rank}", 70 + rank, step, doing, count, silent, still)


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ([], None),
        ([place(0), place(1)], None),
        ([place(0, still=99), place(1)], None),  # waits for rank 1, which moves
        ([place(0, silent=59), place(1, still=59)], None),
        (
            [place(0, still=70), place(1, step=6, doing="updating the weights", count=38, silent=65, still=65)],
            (
                "rank 1 on 10.0.0.1 (process 71) has not been heard of for 65 s; it was last seen at step 6, "
                "updating the weights"
            ),
        ),
        (
            [place(0, still=70, count=41), place(1, doing="in the forward and backward pass", count=40, still=75)],
            (
                "rank 1 on 10.0.0.1 (process 71) stands still at step 7, in the forward and backward pass, for 75 s "
                "(failure.timeout_s is 60); the others wait for it"
            ),
        ),
        (
            [place(0, still=70), place(1, still=70)],
            (
                "all ranks stand still at step 7, waiting for rows, for 70 s (failure.timeout_s is 60); "
                "first of them is rank 0 on 10.0.0.0 (process 70)"
            ),
        ),
        (
            [place(0, step=None, doing="loading the model", still=70)],
            (
                "rank 0 on 10.0.0.0 (process 70) stands still before its first step, loading the model, for 70 s "
                "(failure.timeout_s is 60)"
            ),
        ),
        (
            [
                place(0, step=None, doing="loading the model", still=70),
                place(1, step=None, still=65, doing="loading the model"),
            ],
            (
                "all ranks stand still before their first step, loading the model, for 70 s (failure.timeout_s is 60); "
                "first of them is rank 0 on 10.0.0.0 (process 70)"
            ),
        ),
    ],
)
def test_who_stands_still(places: list[Place], says: str | None) -> None:
    assert standstill(places, 60) == says


def test_a_place_is_silent_since_it_was_heard_and_was_still_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: clock[0])
    told, known = Board(), {"node": "a", "node_id": "b", "pid": 1, "step": 3}

    def pulse(rank: int, count: int, worked: int = 0) -> Any:
        return told.pulse(rank, {**known, "count": count, "worked": worked, "doing": "x"})

    assert pulse(1, 4) is None
    clock[0] = 110.0
    assert pulse(0, 9) is None
    assert pulse(1, 4) is None
    clock[0] = 113.0
    told.push({"event": "step"})
    events, (first, second) = told.drain()
    assert events == [{"event": "step"}]
    assert (first.rank, first.silent_s, first.still_s) == (0, 3.0, 0.0)
    assert (second.rank, second.silent_s, second.still_s) == (1, 3.0, 10.0)
    assert told.drain()[0] == []
    assert pulse(1, 4, worked=1) is None
    assert told.drain()[1][1].still_s == 0.0  # it has come to nothing else, and works
    told.tell("leave")
    assert pulse(1, 5) == "leave"


def test_who_works_alone_for_long_is_not_said_to_stand_still_nor_are_those_who_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: clock[0])
    told = Board()
    waits = {"node": "a", "node_id": "b", "pid": 1, "step": 9, "doing": "waiting for the export", "worked": 0}
    found = []
    for second in range(0, 300, 10):
        clock[0] = float(second)
        told.pulse(1, {**waits, "count": 8})
        told.pulse(0, {**waits, "count": 7, "doing": "exporting", "worked": min(second, 200)})
        found.append(standstill(told.drain()[1], 60))
    assert found[:27] == [None] * 27
    assert found[27:] == [
        f"rank 0 on a (process 1) stands still at step 9, exporting, for {second} s (failure.timeout_s is 60); "
        "the others wait for it"
        for second in (70, 80, 90)
    ]
