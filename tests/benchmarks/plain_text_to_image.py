"""Text to image by diffusers, peft and torch alone: what a run of the same recipe is compared with.

    python tests/benchmarks/plain_text_to_image.py jobs/text_to_image.yaml|jobs/text_to_image_subject.yaml
        [epochs=N] [seed=S] [model=FOLDER]

One process, shuffled batches, AdamW and a linear schedule with the recipe's warm-up, noise and steps drawn anew for
each batch, weights of steps by `compute_snr`, as the training script of diffusers has it. Prints one JSON line: the
mean squared error on the test rows before and after training. How pictures are cut, which noise is laid over the test
rows, and what weights are drawn where the folder has configs alone, is rayft's own: how small an error can become hangs
on the autoencoder that was drawn.
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
from peft import LoraConfig
from transformers import CLIPTextModel

from rayft.data.pieces import fragments
from rayft.data.source import read
from rayft.models import without_weights
from rayft.recipe import Recipe
from rayft.tasks.task import Pretrained


def rows_of(recipe: Recipe, split: str, processor: Any) -> dict[str, Any]:
    """(n, 3, size, size) pictures from -1 to 1, (n, positions) token ids, and of each row the seed of its noise and how
    often it is drawn."""
    task = recipe.task
    made: dict[str, list[Any]] = {"pixels": [], "input_ids": [], "draw": [], "draws": []}
    for source in getattr(recipe.data, split):
        for piece in fragments([source], split):
            for rows in read(piece, source, recipe.data.columns, task.columns()):
                features = task.encode(rows.columns, processor, {}, evaluation=True).features
                for name in made:
                    made[name] += int(source.weight) * features[name]
    channels = np.frombuffer(b"".join(made["pixels"]), np.uint8).reshape(-1, 3, processor.size, processor.size)
    pictures = torch.from_numpy(channels.astype(np.float32) / 127.5 - 1)
    return {
        "pictures": pictures,
        "ids": torch.tensor(made["input_ids"]),
        "draws": list(zip(made["draw"], made["draws"], strict=True)),
    }


def parts_of(recipe: Recipe, folder: str, seed: int) -> tuple[Any, Any, Any]:
    """Text encoder, autoencoder and denoiser, drawn where the folder holds configs alone."""
    if without_weights(folder):
        source = Pretrained(folder, seed=seed)
        drawn = recipe.task.load(source, {}, recipe.task.processor(source))
        return drawn.conditions.text_encoder.eval(), drawn.conditions.vae.eval(), drawn.unet
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    return text_encoder.eval(), vae.eval(), UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def main(path: str, *overrides: str) -> None:
    plain = yaml.safe_load(Path(path).read_text())
    given = dict(argument.split("=") for argument in overrides)
    train, folder = plain["train"], given.get("model", plain["model"]["path"])
    recipe = Recipe.load(path)
    processor = recipe.task.processor(Pretrained(folder))
    seed = int(given.get("seed", 0))
    torch.manual_seed(seed)
    wording, autoencoder, unet = parts_of(recipe, folder, seed)
    if lora := plain["model"].get("lora"):
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules=lora["targets"]))
    noising = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")

    @torch.no_grad()
    def encoded(split: str) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        rows = rows_of(recipe, split, processor)
        latents = autoencoder.encode(rows["pictures"]).latent_dist.mode() * autoencoder.config.scaling_factor
        return latents, wording(rows["ids"])[0], rows["draws"]

    def errors(latents: torch.Tensor, text: torch.Tensor, noise: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        answer = unet(noising.add_noise(latents, noise, steps), steps, encoder_hidden_states=text).sample
        return (answer - noise).square().mean(dim=(1, 2, 3))

    *test, draws = encoded("test")
    drawn = [processor.drawn(*draw) for draw in draws]
    noise, steps = (torch.from_numpy(np.stack(parts)) for parts in zip(*drawn, strict=True))

    @torch.no_grad()
    def score() -> float:
        unet.eval()
        of_draws = [errors(*test, noise[:, draw], steps[:, draw]).mean() for draw in range(noise.shape[1])]
        return float(torch.stack(of_draws).mean())

    before = score()
    latents, text, _ = encoded("train")
    epochs, size = int(given.get("epochs", train["epochs"])), train["global_batch_size"]
    total = epochs * math.ceil(len(latents) / size)
    warm = math.ceil(train.get("warmup", 0.0) * total)
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=train["learning_rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warm if step < warm else (total - step) / max(1, total - warm)
    )
    gamma = plain["task"].get("snr_gamma")
    for _ in range(epochs):
        unet.train()
        for chosen in torch.randperm(len(latents)).split(size):
            at = torch.randint(1000, (len(chosen),))
            ratio = compute_snr(noising, at)
            weights = ratio.clamp(max=gamma) / ratio if gamma else torch.ones(len(chosen))
            loss = (errors(latents[chosen], text[chosen], torch.randn_like(latents[chosen]), at) * weights).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    print(json.dumps({"untrained": round(before, 4), "mse": round(score(), 4), "steps": total}))


if __name__ == "__main__":
    main(*sys.argv[1:])
