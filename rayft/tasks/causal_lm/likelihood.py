"""The loss over logits, without a second copy of all of them in float32."""

from __future__ import annotations

from collections.abc import Iterator

from rayft.tasks.later import torch

IGNORED = -100  # the target of a token that predicts nothing
CHUNK = 2**24  # logits that are held in float32 at a time: 64 MiB


def learnable(labels: list[int]) -> bool:
    """Whether any token is predicted: nothing comes before the first."""
    return labels[1:].count(IGNORED) < len(labels) - 1


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Cross entropy of (tokens, vocabulary) logits and (tokens,) targets, summed; a scalar in float32.

    It is taken in chunks of tokens, whose float32 logits are made again for the backward pass instead of kept.
    """
    from torch.utils.checkpoint import checkpoint

    def part(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits.float(), targets, reduction="sum", label_smoothing=label_smoothing
        )

    chunks = list(_chunks(logits, targets))
    if len(chunks) == 1 or not logits.requires_grad:
        parts = [part(*chunk) for chunk in chunks]
    else:
        parts = [checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(parts).sum()


def per_token(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of the (tokens,) targets its negative log-likelihood in float64, and whether it was the most likely."""
    losses, hits = [], []
    for some, wanted in _chunks(logits.detach(), targets):
        losses.append(torch.nn.functional.cross_entropy(some.float(), wanted, reduction="none"))
        hits.append(some.argmax(dim=-1) == wanted)
    return torch.cat(losses).double(), torch.cat(hits)


def _chunks(logits: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, vocabulary) logits and (tokens,) targets; `split`, since its backward pass joins all parts at once."""
    size = max(1, CHUNK // logits.shape[-1])
    yield from zip(logits.split(size), targets.split(size), strict=True)
