"""Masked language modelling by the Hugging Face Trainer in one process: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_masked_lm.py jobs/masked_lm.yaml [seed=S]

The recipe's windows, batches, epochs, learning rate and warm-up; tokens are masked as the Trainer's collator does it,
others in each epoch. Prints one JSON line: scores on the test rows, masked as rayft does it, after the last epoch.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from typing import Any

import pandas as pd
import torch
import yaml
from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from rayft.models import fetch_model
from rayft.tasks.masked_lm import IGNORED, MaskedLM

SCORED = 16  # rows at a time


def scored(model: Any, tokenizer: Any, section: dict[str, Any], rows: pd.DataFrame) -> dict[str, float]:
    """`pseudo_perplexity` and `accuracy` of the tokens that are asked for."""
    task = MaskedLM.model_validate(section)
    encoded = task.encode({task.text: rows[task.text].tolist()}, tokenizer, {}, evaluation=True)
    names, loss, right, asked = list(encoded.features), 0.0, 0, 0
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(encoded.rows), SCORED):
            part = {name: encoded.features[name][first : first + SCORED] for name in names}
            batch = task.collate(part, tokenizer, {})
            labels = batch.pop("labels")
            logits = model(**batch).logits[labels != IGNORED]
            labels = labels[labels != IGNORED]
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(dim=-1) == labels).sum())
            asked += len(labels)
    return {"pseudo_perplexity": math.exp(loss / asked), "accuracy": right / asked}


def main(path: str, *overrides: str) -> None:
    with open(path, encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    options = dict(override.split("=") for override in overrides)
    task, train, seed = recipe["task"], recipe["train"], int(options.get("seed", 0))
    set_seed(seed)  # the head is drawn before the Trainer sets it
    model_path = fetch_model(recipe["model"]["path"])
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def encoded(batch: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer(
            batch[task["text"]],
            truncation=True,
            max_length=task["max_length"],
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        return {name: made[name] for name in ("input_ids", "attention_mask", "special_tokens_mask")}

    frames = {split: pd.read_parquet(recipe["data"][split])[[task["text"]]] for split in ("train", "test")}
    rows = Dataset.from_pandas(frames["train"], preserve_index=False).map(
        encoded, batched=True, remove_columns=[task["text"]]
    )
    model = AutoModelForMaskedLM.from_pretrained(model_path)
    steps = train["epochs"] * -(-len(rows) // train["global_batch_size"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=train["epochs"],
            per_device_train_batch_size=train["micro_batch_size"],
            gradient_accumulation_steps=train["global_batch_size"] // train["micro_batch_size"],
            learning_rate=float(train["learning_rate"]),
            weight_decay=0.01,
            warmup_steps=math.ceil(train.get("warmup", 0.0) * steps),
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(tokenizer),
        )
        trainer.train()
    print(json.dumps({**scored(model, tokenizer, task, frames["test"]), "steps": steps, "seed": seed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
