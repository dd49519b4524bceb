"""The files of `ray up`: valid by Ray's own schema, with a token, and the lock's versions."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler

from manifests import CLUSTER, LOCK, ROOT, document, documents

FILES = ("aws.yaml", "gcp.yaml")
SCHEMA = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "head_start_ray_commands",
            "worker_start_ray_commands")  # fmt: skip


@pytest.fixture(params=FILES)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    (found,) = documents(f"ray-up/{request.param}")
    return found


def test_it_fits_rays_schema(config: dict[str, Any]) -> None:
    jsonschema.validate(config, SCHEMA)


def test_the_schema_finds_an_unknown_field(config: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        jsonschema.validate(config | {"min_worker": 1}, SCHEMA)


def test_ray_fills_and_accepts_it(config: dict[str, Any]) -> None:
    """As `ray up` does before it asks the cloud for anything."""
    from ray.autoscaler._private.util import fillout_defaults, merge_setup_commands, validate_config

    if config["provider"]["type"] == "aws":  # Ray asks EC2 what its machines have
        for node in config["available_node_types"].values():
            node["resources"] = node["resources"] or {"CPU": 16}
    filled = merge_setup_commands(fillout_defaults(config))
    validate_config(filled)
    assert filled["head_node_type"] in filled["available_node_types"]
    assert sum(node.get("min_workers", 0) for node in filled["available_node_types"].values()) <= filled["max_workers"]


def test_every_node_asks_for_the_token(config: dict[str, Any]) -> None:
    tokens = [remote for remote, local in config["file_mounts"].items() if local == "~/.ray/auth_token"]
    assert tokens == [f"/home/{config['auth']['ssh_user']}/.ray/auth_token"]
    starts = [command for key in COMMANDS for command in config.get(key, []) if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ~/.rayft/bin/ray start" in command for command in starts)
    assert any("export RAY_AUTH_MODE=token" in command for command in config["initialization_commands"])
    assert "--dashboard-host=127.0.0.1" in next(command for command in starts if "--head" in command)


def test_rayft_is_installed_from_the_lock(config: dict[str, Any]) -> None:
    home = f"/home/{config['auth']['ssh_user']}/rayft/"
    sent = {local for remote, local in config["file_mounts"].items() if remote == home + local}
    assert sent == {"rayft", "pyproject.toml", "README.md", "LICENSE", str(LOCK.relative_to(ROOT))}
    assert all((ROOT / local).exists() for local in sent)
    installs = [command for command in config["setup_commands"] if "uv pip install" in command]
    assert f"-r ~/rayft/{LOCK.relative_to(ROOT)}" in installs[0]
    assert installs[1].endswith("--no-deps --no-build-isolation ~/rayft")
    pinned = [
        command for key in COMMANDS for command in config.get(key, []) if re.search(r"pip install .*[a-z]==", command)
    ]
    assert [re.findall(r"[\w-]+==[\d.]+", command) for command in pinned]


@pytest.mark.parametrize("key", COMMANDS)
def test_commands_are_bash(config: dict[str, Any], key: str) -> None:
    for command in config.get(key, []):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr


def test_both_clouds_prepare_their_machines_alike() -> None:
    (aws,), (gcp,) = (documents(f"ray-up/{file}") for file in FILES)
    same = ("cluster_name", "file_mounts", "initialization_commands", "setup_commands", "head_start_ray_commands",
            "worker_start_ray_commands", "auth", "head_node_type", "max_workers")  # fmt: skip
    assert {key: aws[key] for key in same} == {key: gcp[key] for key in same}
    assert set(aws["available_node_types"]) == set(gcp["available_node_types"])


def test_the_instructions_pin_the_images_of_every_node() -> None:
    text = (CLUSTER / "ray-up" / "aws.yaml").read_text()
    (aws,) = documents("ray-up/aws.yaml")
    images = {node["node_config"]["ImageId"] for node in aws["available_node_types"].values()}
    assert images == set(re.findall(r"s\|(\w+)\|", text))


def test_ray_listens_where_kubernetes_says_too() -> None:
    head = document("kuberay/raycluster.yaml", "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][
        0
    ]
    (port,) = [one["containerPort"] for one in head["ports"] if one["name"] == "gcs-server"]
    (aws,) = documents("ray-up/aws.yaml")
    assert f"--port={port} " in aws["head_start_ray_commands"][1]
    assert f"$RAY_HEAD_IP:{port} " in aws["worker_start_ray_commands"][1]
