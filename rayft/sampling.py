"""Which values the fields of each trial take: a grid, random draws, or what Optuna proposes.

Grid and random draws are functions of (seed, trial number), so that a sweep that goes on gives its trials what they
would have got. Optuna is told of the trials that have ended, in the order of their numbers, before it is asked.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from rayft.search import Space, Tune

Fields = dict[str, Any]  # dotted name -> value


def trials(tune: Tune) -> int:
    """How many trials the sweep has; a grid has each combination once, or fewer where `trials` says so."""
    whole = math.prod(len(space.choices) for space in tune.search.values())
    if tune.sampler == "grid":
        return min(whole, tune.trials or whole)
    return tune.trials or 0


class Sampler:
    """Proposes the fields of trial after trial."""

    def __init__(self, tune: Tune, maximize: bool) -> None:
        self.tune = tune
        self._study = _study(tune, maximize) if tune.sampler == "optuna" else None
        self._asked: dict[int, Any] = {}
        self._told: set[int] = set()

    def propose(self, number: int) -> Fields:
        """The fields of trial `number` (from 0)."""
        if self.tune.sampler == "grid":
            return _combination(self.tune.search, number)
        if self._study is None:
            return _drawn(self.tune, number)
        asked = self._asked[number] = self._study.ask()
        return {name: _suggested(asked, name, space) for name, space in sorted(self.tune.search.items())}

    def tell(self, number: int, fields: Fields, value: float | None) -> None:
        """What came of a trial; `value` None where it failed. Trials of an earlier start are told too.

        Only what is told of a trial first counts.
        """
        if self._study is None or number in self._told:
            return
        self._told.add(number)
        import optuna

        failed = value is None or not math.isfinite(value)
        state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
        values = None if failed else [float(value or 0.0)]
        if number in self._asked:
            self._study.tell(self._asked.pop(number), values, state=state)
            return
        spaces = self.tune.search
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=values,
                params={name: _parameter(spaces[name], fields[name]) for name in spaces},
                distributions={name: _distribution(space) for name, space in spaces.items()},
            )
        )


def _combination(search: dict[str, Space], number: int) -> Fields:
    names = sorted(search)  # whatever their order in the file
    combinations = itertools.product(*(search[name].choices for name in names))
    return dict(zip(names, next(itertools.islice(combinations, number, None)), strict=True))


def _drawn(tune: Tune, number: int) -> Fields:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(tune.seed, spawn_key=(number,))))
    grids = {name: space for name, space in tune.search.items() if space.grid}
    size = math.prod(len(space.choices) for space in grids.values())
    fixed = _combination(grids, number % size) if grids else {}
    # Every field draws, a grid's too: adding one then changes no other.
    shares = {name: float(generator.random()) for name in sorted(tune.search)}
    spaces = tune.search
    return {name: fixed[name] if name in fixed else _at(spaces[name], share) for name, share in shares.items()}


def _at(space: Space, share: float) -> Any:
    """The value at `share` (0 to below 1) of the way through a space."""
    if space.choices:
        return space.choices[int(share * len(space.choices))]
    if space.int:
        return space.int[0] + int(share * (space.int[1] - space.int[0] + 1))
    if space.log_uniform:
        low, high = (math.log(bound) for bound in space.log_uniform)
        return readable(math.exp(low + share * (high - low)))
    low, high = space.uniform or (0.0, 1.0)
    return readable(low + share * (high - low))


def readable(value: float) -> float:
    """Four significant digits: nobody can tell trials apart by more, and a recipe stays legible."""
    return float(f"{value:.4g}")


def _study(tune: Tune, maximize: bool) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=tune.seed)
    return optuna.create_study(sampler=sampler, direction="maximize" if maximize else "minimize")


def _suggested(asked: Any, name: str, space: Space) -> Any:
    if space.choices:  # by their places: Optuna knows plain values alone
        return space.choices[asked.suggest_categorical(name, list(range(len(space.choices))))]
    if space.int:
        return asked.suggest_int(name, *space.int)
    if space.log_uniform:
        return readable(asked.suggest_float(name, *space.log_uniform, log=True))
    return readable(asked.suggest_float(name, *(space.uniform or (0.0, 1.0))))


def _parameter(space: Space, value: Any) -> Any:
    if space.choices:
        return space.choices.index(value)
    low, high = space.int or space.log_uniform or space.uniform or (value, value)
    return min(max(value, low), high)  # rounding may have gone past a bound


def _distribution(space: Space) -> Any:
    from optuna import distributions

    if space.choices:
        return distributions.CategoricalDistribution(list(range(len(space.choices))))
    if space.int:
        return distributions.IntDistribution(*space.int)
    if space.log_uniform:
        return distributions.FloatDistribution(*space.log_uniform, log=True)
    return distributions.FloatDistribution(*(space.uniform or (0.0, 1.0)))
