"""Between a sweep and Ray Tune: the schedulers hear of trials that ended before, and numbers survive copied configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from rayft import storage
from rayft.fields.search import Tune
from rayft.sweeps import scheduling, trials
from rayft.sweeps.roster import Roster
from rayft.sweeps.sampling import readable
from rayft.sweeps.trial import number_of

METRIC = "eval_accuracy"


def sweep(home: Path, scheduler: str, scores: list[list[float]]) -> Any:
    """A sweep of 100 rows an epoch, whose trials ended with these scores, an epoch after the other."""
    for number, found in enumerate(scores):
        trials.propose(str(home), number, {"train.learning_rate": 10.0**-number})
        folder = Path(trials.folder_of(str(home), number))
        rows = [{"step": epoch + 1, "epoch": epoch + 1.0, METRIC: score} for epoch, score in enumerate(found)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = trials.known(str(home))
    for trial, found in zip(known, scores, strict=True):
        trials.end(trial, "finished", {"best": max(found), "rows": 100 * len(found)}, METRIC)
    chunks = [{"row_groups": [100], "rows": 100, "bytes": 1000, "path": "a"}]
    manifest = SimpleNamespace(source_rows=100, shards=chunks)
    from rayft.recipe import Recipe

    plain = {
        "name": "s",
        "task": {"type": "text-classification"},
        "model": {"path": "m"},
        "data": {"train": "t.csv"},
        "train": {"epochs": 9, "global_batch_size": 10, "micro_batch_size": 10},
    }
    tune = Tune.model_validate(
        {
            "search": {"train.learning_rate": {"choice": [1.0]}},
            "sampler": "random",
            "trials": 20,
            "scheduler": scheduler,
        }
    )
    roster = Roster(str(home), tune, METRIC, True, 100, lambda event: None)
    return SimpleNamespace(
        tune=tune, maximize=True, metric=METRIC, roster=roster, recipe=Recipe.parse(plain),
        prepared={"train": SimpleNamespace(manifest=manifest)},
    )  # fmt: skip


def decisions(made: TrialScheduler, scores: list[float]) -> list[str]:
    """What the scheduler says of a new trial with these scores, an epoch after the other."""
    stub: Any = scheduling._Stub("new")
    controller: Any = SimpleNamespace(get_live_trials=list)
    made.on_trial_add(controller, stub)
    return [
        made.on_trial_result(controller, stub, {"rows": 100 * (epoch + 1), "value": score})
        for epoch, score in enumerate(scores)
    ]


BEFORE = [[0.5, 0.6, 0.7], [0.6, 0.7, 0.8], [0.55, 0.6, 0.65]]


def test_the_median_rule_that_starts_again_has_heard_of_the_trials_before(tmp_path: Path) -> None:
    made = scheduling.scheduler(sweep(tmp_path / "a", "median", BEFORE))
    assert decisions(made, [0.1])[-1] == TrialScheduler.STOP
    made = scheduling.scheduler(sweep(tmp_path / "b", "median", BEFORE))
    assert decisions(made, [0.9]) == [TrialScheduler.CONTINUE]
    fresh = scheduling.scheduler(sweep(tmp_path / "c", "median", []))
    assert decisions(fresh, [0.1]) == [TrialScheduler.CONTINUE]


def halving(of: Any) -> Any:
    of.roster.rungs = scheduling.rungs(of)
    return scheduling.scheduler(of)


def arrives(made: Any, number: int, score: float) -> str:
    """What is decided of a trial with that score after its first epoch."""
    tried: Any = SimpleNamespace(config={"number": number}, trial_id=f"of-{number}")
    return str(made.on_trial_result(None, tried, {"rows": 100, "value": score}))


def test_asha_that_starts_again_has_heard_of_the_trials_before(tmp_path: Path) -> None:
    assert arrives(halving(sweep(tmp_path / "a", "asha", BEFORE)), 3, 0.58) == TrialScheduler.PAUSE
    assert arrives(halving(sweep(tmp_path / "b", "asha", BEFORE)), 3, 0.9) == TrialScheduler.CONTINUE
    assert arrives(halving(sweep(tmp_path / "c", "asha", [])), 0, 0.9) == TrialScheduler.PAUSE  # alone it waits


def test_a_trial_that_waited_goes_on_when_it_is_among_the_best_third(tmp_path: Path) -> None:
    of = sweep(tmp_path, "asha", [])
    made, roster = halving(of), of.roster
    last = {"best": 0.5, "value": 0.5, "rows": 100, "step": 10, "scores": {METRIC: 0.5}, "seconds": 2.0}
    for number, score in enumerate((0.3, 0.5, 0.4)):
        assert roster.propose() == (number, {"train.learning_rate": 1.0})
        assert arrives(made, number, score) == TrialScheduler.PAUSE
        roster.wait(number, last | {"best": score, "value": score})
    assert roster.waiting == [0, 1, 2]
    assert roster.propose() == (1, {"train.learning_rate": 1.0})
    assert roster.propose() == (3, {"train.learning_rate": 1.0})
    assert roster.best.number == 1
    roster.wait(1, last | {"best": 0.7, "seconds": 3.0})
    assert (roster.known[1].seconds, roster.known[1].value) == (5.0, 0.7)  # of both times


def test_while_an_unfinished_trial_leads_the_best_that_has_ended_keeps_its_checkpoints(tmp_path: Path) -> None:
    """Where the leader then fails, that one is the sweep's answer."""
    roster = sweep(tmp_path, "none", []).roster
    scores = (0.8, 0.9, 0.95)
    for number in range(3):
        roster.propose()
        (Path(roster.known[number].folder) / "checkpoints").mkdir()
    roster.wait(2, {"best": scores[2], "value": scores[2], "rows": 100, "step": 10, "scores": {}})
    for number in (0, 1):
        roster.end(number, "finished", {"best": scores[number], "rows": 900})
    assert roster.best.number == 2
    roster.end(2, "failed", {"error": "the loss was NaN"})
    roster.delete_unwanted(again=True)
    assert roster.best.number == 1
    kept = [number for number in range(3) if (Path(roster.known[number].folder) / "checkpoints").exists()]
    assert kept == [1]


