"""Causal language modelling by transformers, peft and torch alone: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_causal_lm.py jobs/mathematics.yaml [epochs=N] [seed=S]

Prompts with completions, or with `chat` a turn each; one process, shuffled batches of as many tokens as rayft's packed
rows hold, AdamW and a cosine schedule with the recipe's warm-up. Prints one JSON line: scores on the test rows after
the last epoch, exact matches over the same rows that rayft asks.
"""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

import pandas as pd
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayft.tasks.causal_lm.answers import chosen

BATCH = 16  # rows of one scoring or writing pass


def encoded(tokenizer: Any, task: dict[str, Any], row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, and those of the completion with its end."""
    if task.get("chat"):
        turns = [{"role": "user", "content": row[task["prompt"]]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        completion = row[task["completion"]]
    else:
        prompt = tokenizer(task["prompt"].format(**row))["input_ids"]
        completion = task["completion"].format(**row)
    return prompt, [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def padded(samples: list[tuple[list[int], list[int]]], length: int) -> dict[str, torch.Tensor]:
    rows = [([*prompt, *answer][:length], [-100] * len(prompt) + answer) for prompt, answer in samples]
    width = max(len(ids) for ids, _ in rows)
    batch = {"input_ids": torch.zeros(len(rows), width, dtype=torch.long)}
    batch["attention_mask"], targets = torch.zeros_like(batch["input_ids"]), torch.full((len(rows), width), -100)
    for place, (ids, labels) in enumerate(rows):
        batch["input_ids"][place, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][place, : len(ids)] = 1
        targets[place, : len(ids) - 1] = torch.tensor(labels[1 : len(ids)])
    return {**batch, "targets": targets}


def summed(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int, int]:
    """Loss, tokens and right guesses."""
    targets = batch["targets"]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((targets != -100).sum()), int((logits.argmax(-1) == targets).sum())


def number(text: str, mark: str) -> str:
    found = re.findall(re.escape(mark) + r"\s*(-?[0-9.,]+)", text)
    return found[-1].replace(",", "").rstrip(".") if found else ""


def matches(model: Any, tokenizer: Any, task: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    right = 0
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        asked = tokenizer([task["prompt"].format(**row) for row in some], return_tensors="pt", padding=True)
        written = model.generate(
            input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"],
            do_sample=False,
            max_new_tokens=task["max_new_tokens"],
        )
        texts = tokenizer.batch_decode(written[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        mark = task["answer_after"]
        for row, text in zip(some, texts, strict=True):
            right += number(text, mark) == number(task["completion"].format(**row), mark) != ""
    return right / len(rows)


def main(path: str, *overrides: str) -> None:
    with open(path, encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    options = dict(override.split("=") for override in overrides)
    task, train = recipe["task"], recipe["train"]
    epochs, seed = int(options.get("epochs", train["epochs"])), int(options.get("seed", 0))
    torch.manual_seed(seed)
    rows, test = (pd.read_parquet(recipe["data"][split]).to_dict("records") for split in ("train", "test"))
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"]["path"], padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"], dtype=torch.float32)
    if lora := recipe["model"].get("lora"):
        model = get_peft_model(model, LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules="all-linear"))
    samples = [encoded(tokenizer, task, row) for row in rows]
    tokens = sum(min(task["max_length"], len(prompt) + len(answer)) for prompt, answer in samples)
    size = round(len(rows) / (tokens / (train["global_batch_size"] * task["max_length"])))
    total = epochs * -(-len(rows) // size)
    warmup = math.ceil(train.get("warmup", 0.0) * total)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=float(train["learning_rate"]), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        ),
    )
    model.train()
    for _ in range(epochs):
        for numbers in torch.randperm(len(rows)).split(size):
            loss, count, _ = summed(model, padded([samples[place] for place in numbers.tolist()], task["max_length"]))
            (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        held = [encoded(tokenizer, task, row) for row in test]
        held = [sample for sample in held if len(sample[0]) < task["max_length"]]
        parts = [summed(model, padded(held[i : i + BATCH], task["max_length"])) for i in range(0, len(held), BATCH)]
        nll, count, right = (float(sum(part[place] for part in parts)) for place in range(3))
        scores = {"perplexity": math.exp(nll / count), "token_accuracy": right / count}
        if "answer_after" in task:
            columns = tuple(test[0])
            cells: dict[str, list[Any]] = {name: [row[name] for row in test] for name in columns}
            share = task.get("answer_share", 1.0)
            asked = [row for place, row in enumerate(test) if chosen(cells, place, columns, share)]
            scores |= {"exact_match": matches(model, tokenizer, task, asked), "asked": len(asked)}
    print(json.dumps({**scores, "epochs": epochs, "steps": total, "batch": size, "seed": seed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
