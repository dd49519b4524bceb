"""A stand-in for a Ray head's job server, over real HTTP and WebSockets, and a port that accepts and never answers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

PATIENCE_S = 20.0  # after which a server here hangs up, so that who waits for ever fails a test and does not hang it
JOB = "rayft-one-12345678-a1"

Tail = Callable[[int, web.WebSocketResponse], Awaitable[None]]


class JobApi:
    """One job: `job` is what is told of it, `logs` its output, or the status and text of a refusal.

    `tail(number, connection)` serves the connection of that number (from 1 on) that follows the output. `silent` is
    set once requests are to be left without an answer, and `waited_for` where somebody waits for one until the end.
    """

    def __init__(self) -> None:
        self.job: dict[str, Any] = {"submission_id": JOB, "type": "SUBMISSION", "entrypoint": "true"}
        self.job |= {"status": "RUNNING", "metadata": {}, "message": None}
        self.logs: str | tuple[int, str] = ""
        self.refusal: tuple[int, str] | None = None
        self.silent = self.waited_for = False
        self.tails = 0
        self.packages: list[int] = []  # their sizes
        self.tail: Tail = nothing_more
        self.before_package: Callable[[], Awaitable[None]] = answered_at_once

    async def reply(self, request: web.Request) -> web.StreamResponse:
        if self.silent:
            await asyncio.sleep(PATIENCE_S)
            self.waited_for = True
            return web.Response(status=504)
        if request.path == "/api/version":
            return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})
        if self.refusal:
            return web.Response(status=self.refusal[0], text=self.refusal[1])
        if request.path.startswith("/api/packages/"):
            return await self._package(request)
        if request.path.endswith("/logs/tail"):
            return await self._tail(request)
        if request.path.endswith("/logs"):
            status, text = (200, json.dumps({"logs": self.logs})) if isinstance(self.logs, str) else self.logs
            return web.Response(status=status, text=text, content_type="application/json")
        if request.method == "POST":
            return web.json_response({"job_id": JOB, "submission_id": JOB})
        return web.json_response([self.job])

    async def _package(self, request: web.Request) -> web.Response:
        if request.method == "GET":
            return web.Response(status=404)
        await self.before_package()
        self.packages.append(len(await request.read()))
        return web.Response()

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        connection = web.WebSocketResponse()
        await connection.prepare(request)
        self.tails += 1
        await self.tail(self.tails, connection)
        return connection


async def answered_at_once() -> None:
    pass


async def nothing_more(number: int, connection: web.WebSocketResponse) -> None:
    """Prints nothing until the other side hangs up; a TimeoutError where it doesn't."""
    await connection.receive(PATIENCE_S)


@contextmanager
def serving() -> Iterator[tuple[JobApi, str]]:
    """The stand-in and its URL."""
    api, loop = JobApi(), asyncio.new_event_loop()
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", api.reply)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    listening = socket.create_server(("127.0.0.1", 0))
    loop.run_until_complete(web.SockSite(runner, listening).start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield api, f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def silence() -> Iterator[str]:
    """The URL of a server that takes connections and says nothing until PATIENCE_S have passed."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        hangs_up = threading.Timer(PATIENCE_S, listening.close)
        hangs_up.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            hangs_up.cancel()
