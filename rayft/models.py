"""Where a model's files are, and what identifies them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import ssl
import urllib.error
import urllib.request

from rayft import storage
from rayft.copies import local_copy
from rayft.errors import ModelError

# Weights, config, tokenizer and a model's own code; not model cards, nor other formats of the same weights.
_CONTENT = (".safetensors", ".bin", ".pt", ".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab")
_WEIGHTS = (".safetensors", ".bin")
HUB_TRIES, HUB_TIMEOUT_S = 2, 5.0
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

UNTRAINED = "model.path: `{}` holds a config and no weights: they are drawn from train.seed, nothing is pretrained"


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


@functools.cache
def hub_answers() -> bool:
    """Whether the Hugging Face Hub can be reached, asked once in a process.

    Where it can't, its library looks into its cache alone from then on. It would do so in any case, but only after it
    has asked six times, for half a minute and with a line each, for every single file.
    """
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    for _ in range(0 if constants.HF_HUB_OFFLINE else HUB_TRIES):
        try:
            with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError as error:
            if isinstance(getattr(error, "reason", None), ssl.SSLError):
                return True  # which certificates count is for the library to say
    constants.HF_HUB_OFFLINE = True
    return False


def without_weights(path: str) -> bool:
    """Whether the model at `path`, as `fetch_model` gave it, is a config alone: its weights are drawn from the seed.

    A pipeline of several models (model_index.json) has them in folders below.
    """
    if os.path.isfile(os.path.join(path, "model_index.json")):
        return not any(name.endswith(_WEIGHTS) for _, _, names in os.walk(path) for name in names)
    if not os.path.isfile(os.path.join(path, "config.json")):
        return False
    return not any(name.endswith(_WEIGHTS) for name in os.listdir(path))


def model_identity(path: str, revision: str | None = None, seed: int = 0) -> str:
    """What identifies the model at `path`, as `fetch_model` gave it: a hash of its files, or "hub:<id>@<revision>".

    The hash covers names and contents of weights, config, tokenizer and code, wherever the folder lies. Of a config
    alone the seed counts too, from which its weights are drawn.
    """
    if not os.path.isdir(path):
        return f"hub:{path}@{revision or 'main'}"
    entries = [entry for entry in storage.expand(path) if entry.path.endswith(_CONTENT)]
    if not entries:
        raise ModelError(f"model.path: the folder `{path}` holds no model: no weights, config or tokenizer")
    total = hashlib.sha256()
    for entry in entries:
        total.update(f"{os.path.relpath(entry.path, path)}\0{storage.content_hash(entry)}\0".encode())
    if without_weights(path):
        total.update(f"drawn from {seed}".encode())
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
    """The local copy of a folder behind an URL."""
    folder = local_copy(url, "models")
    if folder is None:
        raise ModelError(f"model.path: there are no files at `{storage.shown(url)}`")
    return folder
