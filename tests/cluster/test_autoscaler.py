"""A cluster that grows because a run wishes it: Ray's own autoscaler, whose machines are processes of this one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import small
from rayft import storage
from rayft.training import checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_an_autoscaler_hears_how_many_workers_a_run_could_use(tmp_path: Path) -> None:
    """There is room for one on the head, and nobody asks for more but the run, which could do with that."""
    model = small.small_bert(tmp_path / "bert")
    workers = {"min": 1, "max": 3}
    plain = small.recipe(tmp_path, model, cluster__workers=workers, cluster__shared_storage=True)
    plain["train"] |= {"epochs": 1000, "save_every": "5 steps", "evaluate_every": "1000 epochs"}
    run = storage.join(plain["storage"], "small")

    def several() -> bool:
        newest = checkpoints.newest(storage.join(run, "checkpoints"))
        return newest is not None and world_of(newest) > 1

    with small.Cluster(tmp_path, cpus=1, nodes=2) as cluster:
        process = small.start("run", small.write_recipe(tmp_path, plain), **cluster.leads)
        small.wait_for(several, process)
        process.send_signal(signal.SIGINT)
        assert "the same command goes on from step" in small.finish(process, 130)


def world_of(path: str) -> int:
    """The number of workers that wrote a checkpoint."""
    return int((storage.committed(path) or {"world": 0})["world"])
