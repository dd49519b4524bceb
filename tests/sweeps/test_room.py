"""How many trials run at a time, and that those who read for them are never left without a processor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import small
from rayft.errors import ClusterError
from rayft.recipe import Recipe
from rayft.sweeps import room


@pytest.mark.parametrize(
    ("workers", "cpus", "free", "trials"), [(1, 1, 6, 4), (2, 1, 6, 2), (1, 2, 3, 2), (4, 1, 8, 1), (8, 1, 8, 1)]
)
def test_a_local_sweep_runs_as_many_trials_as_the_machine_has_processors_for(
    workers: int, cpus: int, free: int, trials: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever Ray was told that there are: it has room for the readers too."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(room.placement, "room", lambda cluster: free)
    plain = small.recipe(tmp_path, "nowhere", cluster__workers=workers, cluster__cpus_per_worker=cpus)
    assert room.at_once(Recipe.parse(plain)) == trials


def preparing(folder: Path, **changes: Any) -> Recipe:
    """A sweep whose trials prepare rows of their own."""
    plain = small.recipe(folder, "nowhere", **{"cluster__workers": 1, **changes})
    plain["tune"] = {"search": {"task.max_length": {"choice": [16, 32]}}, "trials": 9}
    return Recipe.parse(plain)


@pytest.mark.parametrize(
    ("workers", "cpus", "there", "trials"),
    [(1, 1, 8, 6), (1, 1, 3, 1), (1, 1, 2, 1), (2, 1, 8, 3), (2, 1, 3, 1), (1, 4, 16, 3), (1, 4, 5, 1)],
)
def test_trials_that_prepare_rows_never_hold_every_cpu(
    workers: int, cpus: int, there: int, trials: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    monkeypatch.setattr(room.placement, "room", lambda cluster: there // cpus)
    monkeypatch.setattr(room.placement, "free_cpus", lambda: there)
    monkeypatch.setattr(room.placement, "living_nodes", lambda: [{"Resources": {"CPU": there}}])
    recipe = preparing(tmp_path, cluster__workers=workers, cluster__cpus_per_worker=cpus)
    room.refuse(recipe)
    assert room.at_once(recipe) == trials
    assert trials * workers * cpus < there


def test_a_cluster_without_a_cpu_to_prepare_rows_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room.placement, "living_nodes", lambda: [{"Resources": {"CPU": 2.0}}])
    with pytest.raises(
        ClusterError, match=r"task\.max_length prepare rows .* a CPU beside its 2, and the cluster has 2;"
    ):
        room.refuse(preparing(tmp_path, cluster__workers=2))
    plain = small.recipe(tmp_path, "nowhere", cluster__workers=2)
    plain["tune"] = {"search": {"train.learning_rate": {"choice": [1e-3]}}, "trials": 1}
    room.refuse(Recipe.parse(plain))
