"""Asynchronous successive halving (Li et al. 2018, A System for Massively Parallel Hyperparameter Tuning, algorithm 2).

    rung 2                              9 r         every trial of a sweep trains `r` rows; the best third of those that
    rung 1              3 r                         have come to a rung goes on to the next, at three times the rows,
    rung 0   r                                      and the others wait, since of more trials the best third is larger

So a trial is never ahead by being early: it may wait for the others, and goes on later from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from rayft.sweeps.trials import merit

REDUCTION = 3  # the best third goes on
LAST = 0.9  # of a trial's length: who has come so far may as well end


@dataclass
class Rungs:
    """Which trials go on. `rows` of each rung ascend; `seen` holds each rung's trials with their scores there."""

    rows: tuple[int, ...]
    maximize: bool
    seen: list[dict[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seen = self.seen or [{} for _ in self.rows]

    @classmethod
    def below(cls, whole: int, first: int, maximize: bool) -> Rungs:
        """Those at `first` rows, three times as many and so on, below the `whole` length of a trial."""
        rows, least = [], max(1, first)
        while least < LAST * whole:
            rows.append(least)
            least *= REDUCTION
        return cls(tuple(rows), maximize)

    def note(self, number: int, rows: int, score: float) -> bool:
        """Takes down a trial's score after so many rows; whether it has come to a rung by that."""
        new = [seen for least, seen in zip(self.rows, self.seen, strict=True) if rows >= least and number not in seen]
        for seen in new:
            seen[number] = score
        return bool(new)

    def height(self, number: int) -> int:
        """The highest rung that the trial has come to; -1 for none."""
        return max((rung for rung, seen in enumerate(self.seen) if number in seen), default=-1)

    def promoted(self, number: int) -> bool:
        """May the trial go on from the highest rung that it has come to?"""
        rung = self.height(number)
        return rung < 0 or number in self._best(rung)

    def next(self, waiting: Collection[int]) -> int | None:
        """Which of the waiting trials goes on now: the best of the highest rung where one may."""
        for rung in reversed(range(len(self.rows))):
            for number in self._best(rung):
                if number in waiting and self.height(number) == rung:
                    return number
        return None

    def foremost(self, waiting: Collection[int]) -> int:
        """The best of the highest rung, whether or not it is among the best third."""
        highest = max(self.height(number) for number in waiting)
        return next(number for number in self._ranked(highest) if number in waiting)

    def _best(self, rung: int) -> list[int]:
        return self._ranked(rung)[: len(self.seen[rung]) // REDUCTION]

    def _ranked(self, rung: int) -> list[int]:
        seen = self.seen[rung]
        return sorted(seen, key=lambda number: (-merit(seen[number], self.maximize), number))
