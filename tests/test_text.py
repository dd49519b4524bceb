"""Numbers and tables as a reader sees them."""

from __future__ import annotations

from typing import Any

import pytest

from rayft import text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0, "0"),
        (1234567, "1,234,567"),
        (0.0, "0.0000"),
        (0.93125, "0.9313"),
        (-0.5, "-0.5000"),
        (42.61, "42.61"),
        (1240.4, "1,240"),
        (4.2e-5, "4.2e-05"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ("high", "high"),
        (True, "True"),
    ],
)
def test_number(value: Any, shown: str) -> None:
    assert text.number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (384, "384"), (11_000, "11.0 k"), (22_713_986, "22.7 M"), (1.24e9, "1.2 B")]
)
def test_amount(value: float, shown: str) -> None:
    assert text.amount(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0, "0 B"), (999, "999 B"), (2000, "2.0 kB"), (3.14e9, "3.1 GB")])
def test_size(value: float, shown: str) -> None:
    assert text.size(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "-"), (2.44, "2.4 s"), (60, "0:01:00"), (3599.7, "1:00:00"), (360_000, "100:00:00")]
)
def test_duration(seconds: float | None, shown: str) -> None:
    assert text.duration(seconds) == shown


def test_counted() -> None:
    assert [text.counted(count, "step") for count in (0, 1, 2300)] == ["0 steps", "1 step", "2,300 steps"]


def test_scores_of_the_test_come_first_and_losses_last() -> None:
    given = ["eval_loss", "eval_f1", "speed", "test_loss", "test_exact_match", "test_f1"]
    assert text.ordered(given) == ["test_exact_match", "test_f1", "test_loss", "eval_f1", "eval_loss", "speed"]


def test_columns_are_aligned_by_what_they_take_on_the_screen() -> None:
    assert text.aligned([("a", "1"), ("中文", "100")], right={1}) == ["  a       1", "  中文  100"]
    assert text.aligned([]) == []
    assert text.aligned([("a", ""), ("b", "")]) == ["  a", "  b"]


def test_run_reads_from_top_to_bottom() -> None:
    run = {
        "run": "runs/one",
        "status": "failed",
        "error": "a worker was lost",
        "steps": 1200,
        "epochs": 1.5,
        "started": None,
        "seconds": 75.0,
        "checkpoints": ["step-000800-a1", "step-001200-a2"],
        "export": None,
        "metrics": {},
        "evaluations": [
            {"step": 800, "epoch": 1.0, "eval_loss": 0.5, "eval_f1": 0.25},
            {"step": 1200, "epoch": 1.5, "eval_f1": 0.5},
        ],
        "timing": {},
        "warnings": ["the run overfits"],
    }
    assert text.run_lines(run) == [
        "runs/one",
        "  status       failed: a worker was lost",
        "  steps        1,200 (1.5000 epochs)",
        "  started      -, 0:01:15 in the last attempt",
        "  checkpoints  step-000800-a1, step-001200-a2",
        "  model        -",
        "warning: the run overfits",
        "",
        "evaluations",
        "   step  epoch  eval_f1  eval_loss",
        "    800   1.00   0.2500     0.5000",
        "  1,200   1.50   0.5000          -",
    ]


def test_comparison_reads_from_top_to_bottom() -> None:
    runs = [
        {"name": "a", "status": "finished", "steps": 1200, "seconds": 75.0},
        {"name": "longer", "status": "lost", "steps": None, "seconds": None},
    ]
    recipe = {
        "train.learning_rate": [5e-5, 1e-4],
        "data.shuffle": [True, False],
        "model.freeze.layers": [1, 0],
        "model.lora": [None, "x"],
        "data.train": [[{"path": "a.csv", "where": {}, "weight": 1.0}], [{"path": "a.csv", "weight": 2.0}]],
    }
    found = {"runs": runs, "recipe": recipe, "metrics": {"eval_f1": [0.5, None], "test_f1": [0.25, 0.125]}}
    assert text.compare_lines(found) == [
        "          a         longer",
        "  status  finished  lost",
        "  steps   1,200     -",
        "  time    0:01:15   -",
        "",
        "recipe",
        "  train.learning_rate  5e-05    0.0001",
        "  data.shuffle         true     false",
        "  model.freeze.layers  1        0",
        "  model.lora           null     x",
        '  data.train           [a.csv]  [{"path": "a.csv", "weight": 2.0}]',
        "",
        "scores",
        "  test_f1  0.2500  0.1250",
        "  eval_f1  0.5000       -",
    ]
    same = text.compare_lines({"runs": runs, "recipe": {}, "metrics": {}})
    assert same[-1] == "their recipes are the same"


def test_of_a_jobs_output_only_the_error_at_its_end_is_shown() -> None:
    job = dict.fromkeys(("run", "attempt", "step", "epoch", "loss", "metric", "value", "left_s", "started", "seconds"))
    message = "Job entrypoint command failed with exit code 1, last available logs:\nstep 7\nerror: no room left\n\n"
    lines = text.job_lines({**job, "job": "one", "status": "failed", "message": message})
    assert lines[1].split() == ["status", "failed:", "error:", "no", "room", "left"]
    assert text.job_lines({**job, "job": "one", "status": "running", "message": None})[1].split() == [
        "status",
        "running",
    ]


@pytest.mark.parametrize(
    ("status", "seconds", "left", "says"),
    [
        ("running", 33.3, 60.0, "33.3 s so far, 0:01:00 left"),
        ("pending", 33.3, None, "33.3 s so far, - left"),
        *((status, 33.3, None, "it took 33.3 s") for status in ("succeeded", "failed", "stopped")),
    ],
)
def test_a_job_that_has_ended_has_nothing_left(status: str, seconds: float, left: float | None, says: str) -> None:
    job = dict.fromkeys(("run", "attempt", "step", "epoch", "loss", "metric", "value", "started", "message"))
    lines = text.job_lines({**job, "job": "one", "status": status, "seconds": seconds, "left_s": left})
    assert lines[-1].endswith(f"-, {says}")


@pytest.mark.parametrize(
    ("export", "says"),
    [
        ("runs/one/export", 'use it: transformers.pipeline("text-classification", "runs/one/export")'),
        (
            "s3://b/one/export",
            'use it: rayft export s3://b/one FOLDER, then transformers.pipeline("text-classification", "FOLDER")',
        ),
    ],
)
def test_what_is_said_to_load_the_model_can_load_it(export: str, says: str) -> None:
    result = {"status": "finished", "run": export.rpartition("/")[0], "export": export}
    assert text.result_lines({**result, "pipeline": "text-classification"})[-1] == says
