"""Group normalisation over time that leaves out padding, as the first layer of a wav2vec2 needs it."""

from __future__ import annotations

import torch


class PaddedGroupNorm(torch.nn.GroupNorm):
    """Group normalisation with a channel per group, over the frames of the sound; those of padding become 0.

    `samples` (n,) is how long each row's sound is before the convolution of `kernel` and `stride` below.
    """

    samples: torch.Tensor
    kernel: int
    stride: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as torch names it
        """(n, channels, frames) to the same."""
        frames = (self.samples - self.kernel) // self.stride + 1
        heard = torch.arange(input.shape[-1], device=input.device) < frames.to(input.device)[:, None]
        kept, count = heard[:, None].float(), frames.to(input.device)[:, None, None].float()
        values = input.float()
        mean = (values * kept).sum(dim=-1, keepdim=True) / count
        centred = (values - mean) * kept
        variance = centred.square().sum(dim=-1, keepdim=True) / count
        normal = centred / torch.sqrt(variance + self.eps)
        return ((normal * self.weight[:, None] + self.bias[:, None]) * kept).to(input.dtype)
