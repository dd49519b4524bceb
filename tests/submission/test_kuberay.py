"""What KubeRay is given: the manifests are the golden ones, the API server would take them, and nothing in them leaks.

The schema is that of KubeRay 1.7's RayJob, with unknown fields refused, as `kubectl apply --validate=strict` does it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from kuberay_schema import schema
from rayft import __version__
from rayft.errors import RecipeError
from rayft.recipe import Recipe
from rayft.submission import kuberay
from rayft.submission.kuberay import job_name, manifests, to_yaml
from rayft.submission.kubernetes_rules import amount
from test_kubernetes_rules import KUBERNETES, PASSED, SELECTOR, recipe_with

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "kuberay"

FULL: dict[str, Any] = {
    "name": "Teams/Llama_7B",
    "cluster": {"workers": 32, "gpus_per_worker": 1, "cpus_per_worker": 11},
    "failure.grace_s": 90,
    "model.dtype": "bfloat16",
    "submit.image": "registry.example.com/ml/rayft:2026-11@sha256:" + "0f" * 32,
    "submit.entrypoint_cpus": 1.5,
    KUBERNETES: {
        "namespace": "research",
        "credentials_secret": "s3-keys",
        "token_secret": "ray-token",
        "service_account": "trainer",
        "image_pull_secrets": ["registry", "mirror.example.com"],
        "node_selector": {
            "node.kubernetes.io/instance-type": "p5.48xlarge",
            "topology.kubernetes.io/zone": "eu-west-1a",
        },
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "cpu": 12,
        "memory": "225Gi",
        "shm": "75Gi",
        "mode": "SidecarMode",
        "retries": 5,
        "deadline_s": 86400,
        "ttl_s": 600,
    },
}
SEARCH = {"train.learning_rate": {"log_uniform": [1e-5, 1e-3]}, "model.freeze.layers": {"choice": [0, 2]}}
CASES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu-everything": FULL,
    "elastic": {"cluster": {"workers": {"min": 1, "max": 3}, "gpus_per_worker": 1}},
    "sweep": {
        "cluster.workers": 1,
        "tune": {"trials": 8, "search": SEARCH},
        f"{KUBERNETES}.memory": "64Gi",
        f"{KUBERNETES}.trials_at_once": 4,
    },
    "queue": {f"{KUBERNETES}.queue": "research", f"{KUBERNETES}.mode": "HTTPMode"},
}


def rendered(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    carried, job = manifests(recipe_with(CASES[case]))
    return carried, job


def pods(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod specs of a RayJob by what they are for."""
    cluster = job["spec"]["rayClusterSpec"]
    found = {"head": cluster["headGroupSpec"]["template"], "worker": cluster["workerGroupSpecs"][0]["template"]}
    if "submitterPodTemplate" in job["spec"]:
        found["submitter"] = job["spec"]["submitterPodTemplate"]
    return {name: template["spec"] for name, template in found.items()}


# --- what is rendered


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_the_golden_ones(case: str, request: pytest.FixtureRequest) -> None:
    text, golden = to_yaml(list(rendered(case))), GOLDEN / f"{case}.yaml"
    if request.config.getoption("--update-goldens", default=False):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert golden.read_text(encoding="utf-8") == text, "run pytest with --update-goldens and look at the difference"


def test_there_is_no_golden_file_without_a_test() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_the_job_runs_the_recipe_that_was_submitted(case: str) -> None:
    carried, job = rendered(case)
    assert Recipe.parse(yaml.safe_load(carried["data"]["recipe.yaml"])) == recipe_with(CASES[case])
    head = pods(job)["head"]
    mount = next(one for one in head["containers"][0]["volumeMounts"] if one["name"] == "recipe")
    volume = next(one for one in head["volumes"] if one["name"] == "recipe")
    command = "tune" if case == "sweep" else "run"
    assert job["spec"]["entrypoint"] == f"rayft {command} {mount['mountPath']}/recipe.yaml"
    assert mount["readOnly"] is True
    assert volume["configMap"]["name"] == carried["metadata"]["name"] == job["metadata"]["name"]


