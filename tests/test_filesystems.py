from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rayft import filesystems, storage
from rayft.errors import StorageRefused


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("s4://bucket/x", r"s4://bucket/x: unknown scheme s4://, known are local paths, s3://.*did you mean s3://\?"),
        ("qqqqq://x", "unknown scheme qqqqq://, known are local paths"),
        ("gs://bucket/x", "gs:// needs another package .*gcsfs"),
    ],
)
def test_a_scheme_that_is_not_served_is_refused(path: str, sentence: str) -> None:
    with pytest.raises(StorageRefused, match=sentence) as caught:
        storage.exists(path)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.exit_code) == (str(caught.value), 2)


def test_an_endpoint_without_a_scheme_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "user:password@localhost:9000")
    for call in (storage.exists, storage.arrow):
        with pytest.raises(StorageRefused, match="AWS_ENDPOINT_URL has to start with http") as caught:
            call(s3)
        assert "password" not in str(caught.value)


def test_the_endpoint_of_s3_alone_goes_first(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage.write_bytes(storage.join(s3, "endpoint"), b"1")
    fs, inner = storage.arrow(storage.join(s3, "endpoint"))
    assert fs.get_file_info(inner).size == 1


def test_arrow_writes_what_storage_reads(s3: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"a": list(range(1000))})
    for base in (s3, str(tmp_path), "memory://arrow"):
        fs, inner = storage.arrow(storage.join(base, "table.parquet"))
        pq.write_table(table, inner, filesystem=fs)
        (entry,) = storage.expand(storage.join(base, "*.parquet"))
        assert entry.size > 1000
        with storage.open_read(entry.path) as file:
            assert pq.read_table(file) == table


def test_arrow_of_a_relative_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.arrow("a/b")[1] == str(tmp_path / "a" / "b")


def test_arrows_file_system_crosses_processes_without_credentials(s3: str, tmp_path: Path) -> None:
    storage.write_bytes(storage.join(s3, "crossing"), b"12345")
    data = pickle.dumps(storage.arrow(storage.join(s3, "crossing")))
    assert b"secret-of-the-tests" not in data
    assert b"key-of-the-tests" not in data
    (tmp_path / "pickled").write_bytes(data)
    program = "import pickle, sys; fs, p = pickle.load(open(sys.argv[1], 'rb')); print(fs.get_file_info(p).size)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "pickled")], capture_output=True, text=True, check=False
    )
    assert done.stdout == "5\n", done.stderr


def test_s3fs_does_not_repeat_and_remembers_no_listing(s3: str) -> None:
    found, inner = filesystems.filesystem(storage.join(s3, "x"))
    assert (found.retries, found.dircache.use_listings_cache, inner) == (1, False, "rayft-tests/x")
    assert filesystems.filesystem(s3)[0] is found


def test_importing_storage_imports_nothing_heavy() -> None:
    heavy = {"torch", "ray", "pyarrow", "s3fs", "botocore", "fsspec"}
    program = f"import sys, rayft.storage, rayft.models; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
