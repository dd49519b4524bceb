"""What batches of like length do to a score: MiniLM after one epoch of 1,500 rows of banking77, over several seeds.

    python tests/benchmarks/like_lengths.py [seeds=6]

One process, without rayft's training: its order of the rows alone, grouped by length and mixed, with an AdamW and a
linear schedule. The rows of speed.py, 32 in a batch, rate 5e-4. Prints one JSON line: accuracy and loss on 500 rows,
means over the seeds and each seed's.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from speed import LENGTH, MODEL, data  # noqa: E402

from rayft.data.order import Chunk, Order  # noqa: E402
from rayft.models import fetch_model  # noqa: E402

BATCH, MICRO, RATE = 32, 16, 5e-4


class Rows:
    """Token ids and labels of a file of texts."""

    def __init__(self, path: Path, tokenizer: Any, names: list[str]) -> None:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.ids = [tokenizer(row["text"], truncation=True, max_length=LENGTH)["input_ids"] for row in rows]
        self.labels = torch.tensor([names.index(row["label"]) for row in rows])
        self.lengths = np.array([len(ids) for ids in self.ids])

    def logits(self, model: Any, places: Sequence[int]) -> torch.Tensor:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(self.ids[place]) for place in places], batch_first=True)
        return model(input_ids=ids, attention_mask=(ids != 0).long()).logits

    def micro_batches(self, places: np.ndarray) -> Iterator[np.ndarray]:
        """Of like length, so that mixed batches take no longer."""
        ordered = places[np.argsort(self.lengths[places], kind="stable")]
        return iter(np.split(ordered, range(MICRO, len(ordered), MICRO)))


def trained(path: str, train: Rows, classes: int, seed: int, grouped: bool) -> Any:
    torch.manual_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    order = Order([Chunk(0, 0, len(train.ids))], BATCH, seed, alike=grouped)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, order.steps_per_epoch)
    (window,) = order.windows(0)
    model.train()
    for batch in order.batches(window, train.lengths):
        for some in train.micro_batches(batch):
            loss = torch.nn.functional.cross_entropy(train.logits(model, some), train.labels[some], reduction="sum")
            (loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.inference_mode()
def scored(model: Any, rows: Rows) -> tuple[float, float]:
    """Accuracy and loss."""
    logits = torch.cat([rows.logits(model, range(i, min(i + 50, len(rows.ids)))) for i in range(0, len(rows.ids), 50)])
    right = (logits.argmax(dim=-1) == rows.labels).float().mean()
    return float(right), float(torch.nn.functional.cross_entropy(logits, rows.labels))


def main(*options: str) -> None:
    seeds = int(dict(option.split("=") for option in options).get("seeds", 6))
    path = fetch_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with tempfile.TemporaryDirectory() as folder:
        data(Path(folder))
        texts = [Path(folder) / f"{split}.csv" for split in ("train", "validation")]
        names = sorted({row["label"] for text in texts for row in csv.DictReader(text.open(encoding="utf-8"))})
        train, validation = (Rows(text, tokenizer, names) for text in texts)
    found: dict[str, Any] = {}
    for name, grouped in (("grouped", True), ("mixed", False)):
        scores = [scored(trained(path, train, len(names), seed, grouped), validation) for seed in range(seeds)]
        means = [round(statistics.mean(column), 3) for column in zip(*scores, strict=True)]
        found[name] = {"accuracy": means[0], "loss": means[1], "seeds": [round(one, 3) for one, _ in scores]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
