"""Imports that take seconds, begun before anybody needs them: beside Ray's start, and while other processes start.

A run's driver first asks for its workers' processes, and only then imports what it needs itself, but for what is done
while it waits for Ray: what it does meanwhile takes turns with a thread that imports.

torch, transformers and DeepSpeed take four seconds of a processor in each process. Python's garbage collector would
take one more, looking at modules again and again that are there to stay.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import threading
from collections.abc import Iterator

START = ("torch",)
DRIVER = (*START, "transformers.models.auto.modeling_auto", "transformers.modeling_utils")
WORKER = (*DRIVER, "ray.train.torch", "rayft.launch.network", "rayft.training.worker")


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside; what was made there is never looked at again.

    Where it was nothing, since all is imported already, what there is stays subject to collection: of a process that
    trains again and again, the garbage of the time before is part of that.
    """
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        gc.enable()


@contextlib.contextmanager
def importing(*names: str) -> Iterator[None]:
    """Imports modules in a thread beside what is inside; whoever needs one before waits for it there."""
    thread = threading.Thread(target=_import, args=(names,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()  # a process that ends in the middle of an import may crash


def worker() -> None:
    """Called by Ray in each process that it starts for workers, before the process gets anything to do.

    Not beside it: of modules that import each other, as Ray Train's, two threads may see half.
    """
    _import(WORKER)


def _import(names: tuple[str, ...]) -> None:
    with uncollected(), contextlib.suppress(Exception):  # who needs it says what is missing
        for name in names:
            importlib.import_module(name)
