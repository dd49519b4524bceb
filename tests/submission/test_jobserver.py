"""Addresses of a job server; what it does on a cluster is in `tests/cluster/test_jobs.py`."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rayft.errors import ClusterError
from rayft.recipe import Submit
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
        ("head", ""),  # the same server
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
