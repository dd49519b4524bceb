"""What there is to show of a sweep, as plain data: its trials, their curves and what each field matters."""

from __future__ import annotations

import json
import time
from typing import Any

from pydantic import ValidationError

from rayft import report, storage
from rayft.errors import RecipeError
from rayft.fields.search import Tune
from rayft.recipe import Recipe
from rayft.reports.history import TRIALS, is_sweep, leading, mapping, name, result_of, run, state_of, times, transposed
from rayft.reports.snapshots import Files, Json, in_parallel, is_number, name_of, points, scores, text, thinned
from rayft.storage import Entry
from rayft.sweeps import sampling

MOST_CURVES = 50
ENOUGH = 4  # finished trials from which importances are told
_FEW = 8  # different values up to which a field counts as discrete
_DECADES = 100.0  # from this ratio on, numbers are shown on a logarithmic axis


def page(files: Files, folder: str, where: str | None = None) -> Json:
    """The data of a run's or of a sweep's page, whichever `folder` holds; StorageMissing where it is neither."""
    recipe = files.yaml(files.inside(folder).get("recipe.yaml"))
    return sweep(files, folder, where) if is_sweep(recipe) else run(files, folder, where)


def sweep(files: Files, folder: str, where: str | None = None) -> Json:
    """One sweep, as plain data (see the keys below); StorageMissing where there is none."""
    found, state = files.inside(folder), state_of(files, folder)
    recipe = files.yaml(found.get("recipe.yaml"))
    tune = mapping(recipe.get("tune"))
    result = result_of(files, folder, state)
    status = report.status(state, result)
    read = in_parallel(
        lambda pair: _trial(files, *pair, status in ("running", "finished")),
        sorted(files.each_inside(storage.join(folder, TRIALS)).items()),
    )
    trials = [trial for trial, _ in read]
    metric, mode = _goal(recipe, result, read)
    for trial, evaluations in read:
        trial["score"] = _score(trial.pop("result"), evaluations, metric, mode)
    ranked = _ranked(trials, mode)
    axes = _axes(mapping(tune.get("search")), trials)
    finished = [trial for trial in ranked if trial["status"] == "finished"]
    stamp = (mode, [(trial["trial"], trial["score"]) for trial in finished])
    importance = files.once(folder, "importance", stamp, lambda: _importance(finished, axes, mode))
    seconds = result.get("seconds")
    return {
        "kind": "sweep",
        "name": name(folder, where, recipe),
        "folder": folder,
        **times(state),
        **({"seconds": seconds} if is_number(seconds) else {}),
        "status": status,
        "error": state.get("error") or result.get("error"),
        "why": result.get("why"),
        "planned": _planned(tune),
        "sampler": tune.get("sampler"),
        "scheduler": tune.get("scheduler"),
        "metric": metric,
        "mode": mode,
        "best": mapping(result.get("best")) or (_best(ranked[0], metric) if ranked else None),
        "counts": {each: sum(trial["status"] == each for trial in trials) for each in _STATUSES},
        "axes": axes,
        "importance": importance,
        "trials": trials,
        "curves": _curves(read, ranked, metric),
        "stopping": _stopping(trials, recipe),
        "cache": mapping(result.get("cache")) or _cache(trials),
        "recipe": files.read(found.get("recipe.yaml"), text),
        "best_recipe": files.read(found.get("best.yaml"), text),
    }


_STATUSES = ("finished", "stopped", "failed", "running", "waiting", "interrupted")


def _trial(files: Files, folder: str, found: dict[str, Entry], going: bool) -> tuple[Json, list[Json]]:
    """A trial's row of the table, still with its result, and its evaluations.

    `going`: what has not ended waits, since its sweep is running, or has ended by its budget.
    """
    said, result = files.json(found.get("trial.json")), files.json(found.get("result.json"))
    last, evaluations = files.read(found.get("metrics.jsonl"), scores)
    state = files.json(found.get("run.json"))
    number = said.get("trial")
    seconds = result.get("seconds")
    reached = max((row for row in (last, *evaluations[-1:])), key=lambda row: row.get("step") or 0)
    return {
        "trial": number if isinstance(number, int) else _number(folder),
        "folder": name_of(folder),
        "status": str(result["status"]) if result.get("status") else _unfinished(state, going),
        "error": result.get("error"),
        "fields": mapping(said.get("fields")),
        "rows": result.get("rows"),
        "seconds": seconds if is_number(seconds) or result else times(state)["seconds"],
        "step": result.get("steps") or reached.get("step"),
        "epoch": result.get("epochs") or reached.get("epoch"),
        "saved_s": mapping(result.get("timing")).get("cache_saved_s"),
        "result": result,
    }, evaluations


