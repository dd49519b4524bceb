"""Weights in 4 bits, with bitsandbytes on the CPU: what is loaded, what learns, and what an export makes of it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.errors import ModelError
from rayft.recipe import Recipe
from rayft.tasks import loading
from rayft.tasks.task import Pretrained
from rayft.training import freeze, plan
from rayft.training.assembly import pretrained

MODEL = str(Path(__file__).resolve().parents[2] / "jobs" / "models" / "tiny_lm")
RECIPE: dict[str, Any] = {
    "name": "n",
    "task": {"type": "causal-lm", "prompt": "q", "completion": "a", "max_length": 64},
    "model": {"path": MODEL, "lora": {"r": 4}, "quantize": "4bit"},
    "data": {"train": "a.csv"},
    "train": {"epochs": 1},
    "cluster": {"gpus_per_worker": 1},
}
ROWS = {"q": ["What is flu ?", "What causes it ?"], "a": [" An infection of the nose.", " Influenza viruses."]}


def test_adapters_learn_on_four_bits_and_are_merged_into_what_they_learned_on() -> None:
    recipe = Recipe.parse(RECIPE)
    task, base = recipe.task, pretrained(recipe, MODEL)
    assert base.quantize == "4bit"
    tokenizer = task.processor(base)

    def built(source: Pretrained) -> Any:
        network: Any = task.load(source, {}, tokenizer)
        # Nothing drops out. In evaluation mode a processor that has bfloat16 would multiply in it.
        return freeze.adapted(network, recipe, task.blocks(network), ()).train()

    network = built(base)
    stored = network.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert (stored.dtype, stored.quant_type, stored.numel()) == (torch.uint8, "nf4", 128 * 384 // 2)
    assert stored.quant_state.nested
    batch = task.collate(task.encode(ROWS, tokenizer, {}, evaluation=False).features, tokenizer, {})
    learning = freeze.freeze(network, recipe.model, task.blocks(network))
    assert all("lora_" in name for name in learning.trainable)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = task.loss(task.forward(network, batch), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    whole = built(replace(base, quantize="4bit, and back"))
    learnt = {name: value for name, value in network.state_dict().items() if "lora_" in name}
    assert whole.load_state_dict(learnt, strict=False).unexpected_keys == []
    merged = whole.merge_and_unload()
    assert {value.dtype for value in merged.parameters()} == {torch.float32}
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(task.forward(merged, batch), task.forward(network, batch), rtol=1e-4, atol=1e-4)
        plain: Any = task.load(replace(base, quantize=None), {}, tokenizer)
        far = task.forward(plain, batch) - task.forward(network.get_base_model(), batch)
    assert far.abs().max() > 1e-3  # four bits are not the weights themselves


def test_memory_counts_weights_in_four_bits() -> None:
    recipe = Recipe.parse(RECIPE)
    base = pretrained(recipe, MODEL)
    counted = plan.parameters(recipe, base, {}, recipe.task.processor(base), 1)
    linear = 4 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 384)
    assert counted.narrow == linear
    frozen = 4 * (counted.frozen - linear) + linear * 4.127 / 8
    assert counted.state_bytes(recipe, 0) == pytest.approx(frozen + 16 * counted.trainable, rel=1e-3)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    recipe = Recipe.parse(RECIPE)
    base = pretrained(recipe, MODEL)
    tokenizer = recipe.task.processor(base)
    said = r"model.quantize needs bitsandbytes, which is not installed; `pip install 'rayft\[quantize\]'` fits"
    with pytest.raises(ModelError, match=said):
        recipe.task.load(base, {}, tokenizer)
    with pytest.raises(ModelError, match=said):
        plan.parameters(recipe, base, {}, tokenizer, 1)


def test_what_is_drawn_anew_is_not_put_into_four_bits() -> None:
    network = torch.nn.Linear(2, 2)
    network.weight = torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
    loading._refuse_quantized(Pretrained("m"), network, {"bias"})
    with pytest.raises(ModelError, match=r"model.quantize: m lacks weight, which can't learn in 4 bits"):
        loading._refuse_quantized(Pretrained("m"), network, {"weight", "bias"})
