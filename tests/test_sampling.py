"""Which values trials take: every combination of a grid once, draws that a number alone decides, Optuna's learning."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rayft.sampling import Sampler, readable, trials
from rayft.search import Tune

RATE, DEPTH = "train.learning_rate", "model.freeze.layers"


def tuned(search: dict[str, Any], **fields: Any) -> Tune:
    return Tune.model_validate({"search": search, **fields})


def test_a_grid_has_each_combination_once_whatever_the_order_of_its_fields() -> None:
    spaces = {RATE: {"choice": [1e-4, 1e-3]}, DEPTH: {"grid": [0, 2, "all"]}}
    sampler = Sampler(tuned(spaces, sampler="grid"), True)
    found = [sampler.propose(number) for number in range(trials(sampler.tune))]
    assert len(found) == 6
    assert {(fields[RATE], fields[DEPTH]) for fields in found} == {(r, d) for r in (1e-4, 1e-3) for d in (0, 2, "all")}
    turned = Sampler(tuned(dict(reversed(spaces.items())), sampler="grid"), True)
    assert [turned.propose(number) for number in range(6)] == found
    assert trials(tuned(spaces, sampler="grid", trials=4)) == 4


def test_random_draws_depend_on_seed_and_number_alone() -> None:
    search = {
        RATE: {"log_uniform": [1e-5, 1e-2]},
        "train.warmup": {"uniform": [0.0, 0.5]},
        "train.seed": {"int": [3, 5]},
        DEPTH: {"grid": [1, 2]},
        "train.schedule": {"choice": ["linear", "cosine"]},
    }
    sampler = Sampler(tuned(search, sampler="random", trials=200, seed=4), True)
    found = [sampler.propose(number) for number in range(200)]
    again = Sampler(tuned(search, sampler="random", trials=300, seed=4), True)
    assert again.propose(17) == found[17]
    assert Sampler(tuned(search, sampler="random", trials=200, seed=5), True).propose(17) != found[17]
    rates = [fields[RATE] for fields in found]
    assert all(1e-5 <= rate <= 1e-2 and rate == readable(rate) for rate in rates)
    assert 80 < sum(rate < math.sqrt(1e-5 * 1e-2) for rate in rates) < 120  # as many below as above the middle
    assert all(0 <= fields["train.warmup"] <= 0.5 for fields in found)
    assert {fields["train.seed"] for fields in found} == {3, 4, 5}
    assert sum(fields[DEPTH] == 1 for fields in found) == 100
    assert {fields["train.schedule"] for fields in found} == {"linear", "cosine"}


@pytest.mark.parametrize("maximize", [True, False])
def test_optuna_learns_from_what_it_is_told_and_goes_on_after_a_restart(maximize: bool) -> None:
    tune = tuned({RATE: {"log_uniform": [1e-6, 1e-1]}, DEPTH: {"choice": [0, [2]]}}, trials=60, seed=0)
    sign = 1.0 if maximize else -1.0

    def value(fields: dict[str, Any]) -> float:
        return sign * -abs(math.log10(fields[RATE]) + 3)  # best at 1e-3

    first = Sampler(tune, maximize)
    told = []
    for number in range(30):
        fields = first.propose(number)
        told.append((number, fields, None if number == 3 else value(fields)))
        first.tell(*told[-1])
    second = Sampler(tune, maximize)
    for one in told:
        second.tell(*one)
    late = []
    for number in range(30, 60):
        fields = second.propose(number)
        late.append(abs(math.log10(fields[RATE]) + 3))
        second.tell(number, fields, value(fields))
    early = [abs(math.log10(fields[RATE]) + 3) for _, fields, _ in told[:10]]
    assert sorted(late)[15] < sorted(early)[5] / 2
