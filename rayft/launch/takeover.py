"""Weights that pass from one run to another: population based training lets a trial go on from a better one's.

The run takes a copy and owns it. Whatever the other does with its checkpoints from then on, this one goes on from its
own folder like any run, on any number of workers.
"""

from __future__ import annotations

import tempfile
from typing import Any

from rayft import attempts, storage
from rayft.errors import StorageMissing
from rayft.recipe import Recipe
from rayft.training import checkpoints

STATE = "state.json"


def take_over(recipe: Recipe, donor: str) -> str | None:
    """Makes a copy of the checkpoint `donor` the one from which `recipe` goes on; what its run had counts no more.

    `donor` is a full path. Where the other run has deleted that checkpoint, or does while it is copied, its newest
    stands for it. Returns the copy's path; None, and nothing has changed, where the other run has none. Superseded
    where another process claims the run at the same moment.
    """
    run: str = recipe.folder
    path: str | None = donor
    while path is not None:
        with tempfile.TemporaryDirectory(prefix="rayft-takeover-") as local:
            if _copied(path, local):
                after = attempts.newest(run)
                target = storage.join(run, "checkpoints", checkpoints.folder_name(checkpoints.step_of(path), after + 1))
                state = _own(storage.read_json(storage.join(local, STATE)))
                storage.write_json(storage.join(local, STATE), state)
                storage.upload(local, target)
                attempts.claim(run, [], after)
                storage.write_text(storage.join(run, "recipe.yaml"), recipe.to_yaml())
                storage.commit(target, {"step": state["step"], "world": state["world"], "best": None})
                return target
        path = checkpoints.newest(donor.rpartition("/")[0])
    return None


def _copied(path: str, local: str) -> bool:
    """Copies a checkpoint without its marker; False where it went meanwhile. The marker is what goes first."""
    try:
        storage.download(path, local)
    except StorageMissing:
        return False
    storage.delete(storage.join(local, storage.MARKER))
    return storage.committed(path) is not None


def _own(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a run that stands there and has no evaluation of its own yet."""
    pending = state["step"] >= state["total_steps"]
    own = {"best": None, "foremost": None, "waited": 0, "finished": False, "pending": pending, "stored": None}
    return {**state, **own}
