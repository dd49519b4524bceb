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
from rayft import storage

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

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
    made = small.recipe(folder, small.small_bert(folder / "bert"), cluster__workers=3)
    return {**made, "storage": bucket}


def rayft(leads: dict[str, str], *arguments: str, code: int = 0) -> str:
    return small.finish(small.start(*arguments, **leads), code)


def answered(leads: dict[str, str], *arguments: str) -> Any:
    """The JSON answer of a command, whose other output comes before it here."""
    text = rayft(leads, *arguments, "--json")
    return json.loads(text[min(place for place in (text.find("\n{"), text.find("\n["), 0) if place >= 0) :])


def test_a_job_trains_as_the_command_does_and_a_second_submission_attaches(
    plain: dict[str, Any], leads: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    path = small.write_recipe(tmp_path, {**plain, "name": "once"})
    told = rayft(leads, "submit", path, "--upload", "--follow")
    assert "submitted, attempt 1" in told
    assert "finished after 26 steps" in told
    result = storage.read_json(storage.join(bucket, "once", "result.json"))
    alone = small.write_recipe(tmp_path, {**plain, "name": "alone", "storage": str(tmp_path / "runs")})
    small.finish(small.start("run", alone))
    expected = json.loads((tmp_path / "runs" / "alone" / "result.json").read_text())
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
    assert storage.exists(storage.join(result["export"], "model.safetensors"))
    again = answered(leads, "submit", path, "--upload")
    assert (again["attached"], again["attempt"], again["status"]) == (True, 1, "SUCCEEDED")
    (job,) = [one for one in answered(leads, "jobs", "list") if one["recipe"] == "once"]
    assert (job["status"], job["step"], job["attempt"]) == ("succeeded", 26, 1)
    assert job["value"] == result["metrics"]["eval_accuracy"]
    assert "finished after 26 steps" in rayft(leads, "jobs", "logs", "once")


def test_submitting_twice_at_once_leaves_one_run(
    plain: dict[str, Any], leads: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    path = small.write_recipe(tmp_path, {**plain, "name": "twice"})
    both = [small.start("submit", path, "--upload", "--follow", **leads) for _ in range(2)]
    for process in both:
        assert "finished after 26 steps" in small.finish(process)
    assert len([one for one in answered(leads, "jobs", "list") if one["recipe"] == "twice"]) == 1
    assert len(storage.listing(storage.join(bucket, "twice", "attempts"))) == 1


def test_a_failing_recipe_says_why_last_and_the_next_submission_is_the_next_attempt(
    plain: dict[str, Any], leads: dict[str, str], tmp_path: Path
) -> None:
    made = {**plain, "name": "fails", "train": {**plain["train"], "learning_rate": 1e30}}
    path = small.write_recipe(tmp_path, made)
    last = rayft(leads, "submit", path, "--upload", "--follow", code=1).strip().splitlines()[-3:]
    assert any("train.learning_rate" in line for line in last), last
    again = answered(leads, "submit", path, "--upload")
    assert (again["attached"], again["attempt"]) == (False, 2)
    rayft(leads, "jobs", "logs", again["job"], "--follow", code=1)


def test_a_stopped_job_leaves_a_checkpoint_from_which_the_next_goes_on(
    plain: dict[str, Any], leads: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    made = {**plain, "name": "stopped", "train": {**plain["train"], "epochs": 60}}
    path = small.write_recipe(tmp_path, made)
    run = storage.join(bucket, "stopped")
    following = small.start("submit", path, "--upload", "--follow", **leads)
    small.wait_for(lambda: storage.exists(storage.join(run, "metrics.jsonl")), following)
    found = answered(leads, "jobs", "stop", "stopped")
    assert found["status"] in ("stopped", "failed")  # as Ray calls it: it ended by itself, with exit code 130
    assert "stopped" in small.finish(following, 130)
    assert storage.read_json(storage.join(run, "run.json"))["status"] == "stopped"
    sent = answered(leads, "submit", path, "--upload")
    assert (sent["attached"], sent["attempt"]) == (False, 2)
    following = small.start("jobs", "logs", sent["job"], "--follow", **leads)
    told = ""
    assert following.stdout is not None
    while "going on from step" not in told:
        line = following.stdout.readline()
        assert line, told
        told += line
    rayft(leads, "jobs", "stop", sent["job"])
    following.communicate()


def test_tokens_are_asked_for_in_one_sentence_and_shown_nowhere(
    plain: dict[str, Any], leads: dict[str, str], cluster: Nodes, bucket: str, tmp_path: Path
) -> None:
    path = small.write_recipe(tmp_path, {**plain, "name": "tokens"})
    told = rayft({**leads, "RAY_AUTH_TOKEN": ""}, "submit", path, "--upload", code=2)
    assert "asks for a token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH" in told
    told = rayft({**leads, "RAY_AUTH_TOKEN": "0" * 48}, "submit", path, "--upload", code=2)
    assert "refuses the token that RAY_AUTH_TOKEN gives" in told
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    from_file = {**leads, "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(file)}
    told = rayft(from_file, "submit", path, "--upload", "--follow")
    job = answered(leads, "jobs", "status", "tokens")
    logs = rayft(leads, "jobs", "logs", job["job"])
    listed = rayft(leads, "jobs", "list", "--json")
    stored = [
        storage.read_bytes(entry.path)
        for folder in ("tokens", "inputs")
        for entry in storage.listing(storage.join(bucket, folder))
    ]
    assert len(stored) > 5
    assert not any(TOKEN in text for text in (told, logs, listed, json.dumps(job)))
    assert not any(TOKEN.encode() in content for content in stored)
    arguments = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not any(TOKEN in line for line in arguments)


def test_a_head_that_does_not_answer_is_one_sentence(
    plain: dict[str, Any], leads: dict[str, str], tmp_path: Path
) -> None:
    path = small.write_recipe(tmp_path, {**plain, "name": "nowhere"})
    told = rayft(leads, "submit", path, "--upload", "--address", "http://127.0.0.1:9", code=2)
    assert "no job server answers at http://127.0.0.1:9" in told


def test_a_new_head_and_the_same_submission_go_on(
    plain: dict[str, Any], leads: dict[str, str], cluster: Nodes, bucket: str, tmp_path: Path
) -> None:
    """The last of the file: the cluster knows nothing of its earlier jobs afterwards."""
    train = {**plain["train"], "epochs": 8}
    fields = {"model": {**plain["model"], "dropout": 0.0}, "train": {**train, "save_every": "5 steps"}}
    path = small.write_recipe(tmp_path, {**plain, **fields, "name": "head"})
    alone = small.write_recipe(tmp_path, {**plain, **fields, "name": "untouched", "storage": str(tmp_path / "runs")})
    small.finish(small.start("run", alone))
    run = storage.join(bucket, "head")
    following = small.start("submit", path, "--upload", "--follow", **leads)
    small.wait_for(lambda: any(e.path.endswith("COMMITTED") for e in storage.listing(f"{run}/checkpoints")), following)
    for index in range(3):
        cluster.kill(index)
    following.kill()
    following.communicate()
    for index in range(3):
        cluster.start(index)
    assert "going on from step" in rayft(leads, "submit", path, "--upload", "--follow")
    rows = [json.loads(line) for line in storage.read_text(f"{run}/metrics.jsonl").splitlines()]
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert found == pytest.approx(small.losses(tmp_path / "runs" / "untouched"), rel=1e-5)
