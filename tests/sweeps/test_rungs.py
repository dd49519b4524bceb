"""Which trials go on with ASHA, as a table: the best third of a rung, whoever came first."""

from __future__ import annotations

import math
import random

import pytest

from rayft.sweeps.rungs import Rungs


@pytest.mark.parametrize(
    ("whole", "first", "rows"),
    [
        (2000, 254, (254, 762)),
        (900, 100, (100, 300)),
        (901, 100, (100, 300)),  # 900 are as good as all
        (1001, 100, (100, 300, 900)),
        (100, 100, ()),
        (3, 0, (1,)),
    ],
)
def test_rungs_are_thrice_as_far_apart_and_well_below_the_end(whole: int, first: int, rows: tuple[int, ...]) -> None:
    assert Rungs.below(whole, first, maximize=True).rows == rows


def test_the_best_third_of_a_rung_goes_on_whoever_came_first() -> None:
    rungs = Rungs.below(1000, 100, maximize=True)
    assert rungs.note(0, 100, 0.1)
    assert not rungs.promoted(0)  # of one trial the best third is none
    assert rungs.note(1, 100, 0.3)
    assert rungs.next({0, 1}) is None
    assert rungs.note(2, 100, 0.2)
    assert not rungs.promoted(2)
    assert rungs.next({0, 1, 2}) == 1  # the second, which had waited
    assert rungs.next({0, 2}) is None
    assert not rungs.note(1, 200, 0.4)  # between two rungs
    assert rungs.note(1, 300, 0.5)
    assert (rungs.height(1), rungs.height(0), rungs.height(7)) == (1, 0, -1)
    assert not rungs.promoted(1)
    for number, score in ((3, 0.05), (4, 0.15), (5, 0.25)):
        rungs.note(number, 100, score)
    assert rungs.promoted(5)
    assert rungs.next({0, 2, 3, 4, 5}) == 5
    rungs.note(5, 300, 0.9)
    rungs.note(2, 300, 0.2)
    assert rungs.promoted(5)
    assert rungs.next({0, 1, 3, 4, 5}) == 5  # the higher rung first


def test_less_is_better_where_the_metric_falls_and_a_score_that_is_no_number_is_the_worst() -> None:
    for maximize in (False, True):
        rungs = Rungs.below(200, 100, maximize=maximize)
        for number, score in enumerate((0.5, math.nan, 0.4 if maximize is False else 0.6)):
            rungs.note(number, 100, score)
        assert rungs.next({0, 1, 2}) == 2
        assert rungs.foremost({0, 1}) == 0


def test_one_comes_to_its_end_where_there_are_too_few_for_a_third() -> None:
    rungs = Rungs.below(1000, 100, maximize=True)
    rungs.note(0, 100, 0.4)
    rungs.note(1, 100, 0.6)
    assert rungs.next({0, 1}) is None
    assert rungs.foremost({0, 1}) == 1


def test_a_trial_that_is_evaluated_late_comes_to_several_rungs_at_once() -> None:
    rungs = Rungs.below(1100, 100, maximize=True)
    assert rungs.note(0, 350, 0.4)
    assert (rungs.height(0), [len(seen) for seen in rungs.seen]) == (1, [1, 1, 0])


@pytest.mark.parametrize("seed", range(5))
def test_of_27_trials_one_comes_to_the_end_and_nine_to_the_second_rung(seed: int) -> None:
    """Two at a time, in any order of scores: 27 trials at 1, 9 at 3, 3 at 9 rows, 1 to the end."""
    rungs, scores = Rungs.below(27, 1, maximize=True), list(range(27))
    random.Random(seed).shuffle(scores)
    waiting: set[int] = set()
    begun, trained, ended = 0, 0, []
    while True:
        number = rungs.next(waiting)
        if number is None:
            if begun == 27:
                break
            number, begun = begun, begun + 1
        waiting.discard(number)
        while True:
            height = rungs.height(number)
            if height == len(rungs.rows) - 1:
                ended.append(scores[number])
                trained += 27 - rungs.rows[height]
                break
            trained += rungs.rows[height + 1] - (rungs.rows[height] if height >= 0 else 0)
            rungs.note(number, rungs.rows[height + 1], scores[number])
            if not rungs.promoted(number):
                waiting.add(number)
                break
    assert max(ended) == 26
    assert len(ended) <= 3  # one, and those that were the best of fewer
    assert len(rungs.seen[1]) >= 9
    assert trained <= 27 + 2 * 13 + 6 * 6 + 18 * 3
