from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rayft import filesystems, storage
from rayft.errors import StorageDenied, StorageError, StorageMissing, StorageRefused


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder: every test that takes it runs on a disk and on object storage."""
    if request.param == "local":
        return str(tmp_path / "base")
    return storage.join(request.getfixturevalue("s3"), "storage", request.node.name.replace("[", "-").strip("]"))


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("runs", "a", "b"), "runs/a/b"),
        (("runs/", "/a/", "", "b/"), "runs/a/b"),
        (("s3://bucket", "a"), "s3://bucket/a"),
        (("s3://bucket/", "a/b"), "s3://bucket/a/b"),
        (("memory://", "a"), "memory:///a"),
        (("/", "a"), "/a"),
        (("", "a"), "a"),
        (("runs",), "runs"),
    ],
)
def test_join(parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(*parts) == joined


def test_absolute_changes_local_paths_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == str(tmp_path / "runs" / "x")
    assert storage.absolute("file:///data/x") == "/data/x"
    assert storage.absolute("~/x") == os.path.join(os.path.expanduser("~"), "x")
    assert storage.absolute("s3://b/../x") == "s3://b/../x"
    assert [storage.is_local(p) for p in ("a/b", "file:///a", "s3://a", "https://a")] == [True, True, False, False]


def test_what_was_written_is_read(base: str) -> None:
    path = storage.join(base, "deep", "er", "file.bin")
    assert not storage.exists(path)
    storage.write_bytes(path, b"\0one")
    assert storage.read_bytes(path) == b"\0one"
    assert storage.exists(path)
    assert storage.exists(storage.join(base, "deep"))
    assert not storage.exists(storage.join(base, "dee"))
    storage.write_text(path, "zwei ü")
    assert storage.read_text(path) == "zwei ü"
    storage.write_json(path, {"a": [1, "ü"]})
    assert storage.read_json(path) == {"a": [1, "ü"]}
    assert [entry.path for entry in storage.listing(base)] == [path]


def test_faults_in_content_name_the_path(base: str) -> None:
    path = storage.join(base, "file.json")
    with pytest.raises(StorageMissing, match="does not exist") as missing:
        storage.read_bytes(path)
    storage.write_bytes(path, b'{\n"a": }')
    with pytest.raises(StorageError, match="not valid JSON at line 2") as broken:
        storage.read_json(path)
    storage.write_bytes(path, b"ab\xff")
    with pytest.raises(StorageError, match="not UTF-8 text at byte 2") as undecodable:
        storage.read_text(path)
    assert all(path in str(caught.value) for caught in (missing, broken, undecodable))


def test_open_read_seeks_and_reads_ranges(base: str) -> None:
    path = storage.join(base, "big")
    data = os.urandom(1 << 20) * 20  # 20 MiB: several requests
    storage.write_bytes(path, data)
    with storage.open_read(path) as file:
        assert file.read(10) == data[:10]
        assert file.seek(-5, os.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        file.seek(9_000_000)
        assert file.read(9_000_000) == data[9_000_000:18_000_000]
    assert storage.read_bytes(path) == data


def test_an_object_replaced_while_it_is_read_is_an_error_and_never_a_mixture(s3: str) -> None:
    path = storage.join(s3, "replaced")
    storage.write_bytes(path, b"a" * (20 << 20))
    with storage.open_read(path) as file:
        assert file.read(4) == b"aaaa"
        storage.write_bytes(path, b"b" * (20 << 20))
        with pytest.raises(StorageError, match="was replaced while it was being read"):
            file.read()


def test_a_small_object_that_is_written_all_the_time_is_read_whole(s3: str) -> None:
    path = storage.join(s3, "beating")
    storage.write_json(path, {"beat": 0})
    over = threading.Event()

    def beat() -> None:
        number = 0
        while not over.is_set():
            number += 1
            storage.write_json(path, {"beat": number})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        seen = [storage.read_json(path)["beat"] for _ in range(60)]
    finally:
        over.set()
        thread.join()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    storage.write_bytes(path, b"a" * 4_000_000)
    seen: set[tuple[int, bytes]] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            data = storage.read_bytes(path)
            seen.add((len(data), data[:1]))

    reader = threading.Thread(target=look)
    reader.start()
    for letter in (b"b", b"c", b"d") * 3:
        storage.write_bytes(path, letter * 4_000_000)
    done.set()
    reader.join()
    assert {size for size, _ in seen} == {4_000_000}
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_leaves_the_old_content_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        filesystems.write_local(str(path), fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_commit_marks_a_folder_and_only_then_it_counts(base: str) -> None:
    folder = storage.join(base, "step-000200-a2")
    storage.write_text(storage.join(folder, "weights"), "1")
    assert storage.committed(folder) is None
    storage.commit(folder, {"step": 200})
    assert storage.committed(folder) == {"step": 200}
    assert storage.read_json(storage.join(folder, "COMMITTED")) == {"step": 200}
    for torn in ("[1]", "", '{"step": 20', "\x00\x00"):
        storage.write_text(storage.join(folder, "COMMITTED"), torn)
        assert storage.committed(folder) is None


def test_delete_takes_files_folders_and_nothing_beside_them(base: str) -> None:
    for name in ("step-1/a", "step-1/deep/b", "step-1/COMMITTED", "step-10/a", "file"):
        storage.write_text(storage.join(base, name), name)
    storage.delete(storage.join(base, "step-1"))
    storage.delete(storage.join(base, "file"))
    storage.delete(storage.join(base, "was never there"))
    assert [entry.path for entry in storage.listing(base)] == [storage.join(base, "step-10", "a")]


def test_upload_and_download_carry_a_tree(base: str, tmp_path: Path) -> None:
    names = ["a", "sub/b", "sub/deep/ü c#%.txt", "empty", "COMMITTED", *[f"many/{number:03}" for number in range(40)]]
    source, back = tmp_path / "source", tmp_path / "back"
    for name in names:
        storage.write_text(str(source / name), "" if name == "empty" else name)
    storage.upload(str(source), storage.join(base, "target"))
    found = [entry.path for entry in storage.listing(storage.join(base, "target"))]
    assert found == sorted(storage.join(base, "target", name) for name in names)
    storage.download(storage.join(base, "target/"), str(back))
    assert {str(p.relative_to(back)): p.read_text() for p in back.rglob("*") if p.is_file()} == {
        name: "" if name == "empty" else name for name in names
    }


def test_a_file_larger_than_a_part_travels_whole(base: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 70  # 70 MiB: three parts
    (tmp_path / "big").write_bytes(data)
    storage.upload(str(tmp_path / "big"), storage.join(base, "big"))
    storage.download(storage.join(base, "big"), str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data


def test_nothing_to_carry_is_an_error(base: str, tmp_path: Path) -> None:
    with pytest.raises(StorageMissing, match="there are no files"):
        storage.download(storage.join(base, "nothing"), str(tmp_path / "x"))
    with pytest.raises(StorageMissing, match="nowhere"):
        storage.upload(str(tmp_path / "nowhere"), base)


def test_a_large_file_moves_piece_by_piece(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody could tell a slow copy from one that hangs."""
    monkeypatch.setattr(storage, "_PART", 5 << 20)  # the least that S3 takes
    (tmp_path / "large").write_bytes(bytes(11 << 20))
    seen = [storage.Moved.pieces]
    storage.upload(str(tmp_path / "large"), storage.join(base, "large"))
    seen.append(storage.Moved.pieces)
    storage.fetch(storage.join(base, "large"), str(tmp_path / "again"))
    seen.append(storage.Moved.pieces)
    sent = 2 if storage.is_local(base) else 3  # of 8 and of 5 MiB
    assert [after - before for before, after in itertools.pairwise(seen)] == [sent, 2]


