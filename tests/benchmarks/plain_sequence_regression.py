"""Sequence regression by transformers and torch alone: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_sequence_regression.py jobs/sequence_regression.yaml [epochs=N] [seed=S]

One process, shuffled batches, AdamW and a linear schedule with the recipe's warm-up. Prints one JSON line: scores on
the test rows after the last epoch.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pandas as pd
import torch
import yaml
from scipy.stats import pearsonr, spearmanr
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayft.models import fetch_model


def encoded(tokenizer: Any, texts: list[str], length: int) -> Any:
    return tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")


def main(path: str, *overrides: str) -> None:
    with open(path, encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    options = dict(override.split("=") for override in overrides)
    task, train = recipe["task"], recipe["train"]
    epochs, seed = int(options.get("epochs", train["epochs"])), int(options.get("seed", 0))
    torch.manual_seed(seed)
    rows, test = (pd.read_json(recipe["data"][split], lines=True) for split in ("train", "test"))
    model_path = fetch_model(recipe["model"]["path"])
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1, problem_type="regression")
    size = train["global_batch_size"]
    total = epochs * -(-len(rows) // size)
    warmup = math.ceil(train.get("warmup", 0.0) * total)
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(train["learning_rate"]), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warmup if step < warmup else (total - step) / (total - warmup)
    )
    model.train()
    for _ in range(epochs):
        for numbers in torch.randperm(len(rows)).split(size):
            part = rows.iloc[numbers.tolist()]
            batch = encoded(tokenizer, part[task["text"]].tolist(), task["max_length"])
            model(**batch, labels=torch.tensor(part[task["target"]].tolist(), dtype=torch.float32)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    given: list[float] = []
    with torch.inference_mode():
        for first in range(0, len(test), size):
            batch = encoded(tokenizer, test[task["text"]].tolist()[first : first + size], task["max_length"])
            given += model(**batch).logits.squeeze(-1).tolist()
    truth = test[task["target"]].astype(float).tolist()
    scores = {
        "spearman": float(spearmanr(given, truth).statistic),
        "pearson": float(pearsonr(given, truth).statistic),
        "mse": sum((one - other) ** 2 for one, other in zip(given, truth, strict=True)) / len(truth),
    }
    print(json.dumps({**scores, "epochs": epochs, "steps": total, "seed": seed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
