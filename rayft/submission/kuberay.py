"""From a recipe to what KubeRay runs: a RayJob, and the ConfigMap that carries the recipe to it.

Nothing is asked of a cluster, the environment or storage: the same recipe gives the same text, on any machine. Secrets
are named, never read. What Kubernetes would refuse is refused before (`kubernetes_rules.py`).

One pod is one Ray node. A worker's pod holds a worker and, beside it, readers of Ray Data and what Ray Tune places. The
head holds Ray's own processes and the driver (`rayft run`), and offers Ray no CPU but the driver's: a worker there
would leave the pod that is meant for it idle, and share its memory with the driver.
"""

from __future__ import annotations

import hashlib
import math
import re
from decimal import Decimal
from typing import Any

import yaml

from rayft import __version__, document
from rayft.errors import RecipeError
from rayft.recipe import Recipe, Submit
from rayft.record import JOB
from rayft.submission.kubernetes_rules import amount, faults, names_machine

Manifest = dict[str, Any]

RAY_VERSION = "2.60.0"  # of cluster/requirements.lock; the operator wants to know it where tokens are checked
RECIPE_FOLDER, RECIPE_FILE = "/etc/rayft", "recipe.yaml"
USER = 1000  # of the image; a number, since Kubernetes can't tell of a name whether it is root

# The operator adds six characters to a RayJob's name for its cluster, and up to ten for that one's services.
_LONGEST_NAME = 47
_HASH = 8

_HEAD_CPUS = 2  # for Ray's own processes and the driver, which mostly wait
_HEAD_MEMORY, _HEAD_SHM = "16Gi", "8Gi"  # at most, however large the workers' pods are
_SUBMITTER_CPU, _SUBMITTER_MEMORY = "500m", "1Gi"  # for `ray job submit`, and the logs that it follows
_SLACK_S = 30  # for Ray to end after a checkpoint that took all of failure.grace_s
_READ_S = 300  # for which a cluster stays by default, where nothing else has the output of its run
_ACCOUNT = "kube-api-access"  # the volume with the account's token, for the autoscaler
# What Ray's objects may take of each. Left to itself Ray takes 30 % of the memory, and goes to the disk in /tmp where
# /dev/shm is smaller than that.
_OF_MEMORY, _OF_SHM = Decimal("0.3"), Decimal("0.9")  # workers exchange gradients through /dev/shm, too


def job_name(recipe: Recipe, attempt: int = 1) -> str:
    """The name of the RayJob and of its ConfigMap: made from the recipe's name, a hash of the recipe, and `attempt`.

    At most 47 characters, a letter first (RFC 1035): `sms-spam-1f0c94ab`, and from the second attempt on
    `sms-spam-1f0c94ab-2`. It is the same on each machine, so that a recipe that is submitted twice meets its own job.
    """
    tail = f"-{digest(recipe)[:_HASH]}" + (f"-{attempt}" if attempt > 1 else "")
    return _label(recipe.name, _LONGEST_NAME - len(tail)) + tail


def attempt_of(name: str, digest: str) -> int:
    """Which attempt a job is, by its name and the hash of its recipe."""
    found = re.search(rf"-{re.escape(digest[:_HASH])}-(\d+)$", name)
    return int(found[1]) if found else 1


def digest(recipe: Recipe) -> str:
    """What identifies a recipe's content; a job's annotation has it too."""
    return hashlib.sha256(recipe.to_yaml().encode()).hexdigest()


def selector(recipe: Recipe) -> str:
    """The label selector of every job whose recipe has this name; the annotation `rayft/run` has its run's folder."""
    return f"rayft/job,rayft/name={_label(recipe.name, 63)}"


