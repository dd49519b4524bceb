"""Image classification by transformers and torch alone: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_image_classification.py jobs/image_classification.yaml
        [epochs=N] [seed=S] [norm=batch]

One process, shuffled batches, AdamW and a linear schedule with the recipe's warm-up; BatchNorm takes its statistics
from each batch, as the usual script has it; with norm=running it keeps those that it has. Prints one JSON
line: accuracy on the test rows after the last epoch. How pictures vary is rayft's own.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from rayft.tasks.images import Augment, augmented


def pictures(folder: Path, processor: Any, names: list[str]) -> tuple[np.ndarray, torch.Tensor]:
    """(n, 3, height, width) uint8 at the model's size and (n,) labels; a folder holds one for each label."""
    files = sorted(file for name in names for file in (folder / name).iterdir())
    read = [Image.open(file).convert("RGB") for file in files]
    pixels = np.stack(processor(read, do_rescale=False, do_normalize=False)["pixel_values"]).astype(np.uint8)
    return pixels, torch.tensor([names.index(file.parent.name) for file in files])


def tensors(rows: np.ndarray, processor: Any) -> torch.Tensor:
    made = processor(list(rows), do_resize=False, input_data_format="channels_first", return_tensors="pt")
    return made["pixel_values"].float()


def main(path: str, *overrides: str) -> None:
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    options = dict(override.split("=") for override in overrides)
    task, train = recipe["task"], recipe["train"]
    epochs, seed = int(options.get("epochs", train["epochs"])), int(options.get("seed", 0))
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    folder, data = recipe["model"]["path"], {name: Path(recipe["data"][name]) for name in ("train", "test")}
    names = sorted(entry.name for entry in data["train"].iterdir() if entry.is_dir())
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    (seen, labels), (test, truth) = (pictures(data[split], processor, names) for split in ("train", "test"))
    model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=len(names)))
    size, how = train["global_batch_size"], Augment(**task["augment"])
    total = epochs * -(-len(labels) // size)
    warmup = math.ceil(train.get("warmup", 0.0) * total)
    rate = float(train["learning_rate"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warmup if step < warmup else (total - step) / (total - warmup)
    )
    model.train(options.get("norm", "batch") == "batch")
    for _ in range(epochs):
        for numbers in torch.randperm(len(labels)).split(size):
            shape = list(seen.shape[1:])
            varied = [augmented(seen[one].tobytes(), shape, how, rng) for one in numbers.tolist()]
            values = tensors(np.stack([np.frombuffer(one, np.uint8).reshape(shape) for one in varied]), processor)
            loss = torch.nn.functional.cross_entropy(model(pixel_values=values).logits, labels[numbers])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        parts = [model(pixel_values=tensors(some, processor)).logits for some in np.array_split(test, 16)]
    given = torch.cat(parts).argmax(dim=-1)
    scores = {"accuracy": accuracy_score(truth, given), "f1_macro": f1_score(truth, given, average="macro")}
    print(json.dumps({**scores, "epochs": epochs, "steps": total, "seed": seed}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
