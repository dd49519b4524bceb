"""A language model of about 1 billion parameters on one GPU: rayft against the Hugging Face Trainer.

    python tests/benchmarks/gpu.py [rounds=1] [steps=60] ['only=NAME|NAME'] [small]

A Llama of a config alone, its weights drawn once (no network is needed) and loaded by both sides, bfloat16, sdpa
attention, gsm8k: packed to 512 tokens by rayft, padded by the Trainer, about as many tokens a step. RUNS are whole
fine-tuning, adapters of rank 16, and three quarters of the blocks frozen, their output stored or not. Prints a line of
JSON for each run as soon as it ends, and one in the end: lines of the table, and medians over rounds of tokens/s, model
FLOPs utilization (`flops.py`) and peak memory. What a run leaves on the disk, up to 16 GB, goes when it has ended.
`small` tries the script itself on a CPU with a tiny model: its figures mean nothing.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flops import per_token
from speed import LANGUAGE, PACKED, Figures, data, ours, torchrun

from rayft.training.timing import SETTLING

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12}  # dense bfloat16 FLOPs a second
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip
ROWS = 16  # packed ones of a step
RANK = 16  # of adapters
SCORED = 64  # validation rows
FIGURES = ("tokens_per_s", "mfu", "peak_memory_gib")


@dataclass(frozen=True)
class Llama:
    """A folder with weights and a tokenizer. `trained` is the share of the parameters above `depth` frozen blocks,
    `adapters` what adapters of RANK add."""

    path: str
    small: bool
    depth: int
    parameters: int
    trained: float
    adapters: int


def model(folder: Path, small: bool) -> Llama:
    """Draws the weights: on the GPU, where a billion take a moment."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = folder / "model"
    shutil.copytree(LANGUAGE, made)
    (made / "model.safetensors").unlink()
    config = json.loads((made / "config.json").read_text())
    config |= {} if small else LARGE
    (made / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    with torch.device("cpu" if small else "cuda"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made), dtype=torch.bfloat16)
    network.save_pretrained(made)
    blocks = network.model.layers
    depth = 3 * len(blocks) // 4
    parameters = network.num_parameters()
    above = sum(
        parameter.numel() for module in (*blocks[depth:], network.model.norm) for parameter in module.parameters()
    )
    linear = [module for module in blocks.modules() if isinstance(module, torch.nn.Linear)]
    adapters = sum(RANK * (module.in_features + module.out_features) for module in linear)
    del network, blocks, linear
    if not small:
        torch.cuda.empty_cache()
    return Llama(str(made), small, depth, parameters, above / parameters, adapters)


def rayft(folder: Path, llama: Llama, steps: int, **model_fields: Any) -> Figures:
    """Scores and saves once, in the end, in a storage that is gone then."""
    task = {"type": "causal-lm", "prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}
    once = {"evaluate_every": f"{steps} steps", "save_every": f"{steps} steps"}
    with tempfile.TemporaryDirectory(dir=folder) as storage:
        return ours(
            folder,
            Path(storage),
            task={**task, "max_length": PACKED},
            model={"path": llama.path, "dtype": "float32" if llama.small else "bfloat16", **model_fields},
            data={split: str(folder / f"{split}.parquet") for split in ("train", "validation")},
            train={"epochs": 3, "max_steps": steps, "global_batch_size": ROWS, "micro_batch_size": ROWS, **once},
            checkpoints={"keep": 1},
            cluster={"workers": 1, "gpus_per_worker": 0 if llama.small else 1},
        )


def trainer(folder: Path, llama: Llama, steps: int, lora: int = 0) -> Figures:
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation")}
    config = {
        "task": "causal-lm", "model": llama.path, "length": PACKED, "batch": 2 * ROWS, "steps": steps, "rate": 5e-5,
        "zero": 0, "freeze": 0, "lora": lora, "bf16": not llama.small, **files,
    }  # fmt: skip
    return torchrun(folder, "peer_trainer.py", config, processes=1)


def frozen(cached: str) -> Callable[[Path, Llama, int], Figures]:
    return lambda folder, llama, steps: rayft(folder, llama, steps, freeze={"layers": llama.depth}, cache_frozen=cached)


RUNS: dict[str, Callable[[Path, Llama, int], Figures]] = {
    "trainer": trainer,
    "rayft": rayft,
    "trainer, adapters": lambda folder, llama, steps: trainer(folder, llama, steps, lora=RANK),
    "rayft, adapters": lambda folder, llama, steps: rayft(folder, llama, steps, lora={"r": RANK}),
    "rayft, three quarters frozen": frozen("off"),
    "rayft, three quarters stored": frozen("on"),
}
CONTESTS = (
    ("rayft", "trainer"),
    ("rayft, adapters", "trainer, adapters"),
    ("rayft, three quarters stored", "rayft, three quarters frozen"),
)


def operations(name: str, llama: Llama) -> float:
    """FLOPs of one token in that run."""
    if "adapters" in name:
        return per_token(llama.parameters, adapters=llama.adapters)
    if "three quarters" in name:
        return per_token(llama.parameters, llama.trained, stored="stored" in name)
    return per_token(llama.parameters)


def medians(found: list[Figures]) -> Figures:
    return {name: statistics.median(each[name] for each in found) for name in FIGURES if name in found[0]}


def lines(found: dict[str, list[Figures]], llama: Llama) -> list[tuple[str, ...]]:
    """For each pair that was run: what, rayft's tokens/s, the other's, times more."""
    made = []
    for mine, other in CONTESTS:
        if mine not in found or other not in found:
            continue
        pairs = zip(found[mine], found[other], strict=True)
        ratio = statistics.median(own["tokens_per_s"] / theirs["tokens_per_s"] for own, theirs in pairs)
        own, theirs = (medians(found[one])["tokens_per_s"] for one in (mine, other))
        what = f"Llama of {llama.parameters / 1e9:.2f} B on a GPU: {mine.removeprefix('rayft, ')}"
        made.append((what, f"{own:,.0f} tokens/s", f"{other}: {theirs:,.0f}", f"{ratio:.2f}", ""))
    return made


def main(*options: str) -> None:
    given = dict(option.split("=", 1) for option in options if "=" in option)
    steps, rounds = int(given.get("steps", 60)), int(given.get("rounds", 1))
    if steps <= SETTLING:
        raise SystemExit(f"steps={steps}: rates leave out the first {SETTLING} steps; {SETTLING + 1} or more fit")
    import pyarrow.parquet as pq
    import torch

    chosen = given["only"].split("|") if "only" in given else list(RUNS)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for known, flops in PEAK.items() if known in name), None)
    found: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory(prefix="rayft-gpu-", ignore_cleanup_errors=True) as home:
        folder = Path(home)
        data(folder)
        validation = folder / "validation.parquet"
        pq.write_table(pq.read_table(validation).slice(0, SCORED), validation)
        llama = model(folder, "small" in options)
        for _ in range(rounds):
            for run in chosen:
                figures = RUNS[run](folder, llama, steps)
                if peak:
                    figures["mfu"] = operations(run, llama) * figures["tokens_per_s"] / peak
                found.setdefault(run, []).append(figures)
                print(json.dumps({"run": run, **figures}), flush=True)
    told = {run: medians(figures) for run, figures in found.items()}
    print(json.dumps({"gpu": name, "parameters": llama.parameters, "lines": lines(found, llama), "medians": told}))


if __name__ == "__main__":
    main(*sys.argv[1:])
