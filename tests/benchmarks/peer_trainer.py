"""The peer that a user would take instead: the Hugging Face Trainer, started by torchrun, with or without DeepSpeed.

    torchrun --nproc-per-node 2 tests/benchmarks/peer_trainer.py CONFIG.json

CONFIG holds `task` (text-classification or causal-lm), `model` (a folder), `train` and `validation` (files), `length`
(tokens), `batch` (rows of one process), `epochs` or `steps`, `rate`, `zero` (0: plain data parallel), `freeze` (blocks,
with the embeddings below them) and `seed`; on a GPU also `bf16`, and `lora` (the rank of adapters). Rows are text and
label (CSV), or question and answer (Parquet), whose loss is taken over the answer. Each process takes one thread. Rank
0 prints one JSON line: `first_step_at` (seconds since 1970), `train_s` (from the first step's end to the last's),
`rows_per_s` and `tokens_per_s` of the steps after the fifth, and the score on the validation rows: accuracy, or a
token's mean loss.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

SETTLING = 5  # steps that rates leave out


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.time())


class Counted:
    """A collator that counts the tokens which it hands out, without padding."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self.collator(rows)


def classification(config: dict[str, Any]) -> tuple[Any, Any, dict[str, Any], Any]:
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    data = {split: Dataset.from_csv(config[split]) for split in ("train", "validation")}
    labels = {name: number for number, name in enumerate(sorted(set(data["train"]["label"])))}

    def encoded(batch: dict[str, Any]) -> dict[str, Any]:
        texts = tokenizer(batch["text"], truncation=True, max_length=config["length"])
        return {**texts, "labels": [labels[name] for name in batch["label"]]}

    data = {split: rows.map(encoded, batched=True, remove_columns=["text", "label"]) for split, rows in data.items()}
    model = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=len(labels))
    if config["freeze"]:
        for module in (model.base_model.embeddings, *model.base_model.encoder.layer[: config["freeze"]]):
            module.requires_grad_(False)
    return tokenizer, model, data, DataCollatorWithPadding(tokenizer)


def language(config: dict[str, Any]) -> tuple[Any, Any, dict[str, Any], Any]:
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model: Any = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
    if config.get("lora"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=config["lora"], target_modules="all-linear"))

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids, targets = prompt + answer, [-100] * len(prompt) + answer
        return {"input_ids": ids[: config["length"]], "labels": targets[: config["length"]]}

    data = {split: Dataset.from_parquet(config[split]) for split in ("train", "validation")}
    data = {split: rows.map(encoded, remove_columns=rows.column_names) for split, rows in data.items()}
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, model, data, DataCollatorForSeq2Seq(tokenizer)


def deepspeed(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def main(path: str) -> None:
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    torch.manual_seed(config.get("seed", 0))  # a head is drawn anew
    text = config["task"] == "text-classification"
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = scratch
        tokenizer, model, data, collator = (classification if text else language)(config)
        clock, counted = Clock(), Counted(collator)
        arguments = TrainingArguments(
            scratch,
            num_train_epochs=config.get("epochs", 1),
            max_steps=config.get("steps", -1),
            per_device_train_batch_size=config["batch"],
            per_device_eval_batch_size=2 * config["batch"],
            learning_rate=config["rate"],
            weight_decay=0.01,
            save_strategy="no",
            report_to=[],
            use_cpu=not config.get("bf16"),
            bf16=bool(config.get("bf16")),
            disable_tqdm=True,
            deepspeed=deepspeed(config["zero"]) if config["zero"] else None,
            seed=config.get("seed", 0),
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=counted,
            processing_class=tokenizer,
            callbacks=[clock],
            compute_metrics=(
                lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}
            )
            if text
            else None,
        )
        trainer.train()
        tokens = counted.tokens
        score = (
            trainer.evaluate()["eval_accuracy"]
            if text
            else _loss(trainer.model, data["validation"], collator, bool(config.get("bf16")))
        )
    if not trainer.is_world_process_zero():
        return
    world, ends = int(os.environ.get("WORLD_SIZE", "1")), clock.ends
    steps = len(ends)
    answer = {"first_step_at": ends[0], "train_s": ends[-1] - ends[0], "steps": steps, "score": score}
    if steps > SETTLING:
        seconds = ends[-1] - ends[SETTLING - 1]
        rows = min(steps * config["batch"] * world, config.get("epochs", 1) * len(data["train"]))
        answer["rows_per_s"] = (rows - SETTLING * config["batch"] * world) / seconds
        answer["tokens_per_s"] = world * float(np.sum(tokens[SETTLING:steps])) / seconds
    if torch.cuda.is_available():
        answer["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(answer))


def _loss(model: Any, rows: Any, collator: Any, bf16: bool) -> float:
    """The mean over all tokens of all rows; the Trainer's own is a mean of its batches' means.

    On the model's device, and with `bf16` in the mixed precision in which it was trained.
    """
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    batches = iter(rows)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        while some := list(itertools.islice(batches, 16)):
            batch = collator(some)
            found = int((batch["labels"][:, 1:] != -100).sum())
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            total, count = total + float(loss) * found, count + found
    return total / count


if __name__ == "__main__":
    main(sys.argv[1])
