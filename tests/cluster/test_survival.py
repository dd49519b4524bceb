"""What a run on several machines survives: nodes that die, are cut off, are told to leave, come; and a new Ray head.

Every node has an address of its own. Rows, model, prepared shards, checkpoints and export are on S3, so that no node
needs another one's disk; weights are sharded (ZeRO 3). The number of workers changes on the way, so the same rows are
summed in another order: losses agree with those of a run on one machine within 1e-5.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import small
from cluster.local import Nodes
from faulty_s3 import FaultyS3
from group import run_group
from rayft import storage
from rayft.launch import stopping
from rayft.training import checkpoints
from whole import trained

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

LOOK_S = 0.5

CUT_S = 30
FIELDS = {
    "train__max_steps": 1000,  # more than are made
    "train__epochs": None,
    "train__schedule": "constant",  # so that losses don't depend on where a run ends
    "train__save_every": "5 steps",
    "train__evaluate_every": "1000 steps",
    "train__learning_rate": 1e-4,
    "model__dropout": 0.0,
    "deepspeed__zero_stage": 3,
}


@pytest.fixture(scope="module")
def bucket(s3: str) -> str:
    return storage.join(s3, "nodes")


@pytest.fixture(scope="module")
def plain(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of which everything is on S3."""
    folder = tmp_path_factory.mktemp("nodes")
    made = small.recipe(folder, small.small_bert(folder / "bert"), **FIELDS)
    for split, path in made["data"].items():
        made["data"][split] = storage.join(bucket, "rows", Path(path).name)
        storage.upload(path, made["data"][split])
    made["model"]["path"] = storage.join(bucket, "bert")
    storage.upload(str(folder / "bert"), made["model"]["path"])
    return {**made, "storage": bucket}


def alone(plain: dict[str, Any], steps: int) -> tuple[dict[int, float], dict[str, float]]:
    """Losses and scores of the same run by one worker on this machine, of so many steps."""
    fields = {"train": {**plain["train"], "max_steps": steps}, "cluster": {"workers": 1}}
    (found,) = run_group(
        trained, 1, {**plain, **fields, "name": f"alone-{steps}", "deepspeed": {"zero_stage": 0}}, True
    )
    return dict(enumerate(found["losses"], 1)), found["result"]["metrics"]


def read(run: str) -> tuple[dict[int, float], dict[str, Any]]:
    """Losses by step, of which each stands once, and result.json; nothing half-written is left."""
    folder = storage.join(run, "checkpoints")
    there = {path.rstrip("/").rpartition("/")[2] for path in storage.folders(folder)}
    assert there == {path.rpartition("/")[2] for path in checkpoints.committed(folder)}
    rows = [json.loads(line) for line in storage.read_text(storage.join(run, "metrics.jsonl")).splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [step for step, _ in losses] == list(range(1, len(losses) + 1))
    return dict(losses), storage.read_json(storage.join(run, "result.json"))


@pytest.fixture
def three(s3: str, make_nodes: Any) -> Iterator[Nodes]:
    """Three nodes of one CPU, for which S3 is on this machine."""
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"], host="0.0.0.0") as proxy:
        port = proxy.url.rpartition(":")[2]
        yield make_nodes(3, environment={"AWS_ENDPOINT_URL": f"http://{{gateway}}:{port}"}, with_dashboard=False)


Begin = Callable[[Nodes, str], subprocess.Popen[str]]


@pytest.fixture
def begun() -> Iterator[Begin]:
    """Starts `rayft run` on the head of some nodes; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def begin(nodes: Nodes, path: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                nodes.command(0, [sys.executable, "-m", "rayft", "run", path]),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=nodes.environ,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield begin


def committed(run: str, step: int) -> Callable[[], bool]:
    def there() -> bool:
        found = checkpoints.newest(storage.join(run, "checkpoints"))
        return found is not None and checkpoints.step_of(found) >= step

    return there


def claimed(run: str, attempt: int) -> Callable[[], bool]:
    return lambda: storage.exists(storage.join(run, "attempts", f"{attempt:06d}.json"))


def saved_by(run: str, attempt: int) -> Callable[[], bool]:
    """A group that has not yet started would wait for a machine that comes; one that has saved goes on without it."""
    return lambda: any(path.endswith(f"-a{attempt}") for path in checkpoints.committed(f"{run}/checkpoints"))


def test_machines_leave_come_and_die_and_a_new_head_goes_on(
    three: Nodes, begun: Begin, plain: dict[str, Any], bucket: str, tmp_path: Path
) -> None:
    elastic, streamed = {"workers": {"min": 1, "max": 3}}, {**plain["data"], "stream": "on"}
    path = small.write_recipe(tmp_path, {**plain, "name": "elastic", "cluster": elastic, "data": streamed})
    run = storage.join(bucket, "elastic")
    process = begun(three, path)
    small.wait_for(committed(run, 5), process, every_s=LOOK_S)
    three.drain(2, deadline_s=60)  # a preemption notice: a checkpoint, and a group of two
    small.wait_for(claimed(run, 2), process, every_s=LOOK_S)
    three.kill(2)
    small.wait_for(saved_by(run, 2), process, every_s=LOOK_S)
    three.start(2)  # room again: a checkpoint, and a group of three
    small.wait_for(saved_by(run, 3), process, every_s=LOOK_S)
    three.kill(1)  # a machine that dies
    small.wait_for(saved_by(run, 4), process, every_s=LOOK_S)
    for index in range(3):
        three.kill(index)
    told, _ = process.communicate()
    assert f"{three.nodes[2].ip} is about to leave the cluster, and rank" in told
    assert told.count("working with 2 workers until there is room for more") == 2
    assert "there is room for more than 2 workers" in told
    assert " was lost " in told
    assert told.count("retry") == told.count("retry 1 of 3") == 1  # only what died counts
    for index in range(3):
        three.start(index)
    process = begun(three, path)
    small.wait_for(saved_by(run, 5), process, every_s=LOOK_S)
    stopping.request(run, "the test")
    assert "going on from step" in small.finish(process, 130)
    losses, result = read(run)
    assert result["status"] == "stopped"
    assert losses == pytest.approx(alone(plain, len(losses))[0], rel=1e-5)


def test_a_node_that_was_cut_off_for_half_a_minute_adds_nothing_and_comes_back(
    three: Nodes, begun: Begin, plain: dict[str, Any], bucket: str, tmp_path: Path
) -> None:
    """The group waits for it, since it has to be three."""
    steps = 40
    given = {**plain, "name": "cut", "cluster": {"workers": 3}, "failure": {"timeout_s": 120}}
    given["train"] = {**plain["train"], "max_steps": steps}
    process = begun(three, small.write_recipe(tmp_path, given))
    run = storage.join(bucket, "cut")
    small.wait_for(committed(run, 10), process, every_s=LOOK_S)
    three.cut(1)
    back = time.monotonic() + CUT_S
    three.wait(alive=2)
    small.wait_for(lambda: time.monotonic() > back, process, every_s=LOOK_S)
    three.heal(1)
    small.wait_for(lambda: not three.nodes[1].alive, process, every_s=LOOK_S)  # Ray had given it up, and tells it so
    three.start(1)  # as a supervisor does
    assert " was lost " in small.finish(process)
    losses, result = read(run)
    expected, metrics = alone(plain, steps)
    assert result["status"] == "finished"
    assert losses == pytest.approx(expected, rel=1e-5)
    assert result["metrics"] == pytest.approx(metrics, rel=1e-4)
