"""What pages show is what the files say, whatever is missing, half-written or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import folders
from rayft import report, storage
from rayft.errors import StorageDenied, StorageMissing
from rayft.reports.history import index, run
from rayft.reports.overview import MOST_CURVES, page, sweep
from rayft.reports.snapshots import Files, in_parallel, thinned


@pytest.fixture
def where(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


def append(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


# --- runs


def test_run_shows_the_numbers_of_its_files(where: str) -> None:
    folders.write_manifest(where)
    folder = folders.write_run(where, "team/one", attempts=3)
    result = storage.read_json(storage.join(folder, "result.json"))
    rows = [json.loads(line) for line in storage.read_text(storage.join(folder, "metrics.jsonl")).splitlines()]
    found = run(Files(), folder)
    assert (found["name"], found["status"], found["steps"], found["epochs"]) == ("team/one", "finished", 40, 4.0)
    assert found["best"] == result["best"]
    assert found["metrics"] == result["metrics"]
    assert found["timing"] == result["timing"]
    assert found["warnings"] == []  # of a result that is older than warnings are
    storage.write_json(storage.join(folder, "result.json"), {**result, "warnings": ["overfitting: the loss rose"]})
    assert run(Files(), folder)["warnings"] == ["overfitting: the loss rose"]
    steps = [row for row in rows if "loss" in row]
    for name in ("loss", "learning_rate", "rows_per_s", "tokens_per_s"):
        assert found["curves"][name] == {"x": list(range(1, 41)), "y": [row[name] for row in steps]}
    assert found["evaluations"] == [row for row in rows if "loss" not in row][:-1]
    assert [attempt["host"] for attempt in found["attempts"]] == ["machine-1", "machine-2", "machine-3"]
    (split,) = found["data"]
    assert (split["split"], split["rows"], split["dropped"], split["bad"]["count"]) == (
        "train",
        771,
        {"no label": 2},
        1,
    )
    assert split["lengths"] == [[16, 120], [32, 400], [64, 210], [128, 41]]
    assert found["recipe"] == storage.read_text(storage.join(folder, "recipe.yaml"))


def test_run_with_only_the_beginning_of_its_files_is_shown(where: str) -> None:
    folder = storage.join(where, "new")
    storage.write_text(storage.join(folder, "run.json"), '{"status": "runn')
    found = run(Files(), folder)
    assert (found["status"], found["error"]) == ("unreadable", f"{folder}/run.json is damaged: it holds no JSON object")
    assert [row["status"] for row in index(Files(), where)["runs"] if row["name"] == "new"] == ["unreadable"]
    folders.write_state(folder, "running")
    for name in ("recipe.yaml", "result.json", "trial.json", "attempts/000001.json"):
        storage.write_text(storage.join(folder, name), '{"a": [')
    append(
        storage.join(folder, "metrics.jsonl"), '{"step": 1, "epoch": 0.1, "loss": NaN}\n\n{"step": 2, "lo\n[7]\n{"step"'
    )
    found = run(Files(), folder)
    assert (found["status"], found["steps"], found["curves"], found["best"]) == ("running", 1, {}, None)
    assert found["attempts"] == [{"number": "1", "host": None, "pid": None, "since": None}]
    assert found["data"] == []


def test_half_written_last_line_does_not_count_until_it_ends(where: str) -> None:
    folder, files = folders.write_run(where, "one", "running"), Files()
    append(storage.join(folder, "metrics.jsonl"), '{"step": 41, "epoch": 4.1, "loss": 0.5')
    assert run(files, folder)["steps"] == 40
    append(storage.join(folder, "metrics.jsonl"), "}\n")
    found = run(files, folder)
    assert (found["steps"], found["curves"]["loss"]["y"][-1]) == (41, 0.5)


def test_result_of_an_earlier_attempt_is_not_that_of_a_run_that_goes_on(where: str) -> None:
    folder = folders.write_run(where, "one")
    folders.write_state(folder, "running")
    found = run(Files(), folder)
    assert (found["status"], found["metrics"]) == ("running", {})


def test_a_key_that_is_no_key_leads_nowhere(where: str) -> None:
    storage.write_json(storage.join(where, "secret", "manifest.json"), {"rows": 1})
    folder = folders.write_run(where, "one", prepared={"train": "../secret"})
    assert run(Files(), folder)["data"] == []


def test_what_is_no_run_is_named_and_a_storage_that_refuses_is_an_error(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders.write_run(where, "one")
    with pytest.raises(StorageMissing, match="nothing does not exist"):
        page(Files(), storage.join(where, "nothing"))
    with pytest.raises(StorageMissing, match=r"has no run\.json"):
        page(Files(), where)

    def refuse(path: str) -> bytes:
        raise StorageDenied(f"{path}: no right to read")

    monkeypatch.setattr(storage, "read_bytes", refuse)
    with pytest.raises(StorageDenied, match="no right"):
        page(Files(), folder)


def test_a_long_curve_keeps_its_ends_and_its_peaks_and_makes_nothing_up() -> None:
    curve = [(float(step), float(step % 97)) for step in range(10_000)]
    curve[7_777] = (7_777.0, 500.0)
    found = thinned(curve)
    assert len(found) <= 200
    assert set(found) <= set(curve)
    assert found == sorted(found)
    assert (found[0], found[-1], max(y for _, y in found)) == (curve[0], curve[-1], 500.0)
    assert thinned(curve[:200]) == curve[:200]


# --- sweeps


def test_sweep_shows_the_numbers_of_its_trials(where: str) -> None:
    folder = folders.write_sweep(where, "rates", 40)
    found = sweep(Files(), folder, where)
    result = storage.read_json(storage.join(folder, "result.json"))
    assert (found["status"], found["seconds"], found["best"]) == ("finished", 601.25, result["best"])
    assert {name: found["counts"][name] for name in result["trials"]} == result["trials"]
    assert [trial["trial"] for trial in found["trials"]] == list(range(40))
    for trial in found["trials"]:
        inside = storage.join(folder, "trials", trial["folder"])
        said = storage.read_json(storage.join(inside, "result.json"))
        assert trial["fields"] == storage.read_json(storage.join(inside, "trial.json"))["fields"]
        assert (trial["rows"], trial["seconds"], trial["status"]) == (said["rows"], said["seconds"], said["status"])
        assert trial["score"] == (said["best"] or {}).get("value")
    assert found["cache"]["saved_s"] == 100.0


def test_what_early_stopping_saved_is_the_share_of_rows_not_trained_on(where: str) -> None:
    folder = folders.write_sweep(where, "rates", 40)
    ended = [folders.trial_status(number) for number in range(40)]
    steps = [count for status, count in ended if status != "failed"]
    saved = sweep(Files(), folder)["stopping"]
    assert saved["stopped"] == sum(status == "stopped" for status, _ in ended)
    assert (saved["rows"], saved["full"]) == (4 * sum(steps), 4 * 40 * len(steps))
    assert saved["share"] == pytest.approx(1 - sum(steps) / (40 * len(steps)))


def test_the_field_that_decides_the_score_matters_most(where: str) -> None:
    found = sweep(Files(), folders.write_sweep(where, "rates", 60))
    shares = found["importance"]["values"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert sorted(shares, key=lambda name: -shares[name]) == list(folders.SEARCH)
    again = sweep(Files(), storage.join(where, "rates"))
    assert again["importance"] == found["importance"]


@pytest.mark.parametrize(("trials", "why"), [(0, "too few trials: 0 of at least 4"), (6, "too few trials: 3 of")])
def test_of_few_trials_no_importance_is_told(where: str, trials: int, why: str) -> None:
    found = sweep(Files(), folders.write_sweep(where, "few", trials, "running"))["importance"]
    assert found["values"] is None
    assert why in found["why"]


def test_trials_of_equal_scores_or_odd_values_break_nothing(where: str) -> None:
    folder = storage.join(where, "odd")
    folders.write_state(folder, "running")
    storage.write_text(storage.join(folder, "recipe.yaml"), "tune: {search: {a.b: {choice: [null, [1, 2], x]}}}\n")
    for number, value in enumerate([None, [1, 2], "x", True, {"y": 1}]):
        trial = folders.write_trial(folder, number, **{"a.b": value})
        result = storage.read_json(storage.join(trial, "result.json"))
        storage.write_json(
            storage.join(trial, "result.json"), {**result, "best": {"metric": "eval_accuracy", "value": 0.5}}
        )
    found = sweep(Files(), folder)
    assert found["importance"]["why"] == "all finished trials have the same score"
    assert found["axes"][0]["choices"] == [None, [1, 2], "x", True, {"y": 1}]
    folders.write_trial(folder, 5, **{"a.b": "x"})
    assert set(sweep(Files(), folder)["importance"]["values"]) == {axis["name"] for axis in found["axes"]}


def test_a_trial_without_a_result_runs_or_waits_and_its_score_comes_from_its_lines(where: str) -> None:
    folder = folders.write_sweep(where, "rates", 4, "running")
    trial = folders.write_trial(folder, 4, "running", steps=20)
    folders.write_trial(folder, 5, "waiting")
    silent = folders.write_trial(folder, 6, "running", steps=5)
    folders.write_state(silent, "running", silent_s=31)
    storage.write_text(storage.join(folder, "trials", "00007", "trial.json"), '{"tri')
    found = sweep(Files(), folder)
    assert [one["status"] for one in found["trials"]][4:] == ["running", "waiting", "waiting", "waiting"]
    rows = [json.loads(line) for line in storage.read_text(storage.join(trial, "metrics.jsonl")).splitlines()]
    assert found["trials"][4]["score"] == max(row["eval_accuracy"] for row in rows if "eval_accuracy" in row)
    assert (found["trials"][4]["epoch"], found["trials"][4]["rows"]) == (2.0, None)
    assert found["trials"][6]["score"] is None
    assert found["trials"][7]["trial"] == 7
    folders.write_state(folder, "stopped")
    assert sweep(Files(), folder)["trials"][5]["status"] == "interrupted"


def test_a_metric_that_is_better_when_low_leads_to_the_lowest(where: str) -> None:
    folder = folders.write_sweep(where, "rates", 6, "running")
    recipe = storage.read_text(storage.join(folder, "recipe.yaml"))
    text = recipe.replace("metric: eval_accuracy", "metric: loss").replace("mode: max", "mode: null")
    storage.write_text(storage.join(folder, "recipe.yaml"), text)
    found = sweep(Files(), folder)
    assert (found["metric"], found["mode"]) == ("eval_loss", "min")
    assert found["best"]["value"] == min(trial["score"] for trial in found["trials"] if trial["score"] is not None)


@pytest.mark.parametrize(
    ("space", "values", "log", "choices"),
    [
        ({"log_uniform": [1e-5, 1e-4]}, [2e-5, 3e-5], True, None),
        ({"uniform": [0, 1]}, [0.1, 0.9], False, None),
        ({"uniform": [0, 1]}, [0.001, 0.9], False, None),
        ({"uniform": [0.001, 1]}, [0.2, 0.9], True, None),
        ({"choice": [4, 2, 0]}, [0, 4], False, [0, 2, 4]),
        ({"choice": [1e-5, 1e-2]}, [1e-5, 1e-2], True, [1e-5, 1e-2]),
        ({"choice": ["b", "a"]}, ["a", "b"], False, ["b", "a"]),
        ({"grid": ["c", "b", "a"]}, ["a", "b"], False, ["c", "b", "a"]),
        ({"grid": list(range(1, 12))}, [11, 3], False, list(range(1, 12))),
        ({"grid": [1e-5, 1e-2]}, [1e-2], True, [1e-5, 1e-2]),
        (None, [float(number) for number in range(1, 12)], False, None),
    ],
)
def test_each_field_gets_the_axis_that_its_space_asks_for(
    where: str, space: Any, values: list[Any], log: bool, choices: list[Any] | None
) -> None:
    folder = storage.join(where, "axes")
    folders.write_state(folder, "running")
    tune = {"search": {"f": space}} if space else {}
    storage.write_json(storage.join(folder, "recipe.yaml"), {"tune": tune})
    for number, value in enumerate(values):
        fields = {"trial": number, "fields": {"f": value}}
        storage.write_json(storage.join(folder, "trials", f"{number:05d}", "trial.json"), fields)
    (axis,) = sweep(Files(), folder)["axes"]
    assert (axis["log"], axis["choices"]) == (log, choices)


def test_a_grid_has_as_many_trials_as_combinations_and_those_that_a_budget_left_wait(where: str) -> None:
    folder = storage.join(where, "grid")
    folders.write_state(folder, "finished")
    search = {"train.learning_rate": {"grid": [1e-5, 1e-4, 1e-3]}, "model.freeze.layers": {"grid": [0, 2]}}
    storage.write_json(storage.join(folder, "recipe.yaml"), {"tune": {"search": search, "sampler": "grid"}})
    why = "tune.budget of 1 minutes is used up: 1 trial waits, 5 trials were not begun"
    storage.write_json(storage.join(folder, "result.json"), {"status": "finished", "why": why})
    storage.write_json(storage.join(folder, "trials", "00000", "trial.json"), {"trial": 0, "fields": {}})
    found = sweep(Files(), folder)
    assert (found["planned"], found["why"], found["counts"]["waiting"]) == (6, why, 1)


def test_a_thousand_trials_are_read_once_and_then_only_what_changed(where: str) -> None:
    folder, files = folders.write_sweep(where, "many", 120, "running"), Files()
    first = sweep(files, folder)
    assert first["curves"]["of"] > len(first["curves"]["shown"]) == MOST_CURVES
    assert all(len(curve["x"]) <= 200 for curve in first["curves"]["shown"])
    read = files.reads
    assert read > 4 * 120
    assert sweep(files, folder) == first
    assert files.reads == read
    append(
        storage.join(folder, "trials", "00003", "metrics.jsonl"), '{"step": 41, "epoch": 4.1, "eval_accuracy": 0.1}\n'
    )
    sweep(files, folder)
    assert files.reads == read + 1


# --- the storage


def test_index_lists_runs_and_sweeps_newest_first_and_no_trials(where: str) -> None:
    folders.write_run(where, "old", silent_s=900)
    folders.write_run(where, "team/one", "running")
    folders.write_sweep(where, "rates", 5)
    storage.write_json(storage.join(where, "old", "export", "run.json"), {"status": "not a run"})
    found = index(Files(), where)["runs"]
    assert [(one["name"], one["kind"]) for one in found] == [("team/one", "run"), ("rates", "sweep"), ("old", "run")]
    known = {one["name"]: one for one in report.runs(where)}
    for one in found:
        same = ("status", "metric", "value", "seconds", "started")
        assert {name: one[name] for name in same} == {name: known[one["name"]][name] for name in same}
    assert [one["trials"] for one in found] == [None, 5, None]
    with pytest.raises(StorageMissing, match="does not exist; the storage is"):
        index(Files(), where + "/nowhere")


def test_object_storage_shows_the_same_as_folders(s3: str, where: str) -> None:
    for home in (where, f"{s3}/pages"):
        folders.write_manifest(home)
        folders.write_run(home, "team/one")
        folders.write_sweep(home, "rates", 6)
    files = Files()

    def told(home: str) -> dict[str, Any]:
        text = json.dumps([page(files, storage.join(home, name), home) for name in ("team/one", "rates")])
        one, other = json.loads(text.replace(home, ""))
        clock = {"started": None, "seconds": None}
        return {"run": {**one, **clock}, "sweep": {**other, **clock}, "runs": len(index(files, home)["runs"])}

    there = told(f"{s3}/pages")
    assert there == told(where)
    read = files.reads
    assert told(f"{s3}/pages") == there
    assert files.reads == read


def test_the_first_failure_of_several_threads_is_raised() -> None:
    assert in_parallel(lambda number: number * 2, list(range(50))) == [number * 2 for number in range(50)]
    with pytest.raises(ZeroDivisionError):
        in_parallel(lambda number: 1 / (number - 20), list(range(50)))
