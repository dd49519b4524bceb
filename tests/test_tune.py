"""Sweeps: what they leave, that they go on where they were interrupted, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import small
from rayft import report, storage
from rayft import tune as tune_module
from rayft.errors import RunRefused, TrainingError
from rayft.recipe import Recipe
from rayft.reports import overview
from rayft.reports.snapshots import Files
from rayft.run import run
from rayft.sweeps import trials
from rayft.text import sweep_lines
from rayft.training import checkpoints
from rayft.tune import tune

RATE, DEPTH = "train.learning_rate", "model.freeze.layers"


def sweep(folder: Path, name: str, search: dict[str, Any], **tuned: Any) -> dict[str, Any]:
    """A plain recipe of a small sweep in `folder`, whose model and rows are there."""
    model = str(folder / "model")
    if not Path(model).exists():
        small.small_bert(folder / "model", blocks=3)
    plain = small.recipe(folder, model, name=name, cluster__workers=1, train__micro_batch_size=16)
    plain["tune"] = {"search": search, "scheduler": "none", **tuned}
    return plain


GRID = {RATE: {"grid": [1e-4, 3e-3]}, DEPTH: {"grid": [0, 2, 3]}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def whole(home: Path, ray_local: None) -> dict[str, Any]:
    """The result of a grid of six trials that nothing interrupted."""
    return tune(Recipe.parse(sweep(home, "whole", GRID, sampler="grid")), show=lambda event: None)


def table(folder: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(f"{folder}/trials.parquet").to_pylist()
    return rows


def outcome(folder: str) -> list[tuple[Any, ...]]:
    """What must be equal of two sweeps: fields, status and score of each trial."""
    return [(row["trial"], row["status"], row[RATE], row[DEPTH], row["score"], row["rows"]) for row in table(folder)]


def test_no_driver_loads_a_model_that_takes_a_gpu(tmp_path: Path) -> None:
    plain = sweep(tmp_path, "flash", {RATE: {"grid": [1e-4]}}, sampler="grid")
    plain["model"]["attention"] = "flash_attention_2"
    plain["model"]["dtype"] = "bfloat16"
    plain["cluster"]["gpus_per_worker"] = 1
    driver = object.__new__(tune_module.Sweep)
    driver.recipe = Recipe.parse(plain)
    assert driver._warm() is None


@pytest.mark.slow
def test_a_grid_runs_each_combination_once_and_answers_with_the_best(whole: dict[str, Any], home: Path) -> None:
    assert whole["status"] == "finished"
    assert whole["trials"] == {"finished": 6, "stopped": 0, "failed": 0, "waiting": 0}
    rows = table(whole["run"])
    assert {(row[RATE], row[DEPTH]) for row in rows} == {(rate, depth) for rate in (1e-4, 3e-3) for depth in (0, 2, 3)}
    best = max(rows, key=lambda row: (row["score"], -row["trial"]))
    assert whole["best"] == {
        "trial": best["trial"], "metric": "eval_accuracy", "value": best["score"],
        "fields": {RATE: best[RATE], DEPTH: best[DEPTH]},
    }  # fmt: skip
    assert whole["cache"]["depths"] == [2, 3]
    assert whole["cache"]["saved_s"] > 0
    assert whole["metrics"]["eval_accuracy"] == best["score"]
    assert "test_accuracy" in whole["metrics"]
    # Checkpoints of trials that were not the best are gone.
    kept = [row["trial"] for row in rows if Path(whole["run"], f"trials/{row['trial']:05d}/checkpoints").exists()]
    assert kept == [best["trial"]]
    from transformers import pipeline

    classify = pipeline("text-classification", whole["export"])
    assert classify("hello there")[0]["label"] in ("ham", "spam")


@pytest.mark.slow
def test_the_best_recipe_alone_gives_the_trials_score_again(whole: dict[str, Any]) -> None:
    alone = Recipe.load(f"{whole['run']}/best.yaml")
    assert alone.name == "whole-best"
    assert alone.tune is None
    result = run(alone, show=lambda event: None)
    assert result["metrics"]["eval_accuracy"] == pytest.approx(whole["best"]["value"], abs=1e-6)
    assert result["metrics"]["test_accuracy"] == pytest.approx(whole["metrics"]["test_accuracy"], abs=1e-6)


@pytest.mark.slow
def test_a_trials_board_has_its_fields_and_score(whole: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(f"{whole['run']}/trials/00003/tensorboard").Reload()
    tags = board.summary_metadata
    assert any(name.startswith("_hparams_") for name in tags)
    assert board.Scalars("hparam/eval_accuracy")[0].value == pytest.approx(table(whole["run"])[3]["score"])


@pytest.mark.slow
def test_a_finished_sweep_answers_and_another_search_is_refused(whole: dict[str, Any], home: Path) -> None:
    plain = sweep(home, "whole", GRID, sampler="grid")
    said: list[dict[str, Any]] = []
    assert tune(Recipe.parse(plain), show=said.append) == whole
    assert [event["text"] for event in said] == [f"{whole['run']} is finished; this is its result"]
    other = sweep(home, "whole", {**GRID, RATE: {"grid": [1e-4]}}, sampler="grid")
    with pytest.raises(RunRefused, match=r"another tune\.search"):
        tune(Recipe.parse(other), show=said.append)


def ended(folder: str) -> dict[str, float]:
    """The result files of trials that have ended, with the time of their last change."""
    return {str(path): path.stat().st_mtime for path in Path(folder).glob("trials/*/result.json")}


@pytest.mark.slow
def test_a_sweep_that_was_stopped_and_killed_ends_like_one_that_was_not(whole: dict[str, Any], home: Path) -> None:
    plain = sweep(home, "broken", GRID, sampler="grid")
    path, folder = small.write_recipe(home, plain), f"{plain['storage']}/broken"
    process = small.start("tune", path)
    small.wait_for(lambda: len(ended(folder)) >= 1, process)
    process.send_signal(signal.SIGINT)
    told = small.finish(process, 130)
    assert "stopped by Ctrl-C; the best so far is trial " in told
    assert "the same command goes on with the trials that are left" in told
    result = json.loads(Path(folder, "result.json").read_text())
    assert result["status"] == "stopped"
    assert result["best"]["metric"] == "eval_accuracy"
    assert yaml.safe_load(Path(folder, "best.yaml").read_text())["name"] == "broken-best"
    before, first_s = ended(folder), result["seconds"]
    assert len(before) < 6
    process = small.start("tune", path)
    small.wait_for(lambda: len(ended(folder)) > len(before), process)
    small.kill_with_children(process)
    killed = ended(folder)
    told = small.finish(small.start("tune", path))
    assert "6 finished" in told
    after = ended(folder)
    assert {name: after[name] for name in killed} == killed  # no finished trial ran again
    assert outcome(folder) == outcome(whole["run"])
    result = json.loads(Path(folder, "result.json").read_text())
    assert result["metrics"] == whole["metrics"]
    state = json.loads(Path(folder, "run.json").read_text())
    assert state["before_s"] > 0.9 * first_s  # of the first start, and of the one that was killed
    assert result["seconds"] > state["before_s"]


@pytest.mark.slow
def test_a_trial_that_fails_says_why_and_the_others_go_on(home: Path, ray_local: None) -> None:
    search = {RATE: {"grid": [1e-3, 1e30]}}
    said: list[dict[str, Any]] = []
    result = tune(Recipe.parse(sweep(home, "faulty", search, sampler="grid")), show=said.append)
    assert result["trials"] == {"finished": 1, "stopped": 0, "failed": 1, "waiting": 0}
    (failed,) = [row for row in table(result["run"]) if row["status"] == "failed"]
    assert failed[RATE] == 1e30
    assert "train.learning_rate" in failed["error"]
    assert any(event["event"] == "trial" and event.get("error") == failed["error"] for event in said)
    assert result["best"]["fields"] == {RATE: 1e-3}


def labelled(path: Path, rows: int) -> str:
    """A CSV file whose `text` tells both the label `two` and the label `three`."""
    words = ["alpha beta", "gamma delta", "epsilon zeta"]
    lines = [f"{words[row % 3]} {row},{'yn'[row % 3 == 0]},{'abc'[row % 3]}" for row in range(rows)]
    path.write_text("\n".join(["text,two,three", *lines]) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.slow
def test_the_best_trial_answers_with_its_own_labels_and_rows(home: Path, ray_local: None) -> None:
    plain = sweep(home, "labels", {"task.label": {"grid": ["two", "three"]}}, sampler="grid", metric="loss")
    files = {split: labelled(home / f"labels-{split}.csv", rows) for split, rows in (("train", 96), ("test", 30))}
    plain["data"] = files | {"validation": labelled(home / "labels-validation.csv", 30)}
    plain["task"]["label"] = "three"
    plain["train"] |= {"learning_rate": 5e-3, "epochs": 3}
    result = tune(Recipe.parse(plain), show=lambda event: None)
    assert result["trials"]["finished"] == 2
    assert result["best"]["fields"] == {"task.label": "two"}  # of which two are told apart sooner than of three
    export = Path(result["export"])
    assert set(storage.read_json(f"{export}/config.json")["id2label"].values()) == {"y", "n"}
    alone = run(Recipe.load(f"{result['run']}/best.yaml"), show=lambda event: None)
    assert result["metrics"] == pytest.approx(alone["metrics"], abs=1e-6)
    keys = [storage.read_json(f"{folder}/rayft.json")["data"] for folder in (export, alone["export"])]
    assert keys[0] == keys[1]


@pytest.mark.slow
def test_asha_stops_what_does_not_promise_by_rows_seen(home: Path, ray_local: None) -> None:
    search = {RATE: {"log_uniform": [1e-6, 1e-2]}, "train.global_batch_size": {"choice": [8, 16]}}
    plain = sweep(home, "asha", search, sampler="optuna", scheduler="asha", trials=8)
    plain["train"] |= {"epochs": 3}
    result = tune(Recipe.parse(plain), show=lambda event: None)
    assert result["trials"]["finished"] + result["trials"]["stopped"] == 8
    assert result["trials"]["stopped"] >= 1
    rows = table(result["run"])
    assert {row["rows"] for row in rows if row["status"] == "finished"} == {3 * 203}
    assert {row["rows"] for row in rows if row["status"] == "stopped"} <= {203, 2 * 203}
    assert result["best"]["value"] == max(row["score"] for row in rows)


@pytest.mark.slow
def test_population_based_training_takes_over_the_better_trials_weights(home: Path, ray_local: None) -> None:
    search = {RATE: {"choice": [1e-9, 3e-3, 1e-8, 1e-3]}}
    plain = sweep(home, "pbt", search, sampler="grid", scheduler="pbt", metric="eval_loss")
    plain["train"] |= {"epochs": 6}
    result = tune(Recipe.parse(plain), show=lambda event: None)
    rows = table(result["run"])
    assert [row["error"] for row in rows] == [None] * 4
    assert result["trials"] == {"finished": 4, "stopped": 0, "failed": 0, "waiting": 0}
    assert result["best"]["value"] == min(row["score"] for row in rows)
    # Which of the two whose own rates move nothing is the worst when the others are heard of, nobody knows.
    began = [trials.evaluations(trials.folder_of(result["run"], number))[0]["eval_loss"] for number in (0, 2)]
    assert min(rows[0]["score"], rows[2]["score"]) < 0.9 * min(began)
    ends = [Recipe.load(f"{trials.folder_of(result['run'], row['trial'])}/recipe.yaml") for row in rows]
    assert [row[RATE] for row in rows] == [recipe.train.learning_rate for recipe in ends]
    answer = Path(result["run"], "best.yaml").read_text(encoding="utf-8")
    assert answer.startswith("# Population based training changed")
    assert Recipe.parse(yaml.safe_load(answer)).train.learning_rate == rows[result["best"]["trial"]][RATE]


@pytest.mark.slow
def test_a_trial_of_several_workers_goes_on_from_anothers_weights(whole: dict[str, Any], home: Path) -> None:
    import ray.tune

    from rayft.sweeps.trial import Shared, Trial

    best = whole["best"]
    giver = trials.folder_of(whole["run"], best["trial"])
    donor = checkpoints.committed(f"{giver}/checkpoints")[0]
    fields = {**best["fields"], RATE: 1e-12}  # which moves nothing
    plain = sweep(home, "heir", {RATE: {"choice": [1e-12]}}, trials=1, scheduler="pbt")
    plain["cluster"]["workers"] = 2
    shared = Shared(Recipe.parse(plain).resolved().dump(), {}, "", None)
    trial = ray.tune.with_parameters(Trial, shared=shared)({"number": 0, "fields": fields})
    trial.load_checkpoint({"checkpoint": donor})
    told = trial.step()
    assert (told["step"], told["rows"]) == (2 * checkpoints.step_of(donor), 2 * 203)
    assert told["scores"]["eval_loss"] == pytest.approx(trials.evaluations(giver)[0]["eval_loss"], rel=1e-5)
    assert trial.step()["finished"]
    trial.cleanup()


@pytest.mark.slow
def test_fields_that_do_not_go_together_fail_their_trial_alone_with_the_reason(home: Path, ray_local: None) -> None:
    import ray.tune

    from rayft.sweeps.trial import Shared, Trial

    plain = sweep(home, "unfit", {RATE: {"choice": [1e-4]}}, trials=1)
    shared = Shared(Recipe.parse(plain).resolved().dump(), {}, "", None)
    fields = {"model.unfreeze_every": 1}
    trial = ray.tune.with_parameters(Trial, shared=shared)({"number": 0, "fields": fields})
    told = trial.step()
    assert told["done"]
    assert told["error"].startswith("model.unfreeze_every: ")
    trial.cleanup()


@pytest.mark.slow
def test_fields_that_cannot_be_taken_over_with_fail_their_trial_alone(home: Path, ray_local: None) -> None:
    import ray.tune

    from rayft.sweeps.trial import Shared, Trial

    plain = sweep(home, "beyond", {RATE: {"choice": [1e-4]}}, trials=1, scheduler="pbt")
    shared = Shared(Recipe.parse(plain).resolved().dump(), {}, "", None)
    fields = {"train.label_smoothing": 1.1}
    trial = ray.tune.with_parameters(Trial, shared=shared)({"number": 0, "fields": fields})
    trial.load_checkpoint({"checkpoint": f"{home}/runs/beyond/trials/00001/checkpoints/step-000010-a1"})
    told = trial.step()
    assert told["done"]
    assert told["error"].startswith("train.label_smoothing: too large")
    trial.cleanup()


@pytest.mark.slow
def test_another_length_is_refused_by_a_sweep_whose_trials_have_theirs(whole: dict[str, Any], home: Path) -> None:
    plain = sweep(home, "whole", GRID, sampler="grid")
    plain["train"] = {**plain["train"], "epochs": 4}
    with pytest.raises(RunRefused, match="trials of 2 epochs, and would be with 4 epochs"):
        tune(Recipe.parse(plain), show=lambda event: None)
    assert storage.read_json(f"{whole['run']}/result.json") == whole


@pytest.mark.slow
def test_a_trial_whose_process_dies_fails_alone_and_says_why(home: Path, ray_local: None) -> None:
    plain = sweep(home, "killed", {RATE: {"grid": [1e-4, 3e-3]}}, sampler="grid")
    plain["train"] |= {"epochs": 20}
    plain["failure"] = {"max_retries": 0}
    killed: list[int] = []

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "trial" and event["trial"] == 0 and event["value"] is not None and not killed:
            state = storage.read_json(f"{trials.folder_of(str(home / 'runs' / 'killed'), 0)}/run.json")
            killed.append(state["pid"])
            os.kill(state["pid"], signal.SIGKILL)

    result = tune(Recipe.parse(plain), show=show)
    assert result["trials"] == {"finished": 1, "stopped": 0, "failed": 1, "waiting": 0}
    assert result["best"]["trial"] == 1
    assert "process" in table(result["run"])[0]["error"]


@pytest.mark.slow
def test_trials_of_several_workers_leave_nothing_reserved(home: Path, ray_local: None) -> None:
    import ray

    plain = sweep(home, "nested", {RATE: {"log_uniform": [1e-6, 1e-2]}}, sampler="random", scheduler="asha", trials=3)
    plain["cluster"]["workers"] = 2
    free = ray.available_resources()["CPU"]
    result = tune(Recipe.parse(plain), show=lambda event: None)
    assert sum(result["trials"].values()) == 3
    assert result["trials"]["failed"] == 0
    assert "test_accuracy" in result["metrics"]
    wait(lambda: ray.available_resources()["CPU"] == free)
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}


def wait(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_recipe_without_a_search_is_refused(tmp_path: Path) -> None:
    plain = small.recipe(tmp_path, "nowhere")
    with pytest.raises(RunRefused, match="no `tune` section"):
        tune(Recipe.parse(plain), show=lambda event: None)


def test_a_logger_that_is_not_installed_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plain = small.recipe(tmp_path, "nowhere")
    plain["tune"] = {"search": {RATE: {"choice": [1.0]}}, "trials": 1, "log_to": ["mlflow"]}
    with pytest.raises(RunRefused, match="the package mlflow is not installed; `pip install mlflow`"):
        tune(Recipe.parse(plain), show=lambda event: None)
    assert not Path(plain["storage"]).exists()


def test_known_trials_are_read_from_their_folders(tmp_path: Path) -> None:
    home = str(tmp_path)
    for number in range(4):
        trials.propose(home, number, {RATE: 10.0**-number})
    known = trials.known(home)
    trials.end(known[0], "finished", {"best": 0.5, "rows": 100, "seconds": 2.0, "scores": {"eval_accuracy": 0.5}}, "m")
    trials.end(known[1], "stopped", {"best": 0.7, "rows": 50}, "m")
    trials.end(known[2], "failed", {"error": "the loss of step 3 was NaN"}, "m")
    storage.write_json(f"{home}/trials/00003/result.json", {"status": "stopped", "error": "stopped by Ctrl-C"})
    again = trials.known(home)
    assert [trial.status for trial in again] == ["finished", "stopped", None, None]
    assert [trial.value for trial in again[:2]] == [0.5, 0.7]
    best = trials.best_of(again, maximize=True)
    assert best is not None
    assert best.number == 1
    worst = trials.best_of(again, maximize=False)
    assert worst is not None
    assert worst.number == 0
    trials.write_table(home, known)
    assert [row["error"] for row in table(home)][2] == "the loss of step 3 was NaN"


@pytest.mark.slow
def test_a_budget_that_is_used_up_is_told_and_the_same_command_goes_on_from_the_checkpoints(
    home: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {RATE: {"grid": [1e-4, 1e-3, 3e-3]}}
    plain = sweep(home, "budget", search, sampler="grid", budget={"minutes": 60})
    plain["train"] = {**plain["train"], "epochs": None, "max_steps": 2000, "evaluate_every": "1 epoch"}
    monkeypatch.setattr(tune_module.room, "at_once", lambda recipe: 1)
    monkeypatch.setattr(tune_module.Sweep, "_late", lambda self: bool(evaluated))
    evaluated: list[int] = []

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "trial" and event["value"] is not None:
            evaluated.append(event["trial"])

    result = tune(Recipe.parse(plain), show=show)
    assert result["trials"] == {"finished": 0, "stopped": 0, "failed": 0, "waiting": 1}
    assert result["why"] == "tune.budget of 60 minutes is used up: 1 trial waits, 2 trials were not begun"
    assert f"{result['why']}; the same command goes on" in sweep_lines(result)
    first = trials.folder_of(result["run"], 0)
    state = storage.read_json(f"{first}/run.json")
    assert state["status"] == "stopped"
    newest = checkpoints.newest(f"{first}/checkpoints")
    steps = [row["step"] for row in small.metrics(Path(first)) if "loss" in row]
    assert newest is not None
    assert checkpoints.step_of(newest) == steps[-1]
    shown = overview.sweep(Files(), result["run"])
    assert (shown["counts"]["waiting"], shown["why"], shown["planned"]) == (1, result["why"], 3)
    assert report.show(result["run"])["why"] == result["why"]
    evaluated.clear()
    tune(Recipe.parse(plain), show=show)
    assert len(small.losses(Path(first))) > len(steps)  # each once


def test_a_budget_that_ends_before_any_evaluation_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep: Any = object.__new__(tune_module.Sweep)
    sweep.roster = SimpleNamespace(read=lambda: None, delete_unwanted=lambda again: None, ended=[])
    sweep.record, sweep.stop = SimpleNamespace(superseded=None), SimpleNamespace(asked=lambda: None)
    sweep.tune, sweep.over_at = SimpleNamespace(budget=SimpleNamespace(minutes=2.0)), time.time() - 1
    monkeypatch.setattr(sweep, "run_trials", lambda: None)
    monkeypatch.setattr(sweep, "write", lambda: None)
    with pytest.raises(TrainingError, match=r"no trial was evaluated within tune\.budget of 2 minutes; a larger one"):
        sweep.run()