def _planned(tune: Json) -> int | None:
    """How many trials the sweep is to have; of a grid its combinations."""
    try:
        return sampling.trials(Tune.model_validate(tune)) or None
    except ValidationError:  # half there, or of a version with other fields
        return tune.get("trials")


def _number(folder: str) -> int | str:
    last = name_of(folder)
    return int(last) if last.isascii() and last.isdigit() else last


def _unfinished(state: Json, going: bool) -> str:
    heartbeat = state.get("heartbeat")
    heard = is_number(heartbeat) and time.time() - float(heartbeat) < report.HEARTBEAT_S  # type: ignore[arg-type]
    if state.get("status") == "running" and heard:
        return "running"
    return "waiting" if going else "interrupted"


def _goal(recipe: Json, result: Json, read: list[tuple[Json, list[Json]]]) -> tuple[str | None, str]:
    """The metric that the sweep is about, with its `eval_`, and whether `max` or `min` is wanted."""
    tune = mapping(recipe.get("tune"))
    bests = [mapping(result.get("best")), *(mapping(trial["result"].get("best")) for trial, _ in read)]
    said = next((str(best["metric"]) for best in bests if best.get("metric")), None)
    measured = (first["metric"] for _, evaluations in read if (first := leading(evaluations)))
    metric = tune.get("metric") or said or next(measured, None)
    if metric is None:
        return None, str(tune.get("mode") or "max")
    metric = "eval_" + str(metric).removeprefix("eval_")
    return metric, str(tune.get("mode") or ("min" if _lower_is_better(recipe, metric) else "max"))


def _lower_is_better(recipe: Json, metric: str) -> bool:
    try:
        known = Recipe.parse(recipe, "recipe.yaml").task.lower_is_better
    except RecipeError:  # half there, or of a version with other fields
        return metric.endswith("loss")
    return metric.removeprefix("eval_") in known


def _score(result: Json, evaluations: list[Json], metric: str | None, mode: str) -> float | None:
    """A trial's score: what its result says, else the best of its evaluations so far."""
    best, final = mapping(result.get("best")), mapping(result.get("metrics"))
    if best.get("metric") == metric and is_number(best.get("value")):
        return float(best["value"])
    if metric is not None and is_number(final.get(metric)):
        return float(final[metric])
    values = [value for _, value in points(evaluations, "step", metric or "")]
    return (min(values) if mode == "min" else max(values)) if values else None


def _ranked(trials: list[Json], mode: str) -> list[Json]:
    """The trials with a score that did not fail, best first."""
    scored = [trial for trial in trials if trial["score"] is not None and trial["status"] != "failed"]
    return sorted(scored, key=lambda trial: trial["score"], reverse=mode == "max")


def _best(trial: Json, metric: str | None) -> Json:
    return {"trial": trial["trial"], "metric": metric, "value": trial["score"], "fields": trial["fields"]}


def _axes(search: Json, trials: list[Json]) -> list[Json]:
    """How each varied field is shown: {"name", "log", "choices": its values in order, None where they are many}."""
    found = []
    for field in dict.fromkeys([*search, *(each for trial in trials for each in trial["fields"])]):
        space = mapping(search.get(field))
        given = [trial["fields"][field] for trial in trials if field in trial["fields"]]
        bounds = space.get("log_uniform") or space.get("uniform")
        listed = space.get("choice") or space.get("grid") or []
        choices = None if bounds else _different([*listed, *given])
        if choices is not None and len(choices) > _FEW and not listed:
            choices = choices if not all(map(is_number, choices)) else None
        numbers = bounds or choices or given  # what was drawn evenly near 0 is no reason for a logarithmic axis
        wide = bool(numbers) and all(map(is_number, numbers)) and 0 < _DECADES * min(numbers) <= max(numbers)
        log = "log_uniform" in space or wide
        found.append({"name": field, "log": log, "choices": choices, "bounds": bounds})
    return found


