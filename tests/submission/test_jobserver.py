"""A job server's address, and what its silence means; what it does on a cluster is in `tests/cluster/test_jobs.py`."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from job_api import JOB, JobApi, nothing_more, serving, silence
from rayft.errors import ClusterError, TrainingError
from rayft.recipe import Submit
from rayft.submission import jobserver
from rayft.submission.jobserver import JobServer, address_of
from rayft.text import submitted_lines


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    for name in names:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("head", "http://head:8265"),
        ("head:1234", "http://head:1234"),
        ("http://head/", "http://head:8265"),
        ("https://ray.example.com/", "https://ray.example.com"),
        ("http://10.0.0.1:8265/", "http://10.0.0.1:8265"),
    ],
)
def test_an_address_becomes_an_url(given: str, meant: str) -> None:
    assert address_of(given) == meant


def test_the_command_line_comes_before_the_recipe_and_that_before_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://c:1")
    recipe = Submit(address="http://b:1")
    assert address_of("http://a:1", recipe) == "http://a:1"
    assert address_of(None, recipe) == "http://b:1"
    assert address_of(None, Submit()) == address_of(None) == "http://c:1"


@pytest.mark.parametrize(
    "given",
    [
        *("ray://head:10001", "http://", "http://me:secret@head:8265", "http://me:secret@head:abc", "http://head:0"),
        *("head:abc", "http://head:99999", "http://[::1", "http://head:8265/?token=secret", "http://head#secret"),
        "http://head :8265",
    ],
)
def test_what_is_no_job_server_is_refused_without_repeating_a_secret(given: str) -> None:
    with pytest.raises(ClusterError) as raised:
        address_of(given)
    assert raised.value.exit_code == 2
    assert str(raised.value).startswith("address")
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("cluster", ["10.254.0.1:6379", "auto", "local", "ray://head:10001"])
def test_the_address_of_a_cluster_is_not_taken_for_that_of_its_job_server(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    with pytest.raises(ClusterError, match="RAY_ADDRESS names the cluster itself; give --address http://HEAD:8265"):
        address_of(None)
    assert address_of("http://a:1") == "http://a:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "head")
    assert address_of(None) == "http://head:8265"


def test_no_address_is_refused_with_the_ways_to_give_one() -> None:
    with pytest.raises(ClusterError, match=r"--address .*submit.address.*RAY_API_SERVER_ADDRESS"):
        address_of(None, Submit())
    with pytest.raises(ClusterError, match=r"--address .*RAY_API_SERVER_ADDRESS") as raised:
        address_of(None)
    assert "recipe" not in str(raised.value)


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        (None, " --address http://head:8265"),
        ("http://other:8265", " --address http://head:8265"),
        ("ray://head:10001", " --address http://head:8265"),
        ("http://head", ""),  # the same server
    ],
)
def test_the_next_command_leads_to_the_same_server(
    environment: str | None, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    monkeypatch.setattr(JobServer, "_connected", lambda self: None)
    server = JobServer(address_of("http://head:8265/"))
    assert server.options == options
    sent = {"job": "one", "run": "r", "attached": False, "attempt": 1, "status": "PENDING"}
    told = submitted_lines(sent, server.options)
    assert told[0] == "submission 1: submitted"
    assert [line.split("  ")[-1] for line in told[3:]] == [
        f"rayft jobs logs one --follow{options}",
        f"rayft jobs stop one{options}",
    ]


def test_an_address_of_ipv6_is_quoted_for_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JobServer, "_connected", lambda self: None)
    assert JobServer(address_of("http://[::1]:8265")).options == " --address 'http://[::1]:8265'"


def test_a_server_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8")  # which Ray's client would ask instead
    with pytest.raises(ClusterError, match=r"no job server answers at http://127\.0\.0\.1:9 "):
        JobServer("http://127.0.0.1:9")


@pytest.mark.parametrize(("status", "body"), [(404, "no such page"), (200, "<html>"), (200, "{}"), (500, "")])
def test_what_answers_and_is_no_job_server_is_refused(status: int, body: str) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with pytest.raises(ClusterError, match=r"job server") as raised:
            JobServer(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert raised.value.exit_code == 2


# --- servers that fall silent, and machines that are gone


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobApi]:
    monkeypatch.setattr(jobserver, "LOOK_S", 0.0)
    with serving() as (found, url):
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", url)
        yield found


def server() -> JobServer:
    return JobServer(address_of(None))


def test_a_server_that_accepts_and_stays_silent_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobserver, "READ_S", 0.05)
    with silence() as url, pytest.raises(ClusterError, match=rf"no job server answers at {url} \(ReadTimeout\)"):
        JobServer(url)


def test_a_package_may_take_longer_than_a_connection(
    api: JobApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    connected = server()
    size = 2**24
    (tmp_path / "weights.bin").write_bytes(os.urandom(size))  # more than sockets hold back
    monkeypatch.setattr(jobserver, "CONNECT_S", 0.05)

    async def slow() -> None:
        await asyncio.sleep(0.2)

    api.before_package = slow
    assert connected.submit(JOB, entrypoint="true", runtime_env={"working_dir": str(tmp_path)})
    (sent,) = api.packages
    assert sent > size


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")  # by Ray's client
def test_output_comes_once_where_a_connection_falls_silent(api: JobApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a head has vanished without a word: nobody closes the connection."""
    cut: list[int] = []

    async def tail(number: int, connection: web.WebSocketResponse) -> None:
        await connection.send_str("one\n")
        if number > 1:
            await connection.send_str("two\n")
            api.job["status"], api.logs = "SUCCEEDED", "one\ntwo\nthree\n"
        await nothing_more(number, connection)
        cut.append(number)

    api.tail = tail
    connected, shown = server(), list[str]()
    monkeypatch.setattr(jobserver, "SILENT_S", 0.2)
    assert connected.follow(JOB, shown.append).status == "SUCCEEDED"
    assert "".join(shown) == "one\ntwo\nthree\n"
    assert api.tails >= 2
    assert cut, "it was the server that had to hang up"


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")  # by Ray's client
def test_following_ends_where_a_head_has_vanished(api: JobApi, monkeypatch: pytest.MonkeyPatch) -> None:
    async def tail(number: int, connection: web.WebSocketResponse) -> None:
        api.silent = True
        await nothing_more(number, connection)

    api.tail = tail
    connected = server()
    for name, value in {"SILENT_S": 0.2, "READ_S": 0.2, "PATIENCE_S": 0.1}.items():
        monkeypatch.setattr(jobserver, name, value)
    with pytest.raises(TrainingError, match=r"has not answered for 0\.1 s; the job may go on"):
        connected.follow(JOB, print)
    assert not api.waited_for


GONE = (500, "Traceback (most recent call last):\n  …\nClientConnectorError: Cannot connect to host 10.0.0.3:52365")
NODE_DIED = "Job supervisor actor died: its node has died."


def test_how_a_job_has_ended_is_told_where_the_machine_that_ran_it_is_gone(api: JobApi) -> None:
    api.job |= {"status": "FAILED", "message": NODE_DIED}
    api.logs = GONE
    shown = list[str]()
    ended = server().follow(JOB, shown.append)
    told = f"the output of {JOB} lay on a machine that is gone: {NODE_DIED}"
    assert (ended.status, ended.message, shown) == ("FAILED", NODE_DIED, [f"{told}\n"])
    with pytest.raises(ClusterError) as raised:
        server().logs(JOB)
    assert str(raised.value) == told


def test_a_fault_of_the_server_is_one_sentence(api: JobApi) -> None:
    connected = server()
    api.refusal = (500, "Traceback (most recent call last):\n  …\nTimeoutError: no agent of the head within 10 s")
    for question in (connected.jobs, lambda: connected.stop(JOB)):
        with pytest.raises(ClusterError, match=r"can't answer now: TimeoutError: no agent of the head within 10 s"):
            question()
