"""On one GPU a model learns what it learns on processors: these tests need one, and are there only where one is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import small
from group import run_group
from rayft.data.prepare import prepare
from rayft.recipe import Recipe, set_field
from test_prefix import small_llama
from whole import trained_all

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

GPU = {"cluster.gpus_per_worker": 1}
STORED = {"model.freeze": 2, "model.cache_frozen": "on"}
# Name -> the model, and what the run on the GPU has beside it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"stage {stage}, {dtype}": ("bert", {"deepspeed.zero_stage": stage, "model.dtype": dtype})
        for stage in (0, 2, 3)
        for dtype in ("float32", "bfloat16")
    },
    "packed": ("llama", {}),
    "packed, bfloat16": ("llama", {"model.dtype": "bfloat16"}),
    "packed, compiled": ("llama", {"model.compile": True}),
    "adapters": ("llama", {"model.lora": {"r": 2}}),
    "adapters, bfloat16": ("llama", {"model.lora": {"r": 2}, "model.dtype": "bfloat16"}),
    "stored states": ("bert", STORED),
    "stored states, bfloat16": ("bert", {**STORED, "model.dtype": "bfloat16"}),
    "packed, stored states": ("llama", STORED),
}


def with_fields(plain: dict[str, Any], name: str, **fields: Any) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(plain))
    for field, value in {"name": name, **fields}.items():
        set_field(copied, field, value)
    return copied


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> dict[str, dict[str, Any]]:
    """A recipe of few steps for each kind of model; its rows are prepared."""
    folder = tmp_path_factory.mktemp("gpu")
    few = {"model__dropout": 0.0, "train__max_steps": 8, "cluster__workers": 1, "deepspeed__zero_stage": 0}
    bert = small.recipe(folder, small.small_bert(folder / "bert", blocks=3), **few)
    llama = small.recipe(folder, small_llama(folder / "llama"), name="llama", **few)
    llama["task"] = {"type": "causal-lm", "text": "text", "max_length": 48}
    for each in (bert, llama):
        prepare(Recipe.parse(each), each["model"]["path"], progress=lambda *_: None)
    return {"bert": bert, "llama": llama}


@pytest.fixture(scope="module")
def found(plain: dict[str, dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name -> the run on the GPU, and its like on the CPU: float32, neither sharded nor compiled, no stored states."""
    ours, theirs = [], []
    for name, (kind, fields) in CASES.items():
        run = name.replace(", ", "-").replace(" ", "-")
        ours.append(with_fields(plain[kind], f"{run}-gpu", **fields, **GPU))
        same = {field: value for field, value in fields.items() if field in ("model.freeze", "model.lora")}
        theirs.append(with_fields(plain[kind], f"{run}-cpu", **same, **{"model.cache_frozen": "off"}))
    (on_gpu,), (on_cpu,) = run_group(trained_all, 1, ours, gpu=True), run_group(trained_all, 1, theirs)
    return dict(zip(CASES, zip(on_gpu, on_cpu, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_losses_on_a_gpu_are_those_on_a_processor(
    name: str, found: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    ours, theirs = found[name]
    near = 0.03 if "bfloat16" in name else 1e-4
    assert len(ours["losses"]) == len(theirs["losses"]) == 8
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=near)
    assert ours["scores"][-1]["eval_loss"] == pytest.approx(theirs["scores"][-1]["eval_loss"], rel=near)
    assert (ours["served"] > 0) is ("stored" in name)
    assert ours["result"]["timing"]["peak_memory_gib"] < 4  # of the tensors alone; a process with CUDA takes more


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_gpu_resumes_exactly(plain: dict[str, dict[str, Any]], dtype: str, tmp_path: Path) -> None:
    fields = {**GPU, "storage": str(tmp_path / "runs"), "model.dtype": dtype}
    recipe = small.write_recipe(tmp_path, with_fields(plain["bert"], "verified", **fields))
    small.finish(small.start("verify", recipe, "--steps", "4"))
