"""What writes checkpoints beside training: one at a time, and failures come where they are asked for."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from group import run_group
from rayft import attempts, storage
from rayft.errors import NotFinite, StorageError, Superseded, TrainingError
from rayft.training import checkpoints, loop
from rayft.training.progress import Progress
from rayft.training.saver import Saver
from rayft.training.timing import Timing
from rayft.training.watch import Watch
from test_loop import STEPS, recipe


def engine_of(width: int = 4) -> Any:
    import torch

    from rayft.training import engine

    network = torch.nn.Linear(width, width)
    groups = [{"params": list(network.parameters()), "scale": 1.0, "name": "all"}]
    return engine.build(network, groups, {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True})


def newest_step(folder: str) -> int:
    found = checkpoints.newest(storage.join(folder, "checkpoints"))
    return checkpoints.step_of(found) if found else 0


def alone(folder: str) -> dict[str, Any]:
    """On a worker: what one rank's saver does when it saves, waits, is overtaken and can't write."""
    built, committed = engine_of(), list[int]()
    attempts.claim(folder, [], 0)
    saver = Saver(folder, 1, 1, 60, None, committed.append)
    for step in (1, 2, 3):
        saver.save(built, {"step": step, "best": None}, {})
    saver.wait()
    found: dict[str, Any] = {"committed": list(committed), "newest": newest_step(folder)}
    found["there"] = sorted(os.listdir(storage.join(folder, "checkpoints")))
    found["files"] = sorted(os.listdir(storage.join(folder, "checkpoints", found["there"][-1])))
    attempts.claim(folder, ["step-000003-a1"], 1)
    saver.save(built, {"step": 4, "best": None}, {})
    saver.wait()  # keeps what it has met
    try:
        saver.check()
    except Superseded:
        found["overtaken"] = True
    saver.check()  # told once
    found["after"] = newest_step(folder)
    Path(folder, "file").write_text("")
    blocked = Saver(storage.join(folder, "file"), 1, 1, 60, None, committed.append)
    blocked.save(built, {"step": 5, "best": None}, {})
    try:
        blocked.finish()
    except StorageError as error:
        found["blocked"] = str(error)
    return found


@pytest.mark.slow
def test_one_at_a_time_is_committed_and_what_fails_is_told_once(tmp_path: Path) -> None:
    (found,) = run_group(alone, 1, str(tmp_path))
    assert found["committed"] == [1, 2, 3]
    assert found["newest"] == 3
    assert found["there"] == ["step-000003-a1"]
    assert found["files"] == ["COMMITTED", "index.json", "rank-00000.json", "rank-00000.safetensors", "state.json"]
    assert found["overtaken"]
    assert found["after"] == 3
    assert "file" in found["blocked"]


def apart(folder: str) -> str:
    """On two workers: rank 1 keeps its part to itself."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        attempts.claim(folder, [], 0)
    dist.barrier()
    built = engine_of()
    saver = Saver(folder, 1, 1, 0.5, None, lambda step: None)
    told = ""
    if dist.get_rank() == 0:
        saver.save(built, {"step": 1, "best": None}, {})
        try:
            saver.finish()
        except TrainingError as error:
            told = str(error)
    dist.barrier()
    return told


@pytest.mark.slow
def test_a_rank_that_does_not_write_its_part_is_named(tmp_path: Path) -> None:
    told, _ = run_group(apart, 2, str(tmp_path))
    assert "rank 1 has not written its part of the checkpoint within 0.5 s (failure.timeout_s)" in told
    assert checkpoints.newest(str(tmp_path / "checkpoints")) is None


def test_waiting_returns_when_the_thread_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    saver = Saver("unused", 1, 1, 60, None, lambda step: None)
    saver.wait()
    gate = threading.Event()
    saver._thread = threading.Thread(target=gate.wait)
    saver._thread.start()
    threading.Timer(0.05, gate.set).start()
    saver.wait()
    assert gate.is_set()


@pytest.mark.parametrize("then", ["another is due", "the rank leaves", "the loss is not finite"])
def test_a_checkpoint_that_takes_long_to_write_is_waited_for_by_all_as_for_work(
    monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Outside of any collective, and so that the driver sees whether it gets on: or a slow upload ends the run."""
    told: list[str] = []
    watch = Watch(None, 0)
    waits = lambda event: lambda: told.append(f"{event}, {'busy' if watch._busy else 'still'}")  # noqa: E731
    monkeypatch.setattr(loop, "together", waits("all have come"))
    monkeypatch.setattr(loop.checkpoint, "loss_scale", lambda engine: None)
    saver = SimpleNamespace(finish=waits("written"), save=lambda *_: told.append("copied"))
    job: Any = SimpleNamespace(
        watch=watch, saver=saver, recipe=recipe(), attempt=1, steps_per_epoch=STEPS, total_steps=STEPS, engine=None,
        prepared={}, norms=SimpleNamespace(statistics=dict), learn=lambda: None,
    )  # fmt: skip

    def diverges(*_: Any) -> Any:
        raise NotFinite(1, "loss", "lower train.learning_rate")

    if then == "another is due":
        loop.save_checkpoint(job, Progress(), Timing())
    elif then == "the rank leaves":
        loop._settle(job, Progress(), Timing(), save=False, leave=True)
    else:
        monkeypatch.setattr(loop, "steps", diverges)
        with pytest.raises(NotFinite):
            list(loop.train(job, iter(()), Progress(), Timing(), STEPS))
    waited = ["written, busy", "all have come, busy"]
    expected = {"another is due": [*waited, "copied"], "the rank leaves": [*waited, "copied", *waited]}
    assert told == expected.get(then, waited)
