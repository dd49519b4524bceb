"""What SQuAD's files and its evaluation say: the forms in which answers come, and how two answers are compared."""

from __future__ import annotations

import ast
import json
import re
import string
from collections import Counter
from typing import Any

import numpy as np

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def parse_answers(value: Any, context: str) -> list[tuple[str, int]]:
    """(text, first character in `context`) of each answer in a cell; ValueError where it does not hold that.

    Takes SQuAD's {"text": […], "answer_start": […]}, a list of {"text", "answer_start"}, or either as a string of JSON
    or as Python writes it, which is what pandas leaves in a CSV file.
    """
    if value is None or value == "":  # as a CSV file leaves it
        return []
    if isinstance(value, str):
        value = _read(value)
    try:
        if isinstance(value, dict):
            pairs = list(zip(listed(value["text"]), map(int, listed(value["answer_start"])), strict=True))
        else:
            pairs = [(entry["text"], int(entry["answer_start"])) for entry in value]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"answers are {str(value)[:80]}; they need as many `answer_start` as `text`: "
            '{"text": […], "answer_start": […]}'
        ) from None
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"an answer is {text!r}; it needs text (a question without answer has none in its list)")
        there = context[start : start + len(text)] if start >= 0 else ""
        if there != text:
            place = context.find(text)
            hint = f"it first stands at {place}" if place >= 0 else "it is nowhere in the context"
            raise ValueError(
                f"the answer {text[:60]!r} does not begin at character {start}: {there[:60]!r} does; {hint}"
            )
    return pairs


def _read(text: str) -> Any:
    """The value that JSON or a Python literal stands for."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"answers are {text[:60]!r}, which is not JSON ({fault.msg})") from None


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def normalised(text: str) -> list[str]:
    """The words that count, as SQuAD's evaluation does (Rajpurkar et al. 2016): no case, punctuation or articles."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def scores(given: list[str], true: list[list[str]], unanswerable: bool) -> dict[str, float]:
    """f1 and exact_match, from 0 to 100: the best over each row's `true` answers, then the mean over the rows.

    With `unanswerable` (SQuAD 2) also those of the rows that have an answer, and how many percent of the others were
    given none; a group without rows is left out.
    """
    exact, f1, answerable = np.zeros(len(true)), np.zeros(len(true)), np.zeros(len(true), dtype=bool)
    for row, (text, texts) in enumerate(zip(given, true, strict=True)):
        words, rivals = normalised(text), [normalised(rival) for rival in texts]
        answerable[row] = bool(texts)
        if unanswerable:  # answers of which nothing is left don't count, and "no answer" is the empty one
            rivals = [rival for rival in rivals if rival] or [[]]
        exact[row] = max(words == rival for rival in rivals)
        f1[row] = max(overlap(words, rival, unanswerable) for rival in rivals)
    metrics = {"f1": 100 * float(f1.mean()), "exact_match": 100 * float(exact.mean())}
    if unanswerable and answerable.any():
        metrics["has_answer_f1"] = 100 * float(f1[answerable].mean())
        metrics["has_answer_exact_match"] = 100 * float(exact[answerable].mean())
    if unanswerable and not answerable.all():
        metrics["no_answer_accuracy"] = 100 * float(exact[~answerable].mean())
    return metrics


def overlap(given: list[str], true: list[str], unanswerable: bool) -> float:
    """F1 of the words in common; two empty answers agree in SQuAD 2 and share no word in SQuAD 1."""
    shared = sum((Counter(given) & Counter(true)).values())
    if not shared:
        return float(unanswerable and given == true)
    return 2 * shared / (len(given) + len(true))
