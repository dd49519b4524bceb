"""An S3 server that can be told to fail: a proxy on a free port in front of a real one."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
KEPT = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class FaultyS3:
    """Use as a context manager. `url` is where clients go; `harm` decides what happens to a request.

    `harm(method, path)` gives None (it passes), "503" (SlowDown), "gone" (the connection is closed without an answer),
    or seconds to wait before it passes. `harmed` counts what did not simply pass, `kinds` says what happened.
    """

    def __init__(self, upstream: str, host: str = "127.0.0.1") -> None:
        self.upstream = urlsplit(upstream)
        self.harm: Callable[[str, str], str | float | None] = lambda method, path: None
        self.harmed = 0
        self.kinds: set[str | float] = set()
        handler = type("Handler", (_Handler,), {"s3": self})
        self._server = ThreadingHTTPServer((host, 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> FaultyS3:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def outage(self, kind: str, seconds: float, begins: Callable[[str, str], bool]) -> None:
        """From the first request for which `begins` holds, all requests fail with `kind` for so many seconds.

        What was to happen before goes on happening at other times.
        """
        until: list[float] = []
        before = self.harm

        def harm(method: str, path: str) -> str | float | None:
            if not until and begins(method, path):
                until.append(time.monotonic() + seconds)
            return kind if until and time.monotonic() < until[0] else before(method, path)

        self.harm = harm


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    s3: FaultyS3

    def _pass(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        what = self.s3.harm(self.command, self.path)
        if what is not None:
            self.s3.harmed += 1
            self.s3.kinds.add(what)
        if what == "gone":
            self.close_connection = True
            self.connection.close()
            return
        if what == "503":
            self._answer(503, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else SLOW_DOWN)
            return
        if isinstance(what, float | int):
            time.sleep(what)
        upstream = http.client.HTTPConnection(str(self.s3.upstream.hostname), self.s3.upstream.port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("transfer-encoding",)}
        with contextlib.closing(upstream):  # also where the client was killed in the middle of its request
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in KEPT]
        length_of_head = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(answer.status, kept, content, length_of_head)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

    def log_message(self, *_: Any) -> None:
        pass
