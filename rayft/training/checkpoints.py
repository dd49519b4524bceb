"""The checkpoints of a run: which there are, which count, which go. What one holds, `checkpoint.py` knows.

`checkpoints/step-000200-a2/` is that of attempt 2 after step 200. It exists with its marker, written last, and counts
unless another attempt had superseded its own by then.
"""

from __future__ import annotations

import json
import re
from typing import Any

from rayft import attempts, storage
from rayft.errors import CheckpointError, Damaged, StorageDenied, StorageDown, StorageError, StorageMissing

NAME = re.compile(r"step-(\d+)-a(\d+)$")


def folder_name(step: int, attempt: int) -> str:
    return f"step-{step:06d}-a{attempt}"


def committed(folder: str) -> list[str]:
    """The checkpoints below `<run>/checkpoints` that count, oldest first (by step, then attempt), as full paths.

    Those that were committed, not by an attempt that another had superseded by then (`attempts.py`), and whose best
    model is still there. Damaged where a commit marker can't be read.
    """
    return [path for path, _ in _counting(folder)]


def newest(folder: str) -> str | None:
    """The checkpoint to go on from, or None."""
    found = _counting(folder)
    return found[-1][0] if found else None


def _counting(folder: str) -> list[tuple[str, dict[str, Any]]]:
    """(path, what its commit marker says), oldest first."""
    fence = attempts.accepts(folder.rstrip("/").rpartition("/")[0])
    found = []
    for path in sorted(_folders(folder), key=_place):
        if fence is not None and _place(path)[1] != fence[0] and _name(path) not in fence[1]:
            continue
        marker = _marker(path)
        if marker is not None:
            found.append((path, marker))
    names = {_name(path) for path, _ in found}
    return [(path, marker) for path, marker in found if marker.get("best") is None or marker["best"] in names]


def _marker(path: str) -> dict[str, Any] | None:
    """What the commit marker says, None where there is none, Damaged where it can't be read.

    It is read once: between two looks another process may commit, or delete.
    """
    file = storage.join(path, storage.MARKER)
    try:
        said = json.loads(storage.read_bytes(file))
    except StorageMissing:
        return None
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise Damaged(path, file, "is not as it was written")
    return said


def step_of(path: str) -> int:
    """Optimizer steps done where that checkpoint stands."""
    return _place(path)[0]


def _folders(folder: str) -> list[str]:
    return [path for path in storage.folders(folder) if NAME.search(path)]


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _place(path: str) -> tuple[int, int]:
    found = NAME.search(path)
    if found is None:
        raise CheckpointError(f"{path}: not a checkpoint's folder")
    return int(found[1]), int(found[2])


def read_json(path: str, name: str) -> Any:
    """A file of the checkpoint `path`; Damaged where it is missing or torn."""
    file = storage.join(path, name)
    try:
        return storage.read_json(file)
    except StorageMissing:
        raise Damaged(path, file, "is missing") from None
    except (StorageDown, StorageDenied):
        raise
    except StorageError:
        raise Damaged(path, file, "is not as it was written") from None


def state(path: str) -> dict[str, Any]:
    """Where training stood when the checkpoint was saved; Damaged where that can't be read."""
    found: dict[str, Any] = read_json(path, "state.json")
    return found


def best(folder: str) -> dict[str, Any] | None:
    """The best model of the run below `<run>/checkpoints`: {"step", "metric", "value", "checkpoint", "scores"}.

    None where it was not evaluated yet. Damaged where its newest checkpoint can't be read.
    """
    path = newest(folder)
    found: dict[str, Any] | None = state(path)["best"] if path is not None else None
    return found


def prune(folder: str, keep: int) -> None:
    """Deletes all checkpoints but the newest `keep` (at least 1), the best model of each of these, and what is newer.

    What a killed save left without a marker goes too, once something newer is committed; and what older attempts left
    that counts no longer, however many steps it has.
    """
    whole = _counting(folder)
    if not whole:
        return
    kept = {_name(path) for path, _ in whole[-keep:]} | {marker.get("best") for _, marker in whole[-keep:]}
    for path in _folders(folder):
        newer = _place(path) >= _place(whole[-1][0]) and _place(path)[1] >= _place(whole[-1][0])[1]
        if _name(path) not in kept and not newer:
            storage.delete(path)


def discard(path: str, why: str) -> None:
    """Makes a damaged checkpoint count no longer; it stays until the next one is committed, with `why` beside it."""
    storage.write_text(storage.join(path, "DAMAGED"), why + "\n")
    storage.delete(storage.join(path, storage.MARKER))


def sweep(folder: str, attempt: int) -> None:
    """Deletes what `attempt` began and did not commit. Nobody may be writing there any more."""
    for path in _folders(folder):
        if _place(path)[1] == attempt and storage.committed(path) is None:
            storage.delete(path)