def _different(values: list[Any]) -> list[Any]:
    """Each value once; numbers by size, others as they come."""
    once = list({json.dumps(value, sort_keys=True, default=str): value for value in values}.values())
    return sorted(once) if once and all(map(is_number, once)) else once


def _importance(finished: list[Json], axes: list[Json], mode: str) -> Json:
    """How much of the scores' spread each field explains, as shares that add up to 1: {"values", "trials", "why"}.

    Mean decrease in impurity of a random forest over the finished trials, as optuna computes it: of 1,000 trials in
    0.2 s, where fANOVA took 15 s on the same machine. Where `values` is None, `why` says why.
    """
    count = len(finished)
    if count < ENOUGH:
        why = f"too few trials: {count} of at least {ENOUGH} have finished with a score"
        return {"values": None, "trials": count, "why": why}
    if len({trial["score"] for trial in finished}) == 1:
        return {"values": None, "trials": count, "why": "all finished trials have the same score"}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shared = [axis for axis in axes if all(axis["name"] in trial["fields"] for trial in finished)]
    columns = {axis["name"]: _column(axis, finished) for axis in shared}
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
    for place, trial in enumerate(finished):
        study.add_trial(
            optuna.create_trial(
                value=trial["score"],
                params={field: values[place] for field, (_, values) in columns.items()},
                distributions={field: distribution for field, (distribution, _) in columns.items()},
            )
        )
    evaluator = optuna.importance.MeanDecreaseImpurityImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    values = {axis["name"]: float(shares.get(axis["name"], 0.0)) for axis in axes}
    return {"values": values, "trials": count, "why": None}


def _column(axis: Json, trials: list[Json]) -> tuple[Any, list[Any]]:
    """optuna's distribution of a field, and the trials' values as it takes them."""
    import optuna

    values = [trial["fields"][axis["name"]] for trial in trials]
    if axis["choices"] is None and all(map(is_number, values)):
        low, high = min(values), max(values)
        numbers = [float(value) for value in values]
        return optuna.distributions.FloatDistribution(low, high, log=axis["log"] and low > 0), numbers
    names = [json.dumps(value, sort_keys=True) for value in values]
    return optuna.distributions.CategoricalDistribution(sorted(set(names))), names


def _curves(read: list[tuple[Json, list[Json]]], ranked: list[Json], metric: str | None) -> Json:
    """The metric over the epochs of the best trials: {"of": how many have a curve, "shown": [{"trial", "x", "y"}]}."""
    lines = {trial["folder"]: points(evaluations, "epoch", metric or "") for trial, evaluations in read}
    drawn = [trial for trial in ranked if lines[trial["folder"]]]
    shown = [{"trial": trial["trial"], **transposed(thinned(lines[trial["folder"]]))} for trial in drawn[:MOST_CURVES]]
    return {"of": len(drawn), "shown": shown}


def _stopping(trials: list[Json], recipe: Json) -> Json | None:
    """What ending trials early left out: {"stopped", "rows" trained on, "full" rows at full length, "share" saved}.

    A trial that was stopped at an epoch (or step) would have taken its rows times all epochs (or steps) by that one.
    None where no trial was stopped, or nothing is known of their length.
    """
    train = mapping(recipe.get("train"))
    rows, full, stopped = 0.0, 0.0, 0
    for trial in trials:
        if trial["status"] not in ("finished", "stopped") or not is_number(trial["rows"]):
            continue
        length = 1.0
        if trial["status"] == "stopped":
            stopped += 1
            unit = "step" if train.get("max_steps") else "epoch"
            setting = "max_steps" if unit == "step" else "epochs"
            wanted, reached = trial["fields"].get(f"train.{setting}", train.get(setting)), trial[unit]
            if not is_number(wanted) or not is_number(reached) or reached <= 0:
                return None
            length = max(1.0, wanted / reached)
        rows += trial["rows"]
        full += trial["rows"] * length
    return {"stopped": stopped, "rows": rows, "full": full, "share": 1 - rows / full} if stopped and full else None


def _cache(trials: list[Json]) -> Json | None:
    """What the cache of frozen blocks has saved so far, where the sweep has not said it yet."""
    saved = [trial["saved_s"] for trial in trials if is_number(trial["saved_s"])]
    return {"saved_s": sum(saved)} if saved else None
