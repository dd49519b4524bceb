"""A diffusion pipeline as one network: encoders of texts and pictures that never learn, and a denoiser that does."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch

from rayft.errors import ModelError
from rayft.models import without_weights
from rayft.tasks.loading import set_dropout, told
from rayft.tasks.stacked import Blocks
from rayft.tasks.task import Pretrained
from rayft.tasks.text_to_image.processor import Prompter, config_of


class Conditions(torch.nn.Module):
    """What of a row does not depend on noise: the latents of its picture and the states of its text, side by side."""

    def __init__(self, text_encoder: Any, vae: Any) -> None:
        super().__init__()
        self.text_encoder, self.vae = text_encoder, vae

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """(n, latent numbers + positions x width) float32. Latents are the means, which a row has one of."""
        moments = self.vae.encoder(pixel_values)
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        latents = moments.chunk(2, dim=1)[0] * self.vae.config.scaling_factor
        return torch.cat([latents.flatten(1).float(), self.text(input_ids).flatten(1).float()], dim=1)

    def text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(n, positions, width)"""
        states: torch.Tensor = self.text_encoder(input_ids)[0]
        return states

    def picture(self, latents: torch.Tensor) -> torch.Tensor:
        """(n, 3, size, size) about from -1 to 1"""
        latents = latents / self.vae.config.scaling_factor
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        picture: torch.Tensor = self.vae.decoder(latents)
        return picture


class Diffusion(torch.nn.Module):
    """`kept` is how much of a picture's variance is left at each step; see `TextToImage` for `snr_gamma`."""

    kept: torch.Tensor

    def __init__(self, conditions: Conditions, unet: Any, processor: Prompter, snr_gamma: float | None) -> None:
        super().__init__()
        self.conditions, self.unet = conditions, unet
        self.latent, self.snr_gamma = processor.latent, snr_gamma
        self.target = processor.schedule.get("prediction_type", "epsilon")
        self.register_buffer("kept", _kept(processor.schedule), persistent=False)

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(squared error of the answer at each draw of a row, its weight in the loss), both (n, draws) float32.

        One draw after another: memory is that of one.
        """
        states = self.conditions(pixel_values, input_ids)
        numbers = noise[0, 0].numel()
        latents = states[:, :numbers].view(noise[:, 0].shape)
        text = states[:, numbers:].view(len(noise), input_ids.shape[1], -1)
        draws = zip(noise.unbind(1), timesteps.unbind(1), strict=True)
        errors = torch.stack([self._errors(latents, text, *draw) for draw in draws], dim=1)
        return errors, self._weights(self.kept[timesteps])

    def _errors(
        self, latents: torch.Tensor, text: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """(n,) float32"""
        kept = self.kept[timesteps].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        answer = self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        truth = noise if self.target == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * latents
        return (answer.float() - truth).square().flatten(1).mean(dim=1)

    def _weights(self, kept: torch.Tensor) -> torch.Tensor:
        """Of each step in the loss; 1 without `snr_gamma`."""
        if self.snr_gamma is None:
            return torch.ones_like(kept)
        ratio = kept / (1 - kept)
        return ratio.clamp(max=self.snr_gamma) / (ratio if self.target == "epsilon" else ratio + 1)

    def blocks(self, prefix: str) -> Blocks:
        down = [f"{prefix}unet.down_blocks.{index}" for index in range(len(self.unet.down_blocks))]
        up = [f"{prefix}unet.up_blocks.{index}" for index in range(len(self.unet.up_blocks))]
        middle = [f"{prefix}unet.mid_block"] if self.unet.mid_block is not None else []
        names = ("conv_in", "time_proj", "time_embedding", "class_embedding")
        beside = tuple((f"{prefix}unet.{name}", 1) for name in names if getattr(self.unet, name, None) is not None)
        return Blocks((), (f"{prefix}conditions", *down, *middle, *up), beside, fixed=1)

    def activation_checkpointing_enable(self, options: dict[str, Any] | None = None) -> None:
        self.unet.enable_gradient_checkpointing()

    def save_pretrained(self, folder: str) -> None:
        """The pipeline's folder, but for what the processor writes."""
        parts = {"unet": self.unet, "vae": self.conditions.vae, "text_encoder": self.conditions.text_encoder}
        for name, part in parts.items():
            part.save_pretrained(os.path.join(folder, name))


def _kept(schedule: dict[str, Any]) -> torch.Tensor:
    """(steps,) float32: the running product of 1 - beta."""
    from diffusers import DDPMScheduler

    with torch.device("cpu"):
        kept: torch.Tensor = DDPMScheduler.from_config(schedule).alphas_cumprod
    return kept


def diffusion_of(model: Any) -> Diffusion:
    """The network inside an engine, or below adapters."""
    return next(module for module in model.modules() if isinstance(module, Diffusion))


def load_diffusion(model: Pretrained, processor: Prompter, snr_gamma: float | None) -> Diffusion:
    """ModelError where a part can't be loaded, or the recipe asks for what a pipeline has no place for."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    for name, value in (("attention", model.attention), ("quantize", model.quantize)):
        if value is not None:
            raise ModelError(f"model.{name} is {value!r}, which text-to-image has no use for; null fits")
    if processor.schedule.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"the scheduler of {model.path} predicts {processor.schedule['prediction_type']!r}; epsilon or "
            "v_prediction fits"
        )
    with told(model, "text encoder"):
        wording = CLIPTextConfig.from_pretrained(
            model.path, subfolder="text_encoder", revision=model.revision or "main"
        )
    set_dropout(wording, model.dropout)
    denoising = config_of(UNet2DConditionModel.load_config, model, "unet")
    if model.dropout is not None:
        denoising["dropout"] = model.dropout
    seeing = config_of(AutoencoderKL.load_config, model, "vae")
    dtype = getattr(torch, model.dtype)
    if model.meta or without_weights(model.path):
        text_encoder = _drawn(model, "text_encoder", lambda: CLIPTextModel(wording))
        vae = _drawn(model, "vae", lambda: AutoencoderKL.from_config(seeing))
        unet = _drawn(model, "unet", lambda: UNet2DConditionModel.from_config(denoising))
    else:
        options: dict[str, Any] = {"revision": model.revision}
        with told(model, "weights"):
            text_encoder = CLIPTextModel.from_pretrained(
                model.path, subfolder="text_encoder", config=wording, dtype=dtype, **options
            )
            vae = AutoencoderKL.from_pretrained(model.path, subfolder="vae", torch_dtype=dtype, **options)
            unet = UNet2DConditionModel.from_pretrained(
                model.path, subfolder="unet", dropout=denoising.get("dropout", 0.0), torch_dtype=dtype, **options
            )
    if dtype != torch.float32:
        text_encoder, vae, unet = text_encoder.to(dtype), vae.to(dtype), unet.to(dtype)
    return Diffusion(Conditions(text_encoder, vae), unet, processor, snr_gamma).train()


def _drawn(model: Pretrained, part: str, make: Any) -> Any:
    """A part without weights: on no device, or drawn from (seed, the part's name)."""
    if model.meta:
        with torch.device("meta"):
            return make()
    digest = hashlib.sha256(f"{model.seed}/{part}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return make()
