"""A language model of about 1 billion parameters on one GPU: rayft against the Hugging Face Trainer.

    python tests/benchmarks/gpu.py [rounds=3] [steps=60] [small]

A Llama of a config alone, its weights drawn from the seed (no network is needed), bfloat16, sdpa attention, gsm8k:
packed to 512 tokens by rayft, padded by the Trainer, about as many tokens a step. Whole fine-tuning, adapters of rank
16, and with three quarters of the blocks frozen, their output stored or not. Prints one JSON line: lines of the table,
and medians over rounds of tokens/s, model FLOPs utilization (6 FLOPs a parameter and token; Chowdhery et al. 2022) and
peak memory. `small` tries the script itself on a CPU with a tiny model: its figures mean nothing.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from speed import LANGUAGE, PACKED, Figures, data, ours, torchrun

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12}  # dense bfloat16 FLOPs a second
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip
ROWS = 16  # packed ones of a step


def model(folder: Path, small: bool) -> tuple[str, int]:
    """A folder with a config and a tokenizer, and the model's parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = folder / "model"
    shutil.copytree(LANGUAGE, made)
    (made / "model.safetensors").unlink()
    config = json.loads((made / "config.json").read_text())
    config |= {} if small else LARGE
    (made / "config.json").write_text(json.dumps(config))
    import torch

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made))
    return str(made), sum(parameter.numel() for parameter in network.parameters())


def rayft(folder: Path, path: str, small: bool, steps: int, **model_fields: Any) -> Figures:
    task = {"type": "causal-lm", "prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}
    return ours(
        folder,
        task={**task, "max_length": PACKED},
        model={"path": path, "dtype": "float32" if small else "bfloat16", **model_fields},
        data={split: str(folder / f"{split}.parquet") for split in ("train", "validation")},
        train={"epochs": 3, "max_steps": steps, "global_batch_size": ROWS, "micro_batch_size": ROWS},
        cluster={"workers": 1, "gpus_per_worker": 0 if small else 1},
    )


def trainer(folder: Path, path: str, small: bool, steps: int, lora: int = 0) -> Figures:
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation")}
    config = {
        "task": "causal-lm", "model": path, "length": PACKED, "batch": 2 * ROWS, "steps": steps, "rate": 5e-5,
        "zero": 0, "freeze": 0, "lora": lora, "bf16": not small, **files,
    }  # fmt: skip
    return torchrun(folder, "peer_trainer.py", config, processes=1)


def main(*options: str) -> None:
    import torch

    small = "small" in options
    given = dict(option.split("=") for option in options if "=" in option)
    steps, rounds = int(given.get("steps", 60)), int(given.get("rounds", 3))
    found: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory(prefix="rayft-gpu-", ignore_cleanup_errors=True) as home:
        folder = Path(home)
        data(folder)
        path, parameters = model(folder, small)
        frozen = {"freeze": {"layers": 3 if small else 12}}
        for _ in range(rounds):
            runs = {
                "trainer": trainer(folder, path, small, steps),
                "rayft": rayft(folder, path, small, steps),
                "trainer, adapters": trainer(folder, path, small, steps, lora=16),
                "rayft, adapters": rayft(folder, path, small, steps, lora={"r": 16}),
                "rayft, three quarters frozen": rayft(folder, path, small, steps, **frozen, cache_frozen="off"),
                "rayft, three quarters stored": rayft(folder, path, small, steps, **frozen, cache_frozen="on"),
            }
            for name, figures in runs.items():
                found.setdefault(name, []).append(figures)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for known, flops in PEAK.items() if known in name), None)
    middle = {
        run: {
            figure: statistics.median(each[figure] for each in figures)
            for figure in ("tokens_per_s", "peak_memory_gib")
        }
        for run, figures in found.items()
        if all("peak_memory_gib" in each for each in figures)
    }
    if peak:
        for figures in middle.values():
            figures["mfu"] = 6 * parameters * figures["tokens_per_s"] / peak
    lines = []
    for mine, other in (
        ("rayft", "trainer"),
        ("rayft, adapters", "trainer, adapters"),
        ("rayft, three quarters stored", "rayft, three quarters frozen"),
    ):
        ratio = statistics.median(
            own["tokens_per_s"] / theirs["tokens_per_s"] for own, theirs in zip(found[mine], found[other], strict=True)
        )
        own, theirs = (statistics.median(each["tokens_per_s"] for each in found[one]) for one in (mine, other))
        what = f"Llama of {parameters / 1e9:.2f} B on a GPU: {mine.removeprefix('rayft, ')}"
        lines.append((what, f"{own:,.0f} tokens/s", f"{other}: {theirs:,.0f}", f"{ratio:.2f}", ""))
    print(json.dumps({"gpu": name, "parameters": parameters, "lines": lines, "medians": middle}))


if __name__ == "__main__":
    main(*sys.argv[1:])