def test_check_writable_leaves_no_trace(base: str) -> None:
    storage.check_writable(storage.join(base, "runs"))
    assert storage.listing(base) == []
    assert not storage.is_local(base) or not os.path.exists(base)


def test_check_writable_refuses_a_place_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageRefused, match="file is not a folder"):
        storage.check_writable(str(tmp_path / "file" / "runs"))


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.EROFS, ": Read-only file system"), (errno.ENOSPC, ", the disk of {} is full; free some space")],
)
def test_a_place_that_cannot_be_written_is_refused_by_the_name_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    """And not by that of the probe."""

    def failing(path: str, *_: Any) -> None:
        raise OSError(code, "x")

    monkeypatch.setattr(storage, "write_local", failing)
    for path, file in ((tmp_path / "runs", False), (tmp_path / "out.jsonl", True)):
        with pytest.raises(StorageRefused) as caught:
            storage.check_writable(str(path), file)
        told = f"{path}: writing failed{reason.format(tmp_path)}; a place that can be written fits"
        assert (str(caught.value), caught.value.exit_code) == (told, 2)


def test_a_place_in_a_pseudo_file_system_is_refused() -> None:
    with pytest.raises(StorageRefused, match=r"^/proc/nothing/runs: writing failed"):
        storage.check_writable("/proc/nothing/runs")


