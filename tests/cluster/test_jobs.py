"""Submission to a real job server: three nodes with addresses of their own, token authentication on, all else on S3."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import small
from cluster.local import Nodes
from faulty_s3 import FaultyS3
from group import run_group
from rayft import storage
from rayft.training import checkpoints
from whole import trained

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

LOOK_S = 0.5

TOKEN = secrets.token_hex(24)


@pytest.fixture(scope="module")
def bucket(s3: str) -> str:
    return storage.join(s3, "jobs")


@pytest.fixture(scope="module")
def cluster(s3: str, network_namespaces: None) -> Iterator[Nodes]:
    with FaultyS3(os.environ["AWS_ENDPOINT_URL"], host="0.0.0.0") as proxy:
        port = proxy.url.rpartition(":")[2]
        environment = {
            "AWS_ENDPOINT_URL": f"http://{{gateway}}:{port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
        }
        with Nodes(3, cpus=2, environment=environment) as nodes:
            yield nodes


@pytest.fixture(scope="module")
def leads(cluster: Nodes) -> dict[str, str]:
    """What a user's environment says of the cluster."""
    return {"RAY_API_SERVER_ADDRESS": cluster.dashboard, "RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def plain(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe whose rows and model are on this machine, and whose storage is on S3."""
    folder = tmp_path_factory.mktemp("jobs")
    made = small.recipe(folder, small.small_bert(folder / "bert"), cluster__workers=2)
    return {**made, "storage": bucket}


def untouched(plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the same run gives on two workers of this machine, without a cluster."""
    fields = {"name": "untouched", "storage": str(folder / "runs"), "deepspeed": {"zero_stage": 0}}
    found: dict[str, Any] = run_group(trained, 2, {**plain, **fields}, True)[0]
    return found


def rayft(leads: dict[str, str], *arguments: str, code: int = 0) -> str:
    return small.finish(small.start(*arguments, **leads), code)


def answered(leads: dict[str, str], *arguments: str) -> Any:
    """The JSON answer of a command, whose other output comes before it here."""
    lines = rayft(leads, *arguments, "--json").splitlines()
    begin = next(number for number, line in enumerate(lines) if line[:1] in ("{", "["))
    return json.loads("\n".join(lines[begin:]))


def test_two_submissions_at_once_are_one_job_which_trains_as_the_command_does(
    plain: dict[str, Any], leads: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    path = small.write_recipe(tmp_path, {**plain, "name": "once"})
    for process in [small.start("submit", path, "--upload", "--follow", **leads) for _ in range(2)]:
        told = small.finish(process)
        assert "submission 1: " in told
        assert "finished after 26 steps" in told
    result = storage.read_json(storage.join(bucket, "once", "result.json"))
    assert result["metrics"] == pytest.approx(untouched(plain, tmp_path)["result"]["metrics"], rel=1e-4)
    assert storage.exists(storage.join(result["export"], "model.safetensors"))
    assert len(storage.listing(storage.join(bucket, "once", "attempts"))) == 1
    again = answered(leads, "submit", path, "--upload")
    assert (again["attached"], again["attempt"], again["status"]) == (True, 1, "SUCCEEDED")
    listed = answered(leads, "jobs", "list")
    (job,) = [one for one in listed if one["recipe"] == "once"]
    assert (job["status"], job["step"], job["attempt"]) == ("succeeded", 26, 1)
    assert job["value"] == result["metrics"]["eval_accuracy"]
    logs = rayft(leads, "jobs", "logs", "once")
    assert "finished after 26 steps" in logs
    stored = [
        storage.read_bytes(entry.path)
        for folder in ("once", "inputs", "prepared")
        for entry in storage.listing(storage.join(bucket, folder))
    ]
    assert len(stored) > 10
    assert not any(TOKEN in text for text in (told, logs, json.dumps(again), json.dumps(listed)))
    assert not any(TOKEN.encode() in content for content in stored)
    arguments = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not any(TOKEN in line for line in arguments)


def test_tokens_and_servers_that_do_not_fit_are_one_sentence(
    plain: dict[str, Any], leads: dict[str, str], tmp_path: Path
) -> None:
    path = small.write_recipe(tmp_path, {**plain, "name": "refused"})
    nowhere = {**leads, "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}  # nor is there a token of Ray's own
    told = rayft(nowhere, "submit", path, "--upload", code=2)
    assert "asks for a token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH" in told
    told = rayft({**leads, "RAY_AUTH_TOKEN": "0" * 48}, "submit", path, "--upload", code=2)
    assert "refuses the token that RAY_AUTH_TOKEN gives" in told
    told = rayft(leads, "submit", path, "--upload", "--address", "http://127.0.0.1:9", code=2)
    assert "no job server answers at http://127.0.0.1:9" in told
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    from_file = {**leads, "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(file)}
    assert not [job for job in answered(from_file, "jobs", "list") if job["recipe"] == "refused"]


def test_a_failing_recipe_says_why_last_and_the_next_submission_is_the_next_attempt(
    plain: dict[str, Any], leads: dict[str, str], tmp_path: Path
) -> None:
    made = {**plain, "name": "fails", "train": {**plain["train"], "learning_rate": 1e30}}
    path = small.write_recipe(tmp_path, made)
    last = rayft(leads, "submit", path, "--upload", "--follow", code=1).strip().splitlines()[-3:]
    assert any("train.learning_rate" in line for line in last), last
    again = answered(leads, "submit", path, "--upload")
    assert (again["attached"], again["attempt"]) == (False, 2)


def test_a_new_head_and_a_stop_change_nothing_in_what_is_trained(
    plain: dict[str, Any], leads: dict[str, str], cluster: Nodes, bucket: str, tmp_path: Path
) -> None:
    """The last of the file: the cluster knows nothing of its earlier jobs afterwards."""
    train = {**plain["train"], "epochs": 4, "save_every": "5 steps"}
    made = {**plain, "model": {**plain["model"], "dropout": 0.0}, "train": train}
    path = small.write_recipe(tmp_path, {**made, "name": "head"})
    run = storage.join(bucket, "head")

    def further(step: int) -> bool:
        found = checkpoints.newest(storage.join(run, "checkpoints"))
        return found is not None and checkpoints.step_of(found) > step

    following = small.start("submit", path, "--upload", "--follow", **leads)
    small.wait_for(lambda: further(0), following, every_s=LOOK_S)
    for index in range(3):
        cluster.kill(index)
    following.kill()
    following.communicate()
    for index in range(3):
        cluster.start(index)
    following = small.start("submit", path, "--upload", "--follow", **leads)
    begun = checkpoints.step_of(checkpoints.newest(storage.join(run, "checkpoints")) or "")
    small.wait_for(lambda: further(begun), following, every_s=LOOK_S)
    found = answered(leads, "jobs", "stop", "head")
    assert found["status"] == "stopped"
    assert "going on from step" in small.finish(following, 130)
    assert storage.read_json(storage.join(run, "run.json"))["status"] == "stopped"
    told = rayft(leads, "submit", path, "--upload", "--follow")
    assert "submission 2: submitted" in told
    assert "going on from step" in told
    rows = [json.loads(line) for line in storage.read_text(f"{run}/metrics.jsonl").splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert dict(losses) == pytest.approx(dict(enumerate(untouched(made, tmp_path)["losses"], 1)), rel=1e-5)
    assert len(losses) == len(dict(losses))
