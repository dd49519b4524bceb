"""The schemas of KubeRay's resources, with unknown fields refused, as the API server reads its definitions strictly."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

import yaml

DEFINITIONS = Path(__file__).with_name("kuberay_definitions")
RANGES = {"int32": 2**31 - 1, "int64": 2**63 - 1}


@cache
def schema(plural: str) -> dict[str, Any]:
    """The schema of `rayjobs` or `rayclusters`, as strict as the API server is with strict field validation."""
    text = gzip.decompress((DEFINITIONS / f"ray.io_{plural}.yaml.gz").read_bytes())
    definition = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    versions = {version["name"]: version for version in definition["spec"]["versions"]}
    found: dict[str, Any] = strict(versions["v1"]["schema"]["openAPIV3Schema"])
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    found["properties"]["metadata"] = {  # the definition leaves it open: the API server knows it by itself
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "namespace": {"type": "string"},
            "labels": texts,
            "annotations": texts,
        },
        "required": ["name"],
        "additionalProperties": False,
    }
    return found


def strict(node: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes in JSON Schema's words."""
    made = {key: value for key, value in node.items() if not key.startswith("x-kubernetes-") and key != "nullable"}
    for key in ("properties", "patternProperties"):
        if key in node:
            made[key] = {name: strict(below) for name, below in node[key].items()}
    for key in ("items", "additionalProperties", "not"):
        if isinstance(node.get(key), dict):
            made[key] = strict(node[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in node:
            made[key] = [below if not below.keys() & {"properties", "items"} else strict(below) for below in node[key]]
    if node.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    elif node.get("type") == "object" and "additionalProperties" not in node:
        made["additionalProperties"] = bool(node.get("x-kubernetes-preserve-unknown-fields"))
    if node.get("format") in RANGES:
        made["maximum"] = RANGES[node["format"]]
    if node.get("nullable") is True and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made
