"""Processes that are started ahead are those that a run's workers take."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil
import pytest
import ray
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

from rayft import prestart
from rayft.sections import Cluster
from rayft.session import quiet


class Worker:
    def pid(self) -> int:
        return os.getpid()


class Controller:
    """Starts workers as Ray Train's does."""

    def workers(self, count: int, environment: dict[str, Any]) -> list[int]:
        own = WorkerGroup._get_worker_runtime_env(environment)
        made: Any = [ray.remote(num_cpus=0, runtime_env=own)(Worker).remote() for _ in range(count)]
        return ray.get([worker.pid.remote() for worker in made])


def ahead() -> set[int]:
    """Processes of this one's Ray that have the hook."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if set(prestart.HOOK) <= set(process.environ()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("ray_local")
def test_workers_take_the_processes_that_were_started_for_them() -> None:
    quiet()
    cluster = Cluster(workers=2)
    before = ahead()
    prestart.workers(cluster)
    until = time.monotonic() + 120  # only how long a busy machine may take
    while len(ahead() - before) < 2:
        assert time.monotonic() < until, "no process was started"
        time.sleep(0.05)
    own = {"env_vars": get_env_vars_to_propagate()}
    controller: Any = ray.remote(num_cpus=0, runtime_env=own)(Controller).remote()
    assert set(ray.get(controller.workers.remote(2, prestart.environment(cluster)))) == ahead() - before


@pytest.mark.usefixtures("ray_local")
def test_workers_with_gpus_import_nothing_before_they_know_which_are_theirs() -> None:
    quiet()
    before = ahead()
    cluster = Cluster(workers=2, gpus_per_worker=1)
    prestart.workers(cluster)
    assert not set(prestart.HOOK) & set(prestart.environment(cluster)["env_vars"])
    assert ahead() == before
