"""The modules that a backbone of transformers is trained in to tell identities apart."""

from __future__ import annotations

from typing import Any

import torch


class Directions(torch.nn.Module):
    """One direction for each identity; `weight` is (identities, width), of any lengths."""

    def __init__(self, identities: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(identities, width, dtype=dtype))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Cosines (n, identities) of embeddings (n, width) of length 1, both float32."""
        return torch.nn.functional.linear(embeddings, torch.nn.functional.normalize(self.weight.float()))


class Recogniser(torch.nn.Module):
    """A backbone of transformers and the directions of the identities it is trained on; saved, it is the backbone."""

    base_model_prefix = "backbone"  # transformers and peft ask for it

    def __init__(self, backbone: Any, arcface: Directions) -> None:
        super().__init__()
        self.backbone = backbone
        self.arcface = arcface

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """`embeddings` (n, width) of length 1 and `cosines` (n, identities), both float32 whatever is mixed below."""
        pooled = self.backbone(pixel_values=pixel_values).pooler_output
        with torch.autocast(pooled.device.type, enabled=False):
            embeddings = torch.nn.functional.normalize(pooled.flatten(1).float())
            return {"embeddings": embeddings, "cosines": self.arcface(embeddings)}

    @property
    def config(self) -> Any:
        return self.backbone.config

    def activation_checkpointing_enable(self, options: dict[str, Any]) -> None:
        self.backbone.activation_checkpointing_enable(options)

    def save_pretrained(self, folder: Any) -> None:
        self.backbone.save_pretrained(folder)
