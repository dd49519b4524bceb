"""The standing cluster on Kubernetes: valid, safe, and of one mind about names, ports and versions."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from kuberay_schema import schema
from manifests import CLUSTER, document, documents, locked, nested

FILES = sorted(path.name for path in (CLUSTER / "kuberay").glob("*.yaml"))
RAY = document("kuberay/raycluster.yaml", "RayCluster")
HEAD = RAY["spec"]["headGroupSpec"]["template"]["spec"]
WORKERS = {group["groupName"]: group for group in RAY["spec"]["workerGroupSpecs"]}
REDIS = document("kuberay/redis.yaml", "StatefulSet")["spec"]["template"]["spec"]
PODS = {"head": HEAD, "redis": REDIS, **{name: group["template"]["spec"] for name, group in WORKERS.items()}}
CONTAINERS = {name: pod["containers"][0] for name, pod in PODS.items()} | {
    "autoscaler": RAY["spec"]["autoscalerOptions"]
}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema("rayclusters"))


def test_the_cluster_fits_kuberays_schema(validator: jsonschema.Draft202012Validator) -> None:
    faults = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(RAY)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "headGroupSpec", "template", "spec", "hostNetworks"], True),
        (["spec", "authOptions", "tokenName"], "rayft"),
        (["spec", "authOptions", "mode"], "none"),
        (["spec", "autoscalerOptions", "idleTimeoutSeconds"], "300"),
        (["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
    ],
)
def test_the_schema_finds_what_is_wrong(
    validator: jsonschema.Draft202012Validator, path: list[str], value: object
) -> None:
    wrong = copy.deepcopy(RAY)
    place = wrong
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not validator.is_valid(wrong)


@pytest.mark.parametrize("file", FILES)
def test_documents_have_kind_and_version(file: str) -> None:
    found = documents(f"kuberay/{file}")
    assert found
    assert all(isinstance(one["apiVersion"], str) and isinstance(one["kind"], str) for one in found)


def test_all_that_is_applied_together_is_in_one_namespace() -> None:
    (kustomization,) = documents("kuberay/kustomization.yaml")
    listed = kustomization["resources"]
    assert sorted([*listed, "kustomization.yaml", "queues.yaml"]) == FILES
    names = {one["metadata"].get("namespace") for file in listed for one in documents(f"kuberay/{file}")}
    assert names == {"rayft", None}
    unplaced = [one for file in listed for one in documents(f"kuberay/{file}") if "namespace" not in one["metadata"]]
    assert [one["kind"] for one in unplaced] == ["Namespace"]
    assert unplaced[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_not_root_and_sees_nothing_of_its_machine(name: str) -> None:
    pod = PODS[name]
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] >= 999
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
    assert not [port for one in pod["containers"] for port in one.get("ports", []) if "hostPort" in port]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_has_no_privileges(name: str) -> None:
    security = CONTAINERS[name]["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert not security.get("privileged", False)


@pytest.mark.parametrize("name", CONTAINERS)
def test_memory_is_requested_as_it_is_limited(name: str) -> None:
    resources = CONTAINERS[name]["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert resources["requests"].get("nvidia.com/gpu") == resources["limits"].get("nvidia.com/gpu")


def test_ray_nodes_run_as_the_images_user() -> None:
    ids = {(pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) for pod in (HEAD, *_workers())}
    assert ids == {(1000, 1000)}
    assert "USER 1000:1000" in (CLUSTER / "docker" / "Dockerfile").read_text()


def _workers() -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in WORKERS.values()]


@pytest.mark.parametrize("name", ["head", *WORKERS])
def test_shared_memory_is_memory_and_fits_into_the_limit(name: str) -> None:
    pod, container = PODS[name], CONTAINERS[name]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    shared = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert shared["medium"] == "Memory"
    assert gib(shared["sizeLimit"]) <= gib(container["resources"]["limits"]["memory"]) / 2
    assert set(mounts.values()) <= set(volumes)


@pytest.mark.parametrize("name", ["head", *WORKERS])
def test_rays_objects_fit_into_shared_memory(name: str) -> None:
    group = RAY["spec"]["headGroupSpec"] if name == "head" else WORKERS[name]
    memory = gib(CONTAINERS[name]["resources"]["limits"]["memory"])
    shared = next(volume for volume in PODS[name]["volumes"] if volume["name"] == "shared-memory")["emptyDir"]
    most = min(0.9 * gib(shared["sizeLimit"]), 0.3 * memory) * 2**30
    assert group["rayStartParams"]["object-store-memory"] == str(int(most))


def gib(text: str) -> int:
    assert text.endswith("Gi")
    return int(text.removesuffix("Gi"))


def test_only_the_autoscaler_has_the_accounts_token() -> None:
    tokens = [volume["name"] for volume in HEAD["volumes"] if "serviceAccountToken" in str(volume)]
    assert [mount["name"] for mount in CONTAINERS["autoscaler"]["volumeMounts"]] == tokens
    assert not [mount for mount in CONTAINERS["head"]["volumeMounts"] if mount["name"] in tokens]


SECRET = re.compile(r"([\w-]*[_-])?(password|token|secret|credentials|access_key(_id)?)", re.IGNORECASE)


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*.y*ml")), ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    for one in nested(list(yaml.safe_load_all(path.read_text()))):
        assert one.get("kind") != "Secret"
        assert not [key for key, value in one.items() if SECRET.fullmatch(str(key)) and isinstance(value, str)]
        assert not ("value" in one and SECRET.fullmatch(str(one.get("name")))), f"{one['name']} comes from a Secret"
    assert "PRIVATE KEY" not in path.read_text()


def test_a_head_that_died_comes_back_with_what_redis_kept() -> None:
    options = RAY["spec"]["gcsFaultToleranceOptions"]
    service = document("kuberay/redis.yaml", "Service")
    port = service["spec"]["ports"][0]["port"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{port}"
    password = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert CONTAINERS["redis"]["env"] == [{"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": password}}]
    labels = document("kuberay/redis.yaml", "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_a_token_is_asked_for_and_the_versions_agree() -> None:
    assert RAY["spec"]["authOptions"] == {"mode": "token", "secretName": "rayft-token"}
    assert RAY["spec"]["rayVersion"] == locked()["ray"]
    readme = (CLUSTER / "README.md").read_text()
    for secret, key in (("rayft-token", "auth_token"), ("rayft-redis", "password")):
        assert f"create secret generic {secret} --from-literal={key}=" in readme
    assert f"service/{RAY['metadata']['name']}-head-svc 8265" in readme


def test_pods_have_time_for_a_checkpoint_before_they_end() -> None:
    from rayft.recipe import Failure

    assert all(pod["terminationGracePeriodSeconds"] > Failure().grace_s for pod in (HEAD, *_workers()))


def test_accounts_are_those_that_are_made() -> None:
    made = {one["metadata"]["name"] for one in documents("kuberay/raycluster.yaml") if one["kind"] == "ServiceAccount"}
    assert {pod["serviceAccountName"] for pod in (HEAD, *_workers())} == made


def ports(container: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def test_ports_are_rays_own() -> None:
    from ray._private import ray_constants
    from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
    from ray.dashboard.consts import DASHBOARD_METRIC_PORT

    assert ports(CONTAINERS["head"]) == {
        "gcs-server": ray_constants.DEFAULT_PORT,
        "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT,
        "metrics": 8080,  # KubeRay starts Ray with this one
        "as-metrics": AUTOSCALER_METRIC_PORT,
        "dash-metrics": DASHBOARD_METRIC_PORT,
    }
    assert {name: ports(CONTAINERS[name]) for name in WORKERS} == {name: {"metrics": 8080} for name in WORKERS}


def policies() -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one["spec"] for one in documents("kuberay/network.yaml")}


def test_only_the_cluster_itself_reaches_all_of_its_ports() -> None:
    cluster = {"ray.io/cluster": RAY["metadata"]["name"]}
    nodes = policies()["rayft-nodes"]
    assert nodes["podSelector"] == {"matchLabels": cluster}
    open_to = [rule["from"] for rule in nodes["ingress"] if "ports" not in rule]
    assert open_to == [[{"podSelector": {"matchLabels": cluster}}]]
    for spec in policies().values():
        assert spec["policyTypes"] == ["Ingress"]
        assert all(rule["from"] and all(one for one in rule["from"]) for rule in spec["ingress"])
        for one in (source for rule in spec["ingress"] for source in rule["from"]):
            assert all(selector.get("matchLabels") for selector in one.values())


def test_the_job_port_is_open_to_named_namespaces_alone() -> None:
    jobs = policies()["rayft-jobs"]
    assert jobs["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"
    (rule,) = jobs["ingress"]
    assert [port["port"] for port in rule["ports"]] == ["dashboard"]
    assert all("namespaceSelector" in one for one in rule["from"])
    assert "kubectl label namespace NAME rayft/submits=true" in (CLUSTER / "README.md").read_text()
    assert {"rayft/submits": "true"} in [one["namespaceSelector"]["matchLabels"] for one in rule["from"]]


def test_policies_name_ports_that_exist() -> None:
    known = {name for one in (HEAD, REDIS) for container in one["containers"] for name in ports(container)}
    named = {port["port"] for spec in policies().values() for rule in spec["ingress"] for port in rule.get("ports", [])}
    assert named == {"metrics", "as-metrics", "dash-metrics", "dashboard", "redis"}
    assert named <= known


def test_queues_lead_to_one_another() -> None:
    flavor, queue, local = (
        document("kuberay/queues.yaml", kind) for kind in ("ResourceFlavor", "ClusterQueue", "LocalQueue")
    )
    (group,) = queue["spec"]["resourceGroups"]
    assert [one["name"] for one in group["flavors"]] == [flavor["metadata"]["name"]]
    assert [one["name"] for one in group["flavors"][0]["resources"]] == group["coveredResources"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    assert local["metadata"]["namespace"] == RAY["metadata"]["namespace"]
    needed = {resource for container in CONTAINERS.values() for resource in container["resources"]["requests"]}
    assert needed <= set(group["coveredResources"])
