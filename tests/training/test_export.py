"""The model folder: plain transformers and peft load it, and it answers as the trained network did."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffusion_models import make_pipeline_folder
from rayft import document, storage
from rayft.recipe import Recipe
from rayft.tasks.task import Pretrained
from rayft.training import checkpoint, freeze
from rayft.training.assembly import pretrained
from rayft.training.export import DETAILS, export, model_card, new_parameters
from small import small_bert

FACTS = {"labels": ["ham", "spam"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT without a head."""
    return small_bert(tmp_path_factory.mktemp("base"))


def exported(base: str, folder: Path, model: dict[str, Any]) -> tuple[torch.nn.Module, Path, Any]:
    """A network whose learning parameters were changed at random, its exported checkpoint, and a batch's input."""
    plain = {
        "name": "small",
        "task": {"type": "text-classification"},
        "model": {"path": base, **model},
        "data": {"train": "unused.csv"},
        "train": {"epochs": 1},
    }
    recipe = Recipe.parse(plain)
    given = pretrained(recipe, base)
    processor = recipe.task.processor(given)
    network = recipe.task.load(given, FACTS, processor)
    if recipe.model.lora is not None:
        network = freeze.adapt(network, recipe.model.lora, new_parameters(network), recipe.train.seed)
    freeze.freeze(network, recipe.model, recipe.task.blocks(network))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    path = saved(network, folder)
    target = folder / "export"
    export(recipe, given, FACTS, path, {"eval_accuracy": 0.5}, {"train": "0123"}, str(target))
    inputs = processor(["win a prize now", "see you at six"], return_tensors="pt", padding=True)
    return network.eval(), target, inputs


def saved(network: torch.nn.Module, folder: Path) -> str:
    """A committed checkpoint of what learns, as two ranks would write it."""
    learning = {name: p for name, p in network.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learning.values())
    for parameter in learning.values():
        zeros = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        optimizer.state[parameter] = {"step": torch.tensor(3.0), **zeros}
    engine = SimpleNamespace(module=network, optimizer=optimizer, zero_optimization_stage=lambda: 0)
    path = folder / "step-000003-a1"
    path.mkdir()
    for rank in range(2):
        tensors: dict[str, torch.Tensor] = {}
        checkpoint.write(str(path), rank, checkpoint.snapshot(engine, {}, rank, 2, tensors), tensors)
    shapes = {name: list(p.shape) for name, p in learning.items()}
    storage.write_json(str(path / "state.json"), {"step": 3, "world": 2, "shapes": shapes})
    storage.commit(str(path), {"step": 3, "world": 2})
    return str(path)