def stands(of: Any, number: int, best: float | None) -> None:
    """The newest checkpoint of a trial that waits: of another's weights where it has no best model yet."""
    path = f"{of.roster.known[number].folder}/checkpoints/step-000001-a1"
    saved = None if best is None else {"step": 1, "metric": METRIC, "value": best, "checkpoint": path, "scores": {}}
    storage.write_json(f"{path}/state.json", {"step": 1, "best": saved})
    storage.commit(path, {"step": 1, "world": 1, "best": None})


def test_a_trial_with_anothers_weights_has_no_score_until_it_is_evaluated_with_them(tmp_path: Path) -> None:
    of = sweep(tmp_path, "pbt", [])
    for number, score in enumerate((0.9, 0.4)):
        of.roster.propose()
        path = Path(of.roster.known[number].folder, "metrics.jsonl")
        path.write_text(json.dumps({"step": 1, "epoch": 1.0, METRIC: score}) + "\n")
        stands(of, number, score)
    of.roster.running.clear()
    of.roster.read()
    assert (of.roster.best.number, of.roster.best.value) == (0, 0.9)
    stands(of, 0, None)
    of.roster.read()
    assert (of.roster.best.number, of.roster.best.value) == (1, 0.4)
    assert of.roster.known[0].value is None
    Path(of.roster.known[1].folder, "checkpoints/step-000001-a1/state.json").write_text("{")
    of.roster.read()
    assert of.roster.best is None


def test_one_trial_comes_to_its_end_where_no_third_is_left(tmp_path: Path) -> None:
    of = sweep(tmp_path, "asha", [])
    of.roster.total = 2
    made = halving(of)
    last = {"best": 0.5, "value": 0.5, "rows": 100, "step": 10, "scores": {}, "seconds": 2.0}
    for number in range(2):
        of.roster.propose()
        arrives(made, number, 0.1 * number)
    of.roster.wait(0, last)
    assert of.roster.propose() is None  # the other one runs
    of.roster.wait(1, last)
    assert of.roster.propose() == (1, {"train.learning_rate": 1.0})


def test_a_trials_number_follows_from_tunes_own_where_configs_are_copied() -> None:
    assert number_of({"number": 7, "fields": {}}, "8bc0d_00003") == 7
    assert number_of({"place": 0, "numbers": [4, 5, 9], "fields": {}}, "8bc0d_00002") == 9


def test_a_trial_whose_folder_was_deleted_is_begun_again_and_no_other_is(tmp_path: Path) -> None:
    made = sweep(tmp_path, "none", BEFORE)
    shutil.rmtree(made.roster.known[1].folder)
    again = Roster(made.roster.folder, made.tune, METRIC, True, 100, lambda event: None)
    proposed = [again.propose() for _ in range(3)]
    assert [found[0] for found in proposed if found] == [1, 3, 4]
    assert [trial.number for trial in again.ended] == [0, 2]


def tried(number: int, trial_id: str = "a", **more: Any) -> Any:
    """One of Tune's trials that runs."""
    config = {"number": number, "fields": {"train.learning_rate": 1.0}}
    return SimpleNamespace(trial_id=trial_id, status="RUNNING", config=config, last_result={}, **more)


