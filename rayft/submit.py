"""Carries a recipe to a Ray cluster's job server or to Kubernetes. What runs there is `rayft run`, or `rayft tune`.

A job's id follows from the run's folder (of a RayJob: from the recipe) and the attempt, so that submitting twice runs
once: a second submission attaches to the job that is there, and one after a failure, or after the run's result was
deleted, starts the next attempt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import rayft
from rayft import preflight, storage
from rayft.errors import RunRefused, StorageError
from rayft.paths import local_paths
from rayft.recipe import Recipe
from rayft.record import Record
from rayft.submission import kuberay, reach
from rayft.submission.jobserver import JobServer
from rayft.submission.kubernetes_api import Kubernetes
from rayft.submission.servers import TERMINAL, Job

Show = Callable[[dict[str, Any]], None]
FILE = "recipe.yaml"
_ATTEMPT = re.compile(r"-a(\d+)$")


@dataclass(frozen=True)
class Submitted:
    """A job on a cluster. `attached`: it was there before; `status` is Ray's word for its state then.

    `attempt` counts the jobs that were submitted; within one, a run counts its own.
    """

    job: str
    run: str
    address: str
    attempt: int
    attached: bool
    status: str

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def submit(recipe: Recipe, server: JobServer, *, upload: bool, show: Show) -> Submitted:
    """The job that runs `recipe` on the cluster, submitted now or found there.

    Refused (a RayftError with exit code 2) where the cluster can't reach a path, where `check` finds a fault that shows
    from here, and where a job runs this run with another recipe.
    """
    recipe = recipe.resolved()
    upload = upload and not recipe.cluster.shared_storage  # what every machine has need not be brought
    here = reach.is_here(server.address)
    if upload or not (here or recipe.cluster.shared_storage):
        reach.refuse_out_of_reach(recipe, local_paths(recipe), upload)
    run = storage.join(storage.absolute(recipe.storage), recipe.name)
    prefix, wanted = job_prefix(recipe.name, run), digest(recipe)
    jobs = server.jobs(prefix)
    found = standing(jobs, wanted, run, server.options)
    visible = here or not storage.is_local(run) or storage.exists(storage.absolute(recipe.storage))
    if found is not None and not (visible and deleted(found, run)):
        return Submitted(found.id, run, server.address, _attempt(found), True, found.status)
    attempt = max(map(_attempt, jobs), default=0) + 1
    preflight.refuse_from_here(recipe, show)
    sent = reach.carried(recipe, server.address, upload, show)
    with contextlib.suppress(StorageError):  # from here it may be out of reach; the cluster looks again
        Record(sent.folder).standing(sent)
    job_id = f"{prefix}{attempt}"
    with tempfile.TemporaryDirectory(prefix="rayft-submit-") as folder:
        with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
            file.write(sent.to_yaml())
        show({"event": "stage", "name": "submitting"})
        new = server.submit(
            job_id,
            entrypoint=entrypoint(recipe, FILE),
            runtime_env=environment(recipe, folder),
            metadata=metadata(recipe, run, wanted),
            entrypoint_num_cpus=recipe.submit.entrypoint_cpus if recipe.submit else 0,
        )
    return Submitted(job_id, run, server.address, attempt, not new, "PENDING")


def apply(recipe: Recipe, server: Kubernetes, *, upload: bool, show: Show, source: str) -> Submitted:
    """The RayJob that runs `recipe` on Kubernetes, created now or found there; refused as `submit` refuses.

    Paths stay as they are: a pod has none of this machine's, and what is said to be shared is in its image, so that it
    can't be looked at from here.
    """
    if upload and not recipe.cluster.shared_storage:
        reach.refuse_out_of_reach(recipe, local_paths(recipe), upload)
        kuberay.refuse(recipe, source, uploading=True)  # or a refused recipe would leave its inputs in storage
        recipe = reach.uploaded(recipe, show)
    kuberay.refuse(recipe, source)  # whatever can't run there is refused first
    run, wanted = recipe.folder, kuberay.digest(recipe)
    jobs = [job for job in server.jobs(kuberay.selector(recipe)) if job.run == run]
    same = [kuberay.attempt_of(job.id, wanted) for job in jobs if job.recipe_hash == wanted]
    found = standing(jobs, wanted, run, server.options)
    if found is not None and not deleted(found, run):
        server.adopt(found.id)  # where a submission has ended between the two objects
        attempt = kuberay.attempt_of(found.id, wanted)
        return Submitted(found.id, run, server.address, attempt, True, found.status)
    attempt = max(same, default=0) + 1
    if not recipe.cluster.shared_storage:
        preflight.refuse_from_here(recipe, show)
        reach.refuse_files_of_rows(recipe)
    with contextlib.suppress(StorageError):  # from here it may be out of reach; the cluster looks again
        Record(run).standing(recipe)
    config_map, ray_job = kuberay.manifests(recipe, attempt, source)
    with contextlib.suppress(StorageError):
        Record(run).forget_failure(ray_job["metadata"]["name"])
    show({"event": "stage", "name": "submitting"})
    new = server.submit(config_map, ray_job)
    return Submitted(ray_job["metadata"]["name"], run, server.address, attempt, not new, "PENDING")


def standing(jobs: list[Job], wanted: str, run: str, options: str) -> Job | None:
    """Which of the jobs of a run, the newest first, a submission of the recipe `wanted` attaches to; None: a new one.

    `options` lead `rayft jobs` to the server. RunRefused where one with another recipe has not ended.
    """
    for job in jobs:
        if job.status in TERMINAL:
            continue
        if job.recipe_hash != wanted:
            raise RunRefused(
                f"the job {job.id} runs {run} with another recipe; stop it (`rayft jobs stop {job.id}{options}`), or "
                "give this one another `name=`"
            )
        return job
    newest = jobs[0] if jobs else None
    return newest if newest and newest.status == "SUCCEEDED" and newest.recipe_hash == wanted else None


def deleted(job: Job, run: str) -> bool:
    """Has a job succeeded whose run's result is gone by now? Storage that can't be read from here says nothing."""
    if job.status == "SUCCEEDED":
        with contextlib.suppress(StorageError):
            return not storage.exists(storage.join(run, "result.json"))
    return False


def job_prefix(name: str, run: str) -> str:
    """What the ids of all jobs for the run in the folder `run` begin with; the attempt follows."""
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    return f"rayft-{readable}-{hashlib.sha256(run.encode()).hexdigest()[:8]}-a"


def digest(recipe: Recipe) -> str:
    """What identifies a recipe's content."""
    return hashlib.sha256(json.dumps(recipe.dump(), sort_keys=True).encode()).hexdigest()[:16]


def entrypoint(recipe: Recipe, file: str) -> str:
    """The command on the cluster; rayft may come with the job, without a script of its own on the PATH."""
    return f"python -m rayft {'tune' if recipe.tune else 'run'} {file}"


def metadata(recipe: Recipe, run: str, recipe_hash: str) -> dict[str, str]:
    """What the job server keeps beside the job, from which `rayft jobs` finds its run; no secrets are in a recipe."""
    grace = str(recipe.failure.grace_s)
    known = {"recipe": recipe.name, "recipe_hash": recipe_hash, "run": storage.shown(run), "grace_s": grace}
    return known | {"rayft_version": rayft.__version__, "kind": "sweep" if recipe.tune else "run"}


def environment(recipe: Recipe, folder: str) -> dict[str, Any]:
    """The job's runtime environment: a folder with the recipe alone, and rayft itself unless an image holds it."""
    found: dict[str, Any] = {"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1"}}
    if recipe.submit is None or recipe.submit.image is None:
        found["py_modules"] = [os.path.dirname(os.path.abspath(rayft.__file__))]
    return found


def _attempt(job: Job) -> int:
    number = _ATTEMPT.search(job.id)
    return int(number[1]) if number else 0
