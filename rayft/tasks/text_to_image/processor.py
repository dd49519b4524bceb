"""What a diffusion model is given: token ids of a text, a picture at its size, noise and how much of it."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayft.errors import ModelError
from rayft.tasks.later import transformers
from rayft.tasks.loading import told
from rayft.tasks.task import Pretrained

KIND = "StableDiffusionPipeline"
PACKAGES = {"diffusers": "diffusers", "PIL": "Pillow", "matplotlib": "matplotlib"}


@dataclass(frozen=True)
class Prompter:
    """`size` is a picture's side in pixels, `latent` the shape of its latents (channels, height, width), `steps` how
    many amounts of noise there are; `schedule` is the scheduler's config, `index` says of which classes the parts are.
    """

    tokenizer: Any
    size: int
    latent: tuple[int, int, int]
    steps: int
    schedule: dict[str, Any]
    index: dict[str, Any]

    def ids(self, text: str) -> tuple[list[int], bool]:
        """Token ids, filled up to what the text encoder reads, and whether the text was cut."""
        whole = len(self.tokenizer(text, verbose=False)["input_ids"])
        most = self.tokenizer.model_max_length
        ids: list[int] = self.tokenizer(text, padding="max_length", truncation=True, max_length=most)["input_ids"]
        return ids, whole > most

    def pixels(self, picture: Any) -> bytes:
        """The square around the middle of a Pillow picture, as 8-bit channels (3, size, size)."""
        from PIL import Image, ImageOps

        fitted = ImageOps.fit(picture, (self.size, self.size), Image.Resampling.LANCZOS)
        return np.asarray(fitted).transpose(2, 0, 1).tobytes()

    def drawn(self, draw: int, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Noise (count, channels, height, width) float32 and timesteps (count,) int64, a function of the arguments.

        A first timestep is drawn; the others lie evenly around it, as systematic sampling has it.
        """
        rng = np.random.default_rng(draw)
        noise = rng.standard_normal((count, *self.latent), dtype=np.float32)
        return noise, (rng.integers(self.steps) + np.arange(count) * self.steps // count) % self.steps

    def save_pretrained(self, folder: str) -> None:
        """The pipeline's folder, but for the networks; pictures are no longer checked for what is not safe."""
        self.tokenizer.save_pretrained(os.path.join(folder, "tokenizer"))
        os.makedirs(os.path.join(folder, "scheduler"), exist_ok=True)
        none = {name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")}
        index = {**self.index, **none, "requires_safety_checker": False}
        written = {os.path.join("scheduler", "scheduler_config.json"): self.schedule, "model_index.json": index}
        for name, content in written.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)


def load_prompter(model: Pretrained, size: int | None) -> Prompter:
    """ModelError where the model is no pipeline of this kind, a package is missing, or `size` doesn't fit it."""
    require_packages()
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    index = _index(model)
    if index["_class_name"] != KIND:
        raise ModelError(
            f"model.path: `{model.path}` is a {index['_class_name']}; text-to-image trains what is a {KIND}"
        )
    with told(model, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model.path, subfolder="tokenizer", revision=model.revision
        )
    autoencoder = config_of(AutoencoderKL.load_config, model, "vae")
    denoiser = config_of(UNet2DConditionModel.load_config, model, "unet")
    schedule = config_of(DDPMScheduler.load_config, model, "scheduler")
    smaller = 2 ** (len(autoencoder["block_out_channels"]) - 1)
    halvings = 2 ** (len(denoiser["block_out_channels"]) - 1)
    own = denoiser["sample_size"] * smaller
    side = size or own
    if side % (smaller * halvings):
        raise ModelError(f"task.size is {side}; a multiple of {smaller * halvings} fits {model.path}, such as {own}")
    latent = (denoiser["in_channels"], side // smaller, side // smaller)
    return Prompter(tokenizer, side, latent, schedule.get("num_train_timesteps", 1000), schedule, index)


def require_packages() -> None:
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ModelError(f"text-to-image needs {' and '.join(missing)}: pip install 'rayft[diffusion]'")


def _index(model: Pretrained) -> dict[str, Any]:
    """What the model's model_index.json says."""
    from diffusers import DiffusionPipeline

    with told(model, "model_index.json"):
        return dict(DiffusionPipeline.load_config(model.path, revision=model.revision))


def config_of(load: Callable[..., Any], model: Pretrained, part: str) -> dict[str, Any]:
    """The config of the pipeline's `part`, which lies in the folder of that name."""
    with told(model, part):
        found: dict[str, Any] = load(model.path, subfolder=part, revision=model.revision)
    return {name: value for name, value in found.items() if name != "_name_or_path"}
