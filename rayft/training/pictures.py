"""Pictures that a task draws of its scores, in the run's folder: `pictures/step-000104/eval_confusion_matrix.png`."""

from __future__ import annotations

from collections.abc import Callable

from rayft import storage

FOLDER = "pictures"
Keep = Callable[[dict[str, bytes]], None]  # takes name -> PNG


def keep(run: str, step: int, split: str) -> Keep:
    """What writes the pictures of an evaluation after `step` optimizer steps; `split` is "eval" or "test"."""

    def write(pictures: dict[str, bytes]) -> None:
        for name, content in pictures.items():
            storage.write_bytes(storage.join(run, FOLDER, f"step-{step:06d}", f"{split}_{name}.png"), content)

    return write
