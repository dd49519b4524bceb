"""How many trials of a sweep run at a time, so that whoever reads for them finds a processor too."""

from __future__ import annotations

import os

from rayft.errors import ClusterError
from rayft.fields.search import prepares
from rayft.launch import placement
from rayft.launch.session import DATA_CPUS
from rayft.recipe import Recipe


def local(recipe: Recipe) -> int:
    """How many trials this machine's processors run at a time."""
    cluster = recipe.cluster
    return max(1, (os.cpu_count() or 1) // (cluster.cpus_per_worker * cluster.max_workers))


def at_once(recipe: Recipe) -> int:
    """How many trials run at a time: as many as the cluster holds, those of a local one by its real processors.

    Where they prepare rows of their own they leave CPUs to the readers: a trial would wait for its rows forever once
    each CPU is held by one that waits.
    """
    cluster = recipe.cluster
    workers = placement.room(cluster)
    if _preparing(recipe):
        beside = (placement.free_cpus() - DATA_CPUS) // cluster.cpus_per_worker
        workers = min(workers, max(cluster.max_workers, beside))
    found = workers // cluster.max_workers
    if os.environ.get("RAY_ADDRESS") is None and not cluster.gpus_per_worker:
        found = min(found, local(recipe))
    return max(1, found)


def refuse(recipe: Recipe) -> None:
    """ClusterError where the cluster can't take a trial, or one that prepares its rows leaves no CPU for that."""
    placement.refuse(recipe)
    cluster, fields = recipe.cluster, _preparing(recipe)
    each = cluster.max_workers * cluster.cpus_per_worker
    there = sum(int(node["Resources"].get("CPU", 0)) for node in placement.living_nodes())
    if fields and there <= each:
        raise ClusterError(
            f"cluster: trials with another {' or '.join(fields)} prepare rows of their own, for which one needs a CPU "
            f"beside its {each}, and the cluster has {there}; lower cluster.workers or cluster.cpus_per_worker, or add "
            "a CPU"
        )


def _preparing(recipe: Recipe) -> list[str]:
    """The fields of the search that change how rows are prepared."""
    return [name for name in (recipe.tune.search if recipe.tune is not None else ()) if prepares(name)]
