"""The dashboard over real sockets, and its pages in a browser while runs write."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import folders
from browser import chromium, watched
from rayft import storage
from rayft.errors import StorageDown, StorageMissing, StorageRefused
from rayft.reports.dashboard import Dashboard, is_own, place, serve, token_for

pytestmark = pytest.mark.slow  # they drive a browser

Get = Callable[..., "Reply"]


class Reply:
    def __init__(self, answer: http.client.HTTPResponse):
        self.status, self.headers, self.text = answer.status, answer.headers, answer.read().decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@contextmanager
def serving(dashboard: Dashboard) -> Iterator[int]:
    """Serves on a free port, which it gives, from a thread."""
    loop, ready, ports = asyncio.new_event_loop(), threading.Event(), list[int]()
    runner = web.AppRunner(dashboard.application(), access_log=None, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
        ready.set()

    def work() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(30)
    yield ports[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def get(port: int, path: str, **headers: str) -> Reply:
    """One request, its path sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    reply = Reply(connection.getresponse())
    connection.close()
    return reply


@pytest.fixture
def where(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


# --- what is served


def test_data_carry_a_version_and_are_sent_once(where: str) -> None:
    folder = folders.write_run(where, "team/one", "running")
    dashboard = Dashboard(where)
    with serving(dashboard) as port:
        first = get(port, "/data/team/one")
        assert (first.status, first.json["steps"], first.json["name"]) == (200, 40, "team/one")
        again = get(port, "/data/team/one", If_None_Match=first.headers["ETag"])
        assert (again.status, again.text) == (304, "")
        with open(storage.join(folder, "metrics.jsonl"), "a") as file:
            file.write('{"step": 41, "epoch": 4.1, "loss": 0.25, "learning_rate": 0.0}\n')
        dashboard._answers["team/one"].until = 0.0  # as if FRESH_S had passed
        later = get(port, "/data/team/one", If_None_Match=first.headers["ETag"])
        assert (later.status, later.json["steps"]) == (200, 41)


def test_pages_hold_their_data_and_load_nothing_from_elsewhere(where: str) -> None:
    folders.write_run(where, "one")
    with serving(Dashboard(where)) as port:
        for path in ("/", "/run/one"):
            page = get(port, path)
            assert page.status == 200
            assert "http://" not in page.text.split('<script type="application/json"')[0]
            assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        for name in ("page.css", "plotly.js", "charts.js", "table.js", "page.js", "sweep.js"):
            assert get(port, f"/-/{name}").status == 200
        assert get(port, "/-/dashboard.py").status == 404


@pytest.mark.parametrize("name", ["one", "a/b-c.d", "sweep/trials/00003", "with space", "100%", "ü"])
def test_every_name_has_a_place(where: str, name: str) -> None:
    from urllib.parse import quote

    folders.write_run(where, name)
    with serving(Dashboard(where)) as port:
        found = get(port, "/data/" + quote(name))
        assert (found.status, found.json["name"]) == (200, name)
        assert get(port, "/run/" + quote(name)).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/data/../secret",
        "/data/%2e%2e/secret",
        "/data/one/../../secret",
        "/data/..%2fsecret",
        "/data/%2Fetc",
        "/data//etc",
        "/data/one%5c..%5csecret",
        "/data/one%00",
        "/data/one/",
        "/data/./one",
        "//127.0.0.1/one",
        "/run/",
        "/run",
        "/one",
        "/data/nothing",
        "/data/team",
        "/-/../cli.py",
        "/-/%2e%2e/cli.py",
        "/-/..%2fcli.py",
    ],
)
def test_no_path_leads_out_of_the_storage(where: str, path: str) -> None:
    folders.write_run(where, "team/one")
    folders.write_run(where + "/..", "secret")
    with serving(Dashboard(where)) as port:
        found = get(port, path)
        assert found.status == 404
        assert found.text.count("\n") == 1


