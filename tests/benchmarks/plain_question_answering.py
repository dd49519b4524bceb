"""Question answering by transformers and torch alone: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_question_answering.py jobs/question_answering.yaml [epochs=N] [seed=S] [rate=R]

One process, shuffled batches, AdamW and a linear schedule with the recipe's warm-up. Prints one JSON line: F1 and exact
match on the test rows, untrained and trained. Compare several seeds: on 132 test rows and 925 windows one seed's F1 can
be 17 points from another's.
"""

from __future__ import annotations

import collections
import json
import math
import re
import string
import sys
from typing import Any

import pandas as pd
import torch
import yaml
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from rayft.models import fetch_model


def windows(tokenizer: Any, rows: pd.DataFrame, task: dict[str, Any]) -> Any:
    return tokenizer(
        list(rows["question"]),
        list(rows["context"]),
        truncation="only_second",
        max_length=task["max_length"],
        stride=task["stride"],
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
        return_tensors="pt",
    )


def targets(encoded: Any, rows: pd.DataFrame) -> torch.Tensor:
    """(windows, 2) first and last token of the answer, 0 and 0 where the window does not hold it whole."""
    found = []
    for index, row in enumerate(encoded["overflow_to_sample_mapping"].tolist()):
        answer = rows["answers"].iloc[row]
        begin = int(answer["answer_start"][0])
        end = begin + len(answer["text"][0])
        tokens = [
            (place, left, right)
            for place, (kind, (left, right)) in enumerate(
                zip(encoded.sequence_ids(index), encoded["offset_mapping"][index].tolist(), strict=True)
            )
            if kind == 1
        ]
        inside = [place for place, left, right in tokens if left < end and right > begin]
        whole = tokens and tokens[0][1] <= begin and tokens[-1][2] >= end
        found.append((inside[0], inside[-1]) if whole and inside else (0, 0))
    return torch.tensor(found)


def f1(given: str, true: str) -> tuple[float, float]:
    def words(text: str) -> list[str]:
        kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    ours, theirs = words(given), words(true)
    shared = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return (2 * shared / (len(ours) + len(theirs)) if shared else 0.0), float(ours == theirs)


@torch.inference_mode()
def score(model: Any, tokenizer: Any, rows: pd.DataFrame, task: dict[str, Any]) -> dict[str, float]:
    model.eval()
    encoded = windows(tokenizer, rows, task)
    best: dict[int, tuple[float, str]] = {}
    for index, row in enumerate(encoded["overflow_to_sample_mapping"].tolist()):
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
        outputs = model(**{name: encoded[name][index : index + 1] for name in names})
        start, end = outputs.start_logits[0], outputs.end_logits[0]
        for place, kind in enumerate(encoded.sequence_ids(index)):
            if kind != 1:
                start[place] = end[place] = -1e9
        sums = start[:, None] + end[None, :]
        sums = sums.triu().masked_fill(
            torch.ones_like(sums).triu(30).bool() | torch.ones_like(sums).tril(-1).bool(), -1e9
        )
        place = int(sums.argmax())
        first, last = divmod(place, len(end))
        left, right = int(encoded["offset_mapping"][index][first][0]), int(encoded["offset_mapping"][index][last][1])
        value = float(sums.flatten()[place])
        if row not in best or value > best[row][0]:
            best[row] = (value, rows["context"].iloc[row][left:right])
    pairs = [max(f1(best[row][1], text) for text in rows["answers"].iloc[row]["text"]) for row in range(len(rows))]
    return {
        "f1": 100 * sum(p[0] for p in pairs) / len(pairs),
        "exact_match": 100 * sum(p[1] for p in pairs) / len(pairs),
    }


def main(path: str, *overrides: str) -> None:
    with open(path, encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    options = dict(override.split("=") for override in overrides)
    epochs, seed = int(options.get("epochs", recipe["train"]["epochs"])), int(options.get("seed", 0))
    task, train = recipe["task"], recipe["train"]
    model_path = fetch_model(recipe["model"]["path"])
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForQuestionAnswering.from_pretrained(model_path)
    rows, test = pd.read_parquet(recipe["data"]["train"]), pd.read_parquet(recipe["data"]["test"])
    before = score(model, tokenizer, test, task)
    encoded = windows(tokenizer, rows, task)
    truth = targets(encoded, rows)
    size = train["global_batch_size"]
    total = epochs * -(-len(truth) // size)
    rate, warmup = float(options.get("rate", train["learning_rate"])), math.ceil(train.get("warmup", 0.0) * total)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warmup if step < warmup else (total - step) / (total - warmup)
    )
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(truth)).split(size):
            longest = int(encoded["attention_mask"][batch].sum(dim=1).max())
            names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
            inputs = {name: encoded[name][batch][:, :longest] for name in names}
            loss = model(**inputs, start_positions=truth[batch, 0], end_positions=truth[batch, 1]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    after = score(model, tokenizer, test, task)
    print(json.dumps({"untrained": before, "trained": after, "epochs": epochs, "steps": total, "seed": seed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
