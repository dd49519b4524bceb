"""What a command says of a failure, and the code that it ends with; how it looks from outside is in test_cli.py."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rayft.answer import exit_code, sentence
from rayft.errors import ClusterError, Fault, RecipeError, StorageDenied, TrainingError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("r.yaml", ()), 2),
        (ClusterError("too small"), 2),
        (StorageDenied("no rights"), 2),
        (TrainingError("a worker failed"), 1),
        (KeyError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_rayfts_own_errors_are_told_whole_and_others_by_the_first_line_of_their_cause() -> None:
    fault = Fault("train.epochs", "too small", "-1", "a whole number from 1 fits")
    assert sentence(RecipeError("r.yaml", (fault,))).splitlines()[1].startswith("  train.epochs: too small, got -1")
    assert sentence(ValueError("\nfirst\nsecond")).startswith("something unforeseen went wrong: ValueError: first (")
    assert sentence(ValueError()).startswith("something unforeseen went wrong: ValueError (")
    assert sentence(KeyboardInterrupt()) == "interrupted"


def test_stdout_is_given_back_after_the_answer() -> None:
    code = """
        from rayft.answer import answering
        with answering(True) as answer:
            print("aside")
            answer.give({"a": [1, float("inf"), {"b": (2.5, "ü")}]})
        print("after")
    """
    lines = [line.removeprefix(" " * 8) for line in code.splitlines()]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, check=True)
    answer, after = done.stdout.decode().rsplit("\n", 2)[:2]
    assert json.loads(answer) == {"a": [1, None, {"b": [2.5, "ü"]}]}
    assert (after, done.stderr) == ("after", b"aside\n")
