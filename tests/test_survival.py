"""What a run survives: after each fault, losses and weights are bit-equal to those of a run that was left alone.

Processes are killed with real signals, S3 is a server behind a socket, the full disk is one. Faults of whole machines
are in tests/cluster/test_survival.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import small
from faulty_s3 import FaultyS3
from rayft import storage
from rayft.launch import stopping
from rayft.training import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.alone]

# Micro-batches of one row make a step long enough to be hit by a signal.
FIELDS = {
    "train__save_every": "3 steps",
    "deepspeed__zero_stage": 2,
    "train__epochs": 2,
    "train__micro_batch_size": 1,
}
STEPS = 26  # 2 epochs of ceil(203 / 16)


class Untouched:
    """The same run, left alone; `recipe` gives it under another name and storage."""

    def __init__(self, folder: Path, cluster: small.Cluster) -> None:
        self.folder, self.model = folder, small.small_bert(folder / "bert")
        self.runs = folder / "runs"
        small.finish(small.start("run", self.write("untouched"), **cluster.leads))
        self.losses = small.losses(self.runs / "untouched")
        assert sorted(self.losses) == list(range(1, STEPS + 1))
        self.weights = self._weights(str(self.runs / "untouched"))
        self.metrics = json.loads((self.runs / "untouched" / "result.json").read_text())["metrics"]

    def write(self, name: str, storage_path: str | None = None, **fields: Any) -> str:
        """A recipe's file; without a storage of its own the run finds the rows prepared."""
        given = {**FIELDS, **fields}
        plain = small.recipe(self.folder, self.model, name=name, storage=storage_path or str(self.runs), **given)
        return small.write_recipe(self.folder, plain)

    def assert_equal(self, run: str) -> None:
        """Every step once with the same loss, the same weights and scores, and nothing half-written."""
        rows = [json.loads(line) for line in storage.read_text(storage.join(run, "metrics.jsonl")).splitlines()]
        losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        assert losses == sorted(self.losses.items())
        weights = self._weights(run)
        assert weights.keys() == self.weights.keys()
        assert all(weights[name].equal(self.weights[name]) for name in weights)
        assert storage.read_json(storage.join(run, "result.json"))["metrics"] == self.metrics
        folder = storage.join(run, "checkpoints")
        assert {os.path.basename(path) for path in checkpoints.committed(folder)} == folders_of(folder)

    def _weights(self, run: str) -> dict[str, Any]:
        from safetensors.torch import load

        return load(storage.read_bytes(storage.join(run, "export", "model.safetensors")))


def folders_of(checkpoints: str) -> set[str]:
    return {os.path.basename(path.rstrip("/")) for path in storage.folders(checkpoints)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[small.Cluster]:
    with small.Cluster(tmp_path_factory.mktemp("ray")) as started:
        yield started


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, cluster: small.Cluster) -> Untouched:
    return Untouched(tmp_path_factory.mktemp("survival"), cluster)


