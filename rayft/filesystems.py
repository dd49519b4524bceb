"""From an URL to a file system: which library serves it, and with which settings.

Settings and credentials of object storage come from the environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
AWS_PROFILE, ...), the machine's role or a mounted secret, never from an argument. No listing is remembered, so an
answer is never stale; fsspec keeps one file system per process and set of options, and starts anew after a fork.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import uuid
from collections.abc import Callable
from typing import Any, TypeVar, cast

from rayft import retry
from rayft.errors import StorageRefused
from rayft.retry import Doing, shown

T = TypeVar("T")
PIECE = 8 << 20  # bytes asked for in one request
TEMPORARY = ".rayft-tmp-"  # how half-written files are called; listings leave them out


def is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


def is_s3(path: str) -> bool:
    return path.startswith(("s3://", "s3a://"))


def local(path: str) -> str:
    """A local path without `file://` and `~`."""
    return os.path.expanduser(path.removeprefix("file://"))


def write_local(path: str, fill: Callable[[Any], Any], place: Callable[[str, str], Any] = os.replace) -> None:
    """Fills a file beside `path` and puts it in its place; the content is on disk before it is.

    `place(temporary, path)` does that; os.link in place of os.replace leaves an existing file alone: FileExistsError.
    """
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def on(path: str, doing: Doing, action: Callable[[Any, str], T]) -> T:
    """What `action(fsspec file system, path inside it)` returns, retried; making the connection is part of it."""
    return retry.call(path, doing, lambda: action(*filesystem(path)))


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of an URL, and the path inside it."""
    import fsspec

    scheme = path.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if is_s3(path):
        options |= _s3_options()
    try:
        found, inner = fsspec.core.url_to_fs(path, **options)
    except ImportError as error:
        raise StorageRefused(f"{shown(path)}: {scheme}:// needs another package ({error})") from None
    except ValueError:
        known = fsspec.available_protocols()
        if scheme in known:
            raise StorageRefused(f"{shown(path)}: not a valid {scheme}:// path") from None
        near = difflib.get_close_matches(scheme, known, 1, 0.5)
        hint = f"; did you mean {near[0]}://?" if near else ""
        fits = "known are local paths, s3://, gs://, abfs://, hdfs://, https:// and the other schemes of fsspec"
        raise StorageRefused(f"{shown(path)}: unknown scheme {scheme}://, {fits}{hint}") from None
    if is_s3(path):
        found.retries = 1  # `retry.call` is what repeats
    return found, cast("str", inner)


def _s3_options() -> dict[str, Any]:
    once = {"total_max_attempts": retry.RETRY.requests, "mode": "standard"}
    config = {"retries": once, "connect_timeout": 5, "read_timeout": 30, "max_pool_connections": 32}
    options: dict[str, Any] = {"config_kwargs": config, "cache_regions": True}
    if endpoint := _endpoint():
        options["endpoint_url"] = endpoint
    if region := _region():
        options["client_kwargs"] = {"region_name": region}
    return options


def _endpoint() -> str | None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise StorageRefused("AWS_ENDPOINT_URL has to start with http:// or https://")
    return endpoint


def _region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def arrow(path: str) -> tuple[Any, str]:
    """A pyarrow.fs.FileSystem for `path`, and the path inside it.

    It can be pickled, and holds no credentials: each process finds its own. It retries requests as RETRY.attempts says;
    wrap its use in `retry.telling` for sentences.
    """
    from pyarrow import fs

    if is_local(path):
        return fs.LocalFileSystem(), os.path.abspath(local(path))
    if not is_s3(path):
        remote, inner = retry.call(path, "reading", lambda: filesystem(path))
        return fs.PyFileSystem(fs.FSSpecHandler(remote)), inner
    inner = path.partition("://")[2].rstrip("/")
    endpoint, region = _endpoint(), _region()
    options: dict[str, Any] = {}
    if endpoint:
        scheme, _, host = endpoint.partition("://")
        options = {"scheme": scheme, "endpoint_override": host.rstrip("/")}
    elif not region:
        region = retry.call(path, "reading", lambda: fs.resolve_s3_region(inner.partition("/")[0]))
    attempts = fs.AwsStandardS3RetryStrategy(max_attempts=retry.RETRY.attempts)
    bundle = os.environ.get("AWS_CA_BUNDLE")
    certificates = {"tls_ca_file_path": bundle} if bundle else {}
    options |= {"region": region or "us-east-1", "connect_timeout": 5, "request_timeout": 30, **certificates}
    return fs.S3FileSystem(retry_strategy=attempts, **options), inner


class Object(io.RawIOBase):
    """The bytes of an object by ranges, each retried; s3fs asks for the etag that it opened, so content never mixes."""

    def __init__(self, path: str):
        self._path = path
        self._file = on(path, "reading", lambda fs, inner: fs.open(inner, "rb", cache_type="none"))
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = max(0, offset + (0, self._place, self._file.size)[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = retry.call(self._path, "reading", lambda: self._range(len(buffer)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def readall(self) -> bytes:
        pieces = []  # of a few megabytes; the inherited method would ask for 8 kB at a time
        while piece := retry.call(self._path, "reading", lambda: self._range(PIECE)):
            pieces.append(piece)
            self._place += len(piece)
        return b"".join(pieces)

    def _range(self, length: int) -> bytes:
        wanted = max(0, min(length, self._file.size - self._place))
        self._file.seek(self._place)
        data = cast("bytes", self._file.read(wanted))
        if len(data) < wanted:  # the connection ended early and nobody noticed
            raise ConnectionError("short read")
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
