"""What a step's number decides: the end, the learning rate, what is due, and the seed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rayft.recipe import Every, Train
from rayft.training.schedule import due, learning_rate, seed_step, total_steps


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"epochs": 3}, 30),
        ({"max_steps": 7}, 7),
        ({"epochs": 3, "max_steps": 7}, 7),
        ({"epochs": 3, "max_steps": 70}, 30),
    ],
)
def test_a_run_ends_at_whichever_comes_first(given: dict[str, int], steps: int) -> None:
    assert total_steps(Train(**given), 10) == steps


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0.0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 2, [0.0, 0.5, 1.0, 0.5]),
        ("linear", 0.5, [0.0, 0.5, 1.0, 0.5]),
        ("cosine", 0.0, [1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]),
    ],
)
def test_learning_rate_warms_up_and_falls_as_transformers_has_it(
    schedule: str, warmup: float, rates: list[float]
) -> None:
    train = Train(epochs=1, learning_rate=1.0, schedule=schedule, warmup=warmup)
    assert [learning_rate(train, step, 4) for step in range(4)] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ((1, "epoch"), [10, 20, 30]),
        ((0.5, "epoch"), [5, 10, 15, 20, 25, 30]),
        ((0.3, "epoch"), [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]),
        ((1.5, "epoch"), [15, 30]),
        ((7, "steps"), [7, 14, 21, 28]),
        ((1, "minutes"), []),
    ],
)
def test_what_is_due_is_due_at_the_end_of_its_interval(every: tuple[float, str], steps: list[int]) -> None:
    count, unit = every
    interval = Every.model_validate({"count": count, "unit": unit})
    assert [step for step in range(1, 31) if due(interval, step, 10)] == steps


def test_each_step_and_rank_has_random_numbers_of_its_own_and_the_same_again() -> None:
    def drawn(seed: int, step: int, rank: int) -> float:
        seed_step(seed, step, rank)
        return float(torch.rand(()))

    places = list(itertools.product((0, 1), (0, 1, 2), (0, 1)))
    assert len({drawn(*place) for place in places}) == len(places)
    torch.rand(5)
    assert drawn(1, 2, 1) == drawn(1, 2, 1)
