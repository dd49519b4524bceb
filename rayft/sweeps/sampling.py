"""Which values the fields of each trial take: a grid, random draws, or what Optuna proposes.

Grid and random draws are functions of (seed, trial number), Optuna's proposals of these and of what is known of the
other trials: so a sweep that goes on gives its trials what they would have got.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayft.fields.search import Space, Tune

Fields = dict[str, Any]  # dotted name -> value


def trials(tune: Tune) -> int:
    """How many trials the sweep has; a grid has each combination once, or fewer where `trials` says so."""
    whole = math.prod(len(space.choices) for space in tune.search.values())
    if tune.sampler == "grid":
        return min(whole, tune.trials or whole)
    return tune.trials or 0


@dataclass(frozen=True)
class Heard:
    """What is known of a trial: its fields, its score, and how far it had come then (None: to its end).

    `came` counts in anything that is the same of all trials, so that those with the same have comparable scores.
    """

    fields: Fields
    score: float
    came: int | None = None


def propose(tune: Tune, maximize: bool, number: int, heard: Mapping[int, Heard]) -> Fields:
    """The fields of trial `number` (from 0), where so much is known of others by their numbers."""
    if tune.sampler == "grid":
        return _combination(tune.search, number)
    if tune.sampler == "random":
        return _drawn(tune, number)
    return _learned(tune, maximize, number, heard)


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
        return within(space, math.exp(low + share * (high - low)))
    low, high = space.uniform or (0.0, 1.0)
    return within(space, low + share * (high - low))


def readable(value: float) -> float:
    """Four significant digits: nobody can tell trials apart by more, and a recipe stays legible."""
    return float(f"{value:.4g}")


def within(space: Space, value: Any) -> Any:
    """The value of a space that is nearest to a number; what is chosen from a list stays what it is."""
    if space.choices:
        return value
    if space.int:
        return min(max(round(value), space.int[0]), space.int[1])
    low, high = space.log_uniform or space.uniform or (value, value)
    return min(max(readable(value), low), high)  # rounding may go past a bound


def _learned(tune: Tune, maximize: bool, number: int, heard: Mapping[int, Heard]) -> Fields:
    """What Optuna's TPE proposes (Bergstra et al. 2011), with random numbers of the trial's own.

    Trials that ended early, or wait, are to it what it calls pruned: of those it takes the ones that have come furthest
    for the best, and compares the scores of trials that have come equally far.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = int(np.random.SeedSequence(tune.seed, spawn_key=(number,)).generate_state(1)[0])
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed), direction="maximize" if maximize else "minimize"
    )
    study.add_trials([_past(tune, trial) for _, trial in sorted(heard.items())])
    asked = study.ask()
    return {name: _suggested(asked, name, space) for name, space in sorted(tune.search.items())}


def _past(tune: Tune, trial: Heard) -> Any:
    import optuna

    states = optuna.trial.TrialState
    return optuna.trial.create_trial(
        state=states.COMPLETE if trial.came is None else states.PRUNED,
        value=trial.score if trial.came is None else None,
        intermediate_values={} if trial.came is None else {trial.came: trial.score},
        params={name: _parameter(space, trial.fields[name]) for name, space in tune.search.items()},
        distributions={name: _distribution(space) for name, space in tune.search.items()},
    )


def _suggested(asked: Any, name: str, space: Space) -> Any:
    if space.choices:  # by their places: Optuna knows plain values alone
        return space.choices[asked.suggest_categorical(name, list(range(len(space.choices))))]
    if space.int:
        return asked.suggest_int(name, *space.int)
    if space.log_uniform:
        return within(space, asked.suggest_float(name, *space.log_uniform, log=True))
    return within(space, asked.suggest_float(name, *(space.uniform or (0.0, 1.0))))


def _parameter(space: Space, value: Any) -> Any:
    return space.choices.index(value) if space.choices else value


def _distribution(space: Space) -> Any:
    from optuna import distributions

    if space.choices:
        return distributions.CategoricalDistribution(list(range(len(space.choices))))
    if space.int:
        return distributions.IntDistribution(*space.int)
    if space.log_uniform:
        return distributions.FloatDistribution(*space.log_uniform, log=True)
    return distributions.FloatDistribution(*(space.uniform or (0.0, 1.0)))
