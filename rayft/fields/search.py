"""What a sweep varies: the `tune:` section, and whether the fields and values in it exist."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator
from pydantic_core import ErrorDetails

from rayft.document import set_field
from rayft.errors import Fault, RecipeError
from rayft.fields import elsewhere, faults
from rayft.fields.sections import Metric, Natural, Number, Positive, Section, Whole, wrong

# Fields that say which run it is, or where and on what it runs, so that trials can't differ in them.
_FIXED = ("name", "storage", "tune", "submit", "cluster", "task.type")
MOST_TRIED = 512  # combinations with the other fields' values: where there are more, a trial that fails says why


class Space(Section):
    """The values that one field takes in a sweep: exactly one of the keys."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """A list of values, of which a trial takes one; with the sampler `grid` each is crossed with all others."""
    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """A list of values, each as often as any other, crossed with those of every other grid; not with `optuna`."""
    uniform: tuple[Number, Number] | None = None
    """Numbers from the first to the second, each as likely as any other."""
    log_uniform: tuple[Annotated[Number, Field(gt=0)], Annotated[Number, Field(gt=0)]] | None = None
    """Numbers from the first to the second, evenly by their logarithm: 1e-5 to 1e-4 is as likely as 1e-4 to 1e-3."""
    int: tuple[Whole, Whole] | None = None
    """Whole numbers from the first to the second, both included."""

    @model_validator(mode="after")
    def _one(self) -> Space:
        given = [name for name in Space.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise wrong("not one search space", "one of `choice`, `grid`, `uniform`, `log_uniform`, `int` fits")
        bounds = self.uniform or self.log_uniform or self.int
        if bounds and bounds[0] >= bounds[1]:
            raise wrong("bounds in the wrong order", "[low, high] with low below high fits")
        return self

    @model_serializer(mode="wrap")
    def _given(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def values(self) -> tuple[Any, ...]:
        """Its choices, or its two bounds."""
        return self.choices or self.uniform or self.log_uniform or self.int or ()

    @property
    def choices(self) -> tuple[Any, ...]:
        """Its values, where they are listed."""
        return self.choice or self.grid or ()


class Budget(Section):
    """What a sweep may cost; the best trial so far is its answer then."""

    minutes: Annotated[Number, Field(gt=0)]
    """Minutes from the start of the command after which no trial goes on."""


class Tune(Section):
    """What a sweep varies, and how its trials are chosen and stopped."""

    search: Annotated[dict[str, Space], Field(min_length=1)]
    """Dotted names of this recipe's fields, each with its search space."""
    trials: Positive | None = None
    """How many trials there are; needed unless the sampler is `grid`, which runs every combination once."""
    sampler: Literal["grid", "random", "optuna"] = "optuna"
    """Who proposes values: each combination in turn, at random, or Optuna's TPE from what came of earlier trials."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "asha"
    """Which trials go on after an evaluation: all (none), the best third of each rung (asha), those above the median.

    pbt: all, the worse ones from a better one's weights and with other values.
    """
    metric: Metric | None = None
    """The validation score by which trials are compared; null: the one that chooses the best model of a run."""
    mode: Literal["max", "min"] | None = None
    """Which end of the metric is the better one; null: as the metric has it, and the other one is refused."""
    budget: Budget | None = None
    """When the sweep ends before all its trials have; null: it goes on to their end."""
    log_to: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Where trials are logged besides their folders; addresses and keys come from the environment."""
    seed: Natural = 0
    """What random and Optuna's values follow from; that of each trial's training is `train.seed`."""


def prepares(name: str) -> bool:
    """Does the field change how rows are prepared?"""
    return (name + ".").startswith(("task.", "data.", "model.path.", "model.revision."))


def unsearchable(
    tune: Tune,
    data: Mapping[str, Any],
    schema: faults.Schema,
    errors_of: Callable[[Mapping[str, Any]], list[ErrorDetails]],
    broken: Callable[[Mapping[str, Any]], list[Fault]],
) -> Iterator[Fault]:
    """The fields of a sweep that the recipe with the plain form `data` lacks, and the values that they can't take.

    `schema` describes that recipe; `errors_of` gives pydantic's complaints about the plain form of one, and `broken`
    the rules between fields that a trial with that form would break.
    """
    before = {(fault.where, fault.what) for fault in broken(data)}
    for name, space in tune.search.items():
        where = f"tune.search.{name}"
        if instead := _instead(name, data):
            yield Fault(where, "not a field that trials can differ in", fits=instead)
        elif not any(True for _ in faults.at(schema, tuple(name.split(".")))):
            fits = elsewhere.sentence(name) or "a dotted name such as `train.learning_rate` fits"
            yield Fault(where, "no such field in this recipe", None, fits, faults.nearest_name(name, schema))
        else:
            for value in space.values():
                misfits = list(_misfit(where, name, value, data, schema, errors_of))
                yield from misfits or _breaks(tune, name, value, data, broken, before)


def _instead(name: str, data: Mapping[str, Any]) -> str | None:
    """What fits instead of a field in which trials can't differ; None where they can."""
    rows = data.get("data")
    cut = isinstance(rows, Mapping) and rows.get("validation") is None
    if _in(name, *_FIXED):
        return "a field that changes the training fits"
    if _in(name, "train.metric"):
        return "`tune.metric` says by which score trials are compared"
    if name == "data" or _in(name, "data.validation"):
        return "scores of the same rows are compared, and `data.train` fits"
    if cut and _in(name, "data.train"):
        return "beside a `data.validation` it fits: else each trial is scored on a tenth of its own rows"
    return None


def _in(name: str, *fields: str) -> bool:
    """Is the dotted name one of these fields, or below one?"""
    return any((name + ".").startswith(field + ".") for field in fields)


def _misfit(
    where: str,
    name: str,
    value: Any,
    data: Mapping[str, Any],
    schema: faults.Schema,
    errors_of: Callable[[Mapping[str, Any]], list[ErrorDetails]],
) -> Iterator[Fault]:
    """The faults of `value` in the field `name`, told where the sweep asks for it."""
    trial = copy.deepcopy(dict(data))
    try:
        set_field(trial, name, value)
    except RecipeError as error:
        yield from (Fault(where, one.what, one.value, one.fits) for one in error.faults)
        return
    for path, fault in faults.translate(errors_of(trial), trial, schema):
        if (faults.dotted(path) + ".").startswith(name + "."):
            yield Fault(where, fault.what, fault.value, fault.fits, fault.nearest)


def _breaks(
    tune: Tune,
    name: str,
    value: Any,
    data: Mapping[str, Any],
    broken: Callable[[Mapping[str, Any]], list[Fault]],
    before: set[tuple[str, str]],
) -> Iterator[Fault]:
    """A rule that `value` in the field `name` breaks, whatever the other fields of the sweep are.

    None where they have too many combinations for that to be known.
    """
    others = {other: space.values() for other, space in tune.search.items() if other != name}
    found: list[Fault] = []
    for number, values in enumerate(itertools.product(*others.values())):
        if number == MOST_TRIED:
            return
        trial = copy.deepcopy(dict(data))
        with contextlib.suppress(RecipeError):  # told of the field that it belongs to
            for field, given in ((name, value), *zip(others, values, strict=True)):
                set_field(trial, field, given)
        own = [fault for fault in broken(trial) if (fault.where, fault.what) not in before]
        if not own:
            return
        found = found or own
    for fault in found:
        what = fault.what if fault.where == name else f"with it {fault.where} is {fault.what}"
        yield Fault(f"tune.search.{name}", what, faults.show(value), fault.fits)
