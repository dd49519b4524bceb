"""Borrowed copies: one for all who want it at the same time, and gone when the last of them has let go."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rayft.copies import PART_S, borrowed


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies lie while they are borrowed."""
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "borrowed"


@pytest.fixture
def made() -> list[str]:
    return []


@pytest.fixture
def make(made: list[str]) -> Callable[[str], None]:
    def write(path: str) -> None:
        made.append(path)
        Path(path).write_text("weights")

    return write


def left(home: Path) -> list[str]:
    return sorted(one.name for one in home.iterdir())


def test_a_copy_is_made_once_and_goes_when_the_last_lets_go_of_it(
    home: Path, made: list[str], make: Callable[[str], None]
) -> None:
    with borrowed("key", make) as first:
        with borrowed("key", make) as second, borrowed("other", make) as other:
            assert second == first
            assert other != first
        assert Path(first).read_text() == "weights"
        assert not Path(other).exists()
    assert len(made) == 2
    assert left(home) == []
    with borrowed("key", make):
        assert len(made) == 3


def test_who_wants_a_copy_while_it_is_made_waits_for_it(
    home: Path, made: list[str], make: Callable[[str], None]
) -> None:
    seen: list[str] = []

    def other() -> None:
        with borrowed("key", make) as copy:
            seen.append(Path(copy).read_text())

    threads = [threading.Thread(target=other) for _ in range(8)]

    def make_among_others(path: str) -> None:
        for thread in threads:
            thread.start()
        make(path)

    with borrowed("key", make_among_others):
        for thread in threads:
            thread.join()
    assert seen == 8 * ["weights"]
    assert len(made) == 1
    assert left(home) == []


def test_what_could_not_be_made_or_used_leaves_nothing(home: Path, make: Callable[[str], None]) -> None:
    def torn(path: str) -> None:
        make(path)
        raise ValueError("it is not as it was written")

    with pytest.raises(ValueError, match="not as it was written"), borrowed("key", torn):
        pass
    assert left(home) == []
    with pytest.raises(KeyError), borrowed("key", make):
        raise KeyError
    assert left(home) == []


def test_without_locks_each_makes_a_copy_of_its_own(
    home: Path, made: list[str], make: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("rayft.copies.fcntl.flock", refuse)
    with borrowed("key", make) as first:
        with borrowed("key", make) as second:
            assert second != first
        assert not Path(second).exists()
        assert Path(first).read_text() == "weights"
    assert not Path(first).exists()
    assert len(made) == 2


def test_copies_of_processes_that_were_killed_make_room_after_a_day(home: Path, make: Callable[[str], None]) -> None:
    with borrowed("used", make) as used:
        for name in ("killed", "killed-just-now", "own"):
            (home / name).mkdir()
            (home / name / "copy").write_text("weights")
        for name in ("killed.lock", "killed-just-now.lock"):
            (home / name).touch()
        for name in ("killed.lock", "used.lock", "own"):
            stat = (home / name).stat()
            os.utime(home / name, (stat.st_atime, stat.st_mtime - 2 * PART_S))
        with borrowed("another", make):
            assert Path(used).exists()
    assert left(home) == ["killed-just-now", "killed-just-now.lock"]
