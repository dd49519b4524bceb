"""What a RayJob's object and pods say: its state in the words of any job, what it waits for, where its output is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from rayft.submission.kuberay import Manifest, attempt_of
from rayft.submission.servers import TERMINAL, Job

QUEUE = "kueue.x-k8s.io/queue-name"
_STARTING = ("ContainerCreating", "PodInitializing")  # what a sound pod waits for, too
_EXIT_CODE = re.compile(r"failed with exit code (\d+)")  # Ray's words, in the RayJob's message


def plain(job: Manifest) -> Job:
    """A RayJob as what `rayft jobs` knows of any job."""
    metadata, status = job["metadata"], job.get("status") or {}
    known, inner = metadata.get("annotations") or {}, status.get("rayJobInfo") or {}
    message = status.get("message") or status.get("reason") or None
    code = _EXIT_CODE.search(message or "")
    return Job(
        id=metadata["name"],
        status=status_of(job),
        recipe=known.get("rayft/recipe"),
        recipe_hash=known.get("rayft/recipe-sha256"),
        run=known.get("rayft/run"),
        grace_s=float(known.get("rayft/grace-s") or 0),
        started=_seconds(inner.get("startTime") or status.get("startTime") or metadata.get("creationTimestamp")),
        ended=_seconds(status.get("endTime")),
        exit_code=int(code[1]) if code else None,
        message=message,
    )


def status_of(job: Manifest) -> str:
    """Ray's word for the state of a RayJob: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.

    The operator decides whether it is over: `jobStatus` is that of one try, and others may follow. A RayJob that Kueue
    holds back, and one that has been suspended by `stop`, are in the same state; only the first has a queue.
    """
    status = job.get("status") or {}
    deployment, ray = status.get("jobDeploymentStatus") or "", status.get("jobStatus") or ""
    if deployment == "Complete":
        return "SUCCEEDED" if ray not in TERMINAL else ray
    if deployment in ("Failed", "ValidationFailed"):  # the operator never looks again at one that it finds invalid
        return "STOPPED" if ray == "STOPPED" else "FAILED"
    if deployment == "Suspended" and job["spec"].get("suspend") and QUEUE not in job["metadata"].get("labels", {}):
        return "STOPPED"
    return "RUNNING" if deployment == "Running" and ray in ("RUNNING", *TERMINAL) else "PENDING"


def held_back(job: Manifest) -> str | None:
    """That a queue has not admitted the RayJob yet; None where it has, or there is none."""
    queue = (job["metadata"].get("labels") or {}).get(QUEUE)
    return f"Kueue has not admitted it from the queue {queue} yet" if queue and job["spec"].get("suspend") else None


def unready(pods: list[Any]) -> str | None:
    """What keeps the first of these pods (as Kubernetes' client has them) that does not run from it; None: all run.

    Kubernetes' own words, on one line: what a container waits for (an image, a Secret), or why no node takes the pod.
    """
    pending = [pod for pod in pods if pod.status.phase == "Pending"]
    told = [(pod.metadata.name, why) for pod in pending for why in _reasons(pod.status)]
    return next((f"pod {name}: {' '.join(why.split())[:300]}" for name, why in told), None)


def _reasons(status: Any) -> Iterator[str]:
    for container in [*(status.init_container_statuses or ()), *(status.container_statuses or ())]:
        waiting = container.state and container.state.waiting
        if waiting and waiting.reason not in _STARTING:
            yield f"{waiting.reason}: {waiting.message or ''}".rstrip(": ")
    for condition in status.conditions or ():
        if condition.type == "PodScheduled" and condition.status == "False":
            yield f"{condition.reason}: {condition.message or ''}".rstrip(": ")


def age(job: Manifest) -> tuple[str, int]:
    """By what RayJobs are put in the order in which they were made; Kubernetes keeps whole seconds."""
    metadata = job["metadata"]
    digest = (metadata.get("annotations") or {}).get("rayft/recipe-sha256", "")
    return metadata.get("creationTimestamp", ""), attempt_of(metadata["name"], digest)


def _seconds(time_of_day: str | None) -> float | None:
    return datetime.fromisoformat(time_of_day).timestamp() if time_of_day else None


def elsewhere(job: Manifest, mode: str, namespace: str) -> str:
    """How to see the output of a job whose driver is not submitted by a pod of its own."""
    name, status = job["metadata"]["name"], job.get("status") or {}
    head = f"kubectl -n {namespace} {{}} -l ray.io/originated-from-cr-name={name},ray.io/node-type=head"
    if mode == "SidecarMode":
        command = head.format("logs -f --tail=-1") + " -c ray-job-submitter"
    else:
        cluster, submission = status.get("rayClusterName") or "CLUSTER", status.get("jobId") or "JOB"
        command = f"kubectl -n {namespace} exec svc/{cluster}-head-svc -- ray job logs {submission} --follow"
    return f"in {mode} the output is in the cluster alone; this shows it: {command}\n"
