"""Texts as letters for frames: connectionist temporal classification (Graves et al. 2006)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from rayft.tasks.later import torch

CASES = ("upper", "lower")


def spelled(tokenizer: Any, text: str, evaluation: bool = False) -> list[int]:
    """The letters of a text; ValueError names one that the tokenizer lacks, and how to have it.

    For evaluation such a letter is the unknown one, or none where there is no sign for that: no model can write it, and
    a score that leaves its text out would be too good. A model that writes a single case is refused letters in the
    other even so: they would be errors in every word, and need not be.
    """
    unknown = {None, tokenizer.unk_token_id}  # None where there is no sign for the unknown
    ids = _ids(tokenizer, text)
    if not unknown & set(ids):
        return tokenizer(text)["input_ids"]
    known = tokenizer.get_vocab()
    # Asked one by one: a tokenizer may change the case itself.
    lacking = [letter for letter in dict.fromkeys(text) if letter != " " and unknown & {*_ids(tokenizer, letter)}]
    cases = [next((case for case in CASES if getattr(letter, case)() in known), None) for letter in lacking]
    letters = sorted(token for token in known if len(token) == 1 and token != tokenizer.word_delimiter_token)
    single = not (any(map(str.isupper, letters)) and any(map(str.islower, letters)))
    if evaluation and not (single and any(cases)):
        return [number for number in ids if number not in (None, tokenizer.pad_token_id)]
    # Nothing is lacking where the sign for the unknown itself is written out.
    pairs = zip(lacking, cases, strict=True)
    missing, case = max(pairs, key=lambda pair: pair[1] is not None, default=(tokenizer.unk_token, None))
    fits = f"task.case={case} fits" if case else f"these fit: {''.join(letters)}"
    raise ValueError(f"{missing!r} is not among the letters that the model writes; {fits}")


def _ids(tokenizer: Any, text: str) -> list[Any]:
    """As the tokenizer maps them; when called it fails where the first is None."""
    return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))


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
