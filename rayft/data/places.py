"""Where a row goes, by a hash of its id: its place in the order, its copies by weight, and the validation cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int64]

# Different choices about one row must not go together.
_CUT, _COPIES = np.uint64(0x9E6C63D0876A9F5B), np.uint64(0xD6E8FEB86659FD93)

CUT_SHARE = 10  # one row in so many is cut from train for validation
CUT_MOST = 10_000


def mix(values: npt.NDArray[Any]) -> Hashes:
    """A bijection of 64 bits without a visible pattern: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def places(row_ids: Ids, copies: npt.NDArray[np.int64]) -> Hashes:
    """The place of each copy (0 the row itself) of a row among all rows."""
    first = mix(row_ids)
    return np.where(copies == 0, first, mix(first + copies.astype(np.uint64)))


def times(row_ids: Ids, weight: float) -> npt.NDArray[np.int64]:
    """How often each row is taken: floor(weight), and once more for a share of the rows that makes up the rest."""
    whole = int(weight)
    chance = mix(row_ids.astype(np.uint64) ^ _COPIES) >> np.uint64(11)
    return whole + (chance < np.uint64(round((weight - whole) * 2.0**53))).astype(np.int64)


def cut_hashes(row_ids: Ids) -> Hashes:
    """Rows with the smallest of these make up a validation split that is cut from train."""
    return mix(row_ids.astype(np.uint64) ^ _CUT)


def smallest(hashes: Hashes, count: int = CUT_MOST) -> Hashes:
    return hashes if len(hashes) <= count else np.partition(hashes, count - 1)[:count]


def cut_size(rows: int) -> int:
    """How many of `rows` training rows are cut for validation: a tenth, at least one."""
    return min(CUT_MOST, max(1, rows // CUT_SHARE))
