"""A worker group that never begins is not waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rayft.errors import ClusterError
from rayft.launch import group
from rayft.launch.failure import Left
from rayft.recipe import Recipe

STOP = Left("stop", "SIGTERM asks to stop")


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a group, for what it is asked, whose trainer waits for workers of which the board never hears."""
    plain = {"name": "x", "task": {"type": "text-classification"}, "model": {"path": "m"}, "data": {"train": "d.csv"}}
    recipe = Recipe.parse({**plain, "train": {"epochs": 1}, "failure": {"grace_s": 0}})
    over = threading.Event()
    trainer, call = SimpleNamespace(fit=over.wait), SimpleNamespace(remote=lambda *_: None)
    board = SimpleNamespace(drain=call, tell=call)
    monkeypatch.setattr(group, "TURN_S", 0.001)
    monkeypatch.setattr(group, "NOTICE_S", 0.0)
    monkeypatch.setattr(group.ray, "get", lambda *_, **__: ([], []))
    monkeypatch.setattr(group.placement, "leaving", set)
    yield lambda asked: group._Group(recipe, 1, 0, trainer, board, lambda event: None, lambda: asked)  # type: ignore[arg-type]
    over.set()


def test_a_stop_before_any_worker_has_begun_ends_the_run(never: Any) -> None:
    assert never(STOP).run() == Left("stop", "SIGTERM asks to stop", late=True)


def test_workers_that_can_not_begin_end_the_run_with_the_reason(never: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([None, None, "no worker can begin"])
    monkeypatch.setattr(group.prestart, "failing", lambda since: next(told))
    with pytest.raises(ClusterError, match="no worker can begin"):
        never(None).run()
