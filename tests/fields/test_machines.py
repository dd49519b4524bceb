"""The options of a recipe that say where it runs: their defaults and what each takes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from rayft.fields import machines
from rayft.fields.machines import Checkpoints, Cluster, DeepSpeed, Failure, Submit


@pytest.mark.parametrize(
    ("section", "defaults"),
    [
        (Checkpoints(), {"keep": 2}),
        (DeepSpeed(), {"zero_stage": "auto", "offload": "none", "extra": {}}),
        (Cluster(), {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 1, "shared_storage": False}),
        (Failure(), {"max_retries": 3, "timeout_s": 600, "grace_s": 30}),
        (
            Submit(),
            {
                "address": None,
                "image": None,
                "entrypoint_cpus": 0,
                "kubernetes": {
                    "namespace": "default",
                    "queue": None,
                    "credentials_secret": None,
                    "token_secret": None,
                    "service_account": None,
                    "image_pull_secrets": [],
                    "node_selector": {},
                    "tolerations": [],
                    "cpu": "4",
                    "memory": "16Gi",
                    "shm": "8Gi",
                    "trials_at_once": 1,
                    "mode": "K8sJobMode",
                    "retries": 2,
                    "deadline_s": None,
                    "ttl_s": None,
                },
            },
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseModel) else "",
)
def test_defaults_are_those_of_the_design(section: BaseModel, defaults: dict[str, Any]) -> None:
    assert section.model_dump(mode="json") == defaults


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("DeepSpeed", "zero_stage", 4),
        ("DeepSpeed", "zero_stage", True),
        ("DeepSpeed", "zero_stage", "2"),
        ("DeepSpeed", "offload", False),
        ("Cluster", "shared_storage", 1),
        ("Cluster", "shared_storage", "true"),
        ("Cluster", "workers", 0),
        ("Cluster", "workers", True),
        ("Cluster", "workers", {"min": 1}),
        ("Checkpoints", "keep", 0),
    ],
)
def test_values_are_not_bent_to_fit(section: str, field: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        getattr(machines, section).model_validate({field: value})


def test_a_number_of_cpus_may_stand_for_a_quantity() -> None:
    kubernetes = Submit.model_validate({"kubernetes": {"cpu": 2, "memory": "512Mi"}}).kubernetes
    assert (kubernetes.cpu, kubernetes.memory) == ("2", "512Mi")
    with pytest.raises(ValidationError):
        Submit.model_validate({"kubernetes": {"memory": "lots"}})
