"""Names of other trainers are answered with what README's table says of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import RecipeError
from rayft.fields import elsewhere, faults
from rayft.recipe import Recipe, json_schema

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
RECIPE: dict[str, Any] = {
    "name": "n",
    "task": {"type": "causal-lm", "text": "text"},
    "model": {"path": "m"},
    "data": {"train": "a.csv"},
    "train": {"epochs": 1},
}
TABLE = README.partition("### Coming from another trainer\n")[2].partition("\n## ")[0]
ROWS = [tuple(re.split(r" \| ", line.strip("| "), maxsplit=1)) for line in TABLE.splitlines() if line.startswith("| `")]
NAMES = [(name, here) for there, here in ROWS for name in re.findall(r"`(\w+)(?:: [^`]*)?`", there)]
COMMANDS = ("torchrun",)  # what is typed is no key of a file


def told(name: str, section: str = "", **sections: Any) -> str:
    """What is said of the key `name` in a section of a recipe, or on its top level."""
    data = {**RECIPE, **sections}
    data = {**data, section: {**data[section], name: 7}} if section else {**data, name: 7}
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(data)
    (fault,) = caught.value.faults
    return str(fault)


@pytest.mark.parametrize(("name", "here"), [(name, here) for name, here in NAMES if name not in COMMANDS])
def test_each_name_in_readmes_table_is_answered_with_what_stands_beside_it(name: str, here: str) -> None:
    words = re.findall(r"`([^`: ]+)", here)
    known = set(faults.names(json_schema()))
    fields = [word for word in words if word in known] or words
    assert fields
    if name in known:  # a section here, and what is in it is called otherwise
        fields = [field.rpartition(".")[2] for field in fields]
    for section in ("", "train", "model"):
        if f"{section}.{name}" in fields:  # it is called the same here
            continue
        said = told(name, section if name not in known else "")
        assert any(field in said for field in fields), said


def test_readmes_table_is_read_whole() -> None:
    names = {name for name, _ in NAMES}
    assert {"base_model", "gradient_accumulation_steps", "lora_target", "val_size", "fsdp", "quantization_bit"} <= names


def test_every_field_that_a_name_stands_for_is_one() -> None:
    assert set(elsewhere.FIELDS.values()) <= set(faults.names(json_schema()))


@pytest.mark.parametrize("section", ["", "train"])
def test_accumulation_is_not_taken_for_a_batch_size(section: str) -> None:
    assert told("gradient_accumulation_steps", section).partition("; ")[2] == (
        "there is none: `train.global_batch_size` is their batch per device x accumulation x devices, "
        "and `train.micro_batch_size` cuts it"
    )


def test_a_batch_per_device_is_told_to_be_a_bound() -> None:
    assert told("per_device_train_batch_size", "train") == (
        "train.per_device_train_batch_size: unknown key, got 7; a bound of a forward pass: a step has "
        "`train.global_batch_size` rows in any case; did you mean `train.micro_batch_size`?"
    )


@pytest.mark.parametrize(
    ("name", "section", "field"),
    [
        ("lr_scheduler", "", "train.schedule"),
        ("scheduler", "train", "train.schedule"),
        ("stage", "", "task.type"),
        ("stage", "deepspeed", "deepspeed.zero_stage"),
        ("base_model", "model", "model.path"),
        ("Base-Model", "", "model.path"),
        ("batch_size", "", "train.global_batch_size"),
        ("sequence_len", "data", "task.max_length"),
        ("rank", "model", "model.lora.r"),
    ],
)
def test_a_name_of_another_trainer_goes_before_one_that_looks_alike(name: str, section: str, field: str) -> None:
    assert told(name, section, deepspeed={}).endswith(f"; did you mean `{field}`?")


def test_a_field_that_the_task_lacks_is_not_proposed() -> None:
    assert "task.pack" not in told("sample_packing", task={"type": "text-classification"})


def test_a_search_is_told_the_same() -> None:
    space = {"choice": [1, 2]}
    data = {**RECIPE, "tune": {"search": {"train.gradient_accumulation_steps": space, "train.lr": space}}}
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(data)
    accumulation, rate = (fault for fault in caught.value.faults if fault.where.startswith("tune.search."))
    assert accumulation.nearest is None
    assert str(accumulation.fits).startswith("there is none: `train.global_batch_size`")
    assert rate.nearest == "train.learning_rate"
