"""The state of a RayJob in the words of any job: the operator's states, Kueue's and ours."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.submission.kuberay import attempt_of, digest, job_name, manifests
from rayft.submission.rayjobs import QUEUE, plain, status_of
from test_kubernetes_rules import recipe_with


@pytest.mark.parametrize(
    ("deployment", "ray", "suspend", "queued", "meant"),
    [
        ("", "", False, False, "PENDING"),
        ("", "", True, True, "PENDING"),
        ("Initializing", "", False, False, "PENDING"),
        ("Running", "", False, False, "PENDING"),
        ("Running", "PENDING", False, False, "PENDING"),
        ("Running", "RUNNING", False, False, "RUNNING"),
        ("Running", "SUCCEEDED", False, False, "RUNNING"),  # what submits has not ended
        ("Retrying", "FAILED", False, False, "PENDING"),
        ("Suspending", "RUNNING", True, False, "PENDING"),
        ("Suspended", "", True, False, "STOPPED"),
        ("Suspended", "", False, False, "PENDING"),  # it is about to run again
        ("Suspended", "", True, True, "PENDING"),
        ("Complete", "SUCCEEDED", False, False, "SUCCEEDED"),
        ("Complete", "STOPPED", False, False, "STOPPED"),
        ("Failed", "FAILED", False, False, "FAILED"),
        ("Failed", "", False, False, "FAILED"),
        ("Failed", "RUNNING", False, False, "FAILED"),
        ("ValidationFailed", "", False, False, "FAILED"),
    ],
)
def test_the_operator_decides_whether_a_job_is_over(
    deployment: str, ray: str, suspend: bool, queued: bool, meant: str
) -> None:
    job: dict[str, Any] = {
        "metadata": {"name": "n", "labels": {QUEUE: "q"} if queued else {}},
        "spec": {"suspend": suspend},
        "status": {"jobDeploymentStatus": deployment, "jobStatus": ray},
    }
    assert status_of(job) == meant


def test_a_ray_job_says_what_a_stop_and_a_list_need() -> None:
    recipe = recipe_with({"name": "Teams/One", "failure.grace_s": 90})
    job = manifests(recipe)[1]
    job["metadata"]["creationTimestamp"] = "2026-11-21T10:00:00Z"
    found = plain(job)
    assert (found.recipe, found.run, found.grace_s) == ("Teams/One", "s3://bucket/runs/Teams/One", 90.0)
    assert (found.id, found.recipe_hash) == (job_name(recipe), digest(recipe))
    assert (found.status, found.started, found.ended) == ("PENDING", 1795255200.0, None)
    job["status"] = {
        "message": "Job entrypoint command failed with exit code 130, …",
        "endTime": "2026-11-21T10:01:00Z",
    }
    assert (plain(job).exit_code, plain(job).ended) == (130, 1795255260.0)


@pytest.mark.parametrize("name", ["n", "a" * 60, "run-12345678-2"])
@pytest.mark.parametrize("attempt", [1, 2, 137])
def test_an_attempt_is_read_from_a_name(name: str, attempt: int) -> None:
    recipe = recipe_with({"name": name})
    assert attempt_of(job_name(recipe, attempt), digest(recipe)) == attempt
