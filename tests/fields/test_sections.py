"""The options of a recipe that say what is trained: their defaults and what each takes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from rayft.fields import sections
from rayft.fields.sections import Data, EarlyStopping, Every, Lora, Model, Train


@pytest.mark.parametrize(
    ("section", "defaults"),
    [
        (
            Model(path="m"),
            {
                "path": "m",
                "revision": None,
                "dtype": "float32",
                "freeze": None,
                "unfreeze_every": None,
                "cache_frozen": "auto",
                "lora": None,
                "quantize": None,
                "dropout": None,
                "attention": None,
                "batch_norm_rows": None,
                "gradient_checkpointing": False,
                "compile": False,
                "trust_remote_code": False,
            },
        ),
        (
            Data.model_validate({"train": "a.csv"}),
            {
                "train": [{"path": "a.csv", "where": {}, "weight": 1.0}],
                "validation": None,
                "test": None,
                "columns": {},
                "shuffle": True,
                "group_by_length": True,
                "on_bad_row": "error",
                "stream": "auto",
            },
        ),
        (
            Train(),
            {
                "epochs": None,
                "max_steps": None,
                "global_batch_size": 32,
                "micro_batch_size": 16,
                "learning_rate": 5e-5,
                "layer_lr_decay": 1.0,
                "schedule": "linear",
                "warmup": 0.0,
                "weight_decay": 0.01,
                "max_grad_norm": 1.0,
                "label_smoothing": 0.0,
                "evaluate_every": "1 epoch",
                "save_every": "1 epoch",
                "early_stopping": None,
                "metric": None,
                "seed": 0,
            },
        ),
        (Lora(), {"r": 8, "alpha": 16, "dropout": 0.0, "targets": None}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseModel) else "",
)
def test_defaults_are_those_of_the_design(section: BaseModel, defaults: dict[str, Any]) -> None:
    assert section.model_dump(mode="json") == defaults


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (0, {"layers": 0, "patterns": []}),
        (3, {"layers": 3, "patterns": []}),
        ("all", {"layers": "all", "patterns": []}),
        ("*.attention.*", {"layers": 0, "patterns": ["*.attention.*"]}),
        (["a.*", "b.*"], {"layers": 0, "patterns": ["a.*", "b.*"]}),
        ({"layers": 2}, {"layers": 2, "patterns": []}),
        ({"layers": 1, "patterns": "a"}, {"layers": 1, "patterns": ["a"]}),
        (None, None),
    ],
)
def test_freeze_may_be_written_short(given: Any, kept: Any) -> None:
    assert Model.model_validate({"path": "m", "freeze": given}).model_dump(mode="json")["freeze"] == kept


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        ("a.csv", ["a.csv"]),
        (["a.csv", "s3://b/c"], ["a.csv", "s3://b/c"]),
        ({"path": "a.csv", "where": {"accent": "german", "n": [1, 2.5, True, None]}, "weight": 2}, ["a.csv"]),
        ([{"path": "a.csv"}, "b.csv"], ["a.csv", "b.csv"]),
    ],
)
def test_sources_may_be_written_short(given: Any, paths: list[str]) -> None:
    assert [source.path for source in Data.model_validate({"train": given}).train] == paths


def test_where_keeps_the_types_of_its_values() -> None:
    where = {"a": 1, "b": 1.0, "c": True, "d": "1", "e": None, "f": [1, True, 2.0, "x"]}
    data = Data.model_validate({"train": {"path": "p", "where": where}})
    kept = data.model_dump(mode="json")["train"][0]["where"]
    assert [(name, repr(value)) for name, value in kept.items()] == [
        (name, repr(value)) for name, value in where.items()
    ]


@pytest.mark.parametrize(
    ("text", "count", "unit", "written"),
    [
        ("1 epoch", 1, "epoch", "1 epoch"),
        ("2 epochs", 2, "epoch", "2 epochs"),
        ("0.5 epochs", 0.5, "epoch", "0.5 epochs"),
        ("500 steps", 500, "steps", "500 steps"),
        ("1 step", 1, "steps", "1 step"),
        ("1234567steps", 1234567, "steps", "1234567 steps"),
        ("10 minutes", 10, "minutes", "10 minutes"),
    ],
)
def test_intervals_are_read_and_written(text: str, count: float, unit: str, written: str) -> None:
    every = Train.model_validate({"save_every": text}).save_every
    assert (every.count, every.unit, str(every)) == (count, unit, written)
    assert Train.model_validate({"save_every": written}).save_every == every


@pytest.mark.parametrize("text", ["3 hours", "10 minutes", "steps", "0 steps", "1.5 steps", "-1 epoch", 3, None, ""])
def test_evaluation_comes_by_epochs_or_steps_only(text: Any) -> None:
    with pytest.raises(ValidationError):
        Train.model_validate({"evaluate_every": text})


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (8, 8), (16, 16), (17, 16), (64, 16)])
def test_the_micro_batch_is_no_larger_than_the_batch_by_default(size: int, micro: int) -> None:
    assert Train(global_batch_size=size).micro_batch_size == micro


@pytest.mark.parametrize(("given", "kept"), [(0.1, 0.1), (0, 0), (100, 100), (1, 1)])
def test_warmup_is_a_share_or_a_number_of_steps(given: float, kept: float) -> None:
    warmup = Train.model_validate({"warmup": given}).warmup
    assert warmup == kept
    assert type(warmup) is type(given)


@pytest.mark.parametrize("given", [1.0, 1.5, -0.1, -1, True, "0.1", float("nan")])
def test_other_warmups_are_refused(given: Any) -> None:
    with pytest.raises(ValidationError):
        Train.model_validate({"warmup": given})


@pytest.mark.parametrize("given", ["accuracy", "eval_accuracy"])
def test_metrics_are_kept_with_their_prefix(given: str) -> None:
    assert EarlyStopping(metric=given, patience=2).metric == "eval_accuracy"


def test_test_scores_choose_nothing() -> None:
    with pytest.raises(ValidationError, match="a test score"):
        EarlyStopping(metric="test_accuracy", patience=2)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("Train", "epochs", True),
        ("Train", "epochs", "3"),
        ("Train", "epochs", 3.0),
        ("Train", "epochs", 0),
        ("Train", "learning_rate", "1e-4"),
        ("Train", "learning_rate", 0),
        ("Train", "learning_rate", float("inf")),
        ("Train", "learning_rate", True),
        ("Train", "layer_lr_decay", 1.1),
        ("Train", "seed", -1),
        ("Train", "schedule", "poly"),
        ("Lora", "r", 0),
        ("Lora", "dropout", 1.0),
    ],
)
def test_values_are_not_bent_to_fit(section: str, field: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        getattr(sections, section).model_validate({field: value})


@pytest.mark.parametrize("path", ["org/model", "./folder", "s3://bucket/model", "pkg:package/model", "pkg:a.b/c/d"])
def test_models_come_from_many_places(path: str) -> None:
    assert Model(path=path).path == path


@pytest.mark.parametrize("path", ["", "pkg:package", "pkg:/model", "pkg:package/", "pkg:a-b/model"])
def test_a_model_path_that_leads_nowhere_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        Model(path=path)


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Every(count=1, unit="epoch").count = 2  # type: ignore[misc]
