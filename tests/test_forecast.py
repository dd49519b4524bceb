"""What a sweep is said to cost: the arithmetic over one timed batch, and what `check` makes of a real one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import small
from rayft.data.prepare import prepare
from rayft.forecast import Pace, forecast, measure
from rayft.preflight import check, text
from rayft.recipe import Recipe

DEPTH = "model.freeze.layers"


def sweep(**fields: Any) -> Recipe:
    tune = {"search": {DEPTH: {"choice": [0, 2, "all"]}}, "trials": 12, "sampler": "random", "scheduler": "asha"}
    plain = {
        "name": "s",
        "task": {"type": "text-classification"},
        "model": {"path": "m"},
        "data": {"train": "t.csv"},
        "train": {"epochs": 3, "global_batch_size": 10, "micro_batch_size": 10},
        "tune": tune,
    }
    return Recipe.parse(plain, overrides=[f"{name}={value}" for name, value in fields.items()])


def prepared(tokens: int, rows: int) -> Any:
    shards = [{"row_groups": [rows], "rows": rows, "bytes": 1000, "path": "a"}]
    return SimpleNamespace(manifest=SimpleNamespace(tokens=tokens, rows=rows, source_rows=rows, shards=shards))


def test_a_trial_costs_what_lies_above_its_depth() -> None:
    data: Any = {"train": prepared(1000, 100), "validation": prepared(500, 50)}
    # Four blocks; a token takes 1 ms forward, of which half lies below depth 2, and 2 ms backward.
    pace = Pace({2: 0.5e-3, 4: 0.9e-3}, 1e-3, 2e-3, 0, 1e-9)
    counted = {depth: {"trainable": count, "memory": 1} for depth, count in ((0, 3_000_000), (2, 1_000_000), (4, 1000))}
    found = forecast(sweep(**{"cluster.workers": 1}), data, counted, pace, 2)
    by_depth = {one["depth"]: one for one in found["depths"]}
    assert {depth: one["stored"] for depth, one in by_depth.items()} == {0: False, 2: True, 4: True}
    # 30 steps over 3 x 1000 tokens and 3 evaluations of 500, and the optimizer's share.
    assert by_depth[0]["seconds"] == pytest.approx(3000 * 3e-3 + 1500 * 1e-3 + 30 * 3e-3)
    assert by_depth[2]["seconds"] == pytest.approx(3000 * 1.5e-3 + 1500 * 0.5e-3 + 30 * 1e-3)
    assert by_depth[4]["seconds"] == pytest.approx(3000 * 0.3e-3 + 1500 * 0.1e-3 + 30 * 1e-6)
    each = sum(one["seconds"] for one in by_depth.values()) / 3
    assert found["seconds"] == pytest.approx((12 * each + 1500 * 0.9e-3) / 2)
    # Without the stored output the blocks below are passed through, but not back.
    off = forecast(sweep(**{"cluster.workers": 1, "model.cache_frozen": "off"}), data, counted, pace, 2)
    plain = {one["depth"]: one["seconds"] for one in off["depths"]}
    assert plain[2] == pytest.approx(3000 * 2e-3 + 1500 * 1e-3 + 30 * 1e-3)
    assert not any(one["stored"] for one in off["depths"])


@pytest.mark.slow
def test_check_tells_what_each_depth_of_a_sweep_costs(tmp_path: Path, ray_local: None) -> None:
    plain = small.recipe(tmp_path, small.small_bert(tmp_path / "model", blocks=3), cluster__workers=1)
    plain["tune"] = {"search": {DEPTH: {"choice": [0, 1, 3]}}, "trials": 6, "sampler": "random"}
    report = check(Recipe.parse(plain), show=lambda event: None)
    assert report["faults"] == []
    found = report["sweep"]
    assert (found["trials"], found["scheduler"]) == (6, "asha")
    assert [one["depth"] for one in found["depths"]] == [0, 1, 3]
    assert [one["stored"] for one in found["depths"]] == [False, True, True]
    learning = [one["trainable"] for one in found["depths"]]
    memory = [one["memory"] for one in found["depths"]]
    assert learning == sorted(learning, reverse=True)
    assert memory == sorted(memory, reverse=True)
    assert learning[0] == report["parameters"]["trainable"]
    assert all(one["seconds"] > 0 for one in found["depths"])
    told = text(report)
    assert "less what asha stops early" in told
    assert told.count("output of the frozen blocks is stored") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "passed"), [("float32", None), ("bfloat16", torch.bfloat16)])
def test_a_batch_is_timed_in_the_precision_of_training(
    dtype: str, passed: torch.dtype | None, tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = small.recipe(tmp_path, small.small_bert(tmp_path / "model"), cluster__workers=1, model__dtype=dtype)
    recipe = Recipe.parse(plain)
    prepared = prepare(recipe, recipe.model.path, progress=lambda *_: None)["train"]
    seen, frozen = set(), set()
    forward = type(recipe.task).forward

    def seeing(task: Any, model: Any, batch: Any) -> Any:
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        frozen.update(p.dtype for p in model.parameters() if not p.requires_grad and p.dim() > 1)
        return forward(task, model, batch)

    monkeypatch.setattr(type(recipe.task), "forward", seeing)
    pace = measure(recipe.dump(), prepared.folder, [1, 2])
    assert seen == {passed}
    assert frozen == {passed or torch.float32}
    assert 0 < pace.below[1] < pace.below[2] < pace.forward
