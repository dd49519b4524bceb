"""What a sweep looks at before it stores the frozen blocks' output: where, and in which precision."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rayft.data.prepare import prepare
from rayft.recipe import Recipe
from rayft.sweeps import depths
from rayft.tasks.task import Pretrained
from small import recipe as small_recipe
from small import small_bert


def test_with_gpus_a_batch_is_tried_on_one_of_them_and_not_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without processors for it would take minutes for a large model."""
    plain = {
        "name": "s",
        "task": {"type": "text-classification"},
        "model": {"path": "m"},
        "data": {"train": "t.csv"},
        "train": {"epochs": 1},
        "cluster": {"workers": 1, "gpus_per_worker": 1, "cpus_per_worker": 4},
    }
    asked: dict[str, Any] = {}

    def remote(**options: Any) -> Any:
        asked.update(options)
        return lambda function: SimpleNamespace(remote=lambda *given: (function, given))

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    recipe, prepared = Recipe.parse(plain), SimpleNamespace(folder="folder")
    assert depths._tried(recipe, prepared, "warm", [2]) == (depths.tried, (recipe.dump(), "folder", "warm", [2]))
    assert asked == {"num_gpus": 1, "num_cpus": 4, "max_retries": 0}
    assert depths._tried(recipe, prepared, "warm", []) == {}


@pytest.mark.slow
def test_a_batch_is_tried_as_trials_will_pass_it_through(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = small_recipe(tmp_path, small_bert(tmp_path / "bert", blocks=3), cluster__workers=1)
    base = Pretrained(plain["model"]["path"])
    shown = {}
    for dtype in ("float32", "bfloat16"):
        recipe = Recipe.parse(plain, overrides=[f"model.dtype={dtype}"])
        prepared = prepare(recipe, base.path, progress=lambda *_: None)["train"]
        facts = prepared.manifest.facts
        network = lambda _, recipe=recipe, facts=facts: recipe.task.load(base, facts, recipe.task.processor(base))  # noqa: E731
        monkeypatch.setattr(depths, "network", network)
        shown[dtype] = depths._tried(recipe, prepared, SimpleNamespace(base=base), [1, 2])
    assert [tried.why_not for found in shown.values() for tried in found.values()] == [None] * 4
    for depth in (1, 2):
        wide, narrow = shown["float32"][depth], shown["bfloat16"][depth]
        assert (narrow.operations, narrow.bytes) == (wide.operations, wide.bytes / 2)
