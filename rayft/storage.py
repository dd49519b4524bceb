"""Local folders, `s3://` and every other fsspec URL behind one small surface: list, read, write, claim, commit.

A path is a local path (`file://` too) or an URL. Every call retries transient errors, and raises a StorageError that
names the path (`retry.py`). Nothing is remembered between calls (`filesystems.py`), and all functions may be called
from any thread or process. What lists and identifies is written in `entries.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar, cast

from rayft import retry
from rayft.entries import Entry, cache_folder, content_hash, exists, expand, folders, listing
from rayft.errors import StorageError, StorageMissing, StorageRefused
from rayft.filesystems import PIECE, TEMPORARY, Object, arrow, is_local, is_s3, local, on, write_local
from rayft.retry import shown

T = TypeVar("T")
MARKER = "COMMITTED"
_PART = 32 << 20  # bytes of one part of a large upload
_THREADS = 8


class Moved:
    """How many pieces of files this process has copied and uploaded so far: whether a slow copy gets on.

    Threads count without a lock. Where two do at once one of them may be lost, but `pieces` has grown.
    """

    pieces = 0


__all__ = [
    "MARKER", "Entry", "Moved", "absolute", "arrow", "cache_folder", "check_writable", "commit", "committed",
    "content_hash", "create", "delete", "download", "exists", "expand", "fetch", "folders", "is_local", "join",
    "listing", "open_read", "read_bytes", "read_json", "read_object", "read_text", "shown", "upload", "write_bytes",
    "write_json", "write_text",
]  # fmt: skip


def join(base: str, *parts: str) -> str:
    """`base` and below it `parts`, by single slashes; empty parts count for nothing."""
    inner = [part.strip("/") for part in parts if part.strip("/")]
    if not base or not inner:
        return base or "/".join(inner)
    return "/".join([base if base.endswith("://") else base.rstrip("/"), *inner])


def absolute(path: str) -> str:
    """A local path made absolute, `~` too; an URL as it is."""
    return os.path.abspath(local(path)) if is_local(path) else path


def read_bytes(path: str) -> bytes:
    """The whole content, in one request, so that it is of one moment; StorageMissing where there is none."""
    if not is_local(path):
        return on(path, "reading", lambda fs, inner: cast("bytes", fs.cat_file(inner)))
    with open_read(path) as file:
        return file.read()


def read_text(path: str) -> str:
    """The whole content, which has to be UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise StorageError(f"{shown(path)}: not UTF-8 text at byte {error.start}") from None


def read_json(path: str) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise StorageError(f"{shown(path)}: not valid JSON at line {error.lineno} ({error.msg})") from None


def read_object(path: str) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file, or it holds none: a power cut may leave that."""
    try:
        value = json.loads(read_bytes(path))
    except (StorageMissing, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_bytes(path: str, data: bytes) -> None:
    """Writes all or nothing: a reader sees the old content or the new. Folders come into being as needed."""
    if is_local(path):
        retry.call(path, "writing", lambda: write_local(local(path), lambda file: file.write(data)))
    else:
        on(path, "writing", lambda fs, inner: fs.pipe_file(inner, data))


def write_text(path: str, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def create(path: str, data: bytes) -> bool:
    """Writes a file that must not exist yet; False where it does, and then nothing has changed.

    Of several processes that try at once, one wins: by a hard link on local storage, by a conditional put
    (If-None-Match) on S3. `data` must differ between the processes: a request that is repeated after its answer was
    lost finds its own.
    """
    if is_local(path):
        fresh = retry.call(path, "writing", lambda: _made(lambda: _link_new(path, data)))
    else:
        fresh = on(path, "writing", lambda fs, inner: _made(lambda: fs.pipe_file(inner, data, mode="create")))
    return fresh or read_bytes(path) == data


def _made(action: Callable[[], Any]) -> bool:
    """False where `action` finds that what it would make is there."""
    try:
        action()
    except OSError as error:
        if isinstance(error, FileExistsError) or retry.verdict(error)[0] == "replaced":  # 412: the condition fails
            return False
        raise
    return True


def _link_new(path: str, data: bytes) -> None:
    write_local(local(path), lambda file: file.write(data), os.link)


@contextlib.contextmanager
def open_read(path: str) -> Iterator[BinaryIO]:
    """A binary file object that can seek; each request that it makes to object storage is retried."""
    if is_local(path):
        file = retry.call(path, "reading", lambda: cast("BinaryIO", open(local(path), "rb")))  # noqa: SIM115
    else:
        file = cast("BinaryIO", io.BufferedReader(Object(path), PIECE))
    with file:
        yield file


def delete(path: str) -> None:
    """Removes a file or a folder with all in it, commit markers first: what is half deleted is not committed."""
    if is_local(path):
        base = local(path)
        if os.path.isdir(base) and not os.path.islink(base):
            for entry in listing(path):
                if os.path.basename(entry.path) == MARKER:
                    delete(entry.path)
            retry.call(path, "deleting", lambda: shutil.rmtree(base, onerror=_gone))
        else:
            with contextlib.suppress(StorageMissing):
                retry.call(path, "deleting", lambda: os.unlink(base))
        return
    names = on(path, "listing", lambda fs, inner: list(fs.find(inner)))
    markers = [name for name in names if name.rpartition("/")[2] == MARKER]
    for group in (markers, [name for name in names if name not in set(markers)]):
        # One request each: a bulk delete keeps silent about what it was not allowed to delete.
        _parallel(lambda name: _remove(path, name), group)


def upload(source: str, target: str, marker: str = MARKER) -> None:
    """Copies a local file, or a folder's files under their relative paths, to `target`; those named `marker` last."""
    base = local(source)
    pairs = [(entry.path, join(target, os.path.relpath(entry.path, base))) for entry in listing(source)]
    if os.path.isfile(base):
        pairs = [(base, target)]
    elif not os.path.isdir(base):
        raise StorageMissing(f"{shown(source)} does not exist")
    for group in _markers_last(pairs, marker):
        _parallel(lambda pair: _put(*pair), group)


