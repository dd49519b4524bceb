"""What lies in storage: files and objects under a path or a pattern, and what identifies their content."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rayft import retry
from rayft.errors import StorageMissing
from rayft.filesystems import PIECE, TEMPORARY, Object, is_local, local, on, write_local

_ETAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "Last-Modified")
_MEMO_FROM = 1 << 20  # bytes; a smaller file is hashed about as fast as a memo of its hash is read


@dataclass(frozen=True)
class Entry:
    """A file or object. `size` in bytes, `modified` in seconds since 1970 (0: unknown).

    `etag` is what its storage says of its content; None on local storage and where nothing is said.
    """

    path: str
    size: int
    modified: float
    etag: str | None = None


def exists(path: str) -> bool:
    """Whether there is a file, an object or a folder; an outage is an error and not an answer."""
    try:
        _info(path)
    except StorageMissing:
        return False
    return True


def listing(path: str, recursive: bool = True) -> list[Entry]:
    """The files in a folder, or with recursive=False those directly in it, sorted by path; of a file: itself.

    [] where nothing is. Hidden files are in it, files that are still being written are not.
    """
    if is_local(path):
        found = retry.call(path, "listing", lambda: _list_local(path, recursive))
    else:
        found = on(path, "listing", lambda fs, inner: _list_remote(fs, inner, path, recursive))
    return sorted(found, key=lambda entry: entry.path)


def folders(path: str) -> list[str]:
    """Paths of the folders directly in a folder, sorted; [] where nothing is. Links to a folder above are none."""
    if is_local(path):
        base = local(path)
        with contextlib.suppress(StorageMissing):
            found = retry.call(path, "listing", lambda: [one for one in os.scandir(base) if one.is_dir()])
            return sorted(one.path for one in found if not (one.is_symlink() and _is_above(one.path)))
        return []
    try:
        infos = on(path, "listing", lambda fs, inner: fs.ls(inner, detail=True))
    except StorageMissing:
        return []
    return sorted(f"{path.rstrip('/')}/{_name(info)}" for info in infos if info["type"] == "directory")


def _is_above(link: str) -> bool:
    """Does a link lead to a folder that it lies in? Whoever goes down would never come to an end."""
    return f"{os.path.realpath(os.path.dirname(link))}/".startswith(f"{os.path.realpath(link).rstrip('/')}/")


def expand(pattern: str) -> list[Entry]:
    """The entries that a file's path, a folder's (its files, recursively) or a glob stands for, sorted; [] if none.

    Hidden files and folders (a leading dot below what is named) are left out.
    """
    with contextlib.suppress(StorageMissing):
        entry = _info(pattern)
        return [entry] if entry else _visible(listing(pattern), local(pattern) if is_local(pattern) else pattern)
    if not glob.has_magic(pattern) or pattern.startswith("http"):
        return []
    if is_local(pattern):
        pattern = local(pattern)
        matches = retry.call(pattern, "listing", lambda: glob.glob(pattern, recursive=True))
        matched = [entry for match in matches for entry in listing(match)]
    else:
        infos = on(pattern, "listing", lambda fs, inner: [*_urls(fs, fs.glob(inner, detail=True))])
        inside = [entry for url, info in infos if info["type"] == "directory" for entry in listing(url)]
        matched = [_entry(url, info) for url, info in infos if info["type"] == "file"] + inside
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    found = {entry.path: entry for entry in matched if not entry.path.endswith("/")}
    return _visible((found[path] for path in sorted(found)), fixed)


def content_hash(entry: Entry) -> str:
    """What identifies the content: the etag in object storage, the SHA-256 of a local file or where no etag is known.

    The hash of a large file is kept under the user's cache folder, by path, inode, size and times. A file that changed
    within the last two seconds could change again unseen, so its hash is not kept.
    """
    if not is_local(entry.path):
        return entry.etag or _digest(io.BufferedReader(Object(entry.path), PIECE))
    path = os.path.abspath(local(entry.path))
    before = retry.call(path, "reading", lambda: os.stat(path))
    stamp = (path, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    memo = os.path.join(cache_folder(), "hashes", hashlib.sha256(repr(stamp).encode()).hexdigest())
    if before.st_size >= _MEMO_FROM:
        with contextlib.suppress(OSError), open(memo) as file:
            return file.read()
    found = retry.call(path, "reading", lambda: _sha256(path))
    after = retry.call(path, "reading", lambda: os.stat(path))
    settled = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == stamp[2:] and time.time() - after.st_ctime > 2
    if before.st_size >= _MEMO_FROM and settled:
        with contextlib.suppress(OSError):  # a home that can't be written costs time, nothing else
            write_local(memo, lambda file: file.write(found.encode()))
    return found


def cache_folder() -> str:
    """Where this user's machine keeps what can be made again: RAYFT_CACHE, else ~/.cache/rayft."""
    return os.path.abspath(os.path.expanduser(os.environ.get("RAYFT_CACHE") or "~/.cache/rayft"))


