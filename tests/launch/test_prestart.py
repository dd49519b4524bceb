"""Processes that are started ahead are those that a run's workers take, whoever starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rayft.fields.machines import Cluster
from rayft.launch import controller, prestart
from rayft.launch.session import quiet


class Worker:
    def pid(self) -> int:
        return os.getpid()


class Driver:
    """Starts workers as Ray Train's controller does."""

    def __init__(self) -> None:
        quiet()

    def all_taken(self, cluster: Cluster) -> bool:
        before = prestart._known()
        settled = prestart.workers(cluster)
        settled()
        ahead = prestart._known() - before
        own = controller._Workers._get_worker_runtime_env(prestart.environment(cluster))
        made: Any = [ray.remote(num_cpus=0, runtime_env=own)(Worker).remote() for _ in range(cluster.max_workers)]
        taken = set(ray.get([worker.pid.remote() for worker in made]))
        return len(taken) == cluster.max_workers and taken == ahead == prestart._known() - before


JOB = """
import sys
import ray
from test_prestart import Cluster, Driver
environment = {"env_vars": {"WHOSE": "the job's"}, "working_dir": sys.argv[1]}
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
assert Driver().all_taken(Cluster(workers=2))
"""


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("ray_local")
def test_workers_of_a_driver_take_the_processes_that_were_started_for_them() -> None:
    assert Driver().all_taken(Cluster(workers=2))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("ray_local")
def test_workers_of_a_trial_with_an_environment_of_its_own_take_them_too() -> None:
    driver: Any = ray.remote(num_cpus=0, runtime_env={"env_vars": {"WHOSE": "the trial's"}})(Driver).remote()
    assert ray.get(driver.all_taken.remote(Cluster(workers=2)))


@pytest.mark.slow
@pytest.mark.alone
def test_workers_of_a_job_with_an_environment_and_a_folder_take_them_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: of-the-job\n", encoding="utf-8")
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    own["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-c", JOB, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=own)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("ray_local")
def test_workers_with_gpus_import_nothing_before_they_know_which_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet()
    cluster = Cluster(workers=2, gpus_per_worker=1)
    asked: list[Any] = []
    monkeypatch.setattr(prestart, "_ask", lambda *arguments: asked.append(arguments))
    prestart.workers(cluster)()
    assert not asked
    assert not set(prestart.HOOK) & set(prestart.environment(cluster)["env_vars"])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_the_memory_of_gpus_grows_in_place_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], expected: str | None
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    for gpus in (0, 1):
        own = prestart.environment(Cluster(gpus_per_worker=gpus))["env_vars"]
        assert own.get("PYTORCH_ALLOC_CONF") == (expected if gpus else None)


HOOKED = "Failed to execute the setup hook method, x. For more details, see below.\nModuleNotFoundError: No module\n"


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("ended", "fails"),
    [
        ([(0, HOOKED), (10, HOOKED), (21, HOOKED)], True),
        ([(0, HOOKED), (19, HOOKED)], False),  # a folder that could not be read for a moment
        ([(0, "killed"), (21, HOOKED), (22, "killed")], False),
        ([(-5, HOOKED), (16, HOOKED)], False),  # of an earlier start
        ([], False),
    ],
)
def test_workers_that_fail_to_begin_again_and_again_are_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, ended: list[tuple[int, str]], fails: bool
) -> None:
    def table(job: str) -> list[Any]:
        where = SimpleNamespace(ip_address="192.0.2.7")
        return [
            SimpleNamespace(
                job_id=bytes.fromhex(job), end_time_ms=1000 * (100 + s), exit_detail=why, worker_address=where
            )
            for s, why in ended
        ]

    monkeypatch.setattr(prestart, "_table", lambda: table(ray.get_runtime_context().get_job_id()))
    said = prestart.failing(100)
    assert (said or "").startswith("no worker can begin on 192.0.2.7 (ModuleNotFoundError: No module)") is fails
    monkeypatch.setattr(prestart, "_table", lambda: table("fefefefe"))
    assert prestart.failing(100) is None  # another job's
