"""The limit: a bare loop of torch's data parallelism over batches of like length that were tokenised beforehand.

    torchrun --nproc-per-node 2 tests/benchmarks/limit_loop.py CONFIG.json

CONFIG is that of `peer_trainer.py`, for text classification. Batches are cut from windows of 50 that are sorted by
length, and shuffled; fused AdamW. Prints one JSON line: `rows_per_s` of the steps after the fifth. With `share` false
in CONFIG gradients stay where they are: what the processors could do if communication were free.
"""

from __future__ import annotations

import contextlib
import csv
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SETTLING, WINDOW = 5, 50


def main(path: str) -> None:
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    torch.manual_seed(config.get("seed", 0))
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    with open(config["train"], newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    labels = {name: number for number, name in enumerate(sorted({row["label"] for row in table}))}
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    texts = tokenizer([row["text"] for row in table], truncation=True, max_length=config["length"])["input_ids"]
    rows = list(zip(texts, (labels[row["label"]] for row in table), strict=True))
    size, draw = config["batch"] * world, random.Random(config.get("seed", 0))
    batches: list[Any] = []
    for first in range(0, len(rows), WINDOW * size):
        window = sorted(rows[first : first + WINDOW * size], key=lambda row: len(row[0]))
        batches += [window[at : at + size] for at in range(0, len(window) - size + 1, size)]
    draw.shuffle(batches)

    network: Any = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=len(labels))
    if config["freeze"]:
        for module in (network.base_model.embeddings, *network.base_model.encoder.layer[: config["freeze"]]):
            module.requires_grad_(False)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    model = torch.nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(learning, lr=config["rate"], weight_decay=0.01, fused=True)
    begun, count = time.time(), 0
    for number, batch in enumerate(batches):
        if number == SETTLING:
            dist.barrier()
            begun, count = time.time(), 0
        own = batch[rank::world]
        width = max(len(ids) for ids, _ in own)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in own])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in own])
        with contextlib.nullcontext() if config.get("share", True) else model.no_sync():
            model(input_ids=ids, attention_mask=mask, labels=torch.tensor([label for _, label in own])).loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        count += len(batch)
    dist.barrier()
    if rank == 0:
        print(json.dumps({"rows_per_s": count / (time.time() - begun)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