def test_what_the_recipe_says_reaches_its_place() -> None:
    _, job = rendered("gpu-everything")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    workers = cluster["workerGroupSpecs"][0]
    container = pods(job)["worker"]["containers"][0]
    assert job["metadata"]["namespace"] == "research"
    assert (spec["submissionMode"], spec["backoffLimit"]) == ("SidecarMode", 5)
    assert (spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (86400, 600)
    assert (spec["shutdownAfterJobFinishes"], spec["entrypointNumCpus"]) == (True, 1.5)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (32, 32, 32)
    shared = str(int(67.5 * 2**30))
    assert workers["rayStartParams"] == {"num-cpus": "12", "num-gpus": "1", "object-store-memory": shared}
    assert container["resources"]["requests"] == {"cpu": "12", "memory": "225Gi", "nvidia.com/gpu": "1"}
    assert container["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "75Gi"}} in pods(job)["worker"]["volumes"]
    assert all(pod["terminationGracePeriodSeconds"] > 90 for pod in pods(job).values())


def test_an_image_of_this_version_is_the_default_and_with_gpus_that_with_cuda() -> None:
    for case, image in (("cpu", f"rayft:{__version__}"), ("elastic", f"rayft:{__version__}-gpu")):
        assert {pod["containers"][0]["image"] for pod in pods(rendered(case)[1]).values()} == {image}


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, 0),  # the pod that submits keeps the output
        ({"mode": "HTTPMode"}, 300),
        ({"mode": "SidecarMode"}, 300),
        ({"mode": "HTTPMode", "ttl_s": 0}, 0),
        ({"ttl_s": 3600}, 3600),
    ],
    ids=str,
)
def test_machines_go_with_their_run_unless_they_alone_have_its_output(fields: dict[str, Any], seconds: int) -> None:
    assert manifests(recipe_with({KUBERNETES: fields}))[1]["spec"]["ttlSecondsAfterFinished"] == seconds


def test_the_head_takes_no_worker_and_no_machine_with_gpus() -> None:
    _, job = rendered("gpu-everything")
    head = pods(job)["head"]
    start = job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    assert (start["num-cpus"], start["num-gpus"]) == ("2", "0")
    assert head["nodeSelector"] == {"topology.kubernetes.io/zone": "eu-west-1a"}
    assert head["tolerations"] == FULL[KUBERNETES]["tolerations"]
    assert head["containers"][0]["resources"]["requests"] == {"cpu": "4", "memory": "16Gi"}
    assert job["spec"]["entrypointResources"] == '{"node:__internal_head__": 0.001}'


def test_without_gpus_every_pod_goes_to_the_machines_that_are_asked_for() -> None:
    selector = {"node.kubernetes.io/instance-type": "m7i.4xlarge"}
    _, job = manifests(recipe_with({SELECTOR: selector}))
    assert [pod["nodeSelector"] for pod in pods(job).values()] == [selector] * 3


def test_the_head_of_a_sweep_has_the_memory_for_the_pretrained_weights() -> None:
    memory = {case: pods(rendered(case)[1])["head"]["containers"][0]["resources"]["limits"] for case in CASES}
    assert memory["sweep"] == {"memory": "64Gi"}
    assert memory["cpu"] == {"memory": "16Gi"}


@pytest.mark.parametrize(
    ("memory", "shm", "store"),
    [
        ("16Gi", "8Gi", 0.3 * 16 * 2**30),
        ("27Gi", "8Gi", 0.9 * 8 * 2**30),
        ("64G", "8G", 0.9 * 8e9),
        ("1Gi", "128Mi", 0.9 * 128 * 2**20),
    ],
)
def test_rays_objects_fit_into_the_shared_memory_of_every_pod(memory: str, shm: str, store: float) -> None:
    for tune in (None, {"trials": 2, "search": SEARCH}):
        _, job = manifests(recipe_with({f"{KUBERNETES}.memory": memory, f"{KUBERNETES}.shm": shm, "tune": tune}))
        cluster = job["spec"]["rayClusterSpec"]
        head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
        assert workers["rayStartParams"]["object-store-memory"] == str(int(store))
        limit = amount(head["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"])
        assert int(head["rayStartParams"]["object-store-memory"]) == int(min(store, 0.3 * float(limit or 0)))


def test_a_pod_offers_ray_whole_cpus_only() -> None:
    _, job = manifests(recipe_with({f"{KUBERNETES}.cpu": "3500m"}))
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParams"]["num-cpus"] == "3"


def test_an_elastic_run_scales_between_its_bounds_and_a_fixed_one_does_not() -> None:
    spec = rendered("elastic")[1]["spec"]["rayClusterSpec"]
    group = spec["workerGroupSpecs"][0]
    assert spec["enableInTreeAutoscaling"] is True
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 3)
    assert group["replicas"] == 1  # of so many the operator waits until they run, before it submits
    assert "enableInTreeAutoscaling" not in rendered("cpu")[1]["spec"]["rayClusterSpec"]


