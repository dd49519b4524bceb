"""Sounds by transformers and torch alone: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_audio.py jobs/audio_classification.yaml|jobs/speech_recognition.yaml
        [epochs=N] [seed=S] [save=FOLDER] [model=FOLDER] [accent=NAME]

One process, shuffled batches, AdamW and a linear schedule with the recipe's warm-up, the losses that the models
themselves compute. `accent` trains on that accent's rows, from the model that an earlier run saved. Prints one JSON
line: the accuracy, or the word error rate, on the test rows after the last epoch.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import jiwer
import pandas as pd
import soundfile
import torch
import yaml
from scipy.signal import resample_poly
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    Wav2Vec2CTCTokenizer,
)


def rows_of(source: dict[str, Any]) -> pd.DataFrame:
    table = pd.read_csv(source["path"], dtype=str)
    for column, wanted in source["where"].items():
        table = table[table[column].isin(wanted if isinstance(wanted, list) else [wanted])]
    folder = Path(source["path"]).parent
    sounds = [soundfile.read(folder / name, dtype="float32") for name in table["file_name"]]
    return table.assign(sound=[resample_poly(sound, 16_000 // rate, 1) for sound, rate in sounds])


def tokenizer_of(texts: pd.Series) -> Wav2Vec2CTCTokenizer:
    letters = ["<pad>", "<unk>", "|", *sorted(set("".join(texts)) - {" "})]
    path = Path(tempfile.mkdtemp()) / "vocab.json"
    path.write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    return Wav2Vec2CTCTokenizer(str(path), bos_token=None, eos_token=None)


def model_of(folder: str, known: str | None, letters: int | None, labels: int) -> Any:
    """For letters, or where there are none for labels; drawn from torch's seed, or read from folder `known`."""
    if letters is None:
        return AutoModelForAudioClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=labels))
    if known:
        return AutoModelForCTC.from_pretrained(known)
    fields = {"vocab_size": letters, "ctc_zero_infinity": True, "ctc_loss_reduction": "mean"}
    return AutoModelForCTC.from_config(AutoConfig.from_pretrained(folder, **fields))


def scores_of(spells: bool, truth: list[str], given: list[str]) -> dict[str, float]:
    if spells:
        return {"wer": jiwer.wer(truth, given), "cer": jiwer.cer(truth, given)}
    return {"accuracy": sum(one == other for one, other in zip(truth, given, strict=True)) / len(truth)}


def main(path: str, *overrides: str) -> None:
    with open(path, encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    options = dict(override.split("=") for override in overrides)
    task, train, data = recipe["task"], recipe["train"], recipe["data"]
    epochs, seed = int(options.get("epochs", train["epochs"])), int(options.get("seed", 0))
    torch.manual_seed(seed)
    spells = task["type"] == "speech-recognition"
    whole = rows_of(data["train"])
    tokenizer = tokenizer_of(whole["text"])
    names = sorted(set(whole[task.get("label", "text")]))
    if "accent" in options:
        data["train"]["where"]["accent"] = options["accent"]
    rows, test = rows_of(data["train"]), rows_of(data["test"])
    folder = recipe["model"]["path"]
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model = model_of(folder, options.get("model"), len(tokenizer) if spells else None, len(names))
    size = train["global_batch_size"]
    total = epochs * -(-len(rows) // size)
    warmup = math.ceil(train.get("warmup", 0.0) * total)
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(train["learning_rate"]), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warmup if step < warmup else (total - step) / (total - warmup)
    )

    def heard(part: pd.DataFrame) -> Any:
        return extractor(part["sound"].tolist(), sampling_rate=16_000, padding=True, return_tensors="pt")

    model.train()
    for _ in range(epochs):
        for numbers in torch.randperm(len(rows)).split(size):
            part = rows.iloc[numbers.tolist()]
            if spells:
                ids = tokenizer(part["text"].tolist(), padding=True, return_tensors="pt")
                labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
            else:
                labels = torch.tensor([names.index(label) for label in part[task["label"]]])
            model(**heard(part), labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    given: list[Any] = []
    with torch.inference_mode():
        for first in range(0, len(test), size):
            best = model(**heard(test.iloc[first : first + size])).logits.argmax(dim=-1)
            given += tokenizer.batch_decode(best) if spells else [names[number] for number in best]
    scores = scores_of(spells, test["text" if spells else task["label"]].tolist(), given)
    if "save" in options:
        model.save_pretrained(options["save"])
    print(json.dumps({**scores, "epochs": epochs, "steps": total, "seed": seed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
