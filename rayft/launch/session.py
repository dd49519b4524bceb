"""A Ray cluster to work on: the one the environment names, or one on this machine for as long as it is needed."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rayft.errors import ClusterError, TrainingError
from rayft.launch import agent, ahead, tokens

_local: list[Any] = []  # the processes of a cluster that this process has started

DATA_CPUS = 2  # beyond the workers' own: reading tasks must never wait for a worker to end


@contextmanager
def cluster(workers: int = 1, cpus_per_worker: int = 1, *, imports: tuple[str, ...] = ahead.START) -> Iterator[None]:
    """Joins the cluster of `RAY_ADDRESS`, or starts a local one with room for the workers and the readers beside them.

    A Ray that this process has already joined is used as it is and left running. `imports` are modules that will be
    needed, imported meanwhile.
    """
    quiet()
    with ahead.importing(*imports), _silent(), _joined(workers * cpus_per_worker):
        yield


@contextmanager
def _joined(cpus: int) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address:
        from ray.exceptions import AuthenticationError

        try:
            with _refused_once():
                ray.init(address=address, **options)
        except (AuthenticationError, _TokenRefused) as error:
            raise ClusterError(tokens.refused(f"the Ray cluster at {address}", joining=True)) from error
        except ConnectionError as error:
            raise ClusterError(
                f"no Ray cluster answers at RAY_ADDRESS={address}; unset it to run on this machine"
            ) from error
    else:
        room = max(os.cpu_count() or 1, cpus + DATA_CPUS)
        with _own_processes() as started, _bare(), _inherited(MEMORY_ENVIRONMENT):
            try:
                ray.init(address="local", num_cpus=room, include_dashboard=False, **options)
            except Exception as error:
                why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
                raise ClusterError(
                    f"Ray did not start on this machine ({why}); where that was only too busy, try the same again"
                ) from error
        _local.extend(started)
    try:
        yield
    finally:
        _local.clear()
        ray.shutdown()


def is_own() -> bool:
    """Is Ray's cluster one that this process has started for itself?"""
    return bool(_local)


def refuse_lost() -> None:
    """Raises TrainingError where a cluster of this process's own has ended: Ray would wait a minute, and then abort."""
    for process in _local:
        name, code = os.path.basename(process.args[0]), process.poll()
        if name in ("gcs_server", "raylet") and code is not None:
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            told = f"Ray's process {name} on this machine has ended ({how})"
            raise TrainingError(f"{told}; the same command goes on from the last checkpoint")


@contextmanager
def replaced(target: Any, **others: Any) -> Iterator[None]:
    """Inside, these are attributes of a module or class."""
    plain = {name: getattr(target, name) for name in others}
    for name, other in others.items():
        setattr(target, name, other)
    try:
        yield
    finally:
        for name, before in plain.items():
            setattr(target, name, before)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _silent() -> AbstractContextManager[None]:
    """Ray prints nothing of its own: that a process has ended is told by whoever needed it, once and with what follows.

    It prints past Python's logging, for as long as this process is connected.
    """
    return replaced(importlib.import_module("ray._private.worker"), print_to_stdstream=_nothing)


class _TokenRefused(BaseException):
    """A cluster wants a token, or another one. Ray takes every Exception for a reason to ask again."""


def _refused_once() -> AbstractContextManager[None]:
    """A cluster that refuses the token is asked once: Ray would ask for twenty seconds, and print a line each time."""
    from ray.exceptions import AuthenticationError

    node: Any = importlib.import_module("ray._private.node")
    plain = node.GcsClient

    def client(*arguments: Any, **options: Any) -> Any:
        try:
            return plain(*arguments, **options)
        except AuthenticationError as error:
            raise _TokenRefused from error

    return replaced(node, GcsClient=client)


@contextmanager
def _own_processes() -> Iterator[list[Any]]:
    """Processes that Ray starts inside get a process group each, and still end with this process; they are listed.

    Whoever stops a command often signals its whole group (`timeout`, a scheduler, a shell), and a cluster that ends
    then takes the workers along before they have saved.
    """
    services: Any = importlib.import_module("ray._private.services")
    plain, started = services.ConsolePopen, []

    def start(command: list[str], **options: Any) -> Any:
        started.append(plain(_without_agent(command), process_group=0, **options))
        return started[-1]

    with replaced(services, ConsolePopen=start):
        yield started


@contextmanager
def _bare() -> Iterator[None]:
    """A Ray that starts inside has what tasks and actors need: no dashboard, autoscaler or log monitor.

    Nobody would look at them; they would take four seconds of a processor, and Ray waits for the dashboard's address.
    """
    node: Any = importlib.import_module("ray._private.node").Node
    private: Any = importlib.import_module("ray._private.utils")
    with (
        replaced(node, start_api_server=_nothing, start_monitor=_nothing, start_log_monitor=_nothing),
        replaced(private, get_dashboard_dependency_error=_nothing),  # it would import them to see
    ):
        yield


def _without_agent(command: list[str]) -> list[str]:
    """The command of a process of Ray's, a raylet's with `rayft.launch.agent` for a dashboard agent."""
    flag = "--dashboard_agent_command="
    return [_standing_in(flag, part) if part.startswith(flag) else part for part in command]


def _standing_in(flag: str, part: str) -> str:
    given = dict(
        word.split("=", 1) for word in shlex.split(part.removeprefix(flag)) if word.startswith("--") and "=" in word
    )
    own = [sys.executable, "-I", "-S", str(agent.__file__), given["--session-dir"], given["--node-id"]]
    return flag + subprocess.list2cmdline(own)


@contextmanager
def _inherited(variables: dict[str, str]) -> Iterator[None]:
    """Processes started inside have these, where this one does not have its own."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def quiet() -> None:
    """Keeps notices of libraries away from the user; errors still pass.

    For this process and, by environment, its workers.
    """
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.data", "deepspeed", "DeepSpeed", "transformers", "diffusers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # that workers fail is told by who asked for them
    logging.getLogger("torch").setLevel(logging.ERROR)


WORKER_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",  # several threads or processes have one each
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # the controller is in the driver, whose terminal it is
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives a cluster must not start another
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver looks for notices itself; it would be one more process
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon Ray Train sees that workers have ended
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as Ray Train sets it, so that workers started ahead fit
    "DEEPSPEED_LOG_LEVEL": "error",
}

# glibc gives the memory of large tensors back and asks for it anew in every step: with MiniLM and two workers that is
# 36,000 pages of 4 kB at ZeRO 0 and 90,000 at ZeRO 2: a third and a quarter of a step. So workers keep what they
# had, in pages of 2 MB. One arena, as Ray Train's function is not in the main thread, and no other grows beyond 64 MB.
MEMORY_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=33554432"
    ":glibc.malloc.trim_threshold=4294967296:glibc.malloc.top_pad=67108864"
}


def gpu_environment() -> dict[str, str]:
    """What a process with a GPU has beside: before torch asks, which it does when its group is made.

    Rows of ever other lengths leave holes in the GPU's memory, where segments don't grow. Nothing where the environment
    says otherwise, by either of torch's names.
    """
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
