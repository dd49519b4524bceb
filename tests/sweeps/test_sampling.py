"""Which values trials take: every combination of a grid once, draws that a number alone decides, Optuna's learning."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rayft.fields.search import Space, Tune
from rayft.sweeps.sampling import Heard, propose, readable, trials, within

RATE, DEPTH = "train.learning_rate", "model.freeze.layers"


def tuned(search: dict[str, Any], **fields: Any) -> Tune:
    return Tune.model_validate({"search": search, **fields})


def test_a_grid_has_each_combination_once_whatever_the_order_of_its_fields() -> None:
    spaces = {RATE: {"choice": [1e-4, 1e-3]}, DEPTH: {"grid": [0, 2, "all"]}}
    tune = tuned(spaces, sampler="grid")
    found = [propose(tune, True, number, {}) for number in range(trials(tune))]
    assert len(found) == 6
    assert {(fields[RATE], fields[DEPTH]) for fields in found} == {(r, d) for r in (1e-4, 1e-3) for d in (0, 2, "all")}
    turned = tuned(dict(reversed(spaces.items())), sampler="grid")
    assert [propose(turned, True, number, {}) for number in range(6)] == found
    assert trials(tuned(spaces, sampler="grid", trials=4)) == 4


def test_random_draws_depend_on_seed_and_number_alone() -> None:
    search = {
        RATE: {"log_uniform": [1e-5, 1e-2]},
        "train.warmup": {"uniform": [0.0, 0.5]},
        "train.seed": {"int": [3, 5]},
        DEPTH: {"grid": [1, 2]},
        "train.schedule": {"choice": ["linear", "cosine"]},
    }
    tune = tuned(search, sampler="random", trials=200, seed=4)
    found = [propose(tune, True, number, {}) for number in range(200)]
    assert propose(tuned(search, sampler="random", trials=300, seed=4), True, 17, {}) == found[17]
    assert propose(tuned(search, sampler="random", trials=200, seed=5), True, 17, {}) != found[17]
    rates = [fields[RATE] for fields in found]
    assert all(1e-5 <= rate <= 1e-2 and rate == readable(rate) for rate in rates)
    assert 80 < sum(rate < math.sqrt(1e-5 * 1e-2) for rate in rates) < 120  # as many below as above the middle
    assert all(0 <= fields["train.warmup"] <= 0.5 for fields in found)
    assert {fields["train.seed"] for fields in found} == {3, 4, 5}
    assert sum(fields[DEPTH] == 1 for fields in found) == 100
    assert {fields["train.schedule"] for fields in found} == {"linear", "cosine"}


@pytest.mark.parametrize("maximize", [True, False])
def test_optuna_learns_from_what_is_known(maximize: bool) -> None:
    tune = tuned({RATE: {"log_uniform": [1e-6, 1e-1]}, DEPTH: {"choice": [0, [2]]}}, trials=60, seed=0)
    sign = 1.0 if maximize else -1.0
    heard: dict[int, Heard] = {}
    for number in range(60):
        fields = propose(tune, maximize, number, heard)
        if number != 3:  # which failed
            heard[number] = Heard(fields, sign * -abs(math.log10(fields[RATE]) + 3))  # best at 1e-3
    off = [abs(math.log10(trial.fields[RATE]) + 3) for trial in heard.values()]
    assert sorted(off[30:])[15] < sorted(off[:10])[5] / 2


def test_optuna_proposes_by_seed_number_and_what_is_known_alone() -> None:
    """So a sweep that is started again proposes what an unbroken one would have, and no trial twice."""
    tune = tuned({RATE: {"log_uniform": [1e-6, 1e-1]}, "train.warmup": {"uniform": [0.0, 0.5]}}, trials=60, seed=0)
    heard: dict[int, Heard] = {}
    unbroken = []
    for number in range(20):
        unbroken.append(propose(tune, True, number, heard))
        if number % 5:  # the others run, or have failed
            heard[number] = Heard(unbroken[-1], float(number), number % 2 or None)
        assert propose(tune, True, number + 1, heard) not in unbroken
    known = dict(reversed([item for item in heard.items() if item[0] < 12]))  # whatever the order of hearing
    assert propose(tune, True, 12, known) == unbroken[12]
    assert propose(tuned(dict(tune.search), trials=60, seed=1), True, 12, known) != unbroken[12]


def test_optuna_compares_scores_of_trials_that_have_come_equally_far() -> None:
    """A score at the first rung says nothing against a lower one at the second, of trials that learn more slowly."""
    tune = tuned({RATE: {"log_uniform": [1e-6, 1e-1]}}, trials=60, seed=0)
    early = {number: Heard({RATE: 3e-2}, 0.9 + number / 1000, 0) for number in range(20)}
    late = {number: Heard({RATE: 1e-5}, 0.5, 1) for number in range(20, 24)}
    rates = [propose(tune, True, number, early | late)[RATE] for number in range(24, 44)]
    assert sum(rate < 1e-3 for rate in rates) > 15


def test_what_leaves_a_space_comes_back_to_its_nearest_value() -> None:
    space = Space.model_validate
    assert within(space({"uniform": [0.5, 0.95]}), 1.1) == 0.95
    assert within(space({"uniform": [0.12344, 0.2]}), 0.12344) == 0.12344  # which is 0.1234 when it is rounded
    assert within(space({"log_uniform": [1e-4, 1e-1]}), 0.00327961) == 0.00328
    assert within(space({"int": [0, 4]}), 4.8) == 4
    assert within(space({"int": [2, 4]}), 1) == 2
    assert within(space({"choice": [None, {"layers": 2}]}), {"layers": 2}) == {"layers": 2}