def test_an_outage_is_told_and_not_hidden(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.write_run(where, "one")
    dashboard = Dashboard(where)

    def down(path: str, recursive: bool = True) -> list[Any]:
        raise StorageDown(f"{path}: no answer after 9 attempts")

    with serving(dashboard) as port:
        assert get(port, "/data/one").status == 200
        dashboard._answers["one"].until = 0.0
        with monkeypatch.context() as patch:
            patch.setattr(storage, "listing", down)
            found = get(port, "/data/one")
            assert (found.status, found.text.endswith("no answer after 9 attempts\n")) == (503, True)
        assert get(port, "/data/one").status == 200


def test_runs_in_object_storage_are_served(s3: str) -> None:
    folders.write_run(f"{s3}/dashboard", "team/one")
    folders.write_sweep(f"{s3}/dashboard", "rates", 5)
    with serving(Dashboard(f"{s3}/dashboard")) as port:
        names = [(run["name"], run["kind"]) for run in get(port, "/data/").json["runs"]]
        assert sorted(names) == [("rates", "sweep"), ("team/one", "run")]
        assert len(get(port, "/data/rates").json["trials"]) == 5
        assert get(port, "/data/rates/trials/00003").json["trial"]["trial"] == 3
        assert get(port, "/data/nothing").status == 404


# --- who may ask


def test_a_token_opens_by_header_by_url_and_then_by_cookie(where: str) -> None:
    folders.write_run(where, "one")
    with serving(Dashboard(where, "s3cret-ü")) as port:
        refused = [get(port, "/"), get(port, "/data/one", Authorization="Bearer s3cret"), get(port, "/?token=no")]
        refused.append(get(port, "/-/page.js"))
        assert [reply.status for reply in refused] == [401] * 4
        assert refused[0].text.count("\n") == 1
        assert "s3cret" not in refused[0].text
        assert get(port, "/data/one", Authorization="Bearer s3cret-ü".encode().decode("latin-1")).status == 200
    with serving(Dashboard(where, "s3cret")) as port:
        assert get(port, "/data/one", Authorization="Bearer s3cret").status == 200
        opened = get(port, "/run/one?token=s3cret&more=1")
        assert (opened.status, opened.headers["Location"]) == (303, "/run/one?more=1")
        cookie = opened.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert get(port, "/run/one", Cookie=cookie.partition(";")[0]).status == 200
        assert get(port, "//elsewhere.example/?token=s3cret").headers["Location"] == "/elsewhere.example/"


def test_without_a_token_only_names_of_this_machine_are_answered(where: str) -> None:
    folders.write_run(where, "one")
    with serving(Dashboard(where)) as port:
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
            assert get(port, "/", Host=host).status == 200
        assert get(port, "/", Host="elsewhere.example").status == 403


def test_any_other_host_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYFT_DASHBOARD_TOKEN", raising=False)
    assert [is_own(host) for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3")] == [True] * 4
    assert [is_own(host) for host in ("0.0.0.0", "::", "192.168.0.1", "a.example", "localhost.a.example")] == [
        False
    ] * 5
    assert token_for("127.0.0.1") == (None, False)
    tokens = {token_for("0.0.0.0")[0] for _ in range(3)}
    assert len(tokens) == 3
    assert all(token is not None and len(token) >= 32 for token in tokens)
    monkeypatch.setenv("RAYFT_DASHBOARD_TOKEN", "given")
    assert token_for("0.0.0.0") == token_for("127.0.0.1") == ("given", False)


# --- its life


STARTED = """
import sys
from rayft.reports.dashboard import serve
serve(sys.argv[1], sys.argv[2], 0, lambda text: print(text, flush=True))
"""


@pytest.mark.parametrize(("host", "number"), [("127.0.0.1", signal.SIGINT), ("0.0.0.0", signal.SIGTERM)])
def test_it_says_where_it_is_and_ends_without_a_word(where: str, host: str, number: int) -> None:
    folders.write_run(where, "one")
    clean = {name: value for name, value in os.environ.items() if name != "RAYFT_DASHBOARD_TOKEN"}
    command = [sys.executable, "-c", STARTED, where, host]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean) as process:
        assert process.stdout
        assert process.stderr
        said = process.stdout.readline()
        url = re.search(r"http://([^:/]+):(\d+)(/\S*)", said)
        assert url
        assert url[1] == (host if host == "127.0.0.1" else socket.gethostname())
        opened = get(int(url[2]), url[3])
        assert opened.status == (200 if host == "127.0.0.1" else 303)
        process.send_signal(number)
        assert process.wait(30) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("", "")


def test_a_storage_that_is_not_there_and_a_port_that_is_taken_are_refused(where: str) -> None:
    with pytest.raises(StorageMissing, match="does not exist"):
        serve(where, "127.0.0.1", 0, print)
    folders.write_run(where, "one")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StorageRefused, match="can't be listened on"):
            serve(where, "127.0.0.1", taken.getsockname()[1], print)


