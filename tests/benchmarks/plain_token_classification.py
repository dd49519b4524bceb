"""Token classification by transformers and torch alone: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_token_classification.py jobs/token_classification.yaml [epochs=N] [seed=S]

One process, shuffled batches, AdamW and a linear schedule with the recipe's warm-up. Prints one JSON line: scores of
whole entities on the test rows after the last epoch.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pandas as pd
import torch
import yaml
from transformers import AutoModelForTokenClassification, AutoTokenizer

from rayft.models import fetch_model
from rayft.tasks.token_classification.entities import scores


def encoded(tokenizer: Any, words: list[list[str]], length: int) -> Any:
    return tokenizer(
        words, is_split_into_words=True, truncation=True, max_length=length, padding=True, return_tensors="pt"
    )


def firsts(batch: Any, row: int) -> dict[int, int]:
    """Word -> where its first piece stands."""
    found: dict[int, int] = {}
    for place, word in enumerate(batch.word_ids(row)):
        if word is not None:
            found.setdefault(word, place)
    return found


def main(path: str, *overrides: str) -> None:
    with open(path, encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    options = dict(override.split("=") for override in overrides)
    task, train = recipe["task"], recipe["train"]
    epochs, seed = int(options.get("epochs", train["epochs"])), int(options.get("seed", 0))
    torch.manual_seed(seed)
    rows, test = (pd.read_json(recipe["data"][split], lines=True) for split in ("train", "test"))
    names = sorted({tag for tags in rows[task["tags"]] for tag in tags})
    model_path = fetch_model(recipe["model"]["path"])
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForTokenClassification.from_pretrained(model_path, num_labels=len(names))
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
            batch = encoded(tokenizer, part[task["tokens"]].tolist(), task["max_length"])
            labels = torch.full_like(batch["input_ids"], -100)
            for row, tags in enumerate(part[task["tags"]]):
                for word, place in firsts(batch, row).items():
                    labels[row, place] = names.index(tags[word])
            model(**batch, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    given = []
    with torch.inference_mode():
        for first in range(0, len(test), size):
            part = test.iloc[first : first + size]
            batch = encoded(tokenizer, part[task["tokens"]].tolist(), task["max_length"])
            best = model(**batch).logits.argmax(dim=-1)
            for row, words in enumerate(part[task["tokens"]]):
                places = firsts(batch, row)
                given.append([names[best[row, places[word]]] if word in places else "O" for word in range(len(words))])
    print(json.dumps({**scores(given, test[task["tags"]].tolist()), "epochs": epochs, "steps": total, "seed": seed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
