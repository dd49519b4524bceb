"""How well anchors find their positives: the loss within groups, and retrieval over a whole set."""

from __future__ import annotations

import numpy as np

from rayft.tasks.later import torch

TOGETHER = 1024  # anchors that are compared with all candidates at once


def ranking_loss(
    logits: torch.Tensor, keys: torch.Tensor, groups: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross entropy of each row's own positive among the candidates of its group, summed over rows.

    logits  (n, c) float32: n rows against c candidates, the n positives first, then, where there are, the n negatives
    keys    (n, number of texts) int64: which texts are equal, of the anchors, positives and negatives
    groups  (n,) int64: the group of each row
    """
    together = groups[:, None] == groups[None, :]
    allowed = together.repeat(1, keys.shape[1] - 1)
    allowed &= ~others(keys[:, 0], keys[:, 1], keys[:, 1:].T.flatten(), together)
    logs = logits.masked_fill(~allowed, -torch.inf).log_softmax(dim=-1)
    own = -logs.diagonal()
    if not label_smoothing:
        return own.sum()
    even = -logs.masked_fill(~allowed, 0.0).sum(dim=-1) / allowed.sum(dim=-1)
    return ((1 - label_smoothing) * own + label_smoothing * even).sum()


def others(
    anchors: torch.Tensor, positives: torch.Tensor, candidates: torch.Tensor, together: torch.Tensor
) -> torch.Tensor:
    """(n, c) bool: which candidates are no negatives of a row, yet not its own positive, which is candidate i of row i.

    They are equal to its anchor, to its positive, or to the positive of an equal anchor of its group; `together` (n, n)
    says which rows are in one.
    """
    same = ((anchors[:, None] == anchors[None, :]) & together).float()
    found = same @ (positives[:, None] == candidates[None, :]).float() > 0
    found |= anchors[:, None] == candidates[None, :]
    return found.fill_diagonal_(False)


def retrieval(vectors: dict[str, np.ndarray], keys: np.ndarray) -> dict[str, float]:
    """mrr, accuracy_at_1 and recall_at_10 of anchors that look for their positives.

    vectors  role -> (n, width) float32 of length 1: anchor, positive and perhaps negative
    keys     (n, number of texts) int64: which texts are equal

    The candidates are all different positives and negatives. Where several vectors lie equally close, the positive's
    place is the worst of theirs, and so it is where they are no numbers.
    """
    known, first = np.unique(keys[:, 1:].T.ravel(), return_index=True)
    candidates = np.concatenate([found for role, found in vectors.items() if role != "anchor"])[first]
    own = np.searchsorted(known, keys[:, 1])
    true: dict[int, list[int]] = {}  # anchor's key -> candidates that are positives of it
    for anchor, place in zip(keys[:, 0].tolist(), own.tolist(), strict=True):
        true.setdefault(anchor, []).append(place)
    itself = {key: place for place, key in enumerate(known.tolist())}
    places = np.empty(len(keys), np.int64)
    for begin in range(0, len(keys), TOGETHER):
        part = slice(begin, begin + TOGETHER)
        close = vectors["anchor"][part] @ candidates.T
        for row, (near, key, target) in enumerate(zip(close, keys[part, 0].tolist(), own[part].tolist(), strict=True)):
            best = near[target]
            near[[*true[key], *([itself[key]] if key in itself else [])]] = -np.inf
            places[begin + row] = 1 + np.count_nonzero(~(near < best))
    return {
        "mrr": float(np.mean(1 / places)),
        "accuracy_at_1": float(np.mean(places == 1)),
        "recall_at_10": float(np.mean(places <= 10)),
    }
