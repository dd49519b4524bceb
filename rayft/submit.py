"""Carries a recipe to a cluster's job server. What runs there is `rayft run`, or `rayft tune` where it searches.

A job's id follows from the run's folder and the attempt, so that submitting twice runs once: a second submission
attaches to the job that is there, and one after a failure starts the next attempt.
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
from rayft import preflight, reach, storage
from rayft.errors import RunRefused, StorageError
from rayft.jobserver import TERMINAL, JobServer
from rayft.recipe import Recipe
from rayft.record import Record

Show = Callable[[dict[str, Any]], None]
FILE = "recipe.yaml"
_ATTEMPT = re.compile(r"-a(\d+)$")


@dataclass(frozen=True)
class Submitted:
    """A job on a cluster. `attached`: it was there before; `status` is Ray's word for its state then."""

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
    here = reach.is_here(server.address)
    if not here and not recipe.cluster.shared_storage:
        reach.refuse_out_of_reach(recipe, reach.local_paths(recipe), upload)
    run = storage.join(storage.absolute(recipe.storage), recipe.name)
    prefix, wanted = job_prefix(recipe.name, run), digest(recipe)
    found = _newest(server, prefix)
    if found is not None:
        attempt, job = found
        status, same = job.status.value, (job.metadata or {}).get("recipe_hash") == wanted
        if status not in TERMINAL and not same:
            raise RunRefused(
                f"the job {job.submission_id} runs {run} with another recipe; stop it (`rayft jobs stop`), or give "
                "this one another `name=`"
            )
        if status not in TERMINAL or (status == "SUCCEEDED" and same):
            return Submitted(job.submission_id, run, server.address, attempt, True, status)
    attempt = found[0] + 1 if found is not None else 1
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


def _newest(server: JobServer, prefix: str) -> tuple[int, Any] | None:
    """The newest attempt at a run, and its job."""
    found = {int(number[1]): job for job in server.jobs(prefix) if (number := _ATTEMPT.search(job.submission_id))}
    return max(found.items(), key=lambda pair: pair[0], default=None)
