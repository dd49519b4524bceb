"""Serves the pages of a storage's runs and sweeps over HTTP, each kept up to date while runs write.

`/` lists them, `/run/<name>` is a page, `/data/` and `/data/<name>` are their data, which pages ask for again every two
seconds and which answer 304 where nothing has changed. Nothing can be written or started from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from aiohttp import web

from rayft import storage
from rayft.errors import StorageDown, StorageError, StorageMissing, StorageRefused
from rayft.reports import pages
from rayft.reports.history import index
from rayft.reports.overview import page
from rayft.reports.snapshots import Files

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

TOKEN = "RAYFT_DASHBOARD_TOKEN"
FRESH_S = 1.0  # what was read is not read again for so long, however many pages ask for it ...
RESTS = 4.0  # ... nor for so many times what reading it again took: at most a fifth of the time goes into it
MOST_REST_S = 10.0
_ASSETS = "/-/"
_HEADERS = {
    # plotly compiles the shaders of parallel coordinates, and styles itself.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass
class Answer:
    """The data of one page as they were last read: JSON, its ETag, and until when (monotonic) they are fresh."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    title: str = ""
    text: str = ""
    version: str = ""
    until: float = 0.0


class Dashboard:
    """Answers requests for the runs below the storage `where`.

    With a `token` every request has to bring it; without, only names of this machine are answered, so that no page of
    another site can be made to ask here.
    """

    def __init__(self, where: str, token: str | None = None) -> None:
        self.where = storage.absolute(where).rstrip("/")
        self.token = token
        self.files = Files()
        self._answers: dict[str, Answer] = {}

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._guard])
        application.router.add_get(_ASSETS + "{name}", self._asset)
        application.router.add_get("/{path:.*}", self._page)
        return application

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Who may ask; and every failure as one sentence."""
        response: web.StreamResponse | None = self._refusal(request) or self._welcome(request)
        try:
            response = response or await handler(request)
        except StorageMissing as error:
            response = _sentence(404, str(error))
        except StorageError as error:
            response = _sentence(503 if isinstance(error, StorageDown) else 502, str(error))
        except web.HTTPException as error:
            response = _sentence(error.status, error.text or error.reason)
        response.headers.update(_HEADERS)
        return response

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self.token is None:
            if not is_own(request.url.host or ""):
                return _sentence(403, "this dashboard answers only to the names of its own machine")
            return None
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        offered = [given.strip() if scheme.lower() == "bearer" else "", request.query.get("token", "")]
        offered.append(request.cookies.get(self._cookie(request), ""))
        if any(hmac.compare_digest(one.encode(errors="replace"), self.token.encode()) for one in offered):
            return None
        return _sentence(401, "this dashboard wants its token, as `?token=` in the URL or as `Authorization: Bearer`")

    def _welcome(self, request: web.Request) -> web.Response | None:
        """A token in the URL becomes a cookie, and the URL is opened again without it."""
        if self.token is None or "token" not in request.query:
            return None
        rest = request.rel_url.without_query_params("token")
        # One slash only: two would lead to another machine.
        response = web.Response(status=303, headers={"Location": "/" + str(rest).lstrip("/\\")})
        response.set_cookie(self._cookie(request), self.token, httponly=True, samesite="Strict", path="/")
        return response

    def _cookie(self, request: web.Request) -> str:
        return f"rayft_dashboard_{request.url.port}"  # browsers keep cookies by host, whatever the port

    async def _asset(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in (pages.STYLE, pages.PLOTLY, *pages.SCRIPTS):
            return _sentence(404, "there is no such file")
        version = f'"{hashlib.sha256(pages.asset(name).encode()).hexdigest()[:32]}"'
        if request.headers.get("If-None-Match") == version:
            return web.Response(status=304)
        kind = "text/css" if name == pages.STYLE else "text/javascript"
        return _compressed(pages.asset(name), kind, {"Cache-Control": "no-cache", "ETag": version})

    async def _page(self, request: web.Request) -> web.Response:
        kind, name = place(request.rel_url.raw_path)
        answer = await self._answer(name)
        if kind == "data":
            headers = {"Cache-Control": "no-store", "ETag": answer.version}
            if request.headers.get("If-None-Match") == answer.version:
                return web.Response(status=304, headers=headers)
            return _compressed(answer.text, "application/json", headers)
        source = "/data/" + quote(name)
        text = pages.live(answer.text, answer.title, source, answer.version, _ASSETS)
        return _compressed(text, "text/html", {"Cache-Control": "no-store"})

    async def _answer(self, name: str) -> Answer:
        """The data of the index (name "") or of a run or sweep, read by one request for all that wait for it."""
        answer = self._answers.setdefault(name, Answer())
        async with answer.lock:
            if time.monotonic() < answer.until:
                return answer
            begun = time.monotonic()
            try:
                answer.title, answer.text = await in_thread(lambda: self._read(name))
            except StorageMissing:  # names of nothing are not kept
                self._answers.pop(name, None)
                raise
            took = time.monotonic() - begun if answer.version else 0.0  # the first time, every file was new
            answer.version = f'"{hashlib.sha256(answer.text.encode()).hexdigest()[:32]}"'
            answer.until = time.monotonic() + min(MOST_REST_S, max(FRESH_S, RESTS * took))
        return answer

    def _read(self, name: str) -> tuple[str, str]:
        """The title and the JSON of a page."""
        data = page(self.files, storage.join(self.where, name), self.where) if name else index(self.files, self.where)
        return str(data["name"]), pages.to_json(data)


def place(path: str) -> tuple[str, str]:
    """("page" or "data", a run's name or "") of a URL's path as it was sent; 404 for whatever is not a name.

    A name is folders below the storage: none of them empty, `.` or `..`, none with a slash that was sent encoded.
    """
    kinds = {"": "page", "run": "page", "data": "data"}
    first, _, rest = path.removeprefix("/").partition("/")
    parts = [unquote(part) for part in rest.split("/")] if rest else []
    if first not in kinds or (first == "run" and not parts) or (not first and parts):
        raise web.HTTPNotFound(text="there is no such page")
    if any(part in ("", ".", "..") or re.search(r"[/\\\x00-\x1f]", part) for part in parts):
        raise web.HTTPNotFound(text="this is no name of a run")
    return kinds[first], "/".join(parts)


def is_own(host: str) -> bool:
    """Whether a host, a name or an address, can only be reached from this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def token_for(host: str) -> tuple[str | None, bool]:
    """The token that listening on `host` needs, and whether it was made here: the environment's, else a new one.

    None on this machine alone, where the environment has none.
    """
    given = os.environ.get(TOKEN)
    if given:
        return given, False
    return (None, False) if is_own(host) else (secrets.token_urlsafe(24), True)


def serve(where: str, host: str, port: int, say: Callable[[str], Any]) -> None:
    """Serves until SIGINT or SIGTERM, and then returns. `port` 0 takes a free one; `say` is told the URL to open.

    StorageMissing where there is no such storage, StorageRefused where the address can't be listened on.
    """
    if not storage.exists(where):
        raise StorageMissing(f"{where} does not exist; the storage is the recipe's `storage:`, a folder or an URL")
    token, made = token_for(host)
    asyncio.run(_serve(Dashboard(where, token), host, port, lambda url: say(_greeting(where, url, token, made))))


def _greeting(where: str, url: str, token: str | None, made: bool) -> str:
    if token is None:
        return f"{where}: {url} (Ctrl-C ends it)"
    asks = f"?token={token}" if made else f"?token= and the token in {TOKEN}"
    return f"{where}: {url}{asks} (Ctrl-C ends it)"


async def _serve(dashboard: Dashboard, host: str, port: int, say: Callable[[str], Any]) -> None:
    over = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    runner = web.AppRunner(dashboard.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            reason = error.strerror or error
            raise StorageRefused(f"{host}:{port} can't be listened on: {reason}; another --port may be free") from None
        say(url_of(host, runner.addresses[0][1]))
        await over.wait()
    finally:
        await runner.cleanup()


def url_of(host: str, port: int) -> str:
    """What to open; of all addresses of this machine, its name."""
    if host in ("0.0.0.0", "::", ""):
        host = socket.gethostname()
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


async def in_thread(action: Callable[[], T]) -> T:
    """What `action` gives, from a daemon thread, for which a process that ends doesn't wait."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.done():  # whoever asked has gone
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, failure = None, None
        try:
            result = action()
        except Exception as error:  # noqa: BLE001 # raised where it is awaited
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, daemon=True).start()
    return await future


def _compressed(text: str, kind: str, headers: dict[str, str]) -> web.Response:
    response = web.Response(text=text, content_type=kind, charset="utf-8", headers=headers)
    response.enable_compression()
    return response


def _sentence(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n", headers={"Cache-Control": "no-store"})
