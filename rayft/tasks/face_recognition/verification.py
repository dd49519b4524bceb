"""Verification: are two pictures of one person? Which pairs are asked about, and how well their similarity answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayft.errors import DataError

MOST_PAIRS = 1_000_000  # of either kind half of it, where a split has more
FOLDS = 10
_CHUNK = 16_384  # pairs whose embeddings are held at once


@dataclass(frozen=True)
class Pairs:
    """Pictures `first` and `second` (indices), and whether they are of the `same` person: arrays of one length."""

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray


def pairs(identities: Sequence[str], most: int = MOST_PAIRS) -> Pairs:
    """All pairs of pictures; of a split with more than `most`, samples of both kinds that are always the same.

    DataError where there is no pair of one person, or none of two.
    """
    check(identities)
    codes = np.unique(np.asarray(identities, dtype=object).astype(str), return_inverse=True)[1]
    count = len(codes)
    if count * (count - 1) // 2 <= most:
        first, second = np.triu_indices(count, 1)
    else:
        random = np.random.default_rng(0)
        alike, others = _alike(codes, most // 2, random), _others(codes, most // 2, random)
        first, second = np.concatenate([alike, others], axis=1)
    return Pairs(first, second, codes[first] == codes[second])


def check(identities: Sequence[str]) -> None:
    """DataError where there is no pair of pictures of one person, or none of two."""
    people, rows = len(set(identities)), len(identities)
    if people in (rows, 1):
        lack = "pictures of two people" if rows > people else "two pictures of one person"
        raise DataError(f"its {rows:,} rows hold no {lack}; verification needs pairs of both kinds")


def _alike(codes: np.ndarray, most: int, random: np.random.Generator) -> np.ndarray:
    """(2, n) indices of pairs of one person: all there are, or a sample of about `most`."""
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    ends = np.cumsum(sizes * (sizes - 1) // 2)
    total = int(ends[-1])
    numbers = np.arange(total) if total <= most else np.unique(random.integers(0, total, most))
    person = np.searchsorted(ends, numbers, side="right")
    number = numbers - (ends - sizes * (sizes - 1) // 2)[person]  # among the person's pairs (0, 1), (0, 2), (1, 2), ...
    high = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) // 2).astype(np.int64)
    low = number - high * (high - 1) // 2
    start = (np.cumsum(sizes) - sizes)[person]
    return np.sort(np.stack([order[start + low], order[start + high]]), axis=0)


def _others(codes: np.ndarray, most: int, random: np.random.Generator) -> np.ndarray:
    """(2, n) indices of a sample of at most `most` pairs of two people."""
    drawn = np.sort(random.integers(0, len(codes), (2, most)), axis=0)
    drawn = drawn[:, codes[drawn[0]] != codes[drawn[1]]]
    return np.unique(drawn, axis=1)


def similarities(embeddings: np.ndarray, asked: Pairs) -> np.ndarray:
    """The cosine of each pair; `embeddings` (pictures, width) have length 1."""
    found = np.empty(len(asked.same), np.float32)
    for start in range(0, len(found), _CHUNK):
        part = slice(start, start + _CHUNK)
        found[part] = np.einsum("ij,ij->i", embeddings[asked.first[part]], embeddings[asked.second[part]])
    return found


def scores(same: np.ndarray, similarity: np.ndarray) -> dict[str, float]:
    """auc, accuracy, eer and threshold.

    auc        the chance that a pair of one person is more similar than a pair of two
    accuracy   balanced: the mean of the shares of both kinds that are told right, each of ten folds of the pairs at the
               threshold that suits the others best; LFW's protocol (Huang et al. 2007), but for folds that share people
    eer        equal error rate: the share of either kind that is told wrong, where the threshold makes these equal
    threshold  the similarity at which that is
    """
    from sklearn.metrics import roc_auc_score

    rate, threshold = equal_error(same, similarity)
    return {
        "auc": float(roc_auc_score(same, similarity)),
        "accuracy": folded_accuracy(same, similarity),
        "eer": rate,
        "threshold": threshold,
    }


def equal_error(same: np.ndarray, similarity: np.ndarray) -> tuple[float, float]:
    """(rate, threshold) where as large a share of the pairs of two people is accepted as of one person is refused.

    Between two points of the curve the rate is interpolated; the threshold is that of the nearer one beyond.
    """
    from sklearn.metrics import roc_curve

    accepted, right, thresholds = roc_curve(same, similarity, drop_intermediate=False)
    gap = accepted - (1 - right)  # rises from -1 to 1
    place = int(np.argmax(gap > -1e-12))  # two equal shares differ by rounding
    share = -gap[place - 1] / (gap[place] - gap[place - 1])
    rate = accepted[place - 1] + share * (accepted[place] - accepted[place - 1])
    return float(rate), float(thresholds[place])


def folded_accuracy(same: np.ndarray, similarity: np.ndarray, folds: int = FOLDS) -> float:
    """Balanced accuracy, each fold at the threshold that suits the others best.

    There are no more folds than pairs of either kind; a single pair of a kind is told at the best threshold of all.
    """
    folds = min(folds, int(same.sum()), int((~same).sum()))
    fold = np.empty(len(same), np.int64)
    for kind in (same, ~same):
        fold[kind] = np.arange(int(kind.sum())) % folds
    told = np.empty(len(same), bool)
    for number in range(folds):
        here = fold == number
        others = ~here if folds > 1 else here
        told[here] = similarity[here] >= _best_threshold(same[others], similarity[others])
    return float((told[same].mean() + (~told[~same]).mean()) / 2)


def _best_threshold(same: np.ndarray, similarity: np.ndarray) -> float:
    """Half-way between the last similarity that had better be accepted and the next lower one."""
    from sklearn.metrics import roc_curve

    accepted, right, thresholds = roc_curve(same, similarity, drop_intermediate=False)
    place = int(np.argmax(right - accepted))
    return float((thresholds[place] + thresholds[min(place + 1, len(thresholds) - 1)]) / 2)
