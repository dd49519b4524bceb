"""Can the cluster take a run: what is refused before anything starts, room for workers, the memory each will have."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from rayft import storage
from rayft.errors import ClusterError
from rayft.paths import local_paths
from rayft.recipe import Cluster, Recipe
from rayft.text import counted, size
from rayft.training.footprint import Parameters

ANSWER_S = 60.0  # for a node to say how much memory it has
KNOCK_S = 2.0  # for a node to take a connection
LOOK_S = 0.5
SETTLE_S = 5.0  # in which the place of a group that has ended is given free
WISH_S = 10.0  # between two wishes for more machines
WISHED_S = 40.0  # for how long one holds
JOB_FOLDER = "/runtime_resources/working_dir_files/"  # where Ray unpacks the working directory of a job
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_DEVICES = "import torch.cuda as c; print(*(c.get_device_properties(i).total_memory for i in range(c.device_count())))"


def refuse(recipe: Recipe) -> None:
    """ClusterError where the cluster that Ray has joined can't take the run; all that is wrong at once."""
    found = faults(recipe, living_nodes())
    if found:
        raise ClusterError("\n".join(found))


def faults(recipe: Recipe, nodes: list[dict[str, Any]]) -> list[str]:
    """Why a cluster of these nodes can't take the run; nothing where it can."""
    cluster = recipe.cluster
    workers, found = cluster.min_workers, []
    for resource, each in _needs(cluster).items():
        have = int(sum(node["Resources"].get(resource, 0) for node in nodes))
        if workers * each > have:
            found.append(
                f"cluster: {counted(workers, 'worker')} with {counted(each, resource)} each need {workers * each}, "
                f"and the cluster has {have}; lower cluster.workers or cluster.{resource.lower()}s_per_worker"
            )
    held = sum(spots(cluster, node) for node in nodes)
    if not found and held < workers:
        wanted = " and ".join(counted(each, resource) for resource, each in _needs(cluster).items())
        found.append(
            f"cluster: a worker needs {wanted} on one machine, and the machines have room for {held} of {workers} "
            "such workers; lower cluster.workers or what each of them takes"
        )
    local = unshared(recipe)
    if len(nodes) > 1 and local:
        found.append(
            f"cluster: it has {len(nodes)} machines, and {', '.join(local)} may exist on this one alone; "
            "use an URL such as s3://bucket/prefix, or say cluster.shared_storage=true where all of them share it"
        )
    return found


def crowded(cluster: Cluster, processors: int) -> str | None:
    """What to say where the workers ask for more processors than there really are; else None."""
    workers, each = cluster.max_workers, cluster.cpus_per_worker
    if workers * each <= processors:
        return None
    return (
        f"cluster: {counted(workers, 'worker')} with {counted(each, 'CPU')} each share this machine's "
        f"{counted(processors, 'processor')}, so that each is slower; lower cluster.workers or cluster.cpus_per_worker"
    )


def living_nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster that answer and are not about to leave, as Ray lists them.

    Ray lists a machine that died or was cut off for some seconds more.
    """
    import ray

    listed = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving()]
    with ThreadPoolExecutor(32) as pool:
        return [node for node, answers in zip(listed, pool.map(_answers, listed), strict=True) if answers]


def leaving() -> set[str]:
    """The ids of nodes that have been told to leave (a preemption notice, a scale-down)."""
    from ray._private.state import state  # where Ray Train takes it from, too

    return set(state.get_draining_nodes())


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=KNOCK_S).close()
    except OSError:
        return False
    return True


def room(cluster: Cluster) -> int:
    """How many (more) workers the cluster can take now, beside all that runs on it."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return sum(spots(cluster, {"Resources": free.get(node["NodeID"], {})}) for node in living_nodes())


def free_cpus() -> int:
    """How many of the cluster's CPUs nobody holds now."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return sum(int(free.get(node["NodeID"], {}).get("CPU", 0)) for node in living_nodes())


class Growth:
    """The wish for workers that a run has no room for yet, as the cluster's autoscaler hears it; others hear nothing.

    It passes through the actor in which Ray Train's and Ray Data's own wishes are added up. For one thread.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.cluster, self._who = recipe.cluster, f"rayft {recipe.folder}"
        self._wished = float("-inf")
        self._coordinator: Any = None

    def wish(self, workers: int) -> None:
        """Asks for machines that hold so many more workers; asked again, the wish is renewed before it expires."""
        if time.monotonic() - self._wished < WISH_S:
            return
        from ray.data._internal.cluster_autoscaler import base_autoscaling_coordinator as base
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as default

        self._wished = time.monotonic()
        self._coordinator = self._coordinator or default.DefaultAutoscalingCoordinator(self._who)
        self._coordinator.request_resources(
            [_needs(self.cluster)] * workers, WISHED_S, priority=base.ResourceRequestPriority.LOW
        )

    def end(self) -> None:
        """Takes the wish back."""
        if self._coordinator is not None:
            self._coordinator.cancel_request()
            self._coordinator = None
        self._wished = float("-inf")


def settled(recipe: Recipe, show: Callable[[dict[str, Any]], None], asked: Callable[[], object]) -> int:
    """Waits until the cluster has room, and answers for how many workers, between the recipe's least and most.

    For less than the most it waits only some seconds, in which what has just ended gives its place free. ClusterError
    where there is not room for the least within `failure.timeout_s`. `asked` ends the waiting early: 0 then.
    """
    growth = Growth(recipe)
    try:
        return _settled(recipe, growth, show, asked)
    finally:
        growth.end()


