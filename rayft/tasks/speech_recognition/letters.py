"""Texts as letters for frames: connectionist temporal classification (Graves et al. 2006)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from rayft.tasks.later import torch


def spelled(tokenizer: Any, text: str, evaluation: bool = False) -> list[int]:
    """The letters of a text; ValueError names one that the tokenizer lacks, and how to have it.

    For evaluation such a letter is the unknown one, or none where there is no sign for that: no model can write it, and
    a score that leaves its text out would be too good. A text of which another case is known is refused even so.
    """
    ids: list[Any] = tokenizer(text)["input_ids"]  # None where a letter is unknown and there is no sign for that
    if not {None, tokenizer.unk_token_id} & set(ids):
        return ids
    known = tokenizer.get_vocab()
    lacking = [letter for letter in text if letter not in known and letter != " "]
    missing = lacking[0]
    other = next((case for case in ("upper", "lower") if getattr(missing, case)() in known), None)
    if evaluation and (other is None or len(lacking) < len(text.replace(" ", ""))):
        return [number for number in ids if number not in (None, tokenizer.pad_token_id)]
    letters = "".join(sorted(token for token in known if len(token) == 1 and token != tokenizer.word_delimiter_token))
    fits = f"task.case={other} fits" if other else f"these fit: {letters}"
    raise ValueError(f"{missing!r} is not among the letters that the model writes; {fits}")


def frames_needed(ids: list[int]) -> int:
    """Frames that spell `ids`: one for each, and a blank between two that are equal."""
    return len(ids) + sum(first == second for first, second in pairwise(ids))


def ctc_loss(
    logits: torch.Tensor, frames: torch.Tensor, labels: torch.Tensor, blank: int, smoothing: float
) -> torch.Tensor:
    """The sum over rows of the negative log-likelihood of their letters, in float32.

    logits (n, t, letters); frames (n,) of them are a row's; labels (n, l) padded with negative numbers. With
    `smoothing` that share of the loss is the frames' cross entropy with the even distribution (Kim et al. 2018).
    A row whose letters don't fit into its frames adds nothing.
    """
    log = logits.float().log_softmax(dim=-1)
    kept = labels >= 0
    loss = torch.nn.functional.ctc_loss(
        log.transpose(0, 1), labels[kept], frames, kept.sum(dim=-1), blank=blank, reduction="sum", zero_infinity=True
    )
    if not smoothing:
        return loss
    heard = torch.arange(log.shape[1], device=log.device) < frames[:, None]
    return (1 - smoothing) * loss - smoothing * log.mean(dim=-1)[heard].sum()


def read_off(tokenizer: Any, logits: torch.Tensor, frames: torch.Tensor) -> list[str]:
    """The text of each row: the best letter of each frame, equal neighbours joined, blanks left out."""
    best = logits.argmax(dim=-1).tolist()
    return [tokenizer.decode(row[:count]) for row, count in zip(best, frames.tolist(), strict=True)]