@pytest.mark.parametrize(("workers", "pods"), [(1, (6, 6, 6)), (4, (24, 24, 24)), ({"min": 1, "max": 3}, (6, 6, 18))])
def test_each_of_the_trials_at_once_has_the_pods_of_a_run(workers: Any, pods: tuple[int, int, int]) -> None:
    fields = {"cluster": {"workers": workers, "cpus_per_worker": 3}, f"{KUBERNETES}.trials_at_once": 6}
    fields |= {"tune": {"trials": 24, "search": SEARCH}}
    group = manifests(recipe_with(fields))[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == pods


def test_a_queued_job_waits_until_it_is_admitted() -> None:
    _, job = rendered("queue")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert job["spec"]["suspend"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert "suspend" not in rendered("cpu")[1]["spec"]


def test_ray_is_of_the_pinned_version() -> None:
    assert f"\nray=={kuberay.RAY_VERSION}\n" in (ROOT / "cluster" / "requirements.lock").read_text()


# --- names


@pytest.mark.parametrize(
    "name",
    ["n", "7b", "0", "Teams/Llama_7B", "_", "a" * 200, "a-" * 60, "ends.", "x/y/z", "-.-", "A"],
)
@pytest.mark.parametrize("attempt", [1, 2, 137])
def test_names_are_those_that_the_operator_takes(name: str, attempt: int) -> None:
    recipe = recipe_with({"name": name})
    found = job_name(recipe, attempt)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found)
    assert len(found) <= 47
    for document in manifests(recipe, attempt):
        assert document["metadata"]["name"] == found
        for label in document["metadata"]["labels"].values():
            assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", label)


def test_a_name_says_which_recipe_and_which_attempt() -> None:
    one = recipe_with({})
    assert job_name(one) == job_name(recipe_with({}))
    others = [job_name(one, 2), job_name(recipe_with({"train.seed": 1})), job_name(recipe_with({"name": "N"}))]
    assert len({job_name(one), *others}) == 4


def test_manifests_are_the_same_each_time_and_share_nothing() -> None:
    first, second = manifests(recipe_with(FULL)), manifests(recipe_with(FULL))
    assert first == second
    pods(first[1])["head"]["containers"][0]["securityContext"]["privileged"] = True
    assert manifests(recipe_with(FULL)) == second
    assert pods(first[1])["worker"]["containers"][0]["securityContext"]["privileged"] is False


# --- what the API server and the operator would say


def objections(job: dict[str, Any]) -> list[str]:
    found = Draft202012Validator(schema("rayjobs")).iter_errors(job)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


@pytest.mark.parametrize("case", CASES)
def test_the_api_server_would_take_the_job(case: str) -> None:
    assert objections(rendered(case)[1]) == []


@pytest.mark.parametrize("fields", PASSED, ids=str)
def test_whatever_passes_the_rules_the_api_server_would_take(fields: dict[str, Any]) -> None:
    assert objections(manifests(recipe_with(fields))[1]) == []


def test_the_schema_refuses_what_the_api_server_refuses() -> None:
    def with_change(*path: Any, value: Any) -> dict[str, Any]:
        job = node = rendered("cpu")[1]
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value
        return job

    template = ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec")
    changes: list[tuple[tuple[Any, ...], Any]] = [
        (("spec", "retries"), 2),
        (("spec", "backoffLimit"), "2"),
        (("spec", "ttlSecondsAfterFinished"), 2**31),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "open"),
        ((*template, "hostpath"), {}),
        ((*template, "containers"), {}),
        ((*template, "volumes", 0, "emptyDir", "sizeLimit"), ["8Gi"]),
        (("metadata", "labels", "a"), 3),
    ]
    for path, value in changes:
        assert objections(with_change(*path, value=value)), f"{path} is taken"


@pytest.mark.parametrize("case", CASES)
def test_the_operator_would_take_the_job(case: str) -> None:
    """What KubeRay 1.7 checks beyond the schema (ray-operator/controllers/ray/utils/validation.go)."""
    spec = rendered(case)[1]["spec"]
    cluster = spec["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] or not (spec.get("suspend") or spec["ttlSecondsAfterFinished"])
    assert ("submitterPodTemplate" in spec) == (spec["submissionMode"] == "K8sJobMode")
    assert "clusterSelector" not in spec
    assert "deletionStrategy" not in spec
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52)  # from where on tokens are checked
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["restartPolicy"] == "Never"
        assert "resources" not in group
        assert "labels" not in group["rayStartParams"]


# --- safety