MODELS = {
    "whole": ({}, 1e-6),
    "frozen": ({"freeze": 1}, 1e-6),
    "lora": ({"lora": {"r": 4}}, 1e-5),
    "lora on one": ({"lora": {"r": 4, "targets": ["query"], "dropout": 0.1}}, 1e-5),
    "bfloat16": ({"dtype": "bfloat16"}, 0.02),
    "bfloat16 lora": ({"dtype": "bfloat16", "lora": {"r": 4}}, 0.02),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_folder_answers_as_the_trained_network(base: str, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tolerance = MODELS[kind]
    network, folder, inputs = exported(base, tmp_path, model)
    loaded = AutoModelForSequenceClassification.from_pretrained(str(folder))
    assert loaded.dtype == (torch.bfloat16 if "bfloat16" in kind else torch.float32)
    assert loaded.config.id2label == {0: "ham", 1: "spam"}
    assert not any("lora" in name or "modules_to_save" in name for name, _ in loaded.named_parameters())
    with torch.no_grad():
        expected = network.float()(**inputs).logits
        assert torch.allclose(loaded.float()(**inputs).logits, expected, atol=tolerance)
        start = AutoModelForSequenceClassification.from_pretrained(base)(**inputs).logits
        assert (start - expected).abs().max() > 5 * tolerance
    assert (
        AutoTokenizer.from_pretrained(str(folder))("a b").input_ids
        == AutoTokenizer.from_pretrained(base)("a b").input_ids
    )
    assert json.loads((folder / DETAILS).read_text())["metrics"] == {"eval_accuracy": 0.5}


def test_the_adapter_loads_on_the_base_model(base: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    network, folder, inputs = exported(base, tmp_path, {"lora": {"r": 4}})
    with torch.no_grad():
        expected = network(**inputs).logits
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        adapted = PeftModel.from_pretrained(plain, str(folder / "adapter")).eval()
        assert torch.allclose(adapted(**inputs).logits, expected, atol=1e-5)


def test_the_pipeline_needs_nothing_but_the_folder(base: str, tmp_path: Path) -> None:
    from transformers import pipeline

    network, folder, inputs = exported(base, tmp_path, {})
    with torch.no_grad():
        expected = network(**inputs).logits.softmax(-1)[0]
    answer = pipeline("text-classification", model=str(folder), top_k=None)(["win a prize now"])[0]
    scores = {entry["label"]: entry["score"] for entry in answer}
    assert scores == pytest.approx({"ham": expected[0].item(), "spam": expected[1].item()}, abs=1e-5)


def test_the_card_names_no_place_of_this_machine_and_a_base_model_of_the_hub_alone(base: str, tmp_path: Path) -> None:
    """The Hub refuses a card whose `base_model` is no id of its own."""
    rows = tmp_path / "rows.csv"
    plain = {"name": "small", "task": {"type": "text-classification"}, "storage": str(tmp_path / "runs")}
    plain |= {"data": {"train": [str(rows), "s3://bucket/rows.csv"]}, "train": {"epochs": 1}}
    cards = {}
    for path, fetched in ((base, base), ("pkg:some/model", base), ("s3://bucket/model", base), ("org/yes", "org/yes")):
        recipe = Recipe.parse({**plain, "model": {"path": path}})
        cards[path] = model_card(recipe, Pretrained(fetched), {"eval_accuracy": 0.5}, {"train": "0123"}, "transformers")
        assert str(tmp_path) not in cards[path]
        assert base not in cards[path]
        front, shown = (document.read(part).value for part in (cards[path].split("---\n")[1], recipe_in(cards[path])))
        named = {"base_model": path} if path == fetched != base else {}
        head = {"library_name": "transformers", "pipeline_tag": "text-classification"}
        assert front == {**head, **named, "tags": ["rayft"]}
        assert [source["path"] for source in shown["data"]["train"]] == ["rows.csv", "s3://bucket/rows.csv"]
        assert shown["storage"] == "runs"
        assert Recipe.parse(shown).train == recipe.train
    assert f"from `{Path(base).name}`" in cards[base]
    assert "from `pkg:some/model`" in cards["pkg:some/model"]


def recipe_in(card: str) -> str:
    return card.partition("```yaml\n")[2].partition("```")[0]


def test_the_card_names_the_library_that_loads_the_folder(base: str, tmp_path: Path) -> None:
    _, folder, _ = exported(base, tmp_path, {})
    assert "\nlibrary_name: transformers\n" in (folder / "README.md").read_text()
    pipeline, drawing = tmp_path / "pipeline", tmp_path / "drawing"
    make_pipeline_folder(str(pipeline))
    drawing.mkdir()
    fields = {"name": "n", "data": {"train": "unused.csv"}, "train": {"epochs": 1}}
    recipe = Recipe.parse({**fields, "task": {"type": "text-to-image"}, "model": {"path": str(pipeline)}})
    given = pretrained(recipe, str(pipeline))
    network = recipe.task.load(given, {}, recipe.task.processor(given))
    freeze.freeze(network, recipe.model, recipe.task.blocks(network))
    export(recipe, given, {}, saved(network, drawing), {}, {}, str(drawing / "export"))
    assert "\nlibrary_name: diffusers\n" in (drawing / "export" / "README.md").read_text()
