"""The model folder: what `from_pretrained` and `pipeline` load, with no rayft installed."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rayft import __version__, document, storage
from rayft.recipe import Recipe
from rayft.tasks.task import Pretrained
from rayft.training.checkpoint import Checkpoint
from rayft.training.freeze import adapted

DETAILS = "rayft.json"  # task, facts and scores, for `evaluate` and `predict` on the folder alone


def export(
    recipe: Recipe,
    base: Pretrained,
    facts: dict[str, Any],
    best: str,
    scores: dict[str, float],
    data: dict[str, str],
    target: str,
) -> None:
    """Writes the model of checkpoint `best` to folder `target`: weights, config, processor, model card, details.

    The base model is read anew in the processor's memory, trained tensors are laid over it, adapters are merged and
    kept beside it in `adapter/`. A folder that is half-written by a failure is never mistaken for a whole one:
    `rayft.json` comes last.
    """
    task = recipe.task
    processor = task.processor(base)
    # Adapters that learned on weights in 4 bits are merged into these at their width, for merged they would be rounded.
    whole = base if base.quantize is None else replace(base, quantize="4bit, and back")
    network = task.load(whole, facts, processor)
    with tempfile.TemporaryDirectory(prefix="rayft-export-") as folder:
        if recipe.model.lora is not None:
            network = adapted(network, recipe, task.blocks(network), new_parameters(network))
        with Checkpoint(best) as checkpoint:
            checkpoint.load_weights(network)
        if recipe.model.lora is not None:
            network.save_pretrained(str(Path(folder) / "adapter"))  # type: ignore[operator]
            network = network.merge_and_unload()  # type: ignore[operator]
        network.to(torch.float32 if recipe.model.dtype == "float16" else getattr(torch, recipe.model.dtype))
        network.save_pretrained(folder)  # type: ignore[operator]
        processor.save_pretrained(folder)
        task.export(folder, network, processor, facts)
        library = "diffusers" if (Path(folder) / "model_index.json").exists() else "transformers"
        (Path(folder) / "README.md").write_text(model_card(recipe, base, scores, data, library), encoding="utf-8")
        details = {
            "rayft": __version__,
            "task": task.model_dump(mode="json"),
            "facts": facts,
            "metrics": scores,
            "data": data,
        }
        storage.delete(target)
        storage.upload(folder, target)
        storage.write_json(storage.join(target, DETAILS), details)


def new_parameters(network: Any) -> tuple[str, ...]:
    """Names of parameters that the checkpoint lacked: those that loading drew anew."""
    return tuple(getattr(network, "rayft_drawn", ()))


def model_card(recipe: Recipe, base: Pretrained, scores: dict[str, float], data: dict[str, str], library: str) -> str:
    """README.md of the model folder, which `library` loads; what it says of places is true on any machine.

    The Hub knows `base_model` by its id alone, and refuses a card with anything else there.
    """
    pipeline, usage, plain = recipe.task.pipeline(), recipe.task.usage(), _portable(recipe)
    front: dict[str, Any] = {"library_name": library}
    front |= {"pipeline_tag": pipeline} if pipeline else {}
    front |= {} if os.path.isdir(base.path) else {"base_model": base.path}
    lines = ["---", document.write({**front, "tags": ["rayft"]}).strip(), "---", "", f"# {recipe.name}", ""]
    lines += [
        f"Fine-tuned for {recipe.task.type} with rayft {__version__} from `{plain['model']['path']}`.",
        "",
        "## Scores",
        "",
    ]
    lines += [
        "| metric | value |",
        "| --- | --- |",
        *(f"| {name} | {value:.6g} |" for name, value in scores.items()),
        "",
    ]
    if usage:
        lines += ["## Use", "", usage]
    lines += ["## Data", "", *(f"- {split}: content `{identity}`" for split, identity in data.items()), ""]
    return "\n".join([*lines, "## Recipe", "", "```yaml", document.write(plain).strip(), "```", ""])


def _portable(recipe: Recipe) -> dict[str, Any]:
    """The recipe's plain form without the folders in which local files lay on the machine that trained."""

    def named(path: str) -> str:
        return os.path.basename(path.rstrip("/")) if path.startswith(("/", "~", "file://")) else path

    plain = recipe.dump()
    plain["storage"], plain["model"]["path"] = named(recipe.storage), named(recipe.model.path)
    for sources in plain["data"].values():
        for source in sources if isinstance(sources, list) else ():
            source["path"] = named(source["path"])
    return plain