def manifests(recipe: Recipe, attempt: int = 1, source: str = "recipe") -> list[Manifest]:
    """The ConfigMap and the RayJob, in the order in which they are to be applied.

    `attempt` (from 1) tells a job from an earlier one of the same recipe that has ended, and is part of its name only.
    Raises RecipeError with everything in the recipe that can't run on Kubernetes; `source` is what it speaks of.
    """
    refuse(recipe, source)
    return [_config_map(recipe, attempt), _ray_job(recipe, attempt)]


def refuse(recipe: Recipe, source: str, uploading: bool = False) -> None:
    """RecipeError with everything in the recipe that can't run on Kubernetes; `uploading` as in `faults`."""
    wrong = faults(recipe, uploading)
    if wrong:
        raise RecipeError(source, tuple(wrong))


def to_yaml(documents: list[Manifest]) -> str:
    """One YAML stream for `kubectl apply -f -`, with the recipe in it as readable as in its file."""
    return str(yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


# --- the two objects


def _config_map(recipe: Recipe, attempt: int) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(recipe, attempt),
        "immutable": True,  # its name holds a hash of what is in it
        "data": {RECIPE_FILE: recipe.to_yaml()},
    }


def _ray_job(recipe: Recipe, attempt: int) -> Manifest:
    asked = recipe.submit or Submit()
    kubernetes, metadata = asked.kubernetes, _metadata(recipe, attempt)
    if kubernetes.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = kubernetes.queue
    spec: Manifest = {
        "entrypoint": f"rayft {'tune' if recipe.tune else 'run'} {RECIPE_FOLDER}/{RECIPE_FILE}",
        "submissionMode": kubernetes.mode,
        # Each retry is a new cluster, whose run goes on from the last committed checkpoint as any other would.
        "backoffLimit": kubernetes.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _ttl(asked),
    }
    if kubernetes.deadline_s is not None:
        spec["activeDeadlineSeconds"] = kubernetes.deadline_s
    if kubernetes.queue is not None:
        spec["suspend"] = True  # until Kueue has admitted it: without Kueue it waits rather than jumps the queue
    if asked.entrypoint_cpus:
        spec["entrypointNumCpus"] = asked.entrypoint_cpus
        # A driver that asks for CPUs may be placed on any node that has them: this one keeps it where the recipe is.
        spec["entrypointResources"] = '{"node:__internal_head__": 0.001}'
    spec["rayClusterSpec"] = _cluster(recipe, asked, metadata["name"])
    if kubernetes.mode == "K8sJobMode":  # the other modes have no pod of their own, and refuse a template for one
        spec["submitterPodTemplate"] = _submitter(recipe, asked, metadata["name"])
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _ttl(asked: Submit) -> int:
    """Seconds for which a cluster stays when its run has ended. The pod that submits keeps the output without it."""
    kubernetes = asked.kubernetes
    if kubernetes.ttl_s is not None:
        return kubernetes.ttl_s
    return 0 if kubernetes.mode == "K8sJobMode" else _READ_S


def _metadata(recipe: Recipe, attempt: int) -> Manifest:
    name = job_name(recipe, attempt)
    return {
        "name": name,
        "namespace": (recipe.submit or Submit()).kubernetes.namespace,
        "labels": _labels(recipe, name),
        "annotations": {
            "rayft/recipe": recipe.name,
            "rayft/run": recipe.folder,
            "rayft/recipe-sha256": digest(recipe),
            "rayft/grace-s": str(recipe.failure.grace_s),  # how long `rayft jobs stop` waits for a checkpoint
            "rayft/version": __version__,
        },
    }


# --- the Ray cluster


