"""The `tune:` section: its search spaces, and that its fields and values exist in the recipe."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.errors import RecipeError
from rayft.recipe import Recipe

FREE = ("train.weight_decay", "train.warmup", "train.label_smoothing")  # that go with everything


def tuned(search: dict[str, Any], validation: str | None = "v.csv", **fields: Any) -> Recipe:
    return Recipe.parse(
        {
            "name": "n",
            "task": {"type": "text-classification"},
            "model": {"path": "m"},
            "data": {"train": "a.csv", "validation": validation},
            "train": {"epochs": 1},
            "tune": {"search": search, "trials": 4, **fields},
        }
    )


def test_a_sweep_of_the_design_is_read() -> None:
    recipe = tuned(
        {"train.learning_rate": {"log_uniform": [1e-5, 1e-3]}, "model.freeze.layers": {"choice": [0, 2, "all"]}},
        metric="accuracy",
        mode="max",
        budget={"minutes": 5},
    )
    assert recipe.tune is not None
    assert recipe.tune.model_dump(mode="json") == {
        "search": {
            "train.learning_rate": {"log_uniform": [1e-5, 1e-3]},
            "model.freeze.layers": {"choice": [0, 2, "all"]},
        },
        "trials": 4,
        "sampler": "optuna",
        "scheduler": "asha",
        "metric": "eval_accuracy",
        "mode": "max",
        "budget": {"minutes": 5},
        "log_to": [],
        "seed": 0,
    }
    assert recipe.tune.search["train.learning_rate"].values() == (1e-5, 1e-3)
    assert Recipe.parse(recipe.dump()) == recipe


@pytest.mark.parametrize(
    "search",
    [
        {"task.max_length": {"choice": [64, 128]}},
        {"model.freeze": {"choice": [0, "all", ["a.*"], None]}},
        {"model.lora.r": {"choice": [4, 8]}},
        {"deepspeed.extra.reduce_bucket_size": {"choice": [100]}},
        {"train.warmup": {"uniform": [0.0, 0.5]}},
        {"data.train": {"choice": ["a.csv", ["b.csv", "c.csv"]]}},
    ],
)
def test_any_field_that_changes_the_training_may_vary(search: dict[str, Any]) -> None:
    tuned(search)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"train.learning_rat": {"choice": [1]}}, "no such field in this recipe; a dotted name such as"),
        ({"train.learning_rat": {"choice": [1]}}, "did you mean `train.learning_rate`?"),
        ({"learning_rate": {"choice": [1]}}, "did you mean `train.learning_rate`?"),
        ({"task.max_lenght": {"choice": [1]}}, "did you mean `task.max_length`?"),
        ({"name": {"choice": ["a"]}}, "not a field that trials can differ in"),
        ({"tune.trials": {"choice": [3]}}, "not a field that trials can differ in"),
        ({"cluster.workers": {"choice": [1, 2]}}, "not a field that trials can differ in"),
        ({"train.seed": {}}, "tune.search.train.seed: not one search space"),
        ({"train.seed": {"choice": [1], "uniform": [0, 1]}}, "not one search space"),
        ({"train.seed": {"chioce": [1]}}, "tune.search.train.seed.chioce: unknown key, got [1]; did you mean"),
        ({"train.learning_rate": {"log_uniform": [0, 1]}}, "too small, got 0; a number above 0 fits"),
        ({"train.learning_rate": {"uniform": [0.2, 0.1]}}, "bounds in the wrong order"),
        ({"train.learning_rate": {"uniform": [0.2]}}, "tune.search.train.learning_rate.uniform.1: missing"),
        ({"train.learning_rate": {"choice": [1e-4, "1e-4"]}}, "not a number, got '1e-4'; a number above 0 fits"),
        ({"task.max_length": {"choice": [1, 64]}}, "tune.search.task.max_length: too small, got 1"),
        ({"model.freeze.layers": {"choice": [2, "most"]}}, "tune.search.model.freeze.layers: not a value that fits"),
        ({"train.learning_rate": {"uniform": [-1.0, 1.0]}}, "tune.search.train.learning_rate: too small, got -1.0"),
        ({}, "tune.search: too few entries"),
    ],
)
def test_fields_and_values_that_do_not_exist_are_refused(search: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tuned(search)
    assert said in str(caught.value)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("data.validation", "scores of the same rows are compared, and `data.train` fits"),
        ("data", "scores of the same rows are compared, and `data.train` fits"),
        ("data.train", "beside a `data.validation` it fits: else each trial is scored on a tenth of its own rows"),
        ("train.metric", "`tune.metric` says by which score trials are compared"),
    ],
)
def test_trials_whose_scores_could_not_be_compared_are_refused(name: str, fits: str) -> None:
    value: Any = {"train": "b.csv"} if name == "data" else "eval_loss" if name == "train.metric" else "b.csv"
    with pytest.raises(RecipeError) as caught:
        tuned({name: {"choice": [value]}}, validation=None)
    assert [str(fault) for fault in caught.value.faults] == [
        f"tune.search.{name}: not a field that trials can differ in; {fits}"
    ]


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"model.dtype": {"choice": ["float16", "float32"]}}, "float16 needs GPUs, got 'float16'; `float32` or"),
        ({"train.epochs": {"choice": [None, 1]}}, "train.epochs: missing, got null"),
        (
            {"deepspeed.offload": {"choice": ["none", "parameters"]}, "deepspeed.zero_stage": {"choice": [0, 1]}},
            "with it deepspeed.zero_stage is too low for `deepspeed.offload: parameters`, got 'parameters'",
        ),
    ],
)
def test_a_value_that_goes_with_no_other_is_refused_before_a_trial_has_it(search: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tuned(search, sampler="random")
    assert said in str(caught.value)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    "search",
    [
        {"deepspeed.offload": {"choice": ["none", "parameters"]}, "deepspeed.zero_stage": {"choice": [0, 3]}},
        {"model.freeze.layers": {"choice": [0, 2]}, "model.unfreeze_every": {"choice": [None, 1]}},
        {"train.global_batch_size": {"choice": [8, 64]}},
        # The one that fits is far behind in the order of combinations.
        {
            "deepspeed.zero_stage": {"grid": [0, 2]},
            **{name: {"grid": [0.1, 0.2, 0.3, 0.4]} for name in FREE},
            "deepspeed.offload": {"grid": ["none", "optimizer"]},
        },
        {
            "deepspeed.zero_stage": {"grid": [0, 2]},
            **{name: {"grid": [0.1 * n for n in range(1, 10)]} for name in FREE},
            "deepspeed.offload": {"grid": ["none", "optimizer"]},
        },
    ],
)
def test_a_value_that_goes_with_some_other_is_not(search: dict[str, Any]) -> None:
    tuned(search, sampler="random")