def _settled(
    recipe: Recipe, growth: Growth, show: Callable[[dict[str, Any]], None], asked: Callable[[], object]
) -> int:
    cluster, begun, told = recipe.cluster, time.monotonic(), False
    while True:
        free, waited = room(cluster), time.monotonic() - begun
        if free >= cluster.max_workers or (free >= cluster.min_workers and waited > SETTLE_S):
            return min(free, cluster.max_workers)
        if asked():
            return 0
        growth.wish(cluster.max_workers)
        text = f"{counted(cluster.min_workers, 'worker')} needed, and the cluster has room for {free} now"
        if waited > recipe.failure.timeout_s:
            raise ClusterError(f"cluster: {text}; waited {recipe.failure.timeout_s} s (failure.timeout_s) for more")
        if waited > SETTLE_S and not told:
            show({"event": "warning", "text": f"waiting for room: {text}"})
            told = True
        time.sleep(LOOK_S)


def _needs(cluster: Cluster) -> dict[str, int]:
    needs = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return {resource: each for resource, each in needs.items() if each}


def spots(cluster: Cluster, node: dict[str, Any]) -> int:
    """How many workers fit on a node when it is idle."""
    return min(int(node["Resources"].get(resource, 0) // each) for resource, each in _needs(cluster).items())


def unshared(recipe: Recipe) -> list[str]:
    """The recipe's fields whose paths lie on one machine alone, with the first such path."""
    if recipe.cluster.shared_storage:
        return []
    first: dict[str, str] = {}
    for one in local_paths(recipe):
        first.setdefault(one.field, one.path)
    return [f"{field} ({path})" for field, path in first.items()]


def passing(recipe: Recipe) -> str | None:
    """What to say where the run would lie in a job's copy of its working directory, which Ray deletes; else None."""
    if not storage.is_local(recipe.storage) or JOB_FOLDER not in storage.absolute(recipe.storage):
        return None
    return (
        f"storage ({recipe.storage}) lies in this job's copy of its working directory, which Ray deletes in the end; "
        "give storage=/a/folder that stays, or an URL such as s3://bucket/prefix"
    )


def worker_memory(cluster: Cluster) -> int | None:
    """Bytes that a worker has where it has the least: its GPU's, or its share of a machine's; None where unknown."""
    gpus = cluster.gpus_per_worker > 0
    return min((found if gpus else found // workers for found, workers in memories(cluster, gpus)), default=None)


def short_of_memory(recipe: Recipe, parameters: Parameters, machines: list[tuple[int, int]]) -> str | None:
    """What to say where one of the `machines`, as of `memories`, has too little of its own beside its GPUs'.

    `recipe` has its ZeRO stage. None without GPUs: there `worker_memory` says it.
    """
    if recipe.cluster.gpus_per_worker == 0:
        return None
    wanted = [(parameters.machine_bytes(recipe, workers), there, workers) for there, workers in machines]
    needed, there, workers = max(wanted, key=lambda one: one[0] - one[1], default=(0, 0, 0))
    if needed <= there:
        return None
    return (
        f"memory: to read the model, to hold what is offloaded and to export, {counted(workers, 'worker')} of one "
        f"machine need{'s' * (workers == 1)} about {size(needed)} beside the GPUs', and it has {size(there)}; "
        "deepspeed.zero_stage=3, no deepspeed.offload, fewer workers on a machine, or more memory mend that"
    )


def memories(cluster: Cluster, gpu: bool) -> list[tuple[int, int]]:
    """(bytes, workers) of every machine that can hold a worker and says its memory: its own, or its smallest GPU's.

    A machine is taken to hold as many workers as fit, as when they are packed.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    hosts = [(node, spots(cluster, node)) for node in living_nodes() if spots(cluster, node)]
    if [node["NodeID"] for node, _ in hosts] == [ray.get_runtime_context().get_node_id()]:
        answers = [_memory(gpu)]
    else:
        ask = ray.remote(num_cpus=0, max_retries=0)(_memory)
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node, _ in hosts]
        try:
            answers = ray.get([ask.options(scheduling_strategy=on).remote(gpu) for on in places], timeout=ANSWER_S)
        except ray.exceptions.RayError:  # GetTimeoutError is one
            return []
    workers = (min(count, cluster.max_workers) for _, count in hosts)
    return [(answer, held) for answer, held in zip(answers, workers, strict=True) if answer]


def _memory(gpu: bool) -> int | None:
    """On a node: the memory of its smallest GPU, or its own."""
    if not gpu:
        return host_memory()
    # In a process of its own: Ray hides the devices from tasks that hold none.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", _DEVICES], capture_output=True, text=True, env=environment, check=False
    )
    sizes = [int(size) for size in done.stdout.split()] if done.returncode == 0 else []
    return min(sizes, default=None)


def host_memory() -> int:
    """Bytes of memory of this machine, or of this container where it is given less."""
    import psutil

    found = [int(psutil.virtual_memory().total)]
    for file in _CGROUPS:
        with suppress(OSError, ValueError), open(file) as limit:  # `max` is no number
            found.append(int(limit.read()))
    return min(found)
