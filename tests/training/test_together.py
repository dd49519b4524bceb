"""Ranks that wait for each other, however long."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from group import run_group
from rayft.training import together as module
from rayft.training.together import together


class Store:
    """A store of two ranks, of which this process plays one after the other."""

    def __init__(self) -> None:
        self.came, self.known, self.waited = 0, set[str](), list[tuple[str, timedelta]]()

    def clone(self) -> Store:
        return self

    def add(self, key: str, number: int) -> int:
        self.came += number
        return self.came

    def set(self, key: str, value: str) -> None:
        self.known.add(key)

    def wait(self, keys: list[str], patience: timedelta) -> None:
        self.waited.append((keys[0], patience))


def test_the_last_rank_lets_the_others_go_and_each_wait_is_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for number in range(3):
        together()
        waited, patience = store.waited[-1]
        assert waited not in store.known
        assert patience == module.AS_LONG
        together()
        assert waited in store.known
        assert len(store.waited) == number + 1


def ordered(rounds: int) -> list[int]:
    """On a worker: after each wait, how many ranks had come to it before any could leave."""
    store: Any = dist.distributed_c10d._get_default_store()
    found = []
    for number in range(rounds):
        store.add(f"arrived-{number}", 1)
        together()
        found.append(int(store.add(f"arrived-{number}", 0)))
    return found


@pytest.mark.slow
def test_no_rank_goes_on_before_the_last_has_come() -> None:
    assert run_group(ordered, 2, 5) == [[2] * 5, [2] * 5]
