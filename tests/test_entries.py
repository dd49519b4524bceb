from __future__ import annotations

import functools
import hashlib
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rayft import retry, storage
from rayft.errors import StorageDown

TREE = ("b.csv", "a.csv", "deep/c.csv", "deep/er/d.json", ".hidden/e.csv", "deep/.f.csv", "odd[1].csv")


@pytest.fixture(params=["local", "s3", "memory"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder with the files of TREE on a disk, in object storage, and in another file system of fsspec."""
    bases = {"local": lambda: str(tmp_path), "s3": lambda: request.getfixturevalue("s3"), "memory": lambda: "memory://"}
    base = storage.join(bases[request.param](), "entries", request.node.name.split("[")[0])
    for name in TREE:
        storage.write_text(storage.join(base, name), name)
    return base


def names(entries: list[storage.Entry], base: str) -> list[str]:
    return [entry.path.removeprefix(base + "/") for entry in entries]


def test_listing_is_sorted_and_complete(tree: str) -> None:
    found = storage.listing(tree)
    assert names(found, tree) == sorted(TREE)
    assert [entry.size for entry in found] == [len(name) for name in sorted(TREE)]
    assert all(entry.modified > 1.7e9 for entry in found)
    assert all((entry.etag is None) == storage.is_local(tree) for entry in found)
    assert names(storage.listing(tree + "/", recursive=False), tree) == ["a.csv", "b.csv", "odd[1].csv"]
    assert names(storage.listing(storage.join(tree, "a.csv")), tree) == ["a.csv"]
    assert storage.listing(storage.join(tree, "nothing")) == []
    assert storage.listing(storage.join(tree, "nothing"), recursive=False) == []


def test_folders_are_those_directly_inside(tree: str) -> None:
    assert storage.folders(tree) == [storage.join(tree, ".hidden"), storage.join(tree, "deep")]
    assert storage.folders(storage.join(tree, "nothing")) == []


def test_a_link_to_a_folder_above_is_no_folder(tmp_path: Path) -> None:
    """Whoever looks for runs in it would never come to an end."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/b/self").symlink_to(tmp_path / "a/b")
    (tmp_path / "a/b/other").symlink_to(tmp_path / "elsewhere")
    assert storage.folders(str(tmp_path / "a/b")) == [str(tmp_path / "a/b/other")]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["a.csv", "b.csv", "deep/c.csv", "deep/er/d.json", "odd[1].csv"]),
        ("deep", ["deep/c.csv", "deep/er/d.json"]),
        ("deep/", ["deep/c.csv", "deep/er/d.json"]),
        ("b.csv", ["b.csv"]),
        ("*.csv", ["a.csv", "b.csv", "odd[1].csv"]),
        ("[ab].csv", ["a.csv", "b.csv"]),
        ("odd[1].csv", ["odd[1].csv"]),
        ("**/*.csv", ["a.csv", "b.csv", "deep/c.csv", "odd[1].csv"]),
        ("d*", ["deep/c.csv", "deep/er/d.json"]),
        ("deep/*", ["deep/c.csv", "deep/er/d.json"]),
        (".hidden", [".hidden/e.csv"]),
        ("?.txt", []),
        ("c.csv", []),
    ],
)
def test_expand(tree: str, pattern: str, found: list[str]) -> None:
    assert names(storage.expand(storage.join(tree, pattern) if pattern else tree), tree) == found


def test_relative_paths_stay_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/.x", "data/a", "data/b"):
        storage.write_text(name, "")
    assert [entry.path for entry in storage.expand("data")] == ["data/a", "data/b"]
    assert [entry.path for entry in storage.expand("./data/*")] == ["./data/a", "./data/b"]
    assert [entry.path for entry in storage.expand("*/a")] == ["data/a"]
    assert storage.expand(f"../{tmp_path.name}/data")[0].path == f"../{tmp_path.name}/data/a"


def test_placeholders_of_folders_are_no_entries(s3: str) -> None:
    import boto3

    client = boto3.client("s3")
    for key in ("placeholders/", "placeholders/sub/", "placeholders/sub/a.csv"):
        client.put_object(Bucket="rayft-tests", Key=key, Body=b"")
    folder = storage.join(s3, "placeholders")
    assert names(storage.listing(folder), folder) == ["sub/a.csv"]
    assert names(storage.expand(folder), folder) == ["sub/a.csv"]
    assert names(storage.expand(folder + "/*"), folder) == ["sub/a.csv"]
    assert names(storage.expand(folder + "/**"), folder) == ["sub/a.csv"]


def test_a_listing_has_more_than_one_page(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")  # of the server, which runs in this process
    for number in range(10):
        storage.write_bytes(storage.join(s3, "many", str(number)), b"")
    assert names(storage.listing(storage.join(s3, "many")), storage.join(s3, "many")) == list("0123456789")


def test_content_hash_is_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    data = b"x" * (2 << 20)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(data)
    first, second = (storage.content_hash(*storage.expand(str(tmp_path / name))) for name in ("a", "b"))
    assert first == second == hashlib.sha256(data).hexdigest()
    (tmp_path / "b").write_bytes(data[:-1] + b"y")
    assert storage.content_hash(*storage.expand(str(tmp_path / "b"))) == hashlib.sha256(data[:-1] + b"y").hexdigest()


def test_content_hash_remembers_what_is_settled_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "hashes"
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"x" * (2 << 20))
    (entry,) = storage.expand(str(path))
    storage.content_hash(entry)
    assert not cache.exists()  # written just now: the next change might leave no trace in its times
    later = os.stat(path).st_ctime + 10
    monkeypatch.setattr("rayft.entries.time.time", lambda: later)
    true = storage.content_hash(entry)
    (memo,) = cache.iterdir()
    memo.write_text("from the memo")
    assert storage.content_hash(entry) == "from the memo"
    os.utime(path, (1, 1))
    assert storage.content_hash(entry) == true


def test_content_hash_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x" * (2 << 20))
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "file"))
    later = os.stat(tmp_path / "file").st_ctime + 10
    monkeypatch.setattr("rayft.entries.time.time", lambda: later)
    assert len(storage.content_hash(*storage.expand(str(tmp_path / "file")))) == 64


def test_content_hash_of_an_object_is_its_etag(s3: str) -> None:
    path = storage.join(s3, "hashed")
    storage.write_bytes(path, b"1")
    (entry,) = storage.expand(path)
    assert storage.content_hash(entry) == hashlib.md5(b"1").hexdigest() == storage.listing(path)[0].etag


class _Plain(SimpleHTTPRequestHandler):
    """A web server that says nothing of its files but their content."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Last-Modified":
            super().send_header(keyword, value)

    def log_message(self, *_: object) -> None:
        pass


def test_a_web_page_is_known_by_its_content_and_an_outage_is_not_its_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY", retry.Retry(attempts=2, first_s=0.001))
    (tmp_path / "rows.csv").write_bytes(b"a,b\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Plain, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/rows.csv"
    (entry,) = storage.expand(url)
    assert storage.read_bytes(url) == b"a,b\n"
    assert storage.content_hash(entry) == hashlib.sha256(b"a,b\n").hexdigest()
    assert not storage.exists(url + "x")
    server.shutdown()
    thread.join()
    server.server_close()
    with pytest.raises(StorageDown, match=f"{url}: reading failed after 2 attempts"):
        storage.exists(url)


def test_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAYFT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.cache_folder() == str(tmp_path / ".cache" / "rayft")
