"""Local copies of what is in object storage: one per content and machine, shared by the processes that want it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from typing import IO

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


@contextlib.contextmanager
def borrowed(key: str, make: Callable[[str], None]) -> Iterator[str]:
    """A local file of the content that `key` names, for the time being: the last process that lets go of it deletes it.

    The first one has it made: `make(path)` writes it there, whole and looked through, or raises. Those that want it
    meanwhile wait. Where the cache's file system has no locks, each process makes its own.
    """
    home = os.path.join(storage.cache_folder(), "borrowed")
    os.makedirs(home, exist_ok=True)
    _delete_abandoned(home)
    with _in_use(os.path.join(home, key)) as folder:
        copy = os.path.join(folder, "copy")
        with _lock(os.path.join(folder, "lock")):
            if not os.path.exists(copy):
                part = f"{copy}.{uuid.uuid4().hex}.part"
                make(part)
                os.replace(part, copy)
        yield copy


@contextlib.contextmanager
def _in_use(folder: str) -> Iterator[str]:
    """The folder, which stays as long as a process is in here; where there are no locks, one of this process's own."""
    lock, shared = _share(f"{folder}.lock")
    folder = folder if shared else f"{folder}.{uuid.uuid4().hex}"
    with lock:
        try:
            yield folder
        finally:
            if not shared:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                _delete_unless_used(lock, folder)


def _share(path: str) -> tuple[IO[str], bool]:
    """The open file, held together with others; False where the file system has no locks."""
    while True:
        lock = open(path, "w+")  # noqa: SIM115 # whoever asked closes it
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
        except OSError:
            return lock, False
        if _there(lock):
            return lock, True
        lock.close()  # who had it deleted it


def _there(lock: IO[str]) -> bool:
    """Is it still the file of its name?"""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except FileNotFoundError:
        return False


def _delete_unless_used(lock: IO[str], folder: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it in use
        return
    if _there(lock):
        shutil.rmtree(folder, ignore_errors=True)
        os.unlink(lock.name)


def _delete_abandoned(home: str) -> None:
    """What processes had borrowed that were killed a day ago or before, and that no process wanted since."""
    for one in os.scandir(home):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - one.stat().st_mtime <= PART_S:
                continue
            if one.name.endswith(".lock"):
                with open(one.path, "r+") as lock:
                    _delete_unless_used(lock, one.path.removesuffix(".lock"))
            elif not os.path.exists(f"{one.path}.lock"):
                shutil.rmtree(one.path, ignore_errors=True)


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