def _info(path: str) -> Entry | None:
    """The entry of a file, None for a folder; StorageMissing where nothing is."""
    if is_local(path):
        status = retry.call(path, "reading", lambda: os.stat(local(path)))
        return None if os.path.isdir(local(path)) else Entry(local(path), status.st_size, status.st_mtime)
    info = on(path, "reading", lambda fs, inner: fs.info(inner))
    return None if info["type"] == "directory" else _entry(path, info)


def _entry(path: str, info: dict[str, Any]) -> Entry:
    size = int(info.get("size") or 0)
    changed = next(
        (info[key] for key in ("LastModified", "last_modified", "mtime", "updated", "created") if info.get(key)), 0
    )
    if isinstance(changed, str):
        changed = datetime.fromisoformat(changed)
    modified = changed.timestamp() if isinstance(changed, datetime) else float(changed)
    etag = next(
        (str(info[key]).strip('"') for key in _ETAGS if info.get(key)), f"{size}-{modified}" if modified else None
    )
    return Entry(path, size, modified, etag)


def _urls(fs: Any, infos: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((fs.unstrip_protocol(name), info) for name, info in infos.items())


def _name(info: dict[str, Any]) -> str:
    return str(info["name"]).rstrip("/").rpartition("/")[2]


def _list_local(path: str, recursive: bool) -> list[Entry]:
    base = local(path)
    if os.path.isfile(base):
        names = [base]
    elif recursive:
        names = [os.path.join(top, name) for top, _, inside in os.walk(base, onerror=_not_missing) for name in inside]
    else:
        names = [one.path for one in os.scandir(base) if one.is_file()] if os.path.isdir(base) else []
    found = []
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # gone since, or a link to nothing
            status = os.stat(name)
            if not os.path.basename(name).startswith(TEMPORARY):
                found.append(Entry(name, status.st_size, status.st_mtime))
    return found


def _not_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _list_remote(fs: Any, inner: str, path: str, recursive: bool) -> list[Entry]:
    try:
        infos = fs.find(inner, detail=True).values() if recursive else fs.ls(inner, detail=True)
    except FileNotFoundError:
        return []
    stripped, prefix = inner.rstrip("/"), path.rstrip("/")
    # Consoles write empty objects called "folder/" as placeholders.
    files = [info for info in infos if info["type"] == "file" and not info["name"].endswith("/")]
    found = [_entry(prefix + info["name"][len(stripped) :], info) for info in files]
    return [entry for entry in found if not entry.path.rpartition("/")[2].startswith(TEMPORARY)]


def _visible(entries: Iterable[Entry], base: str) -> list[Entry]:
    """Those without a hidden file or folder below `base`."""
    start = len(base.rstrip("/"))
    return [entry for entry in entries if "/." not in "/" + entry.path[start:].lstrip("/")]


def _sha256(path: str) -> str:
    return _digest(open(path, "rb"))


def _digest(file: io.BufferedReader) -> str:
    with file:
        return hashlib.file_digest(file, "sha256").hexdigest()
