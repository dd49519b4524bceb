"""Processes for a run's workers, started while the driver still prepares, so that their imports run beside its own.

Ray starts an actor's process when the actor is made; that of a worker then imports for seconds. But a raylet can be
asked to start processes for a runtime environment, and gives them to the first actors that want the same one: once they
are known to it. For actors that come before that it starts others.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from rayft.fields.machines import Cluster
from rayft.launch import placement
from rayft.launch.session import MEMORY_ENVIRONMENT, WORKER_ENVIRONMENT, gpu_environment
from rayft.training import repeatable

KEPT_S = 120  # how long a process waits to be taken
ANSWER_S = 5.0
KNOWN_S = 10.0  # within which a process that was asked for is known to its raylet, unless something is wrong
LOOK_S = 0.02
FAILING_S = 20.0  # for which processes fail to begin before it is no passing trouble
# What Ray calls when a process has started. (The runtime environment's own field for it counts for whole jobs alone.)
HOOK = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "rayft.launch.ahead.worker"}


def environment(cluster: Cluster) -> dict[str, Any]:
    """The runtime environment of a run's workers, and of nothing else.

    What the environment here says to Ray Train holds for them too, as Ray Train would have it. That is not asked: its
    import takes half a second, in which the processes can begin. Those with GPUs import nothing ahead: a process that
    looks for GPUs before Ray says which are its own sees all.
    """
    said = {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
    own = gpu_environment() | repeatable.said() if cluster.gpus_per_worker else HOOK
    return {"env_vars": WORKER_ENVIRONMENT | said | MEMORY_ENVIRONMENT | own}


def workers(cluster: Cluster) -> Callable[[], None]:
    """Has processes for a run's workers started, where Ray's cluster is this one machine: elsewhere nobody knows yet
    where they will be. Where that fails they start later, as all do.

    What is returned waits until actors get them; to be called before the workers are started.
    """
    import grpc

    nodes = placement.living_nodes()
    if len(nodes) != 1 or cluster.gpus_per_worker:
        return lambda: None
    count = min(cluster.max_workers, placement.room(cluster))
    try:
        before = _known()
        _ask(nodes[0], cluster, count)
    except (grpc.RpcError, ImportError, AttributeError, TypeError, ValueError) as error:  # Ray promises none of this
        logging.getLogger(__name__).debug("no processes were started ahead: %s", error)
        return lambda: None
    return lambda: _wait(before, count)


def _wait(before: set[int], count: int) -> None:
    until = time.monotonic() + KNOWN_S
    while len(_known() - before) < count and time.monotonic() < until:
        time.sleep(LOOK_S)


def failing(since: float) -> str | None:
    """Why no worker of this job's has been able to begin `since` then, in seconds since 1970; None while that can't be
    said.

    A process in which the hook fails ends at once, and Ray starts another, for ever.
    """
    import ray

    job = ray.get_runtime_context().get_job_id()
    ended = [
        worker
        for worker in _table()
        if worker.job_id.hex() == job
        and worker.end_time_ms >= 1000 * since
        and worker.exit_detail.startswith("Failed to execute the setup hook")
    ]
    ended.sort(key=lambda worker: int(worker.end_time_ms))
    if not ended or ended[-1].end_time_ms - ended[0].end_time_ms < 1000 * FAILING_S:
        return None
    why = ended[-1].exit_detail.strip().splitlines()[-1]
    where = ended[-1].worker_address.ip_address
    return f"no worker can begin on {where} ({why}); the same version of rayft has to be installed on every machine"


def _table() -> list[Any]:
    """What Ray knows of each process that it has started, WorkerTableData."""
    messages: Any = importlib.import_module("ray.core.generated.gcs_pb2")
    state: Any = importlib.import_module("ray._private.state").state
    rows = state._connect_and_get_accessor().get_worker_table()
    return [messages.WorkerTableData.FromString(row) for row in rows]


def _known() -> set[int]:
    """The processes with the hook that their raylet knows, by number; on this machine."""
    import psutil

    found = set()
    for worker in _table():
        with contextlib.suppress(psutil.Error):
            if worker.is_alive and set(HOOK) <= set(psutil.Process(worker.pid).environ()):
                found.add(worker.pid)
    return found


def _ask(node: dict[str, Any], cluster: Cluster, count: int) -> None:
    import ray

    messages: Any = importlib.import_module("ray.core.generated.node_manager_pb2")
    services: Any = importlib.import_module("ray.core.generated.node_manager_pb2_grpc")
    channels: Any = importlib.import_module("ray._private.grpc_utils")
    request = messages.PrestartWorkersRequest(
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        runtime_env_info=wanted(cluster),
        keep_alive_duration_secs=KEPT_S,
        num_workers=count,
    )
    with channels.init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        services.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER_S)


def wanted(cluster: Cluster) -> Any:
    """The runtime environment, letter by letter, of the workers that this process's controller starts."""
    import ray
    from ray.runtime_env import RuntimeEnv

    private: Any = importlib.import_module("ray._private.utils")
    info = private.get_runtime_env_info(RuntimeEnv(**environment(cluster)))
    own = json.loads(info.serialized_runtime_env)
    around = json.loads(ray.get_runtime_context().get_runtime_env_string() or "{}")
    if around:  # of a job, or of a trial: Ray adds what is not said, and writes it anew
        variables = around.get("env_vars", {}) | own["env_vars"]
        written = {**around, **own, "env_vars": variables}
        info.serialized_runtime_env = json.dumps(written, sort_keys=True, separators=(",", ":"))
    return info
