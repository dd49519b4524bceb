"""Ray's own commands carry a recipe as well as rayft's: a job is `rayft run`, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import small
from rayft.launch import placement
from rayft.recipe import Recipe


@pytest.mark.slow
def test_ray_job_submit_runs_the_bundled_recipe(tmp_path: Path) -> None:
    """With fewer steps than it has."""
    programs = Path(sys.executable).parent
    with small.Cluster(tmp_path, jobs=True) as cluster:
        where = ["--address", cluster.server, "--working-dir", "."]
        recipe = ["jobs/quickstart.yaml", "train.max_steps=2", f"storage={tmp_path / 'runs'}"]
        command = [str(programs / "ray"), "job", "submit", *where, "--", str(programs / "rayft"), "run", *recipe]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        told = "No available agent"
        while told.count("No available agent"):  # the job server is up before what starts jobs is
            done = subprocess.run(command, capture_output=True, text=True, cwd=small.ROOT, env=environment, check=False)
            told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "finished after 2 steps" in told
    assert "deletes in the end" not in told
    result = json.loads((tmp_path / "runs" / "quickstart" / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("finished", 2)


def test_a_storage_that_goes_with_the_job_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    plain = small.recipe(tmp_path, "nowhere", storage="runs")
    told = placement.passing(Recipe.parse(plain))
    assert told is not None
    assert told.startswith("storage (runs) lies in this job's copy of its working directory")
    for stays in (str(tmp_path / "runs"), "s3://bucket/runs"):
        assert placement.passing(Recipe.parse({**plain, "storage": stays})) is None
