"""Which checkpoints of a run count, and which go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayft import attempts, storage
from rayft.errors import Damaged, StorageMissing, Superseded
from rayft.training import checkpoints


def write(run: Path, step: int, attempt: int = 1, commit: bool = True, best: str | None = None) -> Path:
    path = run / "checkpoints" / checkpoints.folder_name(step, attempt)
    path.mkdir(parents=True)
    storage.write_json(str(path / "state.json"), {"step": step})
    if commit:
        storage.commit(str(path), {"step": step, "best": best})
    return path


def test_what_is_not_committed_does_not_exist(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    assert checkpoints.newest(folder) is None
    write(tmp_path, 9, 1)
    write(tmp_path, 12, 3, commit=False)
    write(tmp_path, 9, 2)
    write(tmp_path, 10, 1)
    (tmp_path / "checkpoints" / "notes").mkdir()
    names = [Path(path).name for path in checkpoints.committed(folder)]
    assert names == ["step-000009-a1", "step-000009-a2", "step-000010-a1"]
    assert checkpoints.newest(folder) == str(tmp_path / "checkpoints" / "step-000010-a1")


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        write(tmp_path, step)
    newest = checkpoints.newest(str(tmp_path / "checkpoints"))
    assert newest is not None
    assert newest.endswith("step-1000000-a1")


def test_an_attempt_that_was_superseded_adds_nothing(tmp_path: Path) -> None:
    """However late it commits, and whatever the clocks say."""
    run, folder = str(tmp_path), str(tmp_path / "checkpoints")
    assert attempts.claim(run, [], 0) == 1
    write(tmp_path, 3, 1)
    names = [Path(path).name for path in checkpoints.committed(folder)]
    assert attempts.claim(run, names, 1) == 2
    write(tmp_path, 6, 1)
    write(tmp_path, 5, 2)
    assert [Path(path).name for path in checkpoints.committed(folder)] == ["step-000003-a1", "step-000005-a2"]
    attempts.hold(run, 2)
    with pytest.raises(Superseded, match=rf"was taken over by process {os.getpid()} on .* \(attempt 2\)"):
        attempts.hold(run, 1)


def test_a_checkpoint_counts_only_with_its_best_model(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    write(tmp_path, 1)
    best = write(tmp_path, 2, best="step-000002-a1")
    write(tmp_path, 3, best="step-000002-a1")
    assert checkpoints.newest(folder) == str(tmp_path / "checkpoints" / "step-000003-a1")
    checkpoints.discard(str(best), "harmed")
    assert checkpoints.newest(folder) == str(tmp_path / "checkpoints" / "step-000001-a1")
    assert (best / "DAMAGED").read_text() == "harmed\n"


@pytest.mark.parametrize("torn", ["", '{"step"', "[]"])
def test_a_checkpoint_whose_marker_is_damaged_is_noticed_and_the_one_before_counts(tmp_path: Path, torn: str) -> None:
    folder = str(tmp_path / "checkpoints")
    before, newest = write(tmp_path, 1), write(tmp_path, 2)
    (newest / storage.MARKER).write_text(torn)
    with pytest.raises(Damaged, match=f"^{newest}/COMMITTED: is not as it was written") as caught:
        checkpoints.newest(folder)
    checkpoints.discard(caught.value.folder, str(caught.value))
    assert checkpoints.newest(folder) == str(before)


def test_a_checkpoint_that_is_committed_while_it_is_looked_at_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, late = write(tmp_path, 1), write(tmp_path, 2, commit=False)
    read = storage.read_bytes

    def slow(path: str) -> bytes:
        try:
            return read(path)
        except StorageMissing:
            storage.commit(str(late), {"step": 2, "best": None})
            raise

    folder = str(tmp_path / "checkpoints")
    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_bytes", slow)
        assert checkpoints.newest(folder) == str(before)
    assert checkpoints.newest(folder) == str(late)


def test_what_an_attempt_left_uncommitted_is_swept(tmp_path: Path) -> None:
    write(tmp_path, 1, 1)
    half, other = write(tmp_path, 2, 1, commit=False), write(tmp_path, 2, 2, commit=False)
    checkpoints.sweep(str(tmp_path / "checkpoints"), 1)
    assert [half.exists(), other.exists()] == [False, True]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    folder, best = tmp_path / "checkpoints", "step-000002-a1"
    for step in range(1, 7):
        write(tmp_path, step, best=best if step > 1 else None)
    write(tmp_path, 3, 2, commit=False)
    write(tmp_path, 8, 2, commit=False)
    checkpoints.prune(str(folder), 2)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000002-a1", "step-000005-a1", "step-000006-a1", "step-000008-a2",
    ]  # fmt: skip
    write(tmp_path, 7, best="step-000007-a1")
    checkpoints.prune(str(folder), 1)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000007-a1", "step-000008-a2"]


def test_what_counts_no_longer_never_costs_what_is_new(tmp_path: Path) -> None:
    """The best model was damaged, those that named it with it; another attempt has begun again below their steps."""
    run, folder = str(tmp_path), str(tmp_path / "checkpoints")
    attempts.claim(run, [], 0)
    best = write(tmp_path, 2, best="step-000002-a1")
    for step in (8, 12):
        write(tmp_path, step, best="step-000002-a1")
    checkpoints.discard(str(best), "harmed")
    assert checkpoints.committed(folder) == []
    attempts.claim(run, [], 1)
    new = write(tmp_path, 2, 2, best="step-000002-a2")
    write(tmp_path, 4, 2, commit=False)
    checkpoints.prune(folder, 2)
    assert checkpoints.newest(folder) == str(new)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["step-000002-a2", "step-000004-a2"]
