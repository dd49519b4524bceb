"""Local copies of folders in object storage: one per content and machine, shared by the processes that want it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator

from rayft import storage
from rayft.errors import StorageError

PART_S = 86_400.0  # a copy that was begun so long ago has no process any more


def local_copy(url: str, kind: str, unused_s: float | None = None) -> str | None:
    """The local copy of a folder behind an URL, under a name made of its content; None where the folder has no files.

    A copy is made beside its place and moved there whole, with its marker in it. Processes that want the same one at
    once wait for the first; where the cache's file system has no locks, each makes its own and one of them stays.
    Copies of this `kind` that nobody has asked for in `unused_s` seconds go; None keeps them. StorageError where the
    cache can't take it.
    """
    entries = [entry for entry in storage.listing(url) if os.path.basename(entry.path) != storage.MARKER]
    if not entries:
        return None
    start = len(url.rstrip("/"))
    names = [f"{entry.path[start:]}\0{entry.size}\0{storage.content_hash(entry)}\0" for entry in entries]
    key = hashlib.sha256("".join(names).encode()).hexdigest()[:32]
    folder = os.path.join(storage.cache_folder(), kind, key)
    if storage.committed(folder) is None:
        with _lock(f"{folder}.lock"):
            _sweep(os.path.dirname(folder), unused_s)
            if storage.committed(folder) is None:
                _make(url, folder, {"files": len(entries), "bytes": sum(entry.size for entry in entries)})
    if storage.committed(folder) is None:
        raise StorageError(f"{storage.shown(url)} could not be put into the cache at {folder}")
    os.utime(folder)
    return folder


def _make(url: str, folder: str, payload: dict[str, int]) -> None:
    part = f"{folder}.{uuid.uuid4().hex}.part"
    try:
        storage.download(url, part)
        storage.commit(part, payload)
        with contextlib.suppress(OSError):  # another process, not held by the lock, was first
            os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sweep(folder: str, unused_s: float | None) -> None:
    """Removes copies whose process died before it could, and those that nobody wants any more."""
    for one in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            limit = PART_S if one.name.endswith(".part") else unused_s
            if limit is not None and one.is_dir() and time.time() - one.stat().st_mtime > limit:
                shutil.rmtree(one.path, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """Held by one process at a time and let go of when it dies; nothing where the file system has no locks."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
