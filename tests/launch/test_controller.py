"""A run asks Ray for no more processes than it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import small

WATCHED = """
import contextlib, json, sys
import psutil
from rayft.recipe import Recipe
from rayft.run import run

seen = set()

def show(event):
    if event["event"] == "step":
        from ray._private.state import actors
        from rayft.launch.prestart import HOOK
        seen.update((actor["ActorClassName"], actor["ActorID"]) for actor in actors().values())
        for one in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if set(HOOK) <= set(one.environ()):
                    seen.add(("ahead", one.pid))

run(Recipe.parse(json.load(open(sys.argv[1]))), show=show)
print(json.dumps(sorted(name for name, _ in seen)))
"""


def alone(tmp_path: Path, text: str, plain: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """A process that starts a Ray of its own."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(plain), encoding="utf-8")
    own = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONWARNINGS")}
    command = [sys.executable, "-c", text, str(recipe)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=own, timeout=300)


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_on_its_own_ray_has_its_workers_and_a_board_and_starts_each_process_once(tmp_path: Path) -> None:
    plain = small.recipe(tmp_path, small.small_bert(tmp_path / "bert"), train__max_steps=3)
    assert plain["cluster"]["workers"] == 2
    done = alone(tmp_path, WATCHED, plain)
    assert done.returncode == 0, done.stderr
    names = ["Board", "RayTrainWorker", "RayTrainWorker", "ahead", "ahead"]
    assert json.loads(done.stdout) == names
    assert done.stderr == ""


LIGHT = """
import json, sys
from rayft.recipe import Recipe
from rayft.run import run

recipe = Recipe.parse(json.load(open(sys.argv[1])))
result = run(recipe, show=lambda event: None)
print(json.dumps({"loaded": sorted({"torch", "transformers"} & set(sys.modules)), "metrics": result["metrics"]}))
"""


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_on_rows_that_are_prepared_needs_neither_torch_nor_transformers_itself(tmp_path: Path) -> None:
    """Nor does one that goes on; and what another run has counted gives the same model."""
    plain = small.recipe(tmp_path, small.small_bert(tmp_path / "bert"), train__epochs=1, deepspeed__zero_stage="auto")
    found = []
    for changes in ({}, {"name": "second"}, {"name": "second", "train": {**plain["train"], "epochs": 2}}):
        done = alone(tmp_path, LIGHT, {**plain, **changes})
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert [one["loaded"] for one in found] == [["torch", "transformers"], [], []]
    assert found[0]["metrics"] == found[1]["metrics"] != found[2]["metrics"]