@pytest.mark.parametrize("case", CASES)
def test_pods_have_no_more_rights_than_they_need(case: str) -> None:
    """The "restricted" level of Kubernetes' Pod Security Standards."""
    _, job = rendered(case)
    for name, pod in pods(job).items():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert min(pod["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")) > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        scaled = {"projected"} if name == "head" and case == "elastic" else set()
        assert {key for volume in pod.get("volumes", ()) for key in volume} <= {
            "name",
            "emptyDir",
            "configMap",
        } | scaled
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["privileged"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
    options = job["spec"]["rayClusterSpec"].get("autoscalerOptions")
    assert (options is not None) == (case == "elastic")
    assert options is None or options["securityContext"]["allowPrivilegeEscalation"] is False


def test_only_the_autoscaler_sees_the_token_that_can_make_pods() -> None:
    _, job = rendered("elastic")
    (mount,) = job["spec"]["rayClusterSpec"]["autoscalerOptions"]["volumeMounts"]
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    for name, pod in pods(job).items():
        tokens = [volume["name"] for volume in pod.get("volumes", ()) if "projected" in volume]
        assert tokens == ([mount["name"]] if name == "head" else [])
        mounted = {one["name"] for container in pod["containers"] for one in container.get("volumeMounts", ())}
        assert mount["name"] not in mounted


def test_every_pod_has_the_account_and_pulls_with_the_secrets_that_the_recipe_names() -> None:
    for pod in pods(manifests(recipe_with({**FULL, f"{KUBERNETES}.mode": "K8sJobMode"}))[1]).values():
        assert pod["serviceAccountName"] == "trainer"
        assert pod["imagePullSecrets"] == [{"name": "registry"}, {"name": "mirror.example.com"}]
    for pod in pods(rendered("cpu")[1]).values():
        assert not {"serviceAccountName", "imagePullSecrets"} & pod.keys()


@pytest.mark.parametrize("case", CASES)
def test_memory_and_gpus_are_reserved_as_far_as_they_are_allowed(case: str) -> None:
    for pod in pods(rendered(case)[1]).values():
        for container in pod["containers"]:
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert limits == {key: value for key, value in requests.items() if key != "cpu"}
            assert "memory" in limits


@pytest.mark.parametrize("case", CASES)
def test_no_secret_is_in_a_manifest_only_names_of_secrets(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {name: f"value-of-{name}" for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "RAY_AUTH_TOKEN")}
    secrets |= {name: f"value-of-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    documents = list(rendered(case))
    text = to_yaml(documents)
    assert not [value for value in secrets.values() if value in text]
    assert [document["kind"] for document in documents] == ["ConfigMap", "RayJob"]
    assert list(documents[0]["data"]) == ["recipe.yaml"]
    written = {path[-1]: value for path, value in leaves(documents) if "env" in path}  # others come by `envFrom`
    assert written == {"name": "RAYFT_JOB", "value": documents[1]["metadata"]["name"]}


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, (*path, key))
    else:
        yield path, node


# --- refusals


def test_what_can_not_run_is_refused_all_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        manifests(recipe_with({"storage": "runs", f"{KUBERNETES}.cpu": "1"}), source="r.yaml")
    assert caught.value.exit_code == 2
    assert [fault.where for fault in caught.value.faults] == ["storage", f"{KUBERNETES}.cpu"]
    assert str(caught.value).startswith("r.yaml: 2 faults\n")


# --- YAML


@pytest.mark.parametrize("case", CASES)
def test_yaml_reads_back_to_what_was_rendered(case: str) -> None:
    documents = list(rendered(case))
    assert list(yaml.safe_load_all(to_yaml(documents))) == documents


@pytest.mark.parametrize(
    "text", ["12e45", "1_000", "0x1f", "0o17", "007", "1.5", "16Gi", "-1", "+1", ".5", "on", "y", "N", "~"]
)
def test_text_that_another_reader_takes_for_something_else_is_quoted(text: str) -> None:
    assert to_yaml([{"a": text}]).strip() in (f'a: "{text}"', f"a: '{text}'")


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_the_breaks_of_other_alphabets_reach_the_cluster_as_they_are(character: str) -> None:
    where = {"label": f"spam{character}"}
    recipe = recipe_with({"data.train": [{"path": "s3://b/train.csv", "where": where}]})
    documents = manifests(recipe)
    text = to_yaml(documents)
    assert character not in text
    assert list(yaml.safe_load_all(text)) == documents
    (train,) = Recipe.written(documents[0]["data"]["recipe.yaml"], "recipe.yaml").data.train
    assert train.where == where
    assert to_yaml([{"a": f"one\n{character}two"}]).count("\n") == 1


def test_the_recipe_can_be_read_in_the_manifest() -> None:
    assert "  recipe.yaml: |\n    name: n\n    task:\n" in to_yaml(list(rendered("cpu")))
