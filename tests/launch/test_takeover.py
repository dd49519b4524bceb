"""Weights that pass from one run to another: what the taker owns then, also where the giver deletes meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import small
from rayft import attempts, storage
from rayft.launch.takeover import take_over
from rayft.recipe import Recipe
from rayft.training import checkpoints


def recipe(folder: Path, name: str, rate: float = 1e-3) -> Recipe:
    return Recipe.parse(small.recipe(folder, "nowhere", name=name, train__learning_rate=rate))


def saved(run: str, step: int, finished: bool = False) -> str:
    """A checkpoint of attempt 1 with one file of tensors; its path."""
    if not attempts.newest(run):
        attempts.claim(run, [], 0)
    path = storage.join(run, "checkpoints", checkpoints.folder_name(step, 1))
    best = {"step": step, "checkpoint": checkpoints.folder_name(step, 1)}
    state: dict[str, Any] = {"step": step, "total_steps": 30, "best": best, "waited": 2, "finished": finished}
    storage.write_json(storage.join(path, "state.json"), {**state, "pending": False, "world": 1, "scores": {"a": 1.0}})
    storage.write_bytes(storage.join(path, "rank-00000.safetensors"), b"weights of step %d" % step)
    storage.commit(path, {"step": step, "world": 1, "best": best["checkpoint"]})
    return path


@pytest.mark.parametrize(("step", "pending"), [(10, False), (30, True)])
def test_the_copy_is_all_that_counts_and_has_no_best_model_of_its_own(tmp_path: Path, step: int, pending: bool) -> None:
    taker, donor = recipe(tmp_path, "taker", 0.5), recipe(tmp_path, "donor").folder
    saved(taker.folder, 20)
    path = take_over(taker, saved(donor, step, finished=step == 30))
    assert path is not None
    assert checkpoints.newest(f"{taker.folder}/checkpoints") == path
    assert checkpoints.committed(f"{taker.folder}/checkpoints") == [path]
    state = storage.read_json(f"{path}/state.json")
    assert {name: state[name] for name in ("step", "best", "waited", "finished", "pending")} == {
        "step": step, "best": None, "waited": 0, "finished": False, "pending": pending,
    }  # fmt: skip
    assert Path(path, "rank-00000.safetensors").read_bytes() == b"weights of step %d" % step
    assert Recipe.load(f"{taker.folder}/recipe.yaml").train.learning_rate == 0.5
    storage.delete(donor)
    assert checkpoints.newest(f"{taker.folder}/checkpoints") == path


def test_the_newest_stands_for_one_that_is_deleted_while_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker, donor = recipe(tmp_path, "taker"), recipe(tmp_path, "donor").folder
    first = saved(donor, 10)
    download = storage.download

    def slow(source: str, folder: str) -> None:
        download(source, folder)
        if source == first:
            saved(donor, 12)
            storage.delete(first)

    monkeypatch.setattr(storage, "download", slow)
    path = take_over(taker, first)
    assert path is not None
    assert checkpoints.step_of(path) == 12
    assert Path(path, "rank-00000.safetensors").read_bytes() == b"weights of step 12"
    gone = take_over(taker, first)  # from the beginning
    assert gone is not None
    assert checkpoints.step_of(gone) == 12


def test_where_nothing_is_left_to_take_over_nothing_changes(tmp_path: Path) -> None:
    taker, donor = recipe(tmp_path, "taker"), recipe(tmp_path, "donor").folder
    own, path = saved(taker.folder, 20), saved(donor, 10)
    storage.delete(donor)
    assert take_over(taker, path) is None
    assert checkpoints.newest(f"{taker.folder}/checkpoints") == own
    assert attempts.newest(taker.folder) == 1
