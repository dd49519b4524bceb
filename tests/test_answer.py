"""What a command says of a failure, and the code that it ends with; how it looks from outside is in test_cli.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rayft.answer import exit_code, sentence
from rayft.errors import ClusterError, Fault, RecipeError, StorageDenied, TrainingError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("r.yaml", ()), 2),
        (ClusterError("too small"), 2),
        (StorageDenied("no rights"), 2),
        (TrainingError("a worker failed"), 1),
        (KeyError("x"), 1),
        (ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed"), 2),
        (ModuleNotFoundError("No module named 'rayft.x'", name="rayft.x"), 1),
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


@pytest.mark.parametrize("package", ["typer", "rich", "pydantic", "ray"])
def test_a_machine_without_a_package_is_one_sentence_that_names_it(package: str) -> None:
    """As a job finds it on a cluster to which rayft came alone."""
    code = f"import sys, runpy; sys.modules[{package!r}] = None; sys.argv[1:] = ['run', 'jobs/quickstart.yaml']; "
    code += "runpy.run_module('rayft', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: this Python ({sys.executable}) lacks the package {package}; ")
    assert "cluster/requirements.lock" in done.stderr


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


def test_a_signal_while_the_command_line_is_imported_ends_it_as_any_later_one() -> None:
    code = """
import sys
from importlib.abc import MetaPathFinder

class Interrupting(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == NAME:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
from rayft.__main__ import main
main()
"""
    for name in ("rayft.answer", "rayft.cli", "typer"):
        command = [sys.executable, "-c", code.replace("NAME", repr(name))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 130
        assert "Traceback" not in done.stderr
