"""Text to image by diffusers and torch alone: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_text_to_image.py jobs/text_to_image.yaml [epochs=N] [seed=S]

One process, shuffled batches, AdamW and a linear schedule with the recipe's warm-up, noise and steps drawn anew for
each batch, weights of steps by `compute_snr`, as the training script of diffusers has it. Prints one JSON line: the
mean squared error on the test rows, each at noise drawn once, before and after training.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel


def rows_of(path: str, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 3, 64, 64) pictures from -1 to 1, and (n, positions) token ids."""
    rows = [json.loads(line) for line in Path(path, "metadata.jsonl").read_text().splitlines()]
    pictures = [np.asarray(Image.open(Path(path) / row["file_name"]).convert("RGB")) for row in rows]
    ids = tokenizer([row["text"] for row in rows], padding="max_length", truncation=True, return_tensors="pt")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1, ids["input_ids"]


def main() -> None:
    plain = yaml.safe_load(Path(sys.argv[1]).read_text())
    given = dict(argument.split("=") for argument in sys.argv[2:])
    train, folder = plain["train"], plain["model"]["path"]
    torch.manual_seed(int(given.get("seed", 0)))
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    wording = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")).eval()
    autoencoder = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae")).eval()
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    noising = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")

    @torch.no_grad()
    def encoded(path: str) -> tuple[torch.Tensor, torch.Tensor]:
        pictures, ids = rows_of(path, tokenizer)
        latents = autoencoder.encode(pictures).latent_dist.mode() * autoencoder.config.scaling_factor
        return latents, wording(ids)[0]

    def errors(latents: torch.Tensor, text: torch.Tensor, noise: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        answer = unet(noising.add_noise(latents, noise, steps), steps, encoder_hidden_states=text).sample
        return (answer - noise).square().mean(dim=(1, 2, 3))

    test = encoded(plain["data"]["test"])
    drawn = torch.Generator().manual_seed(0)
    noise = torch.randn(test[0].shape, generator=drawn)
    steps = torch.randint(1000, (len(noise),), generator=drawn)

    @torch.no_grad()
    def score() -> float:
        unet.eval()
        return float(errors(*test, noise, steps).mean())

    before = score()
    latents, text = encoded(plain["data"]["train"])
    epochs, size = int(given.get("epochs", train["epochs"])), train["global_batch_size"]
    total = epochs * math.ceil(len(latents) / size)
    warm = math.ceil(train["warmup"] * total)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=train["learning_rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warm if step < warm else (total - step) / max(1, total - warm)
    )
    gamma = plain["task"]["snr_gamma"]
    for _ in range(epochs):
        unet.train()
        for chosen in torch.randperm(len(latents)).split(size):
            at = torch.randint(1000, (len(chosen),))
            ratio = compute_snr(noising, at)
            weights = ratio.clamp(max=gamma) / ratio
            loss = (errors(latents[chosen], text[chosen], torch.randn_like(latents[chosen]), at) * weights).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    print(json.dumps({"untrained": round(before, 4), "mse": round(score(), 4), "steps": total}))


if __name__ == "__main__":
    main()
