"""Sentence embedding by transformers and torch alone: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_sentence_embedding.py jobs/sentence_embedding.yaml [epochs=N] [seed=S]

One process, shuffled batches of groups with in-batch negatives (all other positives of the group, equal texts too),
AdamW and a linear schedule with the recipe's warm-up. Prints one JSON line: scores of search over the test rows after
the last epoch; with epochs=0 those of the model as it was published.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

from rayft.models import fetch_model
from rayft.tasks.sentence_embedding import text_key
from rayft.tasks.sentence_embedding.ranking import retrieval


def vectors(model: Any, tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
    batch = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
    weights = batch["attention_mask"].unsqueeze(-1)
    states = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def main(path: str, *overrides: str) -> None:
    with open(path, encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    options = dict(override.split("=") for override in overrides)
    task, train = recipe["task"], recipe["train"]
    epochs, seed = int(options.get("epochs", train["epochs"])), int(options.get("seed", 0))
    torch.manual_seed(seed)
    columns, length, group = [task["anchor"], task["positive"]], task["max_length"], task["group_size"]
    rows, test = (pd.read_parquet(recipe["data"][split])[columns] for split in ("train", "test"))
    model_path = fetch_model(recipe["model"]["path"])
    tokenizer, model = AutoTokenizer.from_pretrained(model_path), AutoModel.from_pretrained(model_path)
    size = train["global_batch_size"]
    total = epochs * -(-len(rows) // size)
    warmup = math.ceil(train.get("warmup", 0.0) * total)
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(train["learning_rate"]), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warmup if step < warmup else (total - step) / max(1, total - warmup)
    )
    model.train()
    for _ in range(epochs):
        for numbers in torch.randperm(len(rows)).split(size):
            for part in numbers.split(group):
                own = rows.iloc[part.tolist()]
                anchors, positives = (vectors(model, tokenizer, own[name].tolist(), length) for name in columns)
                loss = torch.nn.functional.cross_entropy(
                    20 * anchors @ positives.T, torch.arange(len(own)), reduction="sum"
                )
                (loss / len(numbers)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for role, name in zip(("anchor", "positive"), columns, strict=True):
            texts = test[name].tolist()
            parts = [texts[first : first + size] for first in range(0, len(texts), size)]
            found[role] = torch.cat([vectors(model, tokenizer, part, length) for part in parts]).numpy()
    keys = np.array([[text_key(text) for text in row] for row in test.itertuples(index=False)])
    print(json.dumps({**retrieval(found, keys), "epochs": epochs, "steps": total, "seed": seed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