def _cluster(recipe: Recipe, asked: Submit, job: str) -> Manifest:
    cluster, kubernetes = recipe.cluster, asked.kubernetes
    elastic = cluster.min_workers != cluster.max_workers
    # Without a Secret of ours the operator makes one: whoever reaches a job server without a token can run anything.
    token = {"secretName": kubernetes.token_secret} if kubernetes.token_secret else {}
    spec: Manifest = {"rayVersion": RAY_VERSION, "authOptions": {"mode": "token", **token}}
    if elastic:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            # A pod waits for work as long as a run waits for pods, or preparing the data would cost the workers theirs.
            "idleTimeoutSeconds": recipe.failure.timeout_s,
            "securityContext": _container_security(),
            # Whoever has this token can make pods: what runs on the head does not see it.
            "volumeMounts": [
                {
                    "name": _ACCOUNT,
                    "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
                    "readOnly": True,
                }
            ],
        }
    # What a node has is said and not left to be counted: the operator would round 3500m up, and Ray finds the GPUs of a
    # machine even where the pod asked for none.
    memory, shm = _head_memory(recipe, asked)
    spec["headGroupSpec"] = {
        "rayStartParams": {
            "num-cpus": str(math.ceil(asked.entrypoint_cpus)),
            "num-gpus": "0",
            "object-store-memory": _object_store(memory, shm),
        },
        "template": _head(recipe, asked, job, elastic),
    }
    spec["workerGroupSpecs"] = [
        {
            "groupName": "workers",
            # The operator submits once all of these run, which must not hang on room for the most: a run that begins
            # with fewer asks the autoscaler for the others (`placement.Growth`).
            "replicas": cluster.min_workers * kubernetes.trials_at_once,
            "minReplicas": cluster.min_workers * kubernetes.trials_at_once,
            "maxReplicas": cluster.max_workers * kubernetes.trials_at_once,
            "rayStartParams": {
                "num-cpus": str(int(amount(kubernetes.cpu) or 0)),
                "num-gpus": str(cluster.gpus_per_worker),
                "object-store-memory": _object_store(kubernetes.memory, kubernetes.shm),
            },
            "template": _worker(recipe, asked, job),
        }
    ]
    return spec


