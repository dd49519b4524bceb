"""What a worker tells the driver's board, and the order that comes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from rayft import storage
from rayft.training import watch
from rayft.training.watch import LEAVE, Used, Watch, beat_s, works


@ray.remote(num_cpus=0)
class Board:
    """Keeps what it is told, and answers with what it was given."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.order: str | None = None

    def pulse(self, rank: int, place: dict[str, Any]) -> str | None:
        self.told.append((rank, place))
        return self.order

    def give(self, order: str) -> None:
        self.order = order

    def heard(self) -> list[tuple[int, dict[str, Any]]]:
        return self.told


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT_S", 0.02)


@pytest.mark.usefixtures("ray_local", "quick")
def test_the_board_hears_where_a_rank_stands_and_its_order_comes_back() -> None:
    board: Any = Board.remote()  # type: ignore[attr-defined]
    with Watch(board, 3) as watched:
        watched.at("waiting for rows", 7)
        watched.at("in the forward and backward pass")
        until(lambda: any(place["count"] == 2 for _, place in ray.get(board.heard.remote())))
        rank, place = ray.get(board.heard.remote())[-1]
        assert (rank, place["step"], place["doing"]) == (3, 7, "in the forward and backward pass")
        assert {"node", "node_id", "pid"} <= set(place)
        assert not watched.leave
        ray.get(board.give.remote(LEAVE))
        until(lambda: watched.leave)
    watched._thread.join(timeout=60)
    assert not watched._thread.is_alive()


@pytest.mark.usefixtures("ray_local", "quick")
def test_a_board_that_is_gone_ends_the_telling_and_nothing_else() -> None:
    board: Any = Board.remote()  # type: ignore[attr-defined]
    with Watch(board, 0) as watched:
        until(lambda: bool(ray.get(board.heard.remote())))
        ray.kill(board)
        watched._thread.join(timeout=60)
        assert not watched._thread.is_alive()
        watched.at("evaluating", 1)
        assert not watched.leave


# Seconds, of a processor, blocks, pieces.
IDLE, COMPUTES, READS, SENDS = (1.0, 0.05, 10, 0), (1.0, 0.2, 0, 0), (1.0, 0.0, 200, 0), (8.0, 0.1, 10, 1)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (IDLE, False),
        (COMPUTES, True),
        (READS, True),
        (SENDS, True),
        ((8.0, 0.2, 200, 0), False),
        ((8.0, 1.0, 0, 0), True),
    ],
)
def test_a_process_works_that_computes_or_reads_or_sends(step: tuple[float, float, int, int], expected: bool) -> None:
    seconds, cpu, blocks, pieces = step
    before, after = Used(5.0, 3.0, 100, 7), Used(5.0 + seconds, 3.0 + cpu, 100 + blocks, 7 + pieces)
    assert works(before, after) is expected


def test_what_storage_has_moved_is_seen(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(b"x")
    before = Used.now()
    storage.fetch(str(tmp_path / "from"), str(tmp_path / "to"))
    assert Used.now().pieces == before.pieces + 1


@pytest.mark.usefixtures("ray_local", "quick")
def test_only_what_a_rank_is_busy_with_counts_as_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that hangs may well keep a processor busy."""
    monkeypatch.setattr(watch, "works", lambda before, after: True)
    board: Any = Board.remote()  # type: ignore[attr-defined]

    def heard() -> list[tuple[str, int]]:
        return [(place["doing"], place["worked"]) for _, place in ray.get(board.heard.remote())]

    with Watch(board, 0) as watched:
        watched.at("in the forward and backward pass", 1)
        until(lambda: len(heard()) > 3)
        with watched.busy("exporting"):
            until(lambda: heard()[-1][1] >= 3)
        watched.at("updating the weights")
        until(lambda: [doing for doing, _ in heard()].count("updating the weights") > 3)
        found = heard()
    assert {worked for doing, worked in found if doing == "in the forward and backward pass"} == {0}
    assert len({worked for doing, worked in found if doing == "exporting"}) >= 3
    assert len({worked for doing, worked in found if doing == "updating the weights"}) == 1


def test_many_workers_send_less_often() -> None:
    assert [beat_s(world) for world in (1, 8, 500, 1000, 4000)] == [1, 1, 1, 2, 8]


def test_where_nobody_watches_nothing_is_started() -> None:
    with Watch(None, 0) as watched:
        watched.at("evaluating")
        assert not watched._thread.is_alive()