def download(source: str, folder: str) -> None:
    """Copies a folder's files under their relative paths into a local one; commit markers last."""
    entries = [entry for entry in listing(source) if not entry.path.endswith("/")]
    if not entries:
        raise StorageMissing(f"{shown(source)}: there are no files")
    base = local(source).rstrip("/") if is_local(source) else source.rstrip("/")
    pairs = [(entry.path, join(local(folder), entry.path[len(base) :])) for entry in entries]
    for group in _markers_last(pairs, MARKER):
        _parallel(lambda pair: _get(*pair), group)


def fetch(path: str, file: str) -> None:
    """Copies one file or object to the local `file`; all or nothing."""
    _get(path, local(file))


def commit(folder: str, payload: dict[str, Any]) -> None:
    """Makes a folder count, by writing its marker after everything else; `payload` is what `committed` answers."""
    if is_local(folder):  # or a power cut could leave the marker and take the files
        _parallel(lambda path: retry.call(path, "writing", lambda: _flush(path)), [e.path for e in listing(folder)])
    write_json(join(folder, MARKER), payload)


def committed(folder: str) -> dict[str, Any] | None:
    """The payload of a folder's commit marker; None where there is no whole one, and then the folder does not count."""
    return read_object(join(folder, MARKER))


def check_writable(path: str, file: bool = False) -> None:
    """Writes and deletes a probe in the folder `path` (a `file`'s folder), or in the nearest above it that exists.

    Raises a StorageError that names `path`: where the trouble isn't a passing one, one with which nothing starts.
    """
    folder = absolute(path)
    if file:
        if is_local(path) and os.path.isdir(folder):
            raise StorageRefused(f"{shown(path)} is a folder; a file's name fits")
        folder = os.path.dirname(folder)
    while is_local(folder) and not os.path.isdir(folder) and os.path.dirname(folder) != folder:
        if os.path.lexists(folder):
            raise StorageRefused(f"{shown(folder)} is not a folder, and nothing can be written below it")
        folder = os.path.dirname(folder)
    probe = join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except StorageError as error:
        told = str(error).replace(shown(probe), shown(path))
        if type(error) is not StorageError:
            raise type(error)(told) from None
        raise StorageRefused(f"{told}; a place that can be written fits") from None


def free(path: str) -> int | None:
    """Bytes that the file system of `path`, or of the nearest folder above it that exists, has left; None: no limit."""
    if not is_local(path):
        return None
    folder = absolute(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def _parallel(action: Callable[[T], None], items: Sequence[T]) -> None:
    """Does all, a few at a time; the first failure ends it without starting what has not begun."""
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(action, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _flush(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _gone(_: Any, __: str, failure: Any) -> None:
    if not isinstance(failure[1], FileNotFoundError):  # else another process deletes the same
        raise failure[1]


def _remove(path: str, name: str) -> None:
    with contextlib.suppress(StorageMissing):
        on(path, "deleting", lambda fs, _: fs.rm_file(name))


def _put(source: str, target: str) -> None:
    if is_local(target):
        _get(source, local(target))
        return
    from fsspec.callbacks import Callback

    size = retry.call(source, "reading", lambda: os.stat(source)).st_size
    parts: dict[str, Any] = {}
    if is_s3(target):  # 10,000 parts at most; bounded memory
        parts = {"chunksize": max(_PART, -(-size // 10_000)), "max_concurrency": 2}
    on(target, "writing", lambda fs, inner: fs.put_file(source, inner, Callback(hooks={"moved": _moved}), **parts))


def _moved(_: int | None, sent: int) -> None:
    """As fsspec calls it: with all bytes, and with those that are sent; first when none is."""
    if sent:
        Moved.pieces += 1


def _get(source: str, target: str) -> None:
    with open_read(source) as file:
        retry.call(target, "writing", lambda: write_local(target, lambda out: _copy(file, out)))


def _copy(file: BinaryIO, out: BinaryIO) -> None:
    file.seek(0)
    while piece := file.read(PIECE):
        out.write(piece)
        Moved.pieces += 1


def _markers_last(pairs: list[tuple[str, str]], marker: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    markers = [pair for pair in pairs if os.path.basename(pair[1]) == marker]
    return [pair for pair in pairs if pair not in markers], markers