def _head(recipe: Recipe, asked: Submit, job: str, autoscaler: bool) -> Manifest:
    memory, shm = _head_memory(recipe, asked)
    resources = _resources(str(_HEAD_CPUS + math.ceil(asked.entrypoint_cpus)), memory)
    pod = _pod(recipe, asked, job, _ray_container("ray-head", recipe, asked, resources), shm)
    spec = pod["spec"]
    spec["containers"][0]["volumeMounts"].append({"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True})
    spec["containers"][0]["env"] = [{"name": JOB, "value": job}]
    spec["volumes"].append({"name": "recipe", "configMap": {"name": job}})
    if autoscaler:
        spec["volumes"].append(_account())
    return pod


def _account() -> Manifest:
    """The volume that Kubernetes would mount into every container of a pod, for one of them."""
    certificate = {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    namespace = {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}
    sources = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
        {"configMap": certificate},
        {"downwardAPI": {"items": [namespace]}},
    ]
    return {"name": _ACCOUNT, "projected": {"sources": sources}}


def _head_memory(recipe: Recipe, asked: Submit) -> tuple[str, str]:
    """The head's memory, and how much of it is shared."""
    memory, shm = asked.kubernetes.memory, asked.kubernetes.shm
    if recipe.tune:  # a sweep's driver puts the pretrained weights into the object store of its own node
        return memory, shm
    return _smaller(memory, _HEAD_MEMORY), _smaller(shm, _HEAD_SHM)


def _object_store(memory: str, shm: str) -> str:
    """Bytes of Ray's object store in a pod with so much memory, of which so much is shared."""
    return str(int(min(_OF_MEMORY * (amount(memory) or 0), _OF_SHM * (amount(shm) or 0))))


def _worker(recipe: Recipe, asked: Submit, job: str) -> Manifest:
    kubernetes, gpus = asked.kubernetes, recipe.cluster.gpus_per_worker
    container = _ray_container("ray-worker", recipe, asked, _resources(kubernetes.cpu, kubernetes.memory, gpus))
    pod = _pod(recipe, asked, job, container, kubernetes.shm)
    if kubernetes.node_selector:
        pod["spec"]["nodeSelector"] = dict(kubernetes.node_selector)
    return pod


def _submitter(recipe: Recipe, asked: Submit, job: str) -> Manifest:
    container = {
        "name": "ray-job-submitter",
        "image": _image(recipe, asked),
        "resources": _resources(_SUBMITTER_CPU, _SUBMITTER_MEMORY),
        "securityContext": _container_security(),
    }
    return _pod(recipe, asked, job, container)


# --- pods


def _pod(recipe: Recipe, asked: Submit, job: str, container: Manifest, shm: str | None = None) -> Manifest:
    """The template of a pod with one container, and with shared memory of the size `shm`.

    Tolerations are for every pod, since they allow and don't demand. Of the node selector a pod without GPUs leaves out
    what names a machine, where the workers have GPUs: it would take the CPUs of a node that is there for them.
    """
    kubernetes = asked.kubernetes
    gpus = recipe.cluster.gpus_per_worker > 0
    selector = {key: value for key, value in kubernetes.node_selector.items() if not (gpus and names_machine(key))}
    spec: Manifest = {
        "automountServiceAccountToken": False,
        "containers": [container],
        # A container that ends takes its pod along, and the operator makes another: a Ray node does not start twice.
        "restartPolicy": "Never",
        "securityContext": _pod_security(),
        "terminationGracePeriodSeconds": recipe.failure.grace_s + _SLACK_S,
    }
    if kubernetes.service_account:
        spec["serviceAccountName"] = kubernetes.service_account
    if kubernetes.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in kubernetes.image_pull_secrets]
    if selector:
        spec["nodeSelector"] = selector
    if kubernetes.tolerations:
        spec["tolerations"] = [dict(one) for one in kubernetes.tolerations]
    if shm is not None:
        spec["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}}]
    return {"metadata": {"labels": _labels(recipe, job)}, "spec": spec}


def _ray_container(name: str, recipe: Recipe, asked: Submit, resources: Manifest) -> Manifest:
    secret = asked.kubernetes.credentials_secret
    return {
        "name": name,
        "image": _image(recipe, asked),
        **({"envFrom": [{"secretRef": {"name": secret}}]} if secret else {}),
        "resources": resources,
        "securityContext": _container_security(),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }


def _resources(cpu: str, memory: str, gpus: int = 0) -> Manifest:
    """CPUs are asked for and not limited: a limit halts a process that could use what nobody else does."""
    limits = {"memory": memory, **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return {"requests": {"cpu": cpu, **limits}, "limits": limits}


def _pod_security() -> Manifest:
    """With that of the containers what the "restricted" level of Kubernetes' Pod Security Standards asks for."""
    return {
        "fsGroup": USER,
        "runAsGroup": USER,
        "runAsNonRoot": True,
        "runAsUser": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "privileged": False}


def _image(recipe: Recipe, asked: Submit) -> str:
    """One image for every pod, so that driver and workers have the same torch: with GPUs its CUDA build."""
    return asked.image or f"rayft:{__version__}" + ("-gpu" if recipe.cluster.gpus_per_worker else "")


def _smaller(one: str, other: str) -> str:
    return min(one, other, key=lambda quantity: amount(quantity) or 0)


# --- names


def _labels(recipe: Recipe, job: str) -> dict[str, str]:
    return {"rayft/job": job, "rayft/name": _label(recipe.name, 63)}


def _label(name: str, longest: int) -> str:
    """A run's name as a DNS label of at most so many characters; other names may give the same one."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"run-{plain}".strip("-")
    return plain[:longest].strip("-")


# --- YAML


class _Dumper(yaml.SafeDumper):
    """Quotes text that another YAML reader could take for a number (`12e45` in Go), and writes lines as lines."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else '"' if re.match(r"[-+.\d]|[yYnN]$", value) else None
    return document.scalar(dumper, value, style)


_Dumper.add_representer(str, _text)
