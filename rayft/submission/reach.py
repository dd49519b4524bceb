"""What of a recipe a cluster can reach: paths made good for its machines, small inputs uploaded, the rest refused."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from rayft import storage
from rayft.data.named import left_behind
from rayft.data.pieces import METADATA
from rayft.errors import DataError, RunRefused, StorageError
from rayft.paths import Place, local_paths, places
from rayft.recipe import Recipe
from rayft.storage import Entry
from rayft.text import size

LIMIT_BYTES = 256 << 20  # of what --upload takes
FOLDER = "inputs"  # below storage
_WILD = re.compile(r"[*?\[]")


def carried(recipe: Recipe, address: str, upload: bool, show: Callable[[dict[str, Any]], None]) -> Recipe:
    """The recipe as the cluster whose job server is at `address` can run it.

    Where its machines see this one's files (it is this machine, or storage is shared), relative paths become absolute.
    Otherwise, and wherever `upload` says so (a forwarded port looks like this machine), inputs are uploaded. RunRefused
    names every path that stays out of reach.
    """
    if upload or not (recipe.cluster.shared_storage or is_here(address)):
        refuse_out_of_reach(recipe, local_paths(recipe), upload)
        return uploaded(recipe, show)
    plain = recipe.dump()
    for one in local_paths(recipe):
        _set(plain, one.where, storage.absolute(one.path))
    return Recipe.parse(plain, recipe.name)


def uploaded(recipe: Recipe, show: Callable[[dict[str, Any]], None]) -> Recipe:
    """The recipe with its local inputs beside its run, in a storage that is not local."""
    plain, beside = recipe.dump(), bool(recipe.task.file_columns())
    files = {one: _files(one.path, beside) for one in local_paths(recipe)}
    _refuse_large(files)
    refuse_files_of_rows(recipe)
    for one, entries in files.items():
        show({"event": "stage", "name": f"uploading {one.field}"})
        _set(plain, one.where, _uploaded(one.path, entries, storage.join(recipe.storage, FOLDER)))
    return Recipe.parse(plain, recipe.name)


def refuse_files_of_rows(recipe: Recipe) -> None:
    """RunRefused where rows name pictures or sounds of this machine that would stay on it, with one of each source."""
    lines, columns = [], recipe.task.file_columns()
    for one in places(recipe) if columns else ():
        if one.field == "storage" or one.model or one.path.startswith("hf://"):
            continue
        with suppress(StorageError):  # a table that can't be read from here is left to the cluster
            copied = {entry.path for entry in _files(one.path, True)} if storage.is_local(one.path) else set()
            if found := left_behind(one.path, recipe.data.columns, columns, copied):
                lines.append(f"  {one.field}: {one.path} names {found}")
    if lines:
        fits = (
            "URLs fit in their place; --upload takes folders of them, one for each class or with a metadata.csv in it"
        )
        raise RunRefused("\n".join(["the cluster can't reach files of this machine that rows name:", *lines, fits]))


def refuse_out_of_reach(recipe: Recipe, local: list[Place], upload: bool) -> None:
    lines = []
    for one in local:
        if one.field == "storage":
            lines.append(f"  storage: {one.path}; an URL such as s3://bucket/prefix fits")
        elif not upload:
            lines.append(f"  {one.field}: {one.path}; an URL fits, or --upload puts it beside the run")
    if lines:
        shared = "or say cluster.shared_storage=true where all machines share these paths"
        raise RunRefused("\n".join(["the cluster can't reach paths of this machine:", *lines, shared]))


def is_here(address: str) -> bool:
    """Is the machine of this URL the one that this process runs on?"""
    host = urlsplit(address).hostname or ""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    import psutil

    own = {one.address.partition("%")[0] for each in psutil.net_if_addrs().values() for one in each}
    return any(ip.startswith("127.") or ip == "::1" or ip in own for ip in map(str, found))


def _set(plain: dict[str, Any], where: tuple[str | int, ...], value: str) -> None:
    inner: Any = plain
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value


def _files(path: str, beside: bool) -> list[Entry]:
    """The files that `path` stands for; of a metadata file also those `beside` it, which its rows name."""
    folder, name = os.path.split(storage.absolute(path))
    found = storage.expand(folder if beside and name in METADATA else storage.absolute(path))
    if not found:
        raise DataError(f"{path}: there is nothing to upload")
    return found


def _refuse_large(files: dict[Place, list[Entry]]) -> None:
    total = _bytes(entry for entries in files.values() for entry in entries)
    if total > LIMIT_BYTES:
        listed = "\n".join(f"  {one.field}: {one.path} ({size(_bytes(each))})" for one, each in files.items())
        raise RunRefused(
            f"--upload takes {size(LIMIT_BYTES)} in all, and these are {size(total)}:\n{listed}\n"
            "copy them to object storage yourself, and name the URL"
        )


def _bytes(entries: Iterable[Entry]) -> int:
    return sum({entry.path: entry.size for entry in entries}.values())  # splits may share files


def _uploaded(path: str, entries: list[Entry], home: str) -> str:
    """Where the `entries` of `path` are now, below `home`: a folder of their content's name, so that it is once."""
    base = _fixed(path)
    names = {entry.path: os.path.relpath(entry.path, base) for entry in entries}
    total = hashlib.sha256()
    for entry in entries:
        total.update(f"{names[entry.path]}\0{storage.content_hash(entry)}\0".encode())
    folder = storage.join(home, total.hexdigest()[:16])
    if storage.committed(folder) is None:
        for entry in entries:
            storage.upload(entry.path, storage.join(folder, names[entry.path]))
        storage.commit(folder, {"files": len(entries)})
    return storage.join(folder, os.path.relpath(storage.absolute(path), base))


def _fixed(path: str) -> str:
    """The folder above what `path` names: above its first wildcard, or above the file or folder itself."""
    parts = storage.absolute(path).split(os.sep)
    wild = next((number for number, part in enumerate(parts) if _WILD.search(part)), len(parts) - 1)
    return os.sep.join(parts[:wild]) or os.sep
