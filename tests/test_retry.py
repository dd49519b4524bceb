from __future__ import annotations

import errno
import http.client
import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from rayft import retry, storage
from rayft.errors import StorageDenied, StorageDown, StorageError, StorageMissing

SECRET = "wJalr-this-must-never-be-seen"
KEY_ID = "AKIA-nor-this"


class Proxy:
    """Stands between a client and the S3 server, answers the first requests that `faults` holds something for, and
    passes the others on. A fault is an HTTP status with a code of S3, "close", or "cut" (half of the true answer).
    """

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[tuple[int, str] | str] = []
        self.wanted: Callable[[str, str], bool] = lambda method, path: True
        self.seen: list[str] = []
        handler = type("Handler", (_Handler,), {"proxy": self, "protocol_version": "HTTP/1.1"})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = None
        if self.proxy.wanted(self.command, self.path):
            self.proxy.seen.append(self.command)
            fault = self.proxy.faults.pop(0) if self.proxy.faults else None
        if fault == "close":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif isinstance(fault, tuple):
            status, code = fault
            # A server may well quote what it was sent.
            message = f"{self.headers.get('Authorization')} {SECRET}"
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self.reply(status, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else text)
        else:
            upstream = http.client.HTTPConnection(self.proxy.upstream)
            upstream.request(self.command, self.path, body, dict(self.headers))
            found = upstream.getresponse()
            data = found.read()
            upstream.close()
            skip = {"transfer-encoding", "connection"}
            headers = {name: value for name, value in found.getheaders() if name.lower() not in skip}
            self.reply(found.status, headers, data, cut=fault == "cut")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def reply(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in {name.lower() for name in headers}:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(s3: str) -> Iterator[Proxy]:
    """One for all tests, so that they share its clients."""
    found = Proxy(os.environ["AWS_ENDPOINT_URL"])
    yield found
    found.stop()


@pytest.fixture
def proxy(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    server.faults, server.seen, server.wanted = [], [], lambda method, path: True
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(retry, "RETRY", retry.Retry(attempts=4, first_s=0.001, longest_s=0.01, requests=1))
    return server


SLOW_DOWN = (503, "SlowDown")
FORBIDDEN = (403, "AccessDenied")

READING: dict[str, Callable[[str], object]] = {
    "read": storage.read_bytes,
    "exists": storage.exists,
    "listing": storage.listing,
    "expand": storage.expand,
    "committed": storage.committed,
    "folders": storage.folders,
}
WRITING: dict[str, Callable[[str], object]] = {
    "write": lambda path: storage.write_bytes(path, b"new"),
    "commit": lambda path: storage.commit(path, {}),
    "upload": lambda path: storage.upload(__file__, path),
    "delete": storage.delete,
    "check_writable": storage.check_writable,
}
CALLS = READING | WRITING


@pytest.mark.parametrize("name", CALLS)
def test_a_passing_outage_is_not_noticed(proxy: Proxy, s3: str, name: str) -> None:
    path = storage.join(s3, "passing", name)
    storage.write_bytes(path, b"old")
    proxy.seen.clear()
    proxy.faults = [SLOW_DOWN, (500, "InternalError"), "close"]
    CALLS[name](path)
    assert proxy.faults == []
    assert len(proxy.seen) >= 4


def test_each_attempt_is_one_request(proxy: Proxy, s3: str) -> None:
    """No library repeats below: what the policy says is what the server sees."""
    proxy.faults = [SLOW_DOWN] * 3
    storage.write_bytes(storage.join(s3, "counted"), b"1")
    assert proxy.seen == ["PUT"] * 4
    assert storage.read_bytes(storage.join(s3, "counted")) == b"1"


@pytest.mark.parametrize(("name", "fault"), [*((name, SLOW_DOWN) for name in CALLS), ("write", "close")])
def test_an_outage_that_lasts_is_told(proxy: Proxy, s3: str, name: str, fault: tuple[int, str] | str) -> None:
    path = storage.join(s3, "lasting", name)
    proxy.faults = [fault] * 1000
    with pytest.raises(StorageDown) as caught:
        CALLS[name](path)
    assert str(caught.value).startswith(path)
    assert "failed after 4 attempts" in str(caught.value)
    if fault == SLOW_DOWN:  # aiohttp itself sends a request again if a kept connection turns out to be closed
        assert len(proxy.seen) == 4
    assert_no_secret(caught.value)


@pytest.mark.parametrize("name", CALLS)
def test_missing_rights_are_told_at_once(proxy: Proxy, s3: str, name: str) -> None:
    path = storage.join(s3, "denied", name)
    storage.write_bytes(path, b"old")
    proxy.seen.clear()
    proxy.faults = [FORBIDDEN] * 1000
    with pytest.raises(StorageDenied) as caught:
        CALLS[name](path)
    assert str(caught.value).startswith(path)
    assert "access is denied" in str(caught.value)
    assert len(proxy.seen) == 1
    assert_no_secret(caught.value)


@pytest.mark.parametrize(
    ("method", "name", "need"),
    [
        ("PUT", "write", "s3:PutObject"),
        ("PUT", "check_writable", "s3:PutObject"),
        ("DELETE", "delete", "s3:DeleteObject"),
        ("DELETE", "check_writable", "s3:DeleteObject"),
        ("GET", "read", "s3:GetObject"),
        ("GET", "listing", "s3:ListBucket"),
    ],
)
def test_the_right_that_is_missing_is_named(proxy: Proxy, s3: str, method: str, name: str, need: str) -> None:
    path = storage.join(s3, "right", name)
    storage.write_bytes(path, b"old")
    proxy.wanted = lambda used, _: used == method
    proxy.faults = [FORBIDDEN] * 1000
    with pytest.raises(StorageDenied, match=f"the credentials need {need}"):
        CALLS[name](path)


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_wrong_credentials_are_told(proxy: Proxy, s3: str, code: str) -> None:
    proxy.faults = [(403, code)] * 1000
    with pytest.raises(StorageDenied, match=rf"the credentials were not accepted \({code}\)") as caught:
        storage.write_bytes(storage.join(s3, "x"), b"1")
    assert_no_secret(caught.value)


def test_no_credentials_are_told(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(
        "AWS_ENDPOINT_URL", "http://127.0.0.1:9"
    )  # a client of its own: one in use keeps its credentials
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))  # no profile either
    with pytest.raises(StorageDenied, match=r"no complete credentials were found .*set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(storage.join(s3, "x"))


@pytest.mark.parametrize("fault", ["cut", "close", SLOW_DOWN], ids=str)
def test_an_answer_that_breaks_off_is_asked_for_again(
    proxy: Proxy, s3: str, tmp_path: Path, fault: tuple[int, str] | str
) -> None:
    data = bytes(range(256)) * (80 << 10)  # 20 MiB: three requests
    storage.write_bytes(storage.join(s3, "long", "file"), data)
    proxy.seen.clear()
    proxy.wanted = lambda method, path: method == "GET" and "list-type" not in path
    proxy.faults = [fault, fault]
    storage.download(storage.join(s3, "long"), str(tmp_path / "to"))
    assert (tmp_path / "to" / "file").read_bytes() == data
    assert len(proxy.seen) == 5


@pytest.mark.parametrize("faults", [2, 100])
def test_arrow_rides_out_an_outage_or_tells_it(proxy: Proxy, s3: str, faults: int) -> None:
    path = storage.join(s3, "arrow-outage")
    storage.write_bytes(path, b"1")
    proxy.faults = [SLOW_DOWN] * faults
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "RETRY", replace(retry.RETRY, attempts=3))  # the AWS library waits by a clock of its own
        fs, inner = storage.arrow(path)
    if faults == 2:
        with retry.telling(path, "reading"), fs.open_input_file(inner) as file:
            assert file.read() == b"1"
    else:
        with pytest.raises(StorageDown, match="reading failed after the attempts of its reader") as caught:
            open_through(fs, inner, path)
        assert str(caught.value).startswith(path)
        assert_no_secret(caught.value)


def test_arrow_is_denied_in_the_same_words(proxy: Proxy, s3: str) -> None:
    path = storage.join(s3, "arrow-denied")
    proxy.faults = [FORBIDDEN] * 100
    fs, inner = storage.arrow(path)
    with pytest.raises(StorageDenied, match="access is denied") as caught:
        open_through(fs, inner, path)
    assert_no_secret(caught.value)
    proxy.faults = []
    with pytest.raises(StorageMissing, match="does not exist"):
        open_through(fs, inner, path)


def open_through(fs: object, inner: str, path: str) -> None:
    with retry.telling(path, "reading"):
        fs.open_input_file(inner).close()  # type: ignore[attr-defined]


def assert_no_secret(error: BaseException) -> None:
    """Neither in the message nor in what a traceback would print before it; and it survives pickling."""
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))
    text = "".join(traceback.format_exception(error))
    assert SECRET not in text
    assert KEY_ID not in text


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("s3://bucket/key", "s3://bucket/key"),
        ("s3://id:secret@bucket/key?x", "s3://bucket/key?x"),
        ("https://user:pw@host:9/a@b?X-Amz-Signature=1", "https://host:9/a@b"),
        ("/local/a@b?c", "/local/a@b?c"),
        ("sftp://user:pw@host", "sftp://host"),
    ],
)
def test_what_is_printed_of_a_path(path: str, seen: str) -> None:
    assert retry.shown(path) == seen


