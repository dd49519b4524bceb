"""Face recognition by transformers and torch alone: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_face_recognition.py jobs/face_recognition.yaml [epochs=N] [seed=S] [rate=R]

One process, shuffled batches, AdamW and a linear schedule with the recipe's warm-up; ArcFace (Deng et al. 2019) by the
angle itself; `scale=` and `margin=` can be set, too. Prints one JSON line: verification on the test people before the
first and after the last epoch. How pictures vary and how pairs are scored is rayft's own.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from rayft.tasks.face_recognition import verification
from rayft.tasks.images import Augment, augmented


def pictures(files: list[Path], processor: Any) -> np.ndarray:
    """(n, 3, height, width) uint8 at the model's size."""
    read = [Image.open(file).convert("RGB") for file in files]
    return np.stack(processor(read, do_rescale=False, do_normalize=False)["pixel_values"]).astype(np.uint8)


def tensors(rows: np.ndarray, processor: Any) -> torch.Tensor:
    made = processor(list(rows), do_resize=False, input_data_format="channels_first", return_tensors="pt")
    return made["pixel_values"].float()


def embeddings(model: Any, values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(model(pixel_values=values).pooler_output.flatten(1))


def verified(model: Any, values: torch.Tensor, people: list[str]) -> dict[str, float]:
    model.eval()
    with torch.inference_mode():
        found = embeddings(model, values).numpy()
    asked = verification.pairs(people)
    scores = verification.scores(asked.same, verification.similarities(found, asked))
    return {name: round(value, 4) for name, value in scores.items()}


def arcface(cosines: torch.Tensor, labels: torch.Tensor, scale: float, margin: float) -> torch.Tensor:
    angles = torch.acos(cosines.clamp(-1 + 1e-6, 1 - 1e-6))
    moved = angles + margin * torch.nn.functional.one_hot(labels, cosines.shape[1])
    return torch.nn.functional.cross_entropy(scale * torch.cos(moved.clamp(max=math.pi)), labels)


def main(path: str, *overrides: str) -> None:
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    options = dict(override.split("=") for override in overrides)
    task, train = recipe["task"], recipe["train"]
    epochs, seed = int(options.get("epochs", train["epochs"])), int(options.get("seed", 0))
    rate = float(options.get("rate", train["learning_rate"]))
    scale, margin = (float(options.get(name, task[name])) for name in ("scale", "margin"))
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    table = Path(recipe["data"]["train"]["path"])
    rows = pd.read_csv(table, dtype=str)
    folder = recipe["model"]["path"]
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    parts = {name: rows[rows["split"] == name] for name in ("train", "test")}
    files = {name: [table.parent / file for file in part["file_name"]] for name, part in parts.items()}
    seen = {name: pictures(some, processor) for name, some in files.items()}
    labels = torch.tensor(pd.factorize(parts["train"]["identity"])[0])
    test, people = tensors(seen["test"], processor), parts["test"]["identity"].tolist()
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    before = verified(model, test, people)
    heads = torch.nn.Parameter(torch.randn(int(labels.max()) + 1, embeddings(model, test[:1]).shape[1]) * 0.01)
    size, how = train["global_batch_size"], Augment(**task["augment"])
    total = epochs * -(-len(labels) // size)
    warmup = math.ceil(train.get("warmup", 0.0) * total)
    optimizer = torch.optim.AdamW([*model.parameters(), heads], lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warmup if step < warmup else (total - step) / (total - warmup)
    )
    for _ in range(epochs):  # in evaluation mode: BatchNorm keeps its running statistics, as in rayft
        for numbers in torch.randperm(len(labels)).split(size):
            shape = list(seen["train"].shape[1:])
            varied = [augmented(seen["train"][one].tobytes(), shape, how, rng) for one in numbers.tolist()]
            values = tensors(np.stack([np.frombuffer(one, np.uint8).reshape(shape) for one in varied]), processor)
            cosines = embeddings(model, values) @ torch.nn.functional.normalize(heads).T
            loss = arcface(cosines, labels[numbers], scale, margin)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*model.parameters(), heads], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    said = {"loss": round(loss.item(), 3), "epochs": epochs, "steps": total, "seed": seed}
    print(json.dumps({"before": before, "after": verified(model, test, people), **said}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
