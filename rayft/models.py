"""Where a model's files are, and what identifies them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator

from rayft import storage
from rayft.errors import ModelError

# Weights, config, tokenizer and a model's own code; not model cards, nor other formats of the same weights.
_CONTENT = (".safetensors", ".bin", ".pt", ".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def fetch_model(path: str) -> str:
    """What `from_pretrained` can load for a recipe's `model.path`: an absolute local folder, or the Hub id as it is.

    `pkg:<package>/<folder>` is looked up without importing the package. An URL is downloaded once per content and
    machine. Raises ModelError where there is no such model.
    """
    if path.startswith("pkg:"):
        return _packaged(path)
    if not storage.is_local(path):
        return _downloaded(path)
    folder = storage.absolute(path)
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise ModelError(f"model.path: `{path}` is a file; it takes the folder that holds config.json")
    if path.startswith((".", "/", "~", "file://")) or not _HUB_ID.fullmatch(path):
        raise ModelError(
            f"model.path: there is no folder `{path}`; it takes a folder, an URL, pkg:<package>/<folder> or a Hub id "
            "like owner/name"
        )
    return path


def model_identity(path: str, revision: str | None = None) -> str:
    """What identifies the model at `path`, as `fetch_model` gave it: a hash of its files, or "hub:<id>@<revision>".

    The hash covers names and contents of weights, config, tokenizer and code, wherever the folder lies.
    """
    if not os.path.isdir(path):
        return f"hub:{path}@{revision or 'main'}"
    entries = [entry for entry in storage.expand(path) if entry.path.endswith(_CONTENT)]
    if not entries:
        raise ModelError(f"model.path: the folder `{path}` holds no model: no weights, config or tokenizer")
    total = hashlib.sha256()
    for entry in entries:
        total.update(f"{os.path.relpath(entry.path, path)}\0{storage.content_hash(entry)}\0".encode())
    return total.hexdigest()


def _packaged(path: str) -> str:
    package, _, folder = path.removeprefix("pkg:").partition("/")
    if not package or not folder.strip("/"):
        raise ModelError(f"model.path: `{path}` has to read pkg:<package>/<folder>")
    top, *below = package.split(".")  # finding a package inside a package would import the outer one
    spec = None
    with contextlib.suppress(ValueError, ImportError):
        spec = importlib.util.find_spec(top)
    if spec is None:
        name = top.replace("_", "-")
        raise ModelError(f"model.path: the package `{top}` of `{path}` is not installed; try `pip install {name}`")
    places = [os.path.join(place, *below) for place in spec.submodule_search_locations or ()]
    for place in places:
        if os.path.isdir(os.path.join(place, folder)):
            return os.path.abspath(os.path.join(place, folder))
    there = sorted({one.name for place in places if os.path.isdir(place) for one in os.scandir(place) if one.is_dir()})
    known = ", ".join(name for name in there if name != "__pycache__") or "none"
    raise ModelError(f"model.path: the package `{package}` has no folder `{folder}`; its folders: {known}")


def _downloaded(url: str) -> str:
    """The local copy of a folder behind an URL, under a name made of its content.

    A copy is made beside its place and moved there whole, with its marker in it. Processes that want the same one at
    once wait for the first; where the cache's file system has no locks, each makes its own and one of them stays.
    """
    entries = [entry for entry in storage.listing(url) if os.path.basename(entry.path) != storage.MARKER]
    if not entries:
        raise ModelError(f"model.path: there are no files at `{storage.shown(url)}`")
    start = len(url.rstrip("/"))
    names = [f"{entry.path[start:]}\0{entry.size}\0{storage.content_hash(entry)}\0" for entry in entries]
    key = hashlib.sha256("".join(names).encode()).hexdigest()[:32]
    folder = os.path.join(storage.cache_folder(), "models", key)
    if storage.committed(folder) is not None:
        return folder
    with _lock(f"{folder}.lock"):
        _sweep(os.path.dirname(folder))
        if storage.committed(folder) is None:
            part = f"{folder}.{uuid.uuid4().hex}.part"
            try:
                storage.download(url, part)
                storage.commit(part, {"files": len(entries), "bytes": sum(entry.size for entry in entries)})
                with contextlib.suppress(OSError):  # another process, not held by the lock, was first
                    os.rename(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    if storage.committed(folder) is None:
        raise ModelError(f"model.path: `{storage.shown(url)}` could not be put into the cache at {folder}")
    return folder


def _sweep(folder: str) -> None:
    """Removes copies whose process died before it could."""
    for one in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            if one.name.endswith(".part") and time.time() - one.stat().st_mtime > 86400:
                shutil.rmtree(one.path, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """Held by one process at a time and let go of when it dies; nothing where the file system has no locks."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
