"""Text classification by the Hugging Face Trainer in one process: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_text_classification.py jobs/text_classification.yaml [seed=S]

The recipe's batches, epochs, learning rate and warm-up; all else as the Trainer has it. Prints one JSON line: scores on
the test rows after the last epoch.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from typing import Any

import numpy as np
import pandas as pd
import yaml
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from rayft.models import fetch_model


def read(path: str) -> pd.DataFrame:
    return pd.read_parquet(path) if path.endswith(".parquet") else pd.read_csv(path)


def main(path: str, *overrides: str) -> None:
    with open(path, encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    options = dict(override.split("=") for override in overrides)
    task, train, seed = recipe["task"], recipe["train"], int(options.get("seed", 0))
    set_seed(seed)  # the head is drawn before the Trainer sets it
    frames = {split: read(recipe["data"][split]) for split in ("train", "test")}
    names = sorted(frames["train"][task["label"]].astype(str).unique())
    model_path = fetch_model(options.get("model", recipe["model"]["path"]))
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def encoded(batch: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer(batch[task["text"]], truncation=True, max_length=task["max_length"])
        return {**made, "labels": [names.index(str(label)) for label in batch[task["label"]]]}

    rows = {
        split: Dataset.from_pandas(frame, preserve_index=False).map(
            encoded, batched=True, remove_columns=list(frame.columns)
        )
        for split, frame in frames.items()
    }
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=len(names))
    steps = train["epochs"] * -(-len(rows["train"]) // train["global_batch_size"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=train["epochs"],
            per_device_train_batch_size=train["global_batch_size"],
            per_device_eval_batch_size=64,
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
            train_dataset=rows["train"],
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        given = np.argmax(trainer.predict(rows["test"]).predictions, axis=-1)
    truth = rows["test"]["labels"]
    scores = {
        "accuracy": float(accuracy_score(truth, given)),
        "f1_macro": float(f1_score(truth, given, average="macro", zero_division=0)),
    }
    print(json.dumps({**scores, "epochs": train["epochs"], "steps": steps, "seed": seed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
