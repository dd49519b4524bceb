"""How a command answers and ends: text for a reader, or JSON alone on stdout; the sentence and the code of a failure.

Exit codes: 0 done, 1 failed while running, 2 refused before starting, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from rayft.errors import RayftError, RecipeError
from rayft.finite import finite

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


@dataclass
class Answer:
    """Where a command says things. `console` takes progress and text, `stream` the JSON: None where none is wanted."""

    console: Any
    stream: TextIO | None

    def give(self, value: Any, *text: Any) -> None:
        """The answer: `value` as JSON, or `text` (lines or rich renderables) for a reader."""
        if self.stream:
            self.stream.write(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        else:
            self.say(*text)

    def say(self, *text: Any) -> None:
        for one in text:
            self.console.print(one, markup=False, highlight=False, soft_wrap=isinstance(one, str))


@contextmanager
def answering(as_json: bool, interrupted: str = "interrupted") -> Iterator[Answer]:
    """With `as_json`, stdout of this process and of all that it starts becomes stderr; the answer alone is on stdout.

    A failure is an answer too: {"error", "exit_code"}, and "faults" where a recipe has them. `interrupted` is what
    Ctrl-C is answered with.
    """
    from rich.console import Console

    try:
        if not as_json:
            width = None if sys.stdout.isatty() else 120  # of tables; lines are as long as they are
            yield Answer(Console(highlight=False, width=width), None)
            return
        with _stdout_kept() as stream:
            answer = Answer(Console(stderr=True, highlight=False), stream)
            try:
                yield answer
            except (Exception, KeyboardInterrupt) as error:
                answer.give(_failure(error))
                raise
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise


@contextmanager
def _stdout_kept() -> Iterator[TextIO]:
    """The real stdout, while file descriptor 1 leads to stderr, for libraries and child processes too."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        os.dup2(2, 1)
        try:
            yield stream
        finally:
            sys.stdout.flush()
            stream.flush()
            os.dup2(stream.fileno(), 1)


def _failure(error: BaseException) -> dict[str, Any]:
    failure: dict[str, Any] = {"error": sentence(error), "exit_code": exit_code(error)}
    if isinstance(error, RecipeError):
        failure["faults"] = [vars(fault) for fault in error.faults]
    return failure


def sentence(error: BaseException) -> str:
    """What the user is told of a failure: rayft's own errors are complete, others get a line of their cause."""
    if isinstance(error, RayftError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if package := _missing(error):
        return (
            f"this Python ({sys.executable}) lacks the package {package}; rayft needs those of its "
            "cluster/requirements.lock on every machine: install them there"
        )
    lines = str(error).strip().splitlines()
    cause = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"something unforeseen went wrong: {cause} (RAYFT_DEBUG=1 in the environment shows the traceback)"


def exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if _missing(error):
        return REFUSED
    return error.exit_code if isinstance(error, RayftError) else FAILED


def _missing(error: BaseException) -> str | None:
    """The package that is not installed where that is the failure; None where it is another."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return name if name not in ("", "rayft") else None