def test_trials_that_run_are_asked_to_leave_before_the_sweep_ends(tmp_path: Path) -> None:
    of = sweep(tmp_path, "none", [])
    of.folder, of.asked, of.record = str(tmp_path), lambda: False, SimpleNamespace(superseded=None)
    watcher = scheduling.Watcher(of)
    asked, proposals = scheduling.Asked(of, watcher), scheduling.Proposals(of)
    runs, paused = (tried(proposals.suggest("")["number"], trial_id) for trial_id in ("a", "b"))
    for one in (runs, paused):
        watcher.on_trial_start(0, [], one)
    paused.status = "PAUSED"
    assert not asked.stop_all()
    of.asked = lambda: True
    assert not asked.stop_all()
    assert [path.parent.name for path in tmp_path.glob("trials/*/stop.json")] == ["00000"]
    assert proposals.suggest("") == "FINISHED"
    runs.last_result = {"rows": 10, "done": True}
    watcher.on_trial_complete(0, [], runs)
    assert asked.stop_all()
    assert not of.roster.ended  # they go on with the sweep
    watcher.on_trial_start(0, [], runs)
    of.recipe = SimpleNamespace(failure=SimpleNamespace(grace_s=0))
    late = scheduling.Asked(of, watcher)
    assert not late.stop_all()
    assert late.stop_all()  # which did not leave in time
    of.record.superseded = "by somebody"
    assert scheduling.Asked(of, watcher).stop_all()


def test_population_based_training_stays_in_the_search_space_and_draws_by_the_seed(tmp_path: Path) -> None:
    search = {
        "train.learning_rate": {"log_uniform": [1e-4, 1e-1]},
        "train.label_smoothing": {"uniform": [0.5, 0.95]},
        "model.freeze.layers": {"int": [1, 4]},
        "train.schedule": {"choice": ["linear", "cosine"]},
    }
    of = sweep(tmp_path, "pbt", [])
    of.tune = Tune.model_validate({"search": search, "sampler": "random", "trials": 4, "scheduler": "pbt", "seed": 3})
    config = {"fields": {"train.learning_rate": 0.09, "train.label_smoothing": 0.92, "model.freeze.layers": 4}}
    config["fields"]["train.schedule"] = "cosine"
    tried = SimpleNamespace(config=config)

    def explored() -> list[dict[str, Any]]:
        made: Any = scheduling.scheduler(of)
        return [made._get_new_config(None, tried)[0]["fields"] for _ in range(40)]

    found = explored()
    for fields in found:
        assert 1e-4 <= fields["train.learning_rate"] <= 1e-1
        assert fields["train.learning_rate"] == readable(fields["train.learning_rate"])
        assert 0.5 <= fields["train.label_smoothing"] <= 0.95
        assert fields["model.freeze.layers"] in (1, 2, 3, 4)
        assert fields["train.schedule"] in ("linear", "cosine")
    assert len({fields["train.label_smoothing"] for fields in found}) > 2
    assert explored() == found


def test_a_trials_seconds_are_those_of_all_times_that_it_has_gone_on(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    of = sweep(tmp_path, "none", [])
    of.roster.show = said.append
    watcher, one = scheduling.Watcher(of), tried(of.roster.propose()[0])
    last = {"value": 0.5, "best": 0.5, "rows": 100, "step": 10, "scores": {METRIC: 0.5}, "saved_s": 1.0}
    for seconds in (2.0, 5.0, 4.0):
        watcher.on_trial_start(0, [], one)
        watcher.on_trial_result(0, [], one, last | {"seconds": seconds - 1})
        watcher.on_trial_result(0, [], one, last | {"seconds": seconds})
    watcher.on_trial_start(0, [], one)  # and failed before it told anything: its process is started again
    watcher.on_trial_start(0, [], one)
    assert said[-1]["seconds"] == 11.0
    watcher.on_trial_result(0, [], one, last | {"seconds": 3.0})
    one.last_result = last | {"seconds": 3.0, "finished": True}
    of.asked = lambda: False
    watcher.on_trial_complete(0, [], one)
    (trial,) = of.roster.ended
    assert (trial.seconds, trial.saved_s) == (14.0, 4.0)


def test_a_sampler_that_starts_again_has_heard_of_trials_that_wait_by_the_rung_they_have_come_to(
    tmp_path: Path,
) -> None:
    of = sweep(tmp_path, "asha", [[0.5, 0.6, 0.7]])
    for number, scores in ((1, [0.8]), (2, [0.4, 0.9, 0.6, 0.7]), (3, [])):
        trials.propose(str(tmp_path), number, {"train.learning_rate": 1.0})
        rows = [{"step": epoch + 1, "epoch": epoch + 1.0, METRIC: score} for epoch, score in enumerate(scores)]
        path = Path(trials.folder_of(str(tmp_path), number), "metrics.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = Roster(str(tmp_path), of.tune, METRIC, True, 100, lambda event: None)
    of.roster = again
    again.rungs = scheduling.rungs(of)
    heard = {number: (trial.score, trial.came) for number, trial in again.heard.items()}
    assert heard == {0: (0.7, None), 1: (0.8, 0), 2: (0.6, 1)}  # at its end, after 100 and after 300 rows
