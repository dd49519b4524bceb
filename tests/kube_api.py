"""A stand-in for Kubernetes' API server: RayJobs, ConfigMaps, pods and their logs over HTTP, and what an operator does.

It answers as Kubernetes does: 401 without the token, 403 for a verb that is forbidden, 404, 409, 400 for a field that
strict validation does not know, 422 for one that does not fit. A test says what happens and when; nothing takes time.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from jsonschema import Draft202012Validator

from kuberay_schema import schema

Object = dict[str, Any]
TOKEN = "token-of-the-kubeconfig"
PATIENCE_S = 20.0  # for what has to happen in a test that passes


class KubeApi:
    """What is stored, what was asked, and the operator's part."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.objects: dict[tuple[str, str, str], Object] = {}  # (resource, namespace, name)
        self.forbidden: set[tuple[str, str]] = set()  # (verb, resource)
        self.kuberay = True
        self.namespaces = {"default"}
        self.asked: list[str] = []  # "POST rayjobs?dryRun=All…"
        self.sent: list[str] = []  # headers without the token, and bodies
        self.logs: dict[str, list[str]] = {}
        self.reading: dict[str, int] = {}  # connections that follow a pod's log
        self.cut: dict[str, int] = {}  # connections to a pod's log that are to be dropped
        self._made = 0

    # --- the operator

    def until(self, so: Callable[[], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(so, PATIENCE_S), "what the test waits for does not happen"

    def job(self, name: str) -> Object:
        return self.objects["rayjobs", "default", name]

    def names(self, resource: str = "rayjobs") -> list[str]:
        return [name for kind, _, name in self.objects if kind == resource]

    def plays(self, name: str, deployment: str, ray: str = "", **more: Any) -> None:
        """The operator writes a RayJob's status."""
        with self.changed:
            status = {"jobDeploymentStatus": deployment, "jobStatus": ray, "jobId": f"{name}-xyz", **more}
            self.job(name)["status"] = status
            self.changed.notify_all()

    def starts_pod(self, job: str, name: str, phase: str = "Running") -> None:
        """The pod of the Kubernetes Job that submits."""
        with self.changed:
            self._made += 1
            metadata = {"name": name, "namespace": "default", "labels": {"job-name": job, "rayft/job": job}}
            self._store("pods", {"metadata": metadata, "spec": {"containers": [{"name": "c", "image": "i"}]}})
            self.objects["pods", "default", name]["status"] = {"phase": phase}
            self.logs.setdefault(name, [])
            self.changed.notify_all()

    def holds_pod(self, job: str, name: str, **status: Any) -> None:
        """A pod of the Ray cluster that does not start: `waiting` of its container, `scheduled` of its place."""
        container = {"name": "c", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
        made: Object = {"phase": "Pending"}
        if waiting := status.get("waiting"):
            made["containerStatuses"] = [{**container, "state": {"waiting": waiting}}]
        if scheduled := status.get("scheduled"):
            made["conditions"] = [{"type": "PodScheduled", "status": "False", **scheduled}]
        with self.changed:
            labels = {"ray.io/originated-from-cr-name": job, "rayft/job": job}
            metadata = {"name": name, "namespace": "default", "labels": labels}
            self._store("pods", {"metadata": metadata, "spec": {"containers": [{"name": "c", "image": "i"}]}})
            self.objects["pods", "default", name]["status"] = made
            self.changed.notify_all()

    def prints(self, pod: str, *lines: str, at: str | None = None) -> None:
        with self.changed:
            for line in lines:
                self._made += 1
                self.logs[pod].append(f"{at or f'2026-11-21T10:00:00.{self._made:09d}Z'} {line}\n")
            self.changed.notify_all()

    def drops(self, pod: str) -> None:
        """Breaks the connections that follow a pod's log, in the middle of its last line."""
        with self.changed:
            self.cut[pod] = self.reading.get(pod, 0)
            self.changed.notify_all()
        self.until(lambda: not self.cut.get(pod))

    def ends_pod(self, pod: str, phase: str = "Succeeded") -> None:
        with self.changed:
            self.objects["pods", "default", pod]["status"]["phase"] = phase
            self.changed.notify_all()

    # --- the API

    def _store(self, resource: str, made: Object) -> Object:
        self._made += 1
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_790_000_000 + self._made))
        metadata = {**made["metadata"], "uid": f"uid-{self._made}", "creationTimestamp": at}
        self.objects[resource, metadata["namespace"], metadata["name"]] = {**made, "metadata": metadata}
        return self.objects[resource, metadata["namespace"], metadata["name"]]

    def create(self, resource: str, namespace: str, made: Object, asked: dict[str, str]) -> tuple[int, Object]:
        name = made["metadata"]["name"]
        if namespace not in self.namespaces:
            return failure(404, "NotFound", f'namespaces "{namespace}" not found', kind="namespaces", name=namespace)
        if resource == "rayjobs" and (wrong := refused(made, asked.get("fieldValidation") == "Strict")):
            return wrong
        if (resource, namespace, name) in self.objects:
            return failure(409, "AlreadyExists", f'{resource} "{name}" already exists', name=name)
        if asked.get("dryRun") == "All":
            return 201, made
        return 201, self._store(resource, copy.deepcopy(made))

    def listed(self, resource: str, namespace: str, selector: str) -> tuple[int, Object]:
        wanted = [term.partition("=") for term in selector.split(",") if term]
        items = [
            found
            for (kind, where, _), found in self.objects.items()
            if (kind, where) == (resource, namespace)
            and all(
                key in found["metadata"]["labels"] and (not equal or found["metadata"]["labels"][key] == value)
                for key, equal, value in wanted
            )
        ]
        kind = {"rayjobs": "RayJobList", "pods": "PodList"}[resource]
        return 200, {"kind": kind, "apiVersion": "v1", "metadata": {}, "items": items}

    def patch(self, found: Object, change: Object) -> tuple[int, Object]:
        for key, value in change.items():
            if isinstance(value, dict):
                self.patch(found.setdefault(key, {}), value)
            else:
                found[key] = value
        return 200, found


def refused(job: Object, strict: bool) -> tuple[int, Object] | None:
    """What Kubernetes says of a RayJob that does not fit its definition."""
    for error in Draft202012Validator(schema("rayjobs")).iter_errors(job):
        where = error.json_path.removeprefix("$.")
        if error.validator != "additionalProperties":
            return failure(
                422, "Invalid", f'RayJob.ray.io "x" is invalid: {where}: Invalid value: {error.message[:99]}'
            )
        if strict:
            return failure(400, "BadRequest", f'strict decoding error: unknown field in "{where}"')
    return None


def failure(code: int, reason: str, message: str, **details: str) -> tuple[int, Object]:
    return code, {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "details": details,
        "code": code,
    }


class Handler(BaseHTTPRequestHandler):
    api: KubeApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _route(self) -> None:
        parts = urlsplit(self.path)
        asked = {key: value[0] for key, value in parse_qs(parts.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = parts.path.strip("/").split("/")
        _, namespace, resource, *rest = path[path.index("namespaces") :]
        named = rest[0] if rest else None
        resource = f"{resource}/log" if rest[1:] == ["log"] else resource
        plain = {key: value for key, value in self.headers.items() if key.lower() != "authorization"}
        with self.api.changed:
            self.api.asked.append(f"{self.command} {resource}" + (f"?{parts.query}" if parts.query else ""))
            self.api.sent.append(f"{self.path} {plain} {body}")
            self.api.changed.notify_all()
            reply = self._reply(resource, namespace, named, asked, body)
        if reply is None:
            self._log(str(named), asked)
        elif reply[0] == 404 and isinstance(reply[1], str):
            self._send(404, reply[1].encode(), "text/plain")
        else:
            self._send(reply[0], json.dumps(reply[1]).encode(), "application/json")

    do_GET = do_POST = do_PATCH = do_DELETE = _route

    def _reply(
        self, resource: str, namespace: str, named: str | None, asked: dict[str, str], body: str
    ) -> tuple[int, Any] | None:
        """The answer; None where a log follows."""
        verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}.get(self.command, "get" if named else "list")
        if refusal := self._gate(verb, resource, namespace):
            return refusal
        if verb == "list":
            return self.api.listed(resource, namespace, asked.get("labelSelector", ""))
        if verb == "create":
            return self.api.create(resource, namespace, json.loads(body), asked)
        found = self.api.objects.get((resource.partition("/")[0], namespace, str(named)))
        if found is None:
            return failure(404, "NotFound", f'{resource} "{named}" not found', name=str(named), kind=resource)
        if verb == "delete":
            del self.api.objects[resource, namespace, str(named)]
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        if verb == "patch":
            assert self.headers["Content-Type"] == "application/merge-patch+json"
            return self.api.patch(found, json.loads(body))
        if resource == "pods/log" and found["status"]["phase"] == "Pending":
            return failure(400, "BadRequest", f'container "c" in pod "{named}" is waiting to start')
        return None if resource == "pods/log" else (200, found)

    def _gate(self, verb: str, resource: str, namespace: str) -> tuple[int, Any] | None:
        """Who may not come in, and what there is not."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return failure(401, "Unauthorized", "Unauthorized")
        if (verb, resource) in self.api.forbidden:
            what = f'User "ann" cannot {verb} resource "{resource}" in API group "" in the namespace "{namespace}"'
            return failure(403, "Forbidden", f"{resource} is forbidden: {what}")
        if resource == "rayjobs" and not self.api.kuberay:
            return 404, "404 page not found\n"
        return None

    def _send(self, code: int, content: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _log(self, pod: str, asked: dict[str, str]) -> None:
        """The pod's lines, and with `follow` those to come until it ends or the connection is dropped."""
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        position, follow = 0, asked.get("follow") == "true"
        with self.api.changed:
            self.api.reading[pod] = self.api.reading.get(pod, 0) + follow
            self.api.changed.notify_all()
        while True:
            with self.api.changed:
                running = ("pods", "default", pod) in self.api.objects and (
                    self.api.objects["pods", "default", pod]["status"]["phase"] == "Running"
                )
                lines, position = self.api.logs[pod][position:], len(self.api.logs[pod])
                cut = bool(follow and self.api.cut.get(pod))
                if not (lines or cut) and follow and running:
                    self.api.changed.wait(PATIENCE_S)
                    continue
            for line in lines:
                text = line if asked.get("timestamps") == "true" else line.partition(" ")[2]
                self._chunk(text.encode())
            if cut:
                self._chunk(b"2026-11-21T11:00:00.000000000Z half a li")
            if cut or not lines:
                break
        if not cut:
            self._chunk(b"")
        with self.api.changed:
            self.api.reading[pod] -= follow
            if cut:
                self.api.cut[pod] -= 1
            self.api.changed.notify_all()

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()


def kubeconfig(folder: Path, url: str, token: str = TOKEN) -> str:
    path = folder / "kubeconfig"
    made = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": token}}],
    }
    path.write_text(yaml.safe_dump(made))
    return str(path)


@contextmanager
def serving() -> Iterator[tuple[KubeApi, str]]:
    """The stand-in and its URL."""
    api = KubeApi()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Led", (Handler,), {"api": api}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield api, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
