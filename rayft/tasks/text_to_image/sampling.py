"""Pictures from texts: noise is taken away step by step, without any drawn in between (DDIM, Song et al. 2021)."""

from __future__ import annotations

import io
from typing import Any

import torch

from rayft.tasks.task import Batch
from rayft.tasks.text_to_image.network import diffusion_of
from rayft.tasks.text_to_image.processor import Prompter


@torch.no_grad()
def sampled(model: Any, batch: Batch, processor: Prompter, steps: int, guidance: float) -> list[bytes]:
    """A PNG for each row of `batch`, which begins with the row's own noise, its first draw.

    With `guidance` above 1 a step goes so many times as far from what the model would do without a text.
    """
    from diffusers import DDIMScheduler

    network = diffusion_of(model)
    scheduler = DDIMScheduler.from_config({**processor.schedule, "clip_sample": False})
    scheduler.set_timesteps(steps)
    ids = batch["input_ids"]
    empty = torch.tensor([processor.ids("")[0]], device=ids.device).expand_as(ids)
    text = network.conditions.text(torch.cat([empty, ids]) if guidance > 1 else ids)
    latents = batch["noise"][:, 0] * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        given = torch.cat([latents, latents]) if guidance > 1 else latents
        answer = network.unet(given, step.to(ids.device), encoder_hidden_states=text, return_dict=False)[0].float()
        if guidance > 1:
            without, with_text = answer.chunk(2)
            answer = without + guidance * (with_text - without)
        latents = scheduler.step(answer, step, latents).prev_sample
    pictures = network.conditions.picture(latents).float()
    channels = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return [_png(picture) for picture in channels.transpose(0, 2, 3, 1)]


def _png(picture: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