def test_paths_are_read_as_they_were_sent() -> None:
    assert place("/") == ("page", "")
    assert place("/data/") == place("/data") == ("data", "")
    assert place("/run/a/b%20c") == ("page", "a/b c")
    for path in ("/run/a%2Fb", "/run/..", "/other/a", "/run/a//b"):
        with pytest.raises(web.HTTPNotFound):
            place(path)


# --- pages that stay fresh


def test_run_grows_on_the_page_while_it_is_open(browser: Any, where: str) -> None:
    folder = folders.write_run(where, "team/one", "running")
    with serving(Dashboard(where)) as port, watched(browser) as page:
        page.goto(f"http://127.0.0.1:{port}/")
        page.locator("#runs a").first.click()
        page.wait_for_selector('[data-tile="steps"] [title="40"]')
        page.evaluate("window.same = true")
        with open(storage.join(folder, "metrics.jsonl"), "a") as file:
            file.write('{"step": 41, "epoch": 4.1, "loss": 0.123456789, "learning_rate": 0.0}\n')
            file.write('{"step": 41, "epoch": 4.1, "eval_accuracy": 0.987654321, "eval_loss": 0.1}\n{"step": 42, "ep')
        page.wait_for_selector('[data-tile="eval_accuracy"] [title="0.987654321"]')
        assert page.evaluate("document.querySelector('#loss .chart').data[0].y.at(-1)") == 0.123456789
        assert page.locator('[data-tile="steps"] .value span').get_attribute("title") == "41"
        folders.write_run(where, "team/one")
        page.wait_for_selector("[data-tile=status] .finished")
        assert page.evaluate("window.same") is True


def test_sweep_gains_trials_and_keeps_sort_and_filter(browser: Any, where: str) -> None:
    folder = folders.write_sweep(where, "rates", 6, "running")
    with serving(Dashboard(where)) as port, watched(browser) as page:
        page.goto(f"http://127.0.0.1:{port}/run/rates")
        page.locator("#trials th button").first.click()
        page.locator("#trials th button").first.click()
        page.locator("#trials input").fill("finished")
        rows = "#trials tbody tr"
        page.wait_for_function(f"document.querySelectorAll('{rows}').length === 3")
        page.evaluate(f"window.row = document.querySelector('{rows}')")
        for number in (6, 7, 8):
            folders.write_trial(folder, number, *folders.trial_status(number))
        folders.write_trial(folder, 9, "running", steps=10)
        page.wait_for_function("document.querySelector('#trials .count').innerText.includes('of 10 trials')")
        keys = page.eval_on_selector_all(rows, "(all) => all.map((row) => row.dataset.key)")
        assert keys == ["8", "6", "4", "2", "0"]
        assert page.evaluate(f"window.row === document.querySelectorAll('{rows}')[2]")
        assert page.evaluate("document.querySelector('#curves .chart').data.length") == 10
        assert page.locator("#importance .note").inner_text() == "from 5 finished trials"
        assert page.locator('[data-tile="still to end"] .more').inner_text() == "1 running"
        page.locator("#trials a").first.click()
        page.wait_for_selector('[data-tile="model.freeze.layers"]')
        assert page.url.endswith("/run/rates/trials/00008")


def test_index_gains_runs_and_the_page_says_when_nothing_answers(browser: Any, where: str) -> None:
    folders.write_run(where, "first", silent_s=100)
    with serving(Dashboard(where)) as port, watched(browser, expected="status of 503") as page:
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector('#runs [data-key="first"]')
        folders.write_run(where, "second", "running")
        page.wait_for_selector('#runs [data-key="second"] .running')
        assert page.eval_on_selector_all("#runs tbody tr", "(all) => all.map((one) => one.dataset.key)") == [
            "second",
            "first",
        ]
        page.route("**/data/", lambda route: route.fulfill(status=503, body="the storage does not answer\n"))
        page.wait_for_selector("#alarm:not([hidden])")
        assert page.locator("#alarm").inner_text() == "the storage does not answer"
        page.unroute("**/data/")
        page.wait_for_selector("#alarm", state="hidden")


def test_names_of_runs_can_be_read_on_a_narrow_screen(browser: Any, where: str) -> None:
    names = ["sms-spam-of-all-countries", "teams/llama-7b-with-adapters"]
    for name in names:
        folders.write_run(where, name)
    with serving(Dashboard(where)) as port, watched(browser) as page:
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_selector(f'#runs [data-key="{names[0]}"]')
            heights = page.eval_on_selector_all("#runs tbody tr", "(all) => all.map((one) => one.clientHeight)")
            assert max(heights) < 80, "more than three lines"
            assert page.evaluate("document.documentElement.scrollWidth") <= width