@pytest.fixture
def started(cluster: small.Cluster) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `rayft ...` on the cluster, or with variables of its own (S3's URL among them) on a Ray of its own.

    What still runs at the end is killed.
    """
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str, s3: str | None = None, **own: str) -> subprocess.Popen[str]:
        own |= {} if s3 is None else {"AWS_ENDPOINT_URL": s3}
        processes.append(small.start(*arguments, **(own or cluster.leads)))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            small.kill_with_children(process)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module", autouse=True)
def unanswered(untouched: Untouched, s3: str) -> Iterator[subprocess.Popen[str]]:
    """A run whose storage does not answer. It tries for a minute, while the other tests run."""
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.harm = lambda method, path: "gone"
        path = untouched.write("gone", storage.join(s3, "gone"))
        with small.start("run", path, AWS_ENDPOINT_URL=proxy.url) as process:
            yield process
            process.kill()


def reached(run: Path, step: int) -> Callable[[], bool]:
    return lambda: max((row["step"] for row in small.metrics(run)), default=0) >= step


def test_a_worker_killed_in_a_step(untouched: Untouched, cluster: small.Cluster, started: Start) -> None:
    run, rng = untouched.runs / "worker", random.Random(3)
    process = started("run", untouched.write("worker", data__stream="on"))
    killed = []
    for attempt, low in ((1, 4), (2, 14)):
        small.wait_for(lambda n=attempt: storage.exists(str(run / "attempts" / f"{n:06d}.json")), process)
        small.wait_for(reached(run, rng.randint(low, low + 4)), process)
        killed.append(rng.choice(cluster.workers()))
        killed[-1].send_signal(signal.SIGKILL)
    told = small.finish(process)
    lines = [line for line in told.splitlines() if " was lost " in line]
    for line, worker in zip(lines, killed, strict=True):  # not the other one, which saw this one's end
        assert f"(process {worker.pid}) was lost " in line
    assert "(raylet)" not in told
    assert "retry 1 of 3 (failure.max_retries)" in told
    assert "retry 2 of 3" not in told  # the second found a newer checkpoint, and counts from there
    untouched.assert_equal(str(run))
    assert storage.read_json(str(run / "run.json"))["attempt"] == 3


def test_the_driver_and_all_workers_killed_three_times(
    untouched: Untouched, cluster: small.Cluster, started: Start
) -> None:
    run, rng, done = untouched.runs / "killed", random.Random(7), 0
    path = untouched.write("killed")
    for _ in range(3):
        done = rng.randint(done + 4, done + 6)  # so that each start gets past a checkpoint
        process = started("run", path)
        small.wait_for(reached(run, done), process)
        cluster.kill(process)
    small.finish(started("run", path))
    untouched.assert_equal(str(run))
    assert storage.read_json(str(run / "run.json"))["attempt"] == 4


def test_a_worker_killed_while_saving_to_s3_that_is_slow(untouched: Untouched, s3: str, started: Start) -> None:
    base = storage.join(s3, "saving")
    run = storage.join(base, "saving")
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.harm = lambda method, path: 2.0 if method == "PUT" and "safetensors" in path and "rank-" in path else None
        process = started("run", untouched.write("saving", base), s3=proxy.url)
        folder = storage.join(run, "checkpoints")

        def saving() -> bool:
            """The second checkpoint is on its way, and not there yet."""
            return len(checkpoints.committed(folder)) >= 1 and len(folders_of(folder)) > len(
                checkpoints.committed(folder)
            )

        small.wait_for(saving, process)
        small.workers_of(process)[0].send_signal(signal.SIGKILL)
        assert "was lost" in small.finish(process)
        assert proxy.harmed > 0
    untouched.assert_equal(run)


def test_s3_that_fails_for_twenty_seconds_while_a_checkpoint_goes_up(
    untouched: Untouched, s3: str, started: Start
) -> None:
    """Once with an answer of its own, later without any."""
    base = storage.join(s3, "outage")
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        for kind, step in (("503", 6), ("gone", 18)):
            proxy.outage(
                kind, 20, lambda method, path, step=step: method in ("PUT", "POST") and f"step-{step:06d}" in path
            )
        told = small.finish(started("run", untouched.write("outage", base), s3=proxy.url))
        assert proxy.kinds == {"503", "gone"}
    assert "retry" not in told  # the training went on meanwhile, and no worker was lost
    untouched.assert_equal(storage.join(base, "outage"))


def damage(file: Path) -> None:
    """Turns one bit in the middle of the file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_damage_is_noticed_in_a_checkpoint_and_in_a_prepared_shard(
    untouched: Untouched, cluster: small.Cluster, tmp_path: Path, started: Start
) -> None:
    """The checkpoint before is used, and the shard is prepared anew."""
    run = tmp_path / "runs" / "harmed"
    path = untouched.write("harmed", str(tmp_path / "runs"))
    process = started("run", path)
    small.wait_for(lambda: len(checkpoints.committed(str(run / "checkpoints"))) >= 2, process)
    cluster.kill(process)
    *_, before, newest = checkpoints.committed(str(run / "checkpoints"))
    file = Path(newest) / "rank-00001.safetensors"
    key = storage.read_json(str(run / "run.json"))["prepared"]["train"]
    (shard,) = (tmp_path / "runs" / "prepared" / key).rglob("*.parquet")
    damage(file)
    damage(shard)
    told = small.finish(started("run", path))
    assert f"{file}: is not as it was written (its SHA-256 differs)" in told
    assert f"going on from step {checkpoints.step_of(before)}" in told
    assert f"{shard}: is not as it was prepared" in told
    untouched.assert_equal(str(run))


def test_a_signal_writes_a_checkpoint_and_the_same_command_goes_on(untouched: Untouched, started: Start) -> None:
    run, done = untouched.runs / "signals", 3
    path = untouched.write("signals", train__save_every="1 epoch")
    for number in (signal.SIGTERM, signal.SIGINT):
        process = started("run", path)
        small.wait_for(reached(run, done + 1), process)
        process.send_signal(number)
        told = small.finish(process, code=130)
        assert "saving a checkpoint" in told
        result = storage.read_json(str(run / "result.json"))
        assert result["status"] == storage.read_json(str(run / "run.json"))["status"] == "stopped"
        newest = checkpoints.newest(str(run / "checkpoints"))
        assert newest is not None
        done = checkpoints.step_of(newest)
        assert result["error"].endswith(f"the same command goes on from step {done}")
    assert f"going on from step {done}" in small.finish(started("run", path))
    untouched.assert_equal(str(run))


def test_a_request_in_the_folder_stops_the_run(untouched: Untouched, started: Start) -> None:
    run = untouched.runs / "asked"
    path = untouched.write("asked")
    process = started("run", path)
    small.wait_for(reached(run, 4), process)
    stopping.request(str(run), "ann")
    assert "stopped by a request from ann; the same command goes on from step" in small.finish(process, code=130)
    small.finish(started("run", path))
    untouched.assert_equal(str(run))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`disk("20m")` is a disk of that size; called again, it has the other size."""
    if os.geteuid() != 0:
        pytest.fail("this test mounts a small disk, which needs root", pytrace=False)
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: str) -> Path:
        options = f"{'remount,' if folder.is_mount() else ''}size={size}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        return folder

    yield sized
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_is_whole(
    untouched: Untouched, disk: Callable[[str], Path], started: Start
) -> None:
    """A checkpoint of this model is 12 MB: the first fits, the second does not."""
    runs = disk("20m")
    path = untouched.write("full", str(runs))
    told = small.finish(started("run", path), code=1)
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "is full; free some space" in line
    folder = str(runs / "full" / "checkpoints")
    assert [os.path.basename(one) for one in checkpoints.committed(folder)] == ["step-000003-a1"]
    assert folders_of(folder) == {"step-000003-a1"}
    disk("200m")
    assert "going on from step 3" in small.finish(started("run", path))
    untouched.assert_equal(str(runs / "full"))


def test_of_two_attempts_the_newer_wins_and_the_older_says_so(
    untouched: Untouched, cluster: small.Cluster, started: Start
) -> None:
    run = untouched.runs / "two"
    path = untouched.write("two")
    older = started("run", path)
    small.wait_for(reached(run, 4), older)
    frozen = cluster.workers()  # they stand still, as if cut off, until the newer one has taken over
    for worker in frozen:
        worker.suspend()
    refused = small.finish(started("run", path), code=2)
    assert f"is being written by process {older.pid}" in refused
    newer = started("run", "--take-over", path)
    small.wait_for(lambda: storage.exists(str(run / "attempts" / "000002.json")), newer)
    for worker in frozen:
        worker.resume()
    told = small.finish(older, code=1)
    assert f"was taken over by process {newer.pid} on " in told
    assert "(attempt 2)" in told
    small.finish(newer)
    untouched.assert_equal(str(run))
    assert storage.read_json(str(run / "run.json"))["status"] == "finished"
    other = small.finish(started("run", path, "train.early_stopping={metric: loss, patience: 1}"), code=2)
    assert "train.early_stopping" in other  # another recipe, but no longer another writer


def test_ranks_and_readers_that_stand_still_are_found_and_named(
    untouched: Untouched, cluster: small.Cluster, started: Start
) -> None:
    """All ranks wait for rows, from a process that is frozen; one rank for another, in a collective; no rank moves."""
    run = untouched.runs / "still"
    process = started("run", untouched.write("still", failure={"timeout_s": 15}, data__stream="on"))
    small.wait_for(lambda: bool(cluster.processes("SplitCoordinator")), process)
    for dealer in cluster.processes("SplitCoordinator"):
        dealer.suspend()
    stopped = []
    for attempt, step, frozen in ((2, 4, 1), (3, 12, 2)):
        small.wait_for(lambda n=attempt: storage.exists(str(run / "attempts" / f"{n:06d}.json")), process)
        small.wait_for(reached(run, step), process)
        stopped.append(cluster.workers()[:frozen])
        for worker in stopped[-1]:
            worker.suspend()
    told = small.finish(process)
    (waiting,) = [line for line in told.splitlines() if "stand still before their first step, waiting for rows" in line]
    assert "all ranks stand" in waiting
    assert "(failure.timeout_s is 15)" in waiting
    lines = [line for line in told.splitlines() if " has not been heard of for " in line]
    for line, workers in zip(lines, stopped, strict=True):
        assert any(f"(process {worker.pid}) has" in line for worker in workers), told
        assert "it was last seen " in line
        assert "of 3 (failure.max_retries)" in line
        assert not any(psutil.pid_exists(worker.pid) for worker in workers)
    untouched.assert_equal(str(run))


def test_a_machine_that_runs_out_of_memory_is_one_error_with_advice(untouched: Untouched, started: Start) -> None:
    """Ray kills a process where the machine has too little left: something else takes it, once the run trains."""
    memory, room = psutil.virtual_memory(), 6 << 30  # for the run, which needs a third of it
    limit = (memory.total - memory.available + room) / memory.total
    leads = {"RAY_memory_usage_threshold": str(limit), "RAY_memory_monitor_refresh_ms": "100"}
    path = untouched.write("memory", train__micro_batch_size=4, train__epochs=500)
    process = started("run", path, **leads)
    small.wait_for(reached(untouched.runs / "memory", 3), process)
    taken = []
    while process.poll() is None and psutil.virtual_memory().percent < 100 * limit + 2:
        taken.append(b"x" * (64 << 20))
    told = small.finish(process, code=1)
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: a worker ran out of memory; try train.micro_batch_size=2 (same model), or ")
    assert "retry" not in told


def test_verify_says_that_a_run_resumes_exactly(untouched: Untouched, started: Start) -> None:
    path = untouched.write("verified")
    told = small.finish(started("verify", "--steps", "6", path))
    assert "resumes exactly, 12 losses and " in told
    assert "killed after step 6 and gone on to step 12" in told
    assert not list(untouched.runs.glob("verified*"))


def test_s3_that_is_gone_at_the_start_is_one_clear_error(unanswered: subprocess.Popen[str]) -> None:
    told = small.finish(unanswered, code=1)
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "s3://rayft-tests/gone/gone" in line
    assert "run it again when the storage answers" in line
    assert "Traceback" not in told
