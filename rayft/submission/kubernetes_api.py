"""How Kubernetes is asked to run a recipe: KubeRay's RayJobs are created, found, followed and stopped.

Spoken to with Kubernetes' own client, and with the rights of the kubeconfig (KUBECONFIG, ~/.kube/config), or inside a
pod of its service account. It takes a role with `get`, `list`, `create`, `patch` and `delete` on `rayjobs` of ray.io,
`create` and `patch` on `configmaps`, `list` on `pods` and `get` on `pods/log`. Credentials are sent, never shown.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import yaml

from rayft.errors import ClusterError, RunRefused, TrainingError
from rayft.submission.kuberay import Manifest
from rayft.submission.podlogs import Lines
from rayft.submission.rayjobs import QUEUE, age, elsewhere, held_back, plain, unready
from rayft.submission.servers import PATIENCE_S, TERMINAL, Job, Unreachable

LOOK_S = 1.0
CONNECT_S, READ_S = 10.0, 60.0  # a log that is silent for so long is asked for anew
RAY_JOBS: dict[str, str] = {"group": "ray.io", "version": "v1", "plural": "rayjobs"}
OURS = "rayft/job"  # the label that every RayJob of rayft has
_KUBECONFIG = "~/.kube/config"
_POD_NAMESPACE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
_MERGE = "application/merge-patch+json"

T = TypeVar("T")


class Kubernetes:
    """The API server that the kubeconfig names, and what is in `namespace` (None: the kubeconfig's own)."""

    def __init__(self, namespace: str | None = None) -> None:
        configuration, self._who, default = _configuration()
        from kubernetes import client

        api = client.ApiClient(configuration)
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self.address: str = configuration.host
        self.namespace = namespace or default
        self.options = f" --kubernetes --namespace {self.namespace}"

    # --- jobs

    def jobs(self, selector: str = OURS) -> list[Job]:
        """RayJobs of rayft that the label selector picks, the newest first."""
        found = self._asked(
            "list",
            "rayjobs",
            lambda: self._objects.list_namespaced_custom_object(
                **RAY_JOBS, namespace=self.namespace, label_selector=selector, **_WAIT
            ),
        )
        return [plain(job) for job in sorted(found["items"], key=age, reverse=True)]

    def job(self, job: str) -> Job | None:
        found = self._found(job)
        return plain(found) if found else None

    def _found(self, job: str) -> Manifest | None:
        """The RayJob as it is, with its status; None where there is none."""
        try:
            return self._on("get", job, self._objects.get_namespaced_custom_object)
        except _Refused as error:
            if error.status == 404:
                return None
            raise

    def _on(self, verb: str, job: str, method: Callable[..., Any], **more: Any) -> Any:
        return self._asked(
            verb, "rayjobs", lambda: method(**RAY_JOBS, namespace=self.namespace, name=job, **_WAIT, **more)
        )

    def submit(self, config_map: Manifest, ray_job: Manifest) -> bool:
        """Creates both objects; False where a RayJob of that name is there, which is left as it is.

        First the RayJob is only tried, so that whatever is refused is refused before anything is written. Then comes
        the ConfigMap: a RayJob without it would hold machines that wait for it, while a ConfigMap without its RayJob
        runs nothing. That is all that can be left behind, and the next submission takes it: its name is that of its
        content.
        """
        try:
            self._create(ray_job, dry_run="All")
            with contextlib.suppress(_There):
                self._asked(
                    "create",
                    "configmaps",
                    lambda: self._core.create_namespaced_config_map(
                        self.namespace, config_map, field_validation="Strict", **_WAIT
                    ),
                )
            self._create(ray_job)
        except _There:
            return False
        self.adopt(ray_job["metadata"]["name"])
        return True

    def _create(self, ray_job: Manifest, **more: Any) -> None:
        self._asked(
            "create",
            "rayjobs",
            lambda: self._objects.create_namespaced_custom_object(
                **RAY_JOBS, namespace=self.namespace, body=ray_job, field_validation="Strict", **_WAIT, **more
            ),
        )

    def adopt(self, job: str) -> None:
        """Makes the RayJob the owner of its ConfigMap, so that Kubernetes deletes both together."""
        owner = self._found(job)
        if owner is None:
            return
        reference = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": job, "uid": owner["metadata"]["uid"]}
        body = {"metadata": {"ownerReferences": [reference]}}
        try:
            self._asked(
                "patch",
                "configmaps",
                lambda: self._core.patch_namespaced_config_map(
                    job, self.namespace, body, _content_type=_MERGE, **_WAIT
                ),
            )
        except _Refused as error:
            if error.status != 404:  # somebody has deleted it, and the pods that have read it don't need it
                raise

    def last_try(self, job: str) -> None:
        """A run that was asked to stop ends with an exit code, which the operator takes for a failure to try again."""
        self._on(
            "patch",
            job,
            self._objects.patch_namespaced_custom_object,
            body={"spec": {"backoffLimit": 0}},
            _content_type=_MERGE,
        )

    def stop(self, job: str) -> None:
        """Ends the pods of a job; they get SIGTERM and their grace period.

        In each submission mode the operator answers `spec.suspend` by deleting the RayCluster and what submits to it,
        and leaves a RayJob that says so and runs again when that is taken back. Deleting the RayJob would take what it
        says along. In a queue `suspend` belongs to Kueue, which would start an admitted job again: there it is deleted.
        """
        found = self._found(job)
        if found is None:
            return
        if QUEUE in found["metadata"].get("labels", {}):
            delete = self._objects.delete_namespaced_custom_object
            self._on("delete", job, delete, propagation_policy="Background")
        else:
            patch = self._objects.patch_namespaced_custom_object
            self._on("patch", job, patch, body={"spec": {"suspend": True}}, _content_type=_MERGE)

    def waits(self, job: str) -> str | None:
        """The queue, or the first pod of the job that can't start: the operator's own status says of neither."""
        found = self._found(job)
        return (held_back(found) or unready(self._pods(f"{OURS}={job}"))) if found else None

    def _pods(self, selector: str) -> list[Any]:
        """Pods that the label selector picks, the oldest first."""
        found = self._asked(
            "list",
            "pods",
            lambda: self._core.list_namespaced_pod(self.namespace, label_selector=selector, **_WAIT),
        )
        return sorted(found.items, key=lambda one: (one.metadata.creation_timestamp, one.metadata.name))

    # --- logs

    def logs(self, job: str) -> str:
        parts: list[str] = []
        self._pass_on(job, Lines(parts.append), ended=True)
        return "".join(parts)

    def follow(self, job: str, write: Callable[[str], None]) -> Job:
        lines, heard, told = Lines(write), time.monotonic(), None
        while True:
            try:
                found = self.job(job)
                if found is None:
                    raise TrainingError(f"the RayJob {job} in namespace {self.namespace} has been deleted")
                heard = time.monotonic()
                if found.status == "PENDING" and (why := self.waits(job)) != told:
                    told = why
                    if why:
                        write(f"{job} waits: {why}\n")
                self._pass_on(job, lines, found.status in TERMINAL)
                if found.status in TERMINAL:
                    return found
            except Unreachable as error:
                if time.monotonic() - heard > PATIENCE_S:
                    raise TrainingError(
                        f"{self.address} has not answered for {PATIENCE_S:g} s; the job may go on: "
                        f"`rayft jobs logs {job} --follow{self.options}` follows it again"
                    ) from error
            time.sleep(LOOK_S)

    def _pass_on(self, job: str, lines: Lines, ended: bool) -> None:
        """What the pods that submit the job print, from where `lines` has got to, until they end or the connection."""
        found = self._found(job)
        if found is None:
            return
        mode = found["spec"].get("submissionMode", "K8sJobMode")
        if mode != "K8sJobMode":  # no pod of its own: the head has the output, and its address is the cluster's
            lines.once(elsewhere(found, mode, self.namespace))
            return
        # The operator submits with a Kubernetes Job of the RayJob's name, whose controller labels its pods.
        for pod in self._pods(f"job-name={job}"):
            name, phase = pod.metadata.name, pod.status.phase
            if phase == "Pending" or name in lines.whole:
                continue
            gone = ended or phase in ("Succeeded", "Failed")
            if self._read(name, lines, gone) and gone:
                lines.whole.add(name)

    def _read(self, pod: str, lines: Lines, gone: bool) -> bool:
        """Whether the pod's output was read to its end, as far as can be told."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        def opened() -> Any:
            response = self._core.read_namespaced_pod_log(
                pod, self.namespace, follow=not gone, timestamps=True, _preload_content=False, **_WAIT
            )
            if response.status != 200:
                raise ApiException(status=response.status, reason=response.reason, body=response.data.decode())
            return response

        try:
            response = self._asked("get", "pods/log", opened)
        except _Refused as error:
            if error.status in (400, 404):  # its container does not run yet, or the pod is gone
                return False
            raise
        taker = lines.of(pod)
        try:
            for chunk in response.stream(amt=None, decode_content=True):
                taker.take(chunk)
        except (HTTPError, OSError):
            return False
        finally:
            taker.over(whole=gone)
            response.close()
        return True

    # --- what goes wrong

    def _asked(self, verb: str, resource: str, question: Callable[[], T]) -> T:
        """What the API server answers; ClusterError says why it doesn't."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return question()
        except ApiException as error:
            raise self._refusal(verb, resource, error) from None
        except (HTTPError, OSError) as error:
            raise Unreachable(
                f"no Kubernetes API server answers at {self.address} ({type(error).__name__}), where {self._who} leads"
            ) from None

    def _refusal(self, verb: str, resource: str, error: Any) -> ClusterError:
        status, told = error.status or 0, _status(error.body)
        message = " ".join(str(told.get("message") or error.reason or "").split())[:500]
        details = told.get("details") or {}
        group = " (API group ray.io)" if resource == "rayjobs" else ""
        if status == 0:
            return ClusterError(f"{self.address} can't be trusted: {message}")
        if status == 401:
            return ClusterError(f"{self.address} does not accept the credentials that {self._who} gives")
        if status == 403 and re.search(r"cannot \w+ resource", message):
            need = f"it takes a role with the verb `{verb}` on `{resource}`{group}"
            return ClusterError(f"no right to {verb} {resource} in namespace {self.namespace}: {need}")
        if status == 404 and details.get("kind") == "namespaces":
            return ClusterError(f"there is no namespace {self.namespace} at {self.address}")
        if status == 404 and resource == "rayjobs" and not details.get("name"):
            return ClusterError(
                f"{self.address} knows no RayJobs (ray.io/v1): KubeRay's operator and its definitions are not installed"
            )
        if status == 409 and told.get("reason") == "AlreadyExists":
            return _There(message, status)
        if status == 429 or status >= 500:
            return Unreachable(f"{self.address} can't answer now: {message} ({status})")
        return _Refused(f"Kubernetes refuses to {verb} {resource} in namespace {self.namespace}: {message}", status)


class _Refused(ClusterError):
    """The API server has understood, and says no; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class _There(_Refused):
    """An object of that name exists."""


_WAIT: dict[str, Any] = {"_request_timeout": (CONNECT_S, READ_S)}


def _configuration() -> tuple[Any, str, str]:
    """The client's configuration, what it comes from, and the namespace that goes with it."""
    try:
        from kubernetes import client, config
    except ImportError:
        raise RunRefused("--kubernetes needs Kubernetes' client: pip install 'rayft[kubernetes]'") from None
    configuration = client.Configuration()
    configuration.retries = False  # what is worth another try is decided here, and told in rayft's words
    named = os.environ.get("KUBECONFIG")
    path = named or _KUBECONFIG
    if named and not any(os.path.exists(os.path.expanduser(one)) for one in named.split(os.pathsep)):
        raise ClusterError(f"KUBECONFIG={named}: there is no such file")
    try:
        if named or os.path.exists(os.path.expanduser(path)):
            config.load_kube_config(path, client_configuration=configuration, persist_config=False)
            context = config.list_kube_config_contexts(path)[1]
            return configuration, f"the kubeconfig {path}", context["context"].get("namespace") or "default"
        config.load_incluster_config(client_configuration=configuration)
        with open(_POD_NAMESPACE, encoding="utf-8") as file:
            return configuration, "the pod's service account", file.read().strip()
    except config.ConfigException as error:
        if not named and not os.path.exists(os.path.expanduser(path)):
            raise ClusterError("no Kubernetes cluster is named: set KUBECONFIG, or make ~/.kube/config") from None
        raise ClusterError(f"the kubeconfig {path} can't be used: {str(error).splitlines()[0][:300]}") from None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:  # its text may hold what it can't read
        raise ClusterError(f"the kubeconfig {path} can't be read ({type(error).__name__})") from None


def _status(body: Any) -> dict[str, Any]:
    """Kubernetes' own words of an error; nothing where somebody else has answered."""
    try:
        found = json.loads(body)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
