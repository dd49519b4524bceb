"""Errors cross process boundaries and are told to users: they survive pickling and say everything in their text."""

from __future__ import annotations

import pickle
import re

import pytest

from rayft import errors
from rayft.errors import Damaged, Fault, NotFinite, RayftError, RecipeError, Stopped, Superseded, SweepStopped

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RayftError)]
FAULTS = (
    Fault("train.epoch", "is not a known field", line=7, nearest="train.epochs"),
    Fault("train.learning_rate", "must be positive", value="-1", fits="a number above 0"),
)


def example(kind: type[RayftError]) -> RayftError:
    if kind is RecipeError:
        return RecipeError("job.yaml", FAULTS)
    if kind is NotFinite:
        return NotFinite(12, "loss", "lower train.learning_rate")
    if kind is Superseded:
        return Superseded("s3://bucket/run", 3, "process 7 on host")
    if kind is Stopped:
        return Stopped("SIGTERM", 12, True)
    if kind is SweepStopped:
        return SweepStopped("Ctrl-C", "the best so far is trial 3")
    if kind is Damaged:
        return Damaged("runs/a/checkpoints/step-000004-a1", "rank-00000.json", "is missing")
    return kind("s3://bucket/run: what happened")


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_error_survives_pickling(kind: type[RayftError]) -> None:
    before = example(kind)
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is kind
    assert str(after) == str(before)
    assert after.args == before.args
    assert vars(after) == vars(before)
    assert after.exit_code == before.exit_code


def test_docstring_draws_every_error_with_its_exit_code() -> None:
    drawn = re.findall(r"(\w+) +(\d+) +\S", errors.__doc__ or "")
    assert {name: int(code) for name, code in drawn} == {
        kind.__name__: kind.exit_code for kind in ALL if kind is not RayftError
    }


def test_recipe_error_tells_every_fault_with_place_value_and_nearest_name() -> None:
    assert str(RecipeError("job.yaml", FAULTS)).splitlines() == [
        "job.yaml: 2 faults",
        "  train.epoch (line 7): is not a known field; did you mean `train.epochs`?",
        "  train.learning_rate: must be positive, got -1; a number above 0",
    ]


def test_not_finite_names_the_step() -> None:
    assert "step 12" in str(NotFinite(12, "loss"))
