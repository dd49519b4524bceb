"""ArcFace: a backbone whose pooled output is the embedding, and a margin in the angle to an identity's direction.

After Deng, Guo, Xue, Zafeiriou 2019, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition". Unlike there no
layer of its own lies between backbone and embedding (a linear layer and BatchNorm in the paper), so that an exported
folder is the plain backbone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from typing import Any

from safetensors import safe_open

from rayft.errors import ModelError
from rayft.tasks.drawing import gathered
from rayft.tasks.later import torch
from rayft.tasks.loading import told
from rayft.tasks.task import Pretrained

FILE = "arcface.safetensors"  # in a model folder: the directions, and in its header the identities they stand for
DRAWN = 0.01  # standard deviation of directions that are drawn anew; only where they point counts for the loss
UNKNOWN = -100  # the label of a picture whose person was not among the training rows
FLAT = 1e-7  # the sine's square is held above it: a root's slope is infinite at 0


def width_of(backbone: Any, shape: Sequence[int], path: str) -> int:
    """The width of the pooled output for pictures of `shape`, seen on an outline of the model without weights.

    ModelError where the model takes no such pictures alone, or pools nothing.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            outputs = type(backbone)(backbone.config).eval()(pixel_values=torch.zeros(1, *shape))
    except (TypeError, ValueError, RuntimeError) as fault:
        reason = next(iter(str(fault).splitlines()), type(fault).__name__).rstrip(".")
        raise ModelError(
            f"model.path: `{path}` takes no pictures of {shape[2]} x {shape[1]} pixels alone, as its image processor "
            f"makes them: {reason}; a ResNet, ConvNeXt or ViT with the processor it came with fits"
        ) from fault
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        raise ModelError(
            f"model.path: `{path}` has no pooled output, which is the embedding; a ResNet, ConvNeXt, ViT or another "
            "model with a `pooler_output` fits"
        )
    return int(pooled.flatten(1).shape[1])


def directions(model: Pretrained, names: Sequence[str], width: int) -> tuple[Any, bool]:
    """Directions for the identities `names`, in their order, and whether they were drawn anew from the seed.

    A folder that an earlier run exported holds them; they are kept where its identities are the same people.
    """
    from rayft.tasks.face_recognition.recogniser import Directions

    with torch.device("meta" if model.meta else "cpu"):
        made = Directions(len(names), width, getattr(torch, model.dtype))
    stored = _stored(model)
    if stored is not None and sorted(stored[0]) == sorted(names) and stored[1].shape == made.weight.shape:
        places = {name: place for place, name in enumerate(stored[0])}
        value = stored[1][[places[name] for name in names]]
    else:
        seed = hashlib.sha256(f"{model.seed}/arcface".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        value, stored = torch.randn(len(names), width, generator=generator) * DRAWN, None
    if not model.meta:
        with torch.no_grad():
            made.weight.copy_(value)
    return made, stored is None


def _stored(model: Pretrained) -> tuple[list[str], torch.Tensor] | None:
    path = os.path.join(model.path, FILE)
    if not os.path.isfile(path):
        return None
    with told(model, f"file {FILE}"), safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["identities"]), file.get_tensor("arcface.weight")


def save(folder: str, made: Any, names: Sequence[str]) -> None:
    """Writes the directions beside a model, so that training can go on from it with the same people."""
    from safetensors.torch import save_file

    with gathered([made.weight]):
        weight = made.weight.detach().cpu().contiguous()
        save_file({"arcface.weight": weight}, os.path.join(folder, FILE), {"identities": json.dumps(list(names))})


def with_margin(cosines: torch.Tensor, labels: torch.Tensor, margin: float) -> torch.Tensor:
    """`cosines` (n, identities) with `margin` radians added to the angle of each row's own identity.

    `labels` (n,) are indices, or UNKNOWN: such a row's values are for no use. Beyond an angle of pi - margin the cosine
    would rise again; there a straight line goes on falling, as in the authors' code (without their `easy_margin`).
    """
    places = labels.clamp(min=0)[:, None]
    own = cosines.gather(1, places)
    sine = (1 - own.square()).clamp(min=FLAT).sqrt()
    moved = own * math.cos(margin) - sine * math.sin(margin)
    moved = torch.where(own > -math.cos(margin), moved, own - margin * math.sin(margin))
    return cosines.scatter(1, places, moved)


def arcface_loss(
    cosines: torch.Tensor, labels: torch.Tensor, scale: float, margin: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross entropy over `scale` times the cosines with the margin, summed over the rows whose person is known."""
    return torch.nn.functional.cross_entropy(
        scale * with_margin(cosines, labels, margin),
        labels,
        ignore_index=UNKNOWN,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
