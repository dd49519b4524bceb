"""Combinations of options: each rule with a case that it refuses and one that it lets pass."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.document import set_field
from rayft.errors import RecipeError
from rayft.fields import rules
from rayft.recipe import Recipe
from rayft.tasks import find

SOUND: dict[str, Any] = {
    "name": "n",
    "task": {"type": "text-classification"},
    "model": {"path": "m"},
    "data": {"train": "a.csv"},
    "train": {"epochs": 1},
}


def recipe_with(fields: dict[str, Any]) -> dict[str, Any]:
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in SOUND.items()}
    for name, value in fields.items():
        set_field(data, name, value)
    return data


COUPLED = {"type": "sentence-embedding"}  # groups of 16 rows

QUANTIZED = {"model.quantize": "4bit", "model.lora": {}, "cluster.gpus_per_worker": 1}
SIGNATURES = ("sig", "Signature", "X-Amz-Signature", "X-Goog-Signature", "x-amz-security-token", "q-signature")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train.epochs": None}, "train.epochs"),
    ({"train.micro_batch_size": 64}, "train.micro_batch_size"),
    ({"cluster.workers": 33}, "cluster.workers"),
    ({"cluster.workers": {"min": 1, "max": 33}}, "cluster.workers.max"),
    ({"cluster.workers": {"min": 3, "max": 2}}, "cluster.workers.min"),
    ({"task": COUPLED, "train.global_batch_size": 40}, "train.global_batch_size"),
    ({"task": COUPLED, "train.global_batch_size": 8}, "train.global_batch_size"),
    ({"task": COUPLED, "train.micro_batch_size": 15}, "train.micro_batch_size"),
    ({"task": COUPLED, "cluster.workers": 3}, "cluster.workers"),
    ({"model.batch_norm_rows": 12}, "train.global_batch_size"),
    ({"model.batch_norm_rows": 32, "cluster.workers": 1}, "train.micro_batch_size"),
    ({"model.batch_norm_rows": 16, "cluster.workers": 3}, "cluster.workers"),
    ({"task": {**COUPLED, "group_size": 4}, "model.batch_norm_rows": 6}, "train.global_batch_size"),
    ({"task": COUPLED, "cluster.workers": {"min": 1, "max": 3}}, "cluster.workers.max"),
    ({"model.lora": {}, "model.freeze": ["a.*"]}, "model.freeze.patterns"),
    ({"model.lora": {}, "model.unfreeze_every": 1}, "model.unfreeze_every"),
    ({"model.unfreeze_every": 1}, "model.unfreeze_every"),
    ({"model.unfreeze_every": 1, "model.freeze": 0}, "model.unfreeze_every"),
    ({"model.unfreeze_every": 1, "model.freeze": ["a.*"]}, "model.unfreeze_every"),
    ({"model.unfreeze_every": 1, "model.freeze": 2, "model.cache_frozen": "on"}, "model.cache_frozen"),
    ({"model.cache_frozen": "on"}, "model.cache_frozen"),
    ({"model.cache_frozen": "on", "model.freeze": 2, "model.compile": True}, "model.cache_frozen"),
    ({"model.cache_frozen": "on", "model.freeze": 2, "task": {"type": "masked-lm"}}, "model.cache_frozen"),
    ({"model.cache_frozen": "on", "model.freeze": 2, "task": COUPLED}, "model.cache_frozen"),
    ({"model.quantize": "4bit", "cluster.gpus_per_worker": 1}, "model.quantize"),
    ({"model.quantize": "4bit", "model.lora": {}}, "model.quantize"),
    ({**QUANTIZED, "deepspeed.zero_stage": 3}, "deepspeed.zero_stage"),
    ({**QUANTIZED, "deepspeed.offload": "parameters"}, "deepspeed.offload"),
    ({**QUANTIZED, "tune": {"search": {"train.seed": {"choice": [1]}}, "trials": 1}}, "model.quantize"),
    ({"data.validation": ["v.csv", {"path": "w.csv", "weight": 2}]}, "data.validation"),
    ({"task": {"type": "sequence-regression"}, "train.label_smoothing": 0.1}, "train.label_smoothing"),
    ({"task": {"type": "text-to-image"}, "train.label_smoothing": 0.1}, "train.label_smoothing"),
    (
        {
            "task": {"type": "sequence-regression"},
            "tune": {"search": {"train.label_smoothing": {"choice": [0.0, 0.1]}}, "trials": 2},
        },
        "tune.search.train.label_smoothing",
    ),
    ({"deepspeed.offload": "parameters", "deepspeed.zero_stage": 2}, "deepspeed.zero_stage"),
    ({"deepspeed.offload": "optimizer", "deepspeed.zero_stage": 0}, "deepspeed.zero_stage"),
    ({"model.compile": True, "deepspeed.zero_stage": 3}, "deepspeed.zero_stage"),
    ({"model.compile": True, "deepspeed.offload": "parameters"}, "deepspeed.offload"),
    *(({f"deepspeed.extra.{key}": {}}, f"deepspeed.extra.{key}") for key in rules.OWNED),
    ({"model.dtype": "float16"}, "model.dtype"),
    ({"model.attention": "flash_attention_2"}, "model.attention"),
    ({"model.attention": "flash_attention_2", "cluster.gpus_per_worker": 1}, "model.attention"),
    ({"cluster.gpus_per_worker": 2}, "cluster.gpus_per_worker"),
    ({"data.columns": {"a": "text", "b": "text"}}, "data.columns.b"),
    ({"storage": "s3://key:secret@bucket"}, "storage"),
    ({"model.path": "https://me@host/m"}, "model.path"),
    ({"data.test": ["t.csv", "s3://key:secret@bucket/t.csv"]}, "data.test"),
    *(({"data.train": f"https://host/a.csv?v=1&{name}=secret"}, "data.train") for name in SIGNATURES),
    ({"tune": {"search": {"train.seed": {"choice": [1]}}}}, "tune.trials"),
    ({"train.metric": "matthew"}, "train.metric"),
    ({"train.early_stopping": {"metric": "eval_f1", "patience": 1}}, "train.early_stopping.metric"),
    ({"tune": {"search": {"train.seed": {"choice": [1]}}, "trials": 1, "metric": "f1_micro"}}, "tune.metric"),
    (
        {"tune": {"search": {"train.learning_rate": {"uniform": [0.1, 0.2]}}, "sampler": "grid"}},
        "tune.search.train.learning_rate",
    ),
    ({"tune": {"search": {"train.seed": {"grid": [1]}}, "trials": 2}}, "tune.search.train.seed"),
    (
        {
            "tune": {"search": {"model.freeze.layers": {"choice": [1]}}, "trials": 2, "scheduler": "pbt"},
        },
        "tune.search.model.freeze.layers",
    ),
]

PASSED: list[dict[str, Any]] = [
    {**QUANTIZED, "deepspeed.zero_stage": 2, "deepspeed.offload": "optimizer"},
    {"data.train": [{"path": "a.csv", "weight": 2}, {"path": "b.csv", "weight": 0.5}]},
    {},
    {"train.epochs": None, "train.max_steps": 10},
    {"train.epochs": 1, "train.max_steps": 10},
    {"train.micro_batch_size": 32},
    {"train.global_batch_size": 4},
    {"cluster.workers": 32},
    {"task": COUPLED, "cluster.workers": 2},
    {"task": COUPLED, "train.micro_batch_size": 20},
    {"model.batch_norm_rows": 16, "cluster.workers": 2},
    {"task": {**COUPLED, "group_size": 4}, "model.batch_norm_rows": 8},
    {"task": {**COUPLED, "group_size": 2}, "train.global_batch_size": 4, "cluster.workers": 2},
    {"cluster.workers": {"min": 2, "max": 2}},
    {"model.lora": {"r": 4}, "model.freeze": 0},
    {"model.lora": {"r": 4}, "model.freeze": 2, "model.cache_frozen": "on"},
    {"model.cache_frozen": "on", "tune": {"search": {"model.freeze.layers": {"choice": [1, 2]}}, "trials": 2}},
    {"model.unfreeze_every": 1, "model.freeze": "all"},
    {"model.unfreeze_every": 1, "model.freeze": 2, "model.cache_frozen": "off"},
    {"model.freeze": 1, "model.cache_frozen": "on", "task": {"type": "text-to-image"}},
    {"deepspeed.offload": "parameters"},
    {"deepspeed.offload": "parameters", "deepspeed.zero_stage": 3},
    {"deepspeed.offload": "optimizer", "deepspeed.zero_stage": 1},
    {"model.compile": True, "deepspeed.zero_stage": 2, "deepspeed.offload": "optimizer"},
    {"model.compile": True},
    {"deepspeed.extra": {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}},
    {"model.dtype": "float16", "cluster.gpus_per_worker": 1},
    {"model.dtype": "bfloat16"},
    {"train.label_smoothing": 0.1},
    {"task": {"type": "sequence-regression"}},
    {"model.attention": "sdpa"},
    {"model.attention": "flash_attention_2", "cluster.gpus_per_worker": 1, "model.dtype": "bfloat16"},
    {"data.columns": {"a": "text", "b": "label"}},
    {"train.metric": "matthews", "train.early_stopping": {"metric": "eval_loss", "patience": 1}},
    {"train.metric": "f1_micro", "task": {"type": "text-classification", "multi_label": True}},
    {"data.train": "s3://bucket/a@b.csv"},
    {"tune": {"search": {"train.seed": {"choice": [1]}}, "sampler": "grid"}},
    {"tune": {"search": {"train.seed": {"choice": [1]}}, "trials": 3}},
    {"tune": {"search": {"train.learning_rate": {"choice": [1.0]}}, "trials": 2, "scheduler": "pbt"}},
]


def unchecked(fields: dict[str, Any]) -> Recipe:
    """Built past `parse`, which would refuse."""
    data = recipe_with(fields)
    return Recipe.model_validate({**data, "task": find(data["task"]["type"])(**data["task"])})


def broken(fields: dict[str, Any], unsound: tuple[str, ...] = ()) -> list[str]:
    """Where the rules see faults."""
    return [fault.where for fault in rules.broken(unchecked(fields), unsound)]


@pytest.mark.parametrize(("fields", "where"), REFUSED, ids=str)
def test_impossible_combinations_are_refused(fields: dict[str, Any], where: str) -> None:
    assert broken(fields) == [where]


@pytest.mark.parametrize("fields", PASSED, ids=str)
def test_possible_combinations_pass(fields: dict[str, Any]) -> None:
    assert broken(fields) == []


def test_adapters_exclude_patterns_and_gradual_unfreezing() -> None:
    assert broken({"model.lora": {}, "model.freeze": ["a.*"], "model.unfreeze_every": 1}) == [
        "model.freeze.patterns",
        "model.unfreeze_every",
    ]


@pytest.mark.parametrize("unsound", ["train.global_batch_size", "train", "train.micro_batch_size"])
def test_rules_about_faulty_fields_are_not_asked(unsound: str) -> None:
    assert broken({"train.micro_batch_size": 64}, (unsound,)) == []


def test_rules_about_other_fields_are_asked_all_the_same() -> None:
    assert broken({"train.micro_batch_size": 64}, ("train.epochs", "model")) == ["train.micro_batch_size"]


def test_a_fault_of_groups_names_both_numbers() -> None:
    (fault,) = rules.broken(unchecked({"task": COUPLED, "train.micro_batch_size": 8}), ())
    assert str(fault) == (
        "train.micro_batch_size: too small for whole groups of 16 rows, which the task couples, got 8; 16 or more fits"
    )
    task = {**COUPLED, "group_size": 4}
    (fault,) = rules.broken(unchecked({"task": task, "model.batch_norm_rows": 6}), ())
    assert "whole groups of 12 rows, which the task and model.batch_norm_rows couple, got 32" in str(fault)


def test_a_fault_of_a_metric_names_those_that_there_are_and_the_nearest() -> None:
    """It was found after the first evaluation, which may be hours after the start."""
    (fault,) = rules.broken(unchecked({"train.metric": "matthew"}), ())
    assert str(fault) == (
        "train.metric: not a score of this task, got 'eval_matthew'; eval_accuracy, eval_f1_macro, eval_matthews, "
        "eval_loss fit; did you mean `eval_matthews`?"
    )


def test_each_rule_refuses_something() -> None:
    refusing = set()
    for fields, _ in REFUSED:
        recipe = unchecked(fields)
        for names, rule in rules.RULES:
            if any(True for _ in rule(*(rules._value(recipe, name) for name in names))):
                refusing.add(rule)
    assert refusing == {rule for _, rule in rules.RULES}


def test_a_signed_url_is_refused_wherever_a_recipe_may_have_one_and_its_signature_not_shown() -> None:
    signed = "https://host/b.csv?v=1&sig=sec%2Fret"
    places = {
        "storage": signed,
        "model.path": signed,
        "data.train": ["a.csv", {"path": signed}],
        "tune": {"search": {"data.test": {"choice": ["a.csv", signed]}}, "trials": 2},
    }
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(recipe_with(places))
    assert [fault.where for fault in raised.value.faults] == [
        "storage",
        "model.path",
        "data.train",
        "tune.search.data.test",
    ]
    assert str(raised.value).count("a signed URL, which is a credential itself") == 4
    assert "sec%2Fret" not in str(raised.value)
