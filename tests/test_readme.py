"""What the README tells a user to type: every command is one the command line has, every recipe in it is valid."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from rayft import cli
from rayft.fields import faults
from rayft.recipe import Recipe, json_schema

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The contents of the README's code blocks in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def lines(program: str) -> list[list[str]]:
    """The shell lines of the README that start `program`, split into words; comments and pipes are cut off."""
    typed = [line.strip() for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(re.split(r"[|>;&]", line)[0], comments=True) for line in typed]
    return [line for line in words if line and line[0] == program]


def table_commands() -> list[str]:
    """The commands in the README's table of commands, such as `runs show`."""
    return re.findall(r"^\| `rayft ([a-z]+(?: [a-z]+)?)\b.*?` \|", README, re.MULTILINE)


def command_line() -> Any:
    """The command line as the object that parses it."""
    return typer.main.get_command(cli.app)


def parse(words: list[str]) -> list[str]:
    """Parses `words` (without `rayft`) down to a command that could run; returns its names; raises on a wrong word."""
    command, names = command_line(), []
    while True:
        context = command.make_context(names[-1] if names else "rayft", list(words))
        if not hasattr(command, "commands"):
            return names
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        names.append(name)


@pytest.mark.parametrize("words", lines("rayft"), ids=" ".join)
def test_command_is_one_that_rayft_has(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert parse(words[1:])
    recipes = [word for word in words if word.startswith("jobs/") and word.endswith(".yaml")]
    for path in recipes:
        Recipe.load(path, [word for word in words if re.fullmatch(r"[a-z_]+(\.[a-z_]+)*=.*", word)])


def test_a_command_that_rayft_lacks_is_noticed() -> None:
    with pytest.raises(Exception, match="trian"):
        parse(["trian", "jobs/quickstart.yaml"])
    with pytest.raises(Exception, match="--no-such-option"):
        parse(["schema", "--no-such-option"])


def test_table_lists_every_command_and_no_other() -> None:
    def leaves(command: Any, path: str = "") -> set[str]:
        found = set()
        for name, child in command.commands.items():
            if child.hidden:
                continue
            full = f"{path} {name}".strip()
            found |= leaves(child, full) if hasattr(child, "commands") else {full}
        return found

    listed = table_commands()
    assert sorted(listed) == sorted(leaves(command_line()))


@pytest.mark.parametrize("words", lines("make"), ids=" ".join)
def test_make_has_the_target(words: list[str]) -> None:
    done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipe_is_valid(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is whole, or the sections that the first one gets."""
    monkeypatch.chdir(ROOT)
    first = yaml.safe_load(blocks("yaml")[0])
    Recipe.parse({**first, **yaml.safe_load(text)}, "README.md")


def test_readme_shows_commands_and_a_recipe() -> None:
    assert {words[1] for words in lines("make")} >= {"quickstart", "test"}
    assert lines("rayft")
    assert blocks("yaml")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http|#)([^)#]+)", README))))
def test_link_leads_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


# --- coming from another trainer


def renamed() -> list[tuple[list[str], list[str]]]:
    """Each row of the table of other trainers' names: the words in code there, and the fields of a recipe here."""
    section = README.partition("### Coming from another trainer\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?`.*?) \| (.+) \|$", section, re.MULTILINE)
    sections = "task|model|data|train|checkpoints|deepspeed|cluster|tune|storage|name"
    named = rf"`((?:{sections})\b(?:\.\w+)*)"
    return [(re.findall(r"`(\w+)", there), re.findall(named, here)) for there, here in rows]


def test_other_trainers_names_lead_to_fields_that_there_are() -> None:
    assert len(renamed()) > 20
    schema, fields = json_schema(), {field for _, here in renamed() for field in here}
    known = {field for field in fields if any(True for _ in faults.at(schema, tuple(field.split("."))))}
    assert fields - known == set()