def test_check_writable_of_a_file_looks_at_its_folder(base: str, tmp_path: Path) -> None:
    path = storage.join(base, "out.jsonl")
    storage.write_text(path, "before")
    storage.check_writable(path, file=True)
    assert storage.read_text(path) == "before"
    assert [entry.path for entry in storage.listing(base)] == [path]
    with pytest.raises(StorageRefused, match="is a folder; a file's name fits"):
        storage.check_writable(str(tmp_path), file=True)


def test_a_folder_without_rights_is_denied(tmp_path: Path) -> None:
    """Runs as a user without rights, since the tests may run as root, whom nothing is denied."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o700)
    program = f"""
import os, sys
from rayft import storage
from rayft.errors import StorageDenied
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
else:
    os.chmod({str(folder)!r}, 0)
try:
    storage.write_text({str(folder / "x")!r}, "")
except StorageDenied as error:
    print(error, error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    folder.chmod(0o700)
    assert done.stdout.startswith(f"{folder / 'x'}: writing failed, access is denied (Permission denied)"), done.stderr
    assert done.stdout.endswith("2\n")


def test_many_threads_share_it(base: str) -> None:
    def work(number: int) -> bytes:
        path = storage.join(base, str(number))
        storage.write_bytes(path, str(number).encode())
        assert storage.exists(path)
        return storage.read_bytes(path)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(32))) == [str(number).encode() for number in range(32)]
    assert len(storage.listing(base)) == 32


def _read_into(path: str, queue: multiprocessing.Queue[bytes]) -> None:
    queue.put(storage.read_bytes(path))


@pytest.mark.parametrize(
    "method",
    # The parent of a fork has threads here, as a driver has; Python 3.12 warns of that.
    [pytest.param("fork", marks=pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")), "spawn"],
)
def test_it_works_in_a_process_started_from_one_that_used_it(s3: str, method: str) -> None:
    path = storage.join(s3, f"process-{method}")
    storage.write_bytes(path, b"from the parent")
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_read_into, args=(path, queue))
    process.start()
    assert queue.get(timeout=30) == b"from the parent"
    process.join()
    assert process.exitcode == 0
    assert storage.read_bytes(path) == b"from the parent"


def test_an_answer_is_never_stale(s3: str) -> None:
    """Another client's writes and deletions are seen at once: no listing is remembered."""
    import boto3

    client, folder = boto3.client("s3"), storage.join(s3, "fresh")
    assert storage.listing(folder) == []
    assert not storage.exists(storage.join(folder, "a"))
    client.put_object(Bucket="rayft-tests", Key="fresh/a", Body=b"1")
    assert storage.exists(storage.join(folder, "a"))
    (first,) = storage.listing(folder)
    client.put_object(Bucket="rayft-tests", Key="fresh/a", Body=b"22")
    (second,) = storage.listing(folder)
    assert (first.size, second.size) == (1, 2)
    assert first.etag != second.etag
    client.delete_object(Bucket="rayft-tests", Key="fresh/a")
    assert not storage.exists(storage.join(folder, "a"))
    assert storage.listing(folder) == []


def test_missing_bucket_is_said(s3: str) -> None:
    with pytest.raises(StorageError, match="there is no such bucket"):
        storage.write_text("s3://no-such-bucket-here/x", "1")
    assert StorageDenied.exit_code == 2