def answered(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


class GcsHttpError(Exception):
    def __init__(self, code: int):
        self.code = code


GcsHttpError.__module__ = "gcsfs.retry"


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (answered("SlowDown", 503), "transient", "SlowDown"),
        (answered("RequestTimeout", 400), "transient", "RequestTimeout"),
        (answered("InternalError", 500), "transient", "InternalError"),
        (answered("502", 502), "transient", "502"),
        (answered("429", 429), "transient", "429"),
        (answered("NotImplemented", 501), "fatal", "NotImplemented"),
        (answered("AccessDenied", 403), "denied", "AccessDenied"),
        (answered("403", 403), "denied", "403"),
        (answered("ExpiredToken", 400), "rejected", "ExpiredToken"),
        (answered("NoSuchKey", 404), "missing", "NoSuchKey"),
        (answered("PreconditionFailed", 412), "replaced", "PreconditionFailed"),
        (answered("EntityTooLarge", 400), "fatal", "EntityTooLarge"),
        (EndpointConnectionError(endpoint_url="http://x"), "transient", "EndpointConnectionError"),
        (NoCredentialsError(), "unsigned", "NoCredentialsError"),
        (OSError("When reading: AWS Error ACCESS_DENIED during GetObject"), "denied", "ACCESS_DENIED"),
        (OSError("When reading: AWS Error SLOW_DOWN during GetObject"), "transient", "SLOW_DOWN"),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject"), "transient", "HTTP 503"),
        (OSError("AWS Error UNKNOWN (HTTP status 404) during HeadObject"), "missing", "HTTP 404"),
        (OSError("When reading: AWS Error NETWORK_CONNECTION during HeadObject"), "transient", "NETWORK_CONNECTION"),
        (TimeoutError(), "transient", "TimeoutError"),
        (ConnectionResetError(errno.ECONNRESET, "x"), "transient", "Connection reset by peer"),
        (OSError(errno.ESTALE, "x"), "transient", "Stale file handle"),
        (OSError(errno.ENOSPC, "x"), "fatal", "No space left on device"),
        (PermissionError(errno.EACCES, "x"), "denied", "Permission denied"),
        (FileNotFoundError(errno.ENOENT, "x"), "missing", "No such file or directory"),
        (NotADirectoryError(errno.ENOTDIR, "x"), "missing", "Not a directory"),
        (GcsHttpError(503), "transient", "HTTP 503"),
        (GcsHttpError(403), "denied", "HTTP 403"),
        (StorageError("x"), "ours", ""),
        (KeyError("x"), "ours", "KeyError"),
    ],
    ids=lambda value: repr(value) if isinstance(value, BaseException) else None,
)
def test_verdict(error: BaseException, kind: str, reason: str) -> None:
    assert retry.verdict(error) == (kind, reason)


def test_delays_double_up_to_the_longest_and_are_spread() -> None:
    policy = retry.Retry(first_s=0.5, longest_s=20.0)
    assert [policy.delay(number, 1.0) for number in (1, 2, 3, 6, 7, 50)] == [0.5, 1.0, 2.0, 16.0, 20.0, 20.0]
    assert [policy.delay(2, chance) for chance in (0.0, 0.5)] == [0.5, 0.75]


def test_the_policy_rides_out_half_a_minute() -> None:
    shortest = sum(retry.RETRY.delay(number, 0.0) for number in range(1, retry.RETRY.attempts))
    assert 30 < shortest < 60


def test_faults_of_a_program_pass_unchanged_and_at_once() -> None:
    calls = []

    def broken() -> None:
        calls.append(time.monotonic())
        raise KeyError("x")

    with pytest.raises(KeyError):
        retry.call("path", "reading", broken)
    assert len(calls) == 1
    with pytest.raises(ZeroDivisionError), retry.telling("path", "reading"):
        _ = 1 / 0
