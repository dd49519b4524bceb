"""The shape of the house: which module may import which, what stays light, and who may know a task by its name.

Everything here is read from the source with `ast`; no module of rayft is imported.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayft import tasks

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rayft"

# From the ground up. A module imports only modules of lower floors, and on its own floor only those written before it,
# so no circle can close. `tasks.*` stands for every task there is, each a file or a folder: one never imports another.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "",
        "errors",
        "retry",
        "filesystems",
        "entries",
        "storage",
        "layout",
        "attempts",
        "copies",
        "models",
        "document",
        "fields",
        "fields.elsewhere",
        "fields.faults",
        "fields.sections",
        "fields.machines",
        "fields.search",
        "fields.rules",
        "tasks.stacked",
        "tasks.cells",
        "tasks.task",
        "tasks.later",
        "tasks.generation",
        "tasks.drawing",
        "tasks.loading",
        "tasks.logits",
        "tasks.labels",
        "tasks.files",
        "tasks.charts",
        "tasks.images",
        "tasks.texts",
        "tasks.sound",
        "tasks.padded_norm",
        "tasks.listening",
        "tasks.*",
        "tasks",
        "fields.task_section",
        "recipe",
        "paths",
    ),
    (
        "data",
        "data.order",
        "data.pack",
        "data.places",
        "data.spread",
        "data.class_labels",
        "data.formats",
        "data.json_rows",
        "data.classes",
        "data.hub",
        "data.pieces",
        "data.source",
        "data.prepared",
        "data.scan",
        "data.named",
        "data.splits",
        "data.shards",
        "data.read",
        "data.prepare",
        "data.window",
        "data.feed",
    ),
    (
        "training",
        "training.checkpoints",
        "training.progress",
        "training.metrics",
        "training.watch",
        "training.together",
        "training.pictures",
        "training.schedule",
        "training.repeatable",
        "training.footprint",
        "training.freeze",
        "training.laps",
        "training.links",
        "training.shared",
        "training.dropout",
        "training.first_token",
        "training.loss_scale",
        "training.engine",
        "training.batch_norm",
        "training.checkpoint",
        "training.saver",
        "training.export",
        "training.plan",
        "training.evaluate",
        "training.states",
        "training.overfitting",
        "training.standin",
        "training.prefix",
        "training.timing",
        "training.loop",
        "training.assembly",
        "training.attempt",
        "training.worker",
    ),
    (
        "text",
        "findings",
        "doubts",
        "finite",
        "answer",
        "display",
        "launch",
        "launch.gauges",
        "launch.agent",
        "launch.ahead",
        "launch.tokens",
        "launch.session",
        "record",
        "launch.stopping",
        "launch.board",
        "launch.failure",
        "launch.network",
        "sweeps",
        "sweeps.sampling",
        "reports",
        "reports.snapshots",
        "report",
        "leftovers",
        "reports.history",
        "reports.overview",
        "reports.pages",
        "reports.dashboard",
        "first",
        "submission",
        "submission.servers",
        "submission.jobserver",
        "submission.jobs",
        "submission.following",
        "launch.placement",
        "sweeps.room",
        "launch.prestart",
        "launch.controller",
        "launch.group",
        "run",
        "verify",
        "sweeps.trials",
        "sweeps.rungs",
        "sweeps.roster",
        "sweeps.warm",
        "launch.takeover",
        "sweeps.trial",
        "sweeps.depths",
        "forecast",
        "sweeps.finish",
        "sweeps.scheduling",
        "tune",
        "balance",
        "preflight",
        "submission.reach",
        "submission.kubernetes_rules",
        "submission.kuberay",
        "submission.rayjobs",
        "submission.podlogs",
        "submission.kubernetes_api",
        "submit",
        "output",
        "inference",
        "predict",
        "options",
        "cli_jobs",
        "cli",
        "__main__",
    ),
)

# Libraries that take seconds to import. They wait inside functions wherever a recipe is read or help is shown.
HEAVY = frozenset(
    {"accelerate", "datasets", "deepspeed", "kubernetes", "peft", "ray", "scipy", "sklearn", "torch", "transformers"}
)

TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "rayft", "cluster", "jobs", "tests"}


def module_name(path: Path) -> str:
    """`rayft/data/source.py` -> `data.source`; a package's `__init__.py` -> the package; `rayft/__init__.py` -> ``."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}
PARTS = tuple(f"tasks.{name}" for name in tasks.PARTS)
TASKS = sorted(name for name in FILES if name.startswith("tasks.") and name not in PARTS)


def slot(name: str) -> tuple[int, int]:
    """(floor, place on it) of a module, where every task module shares one place."""
    if name in TASKS:
        name = "tasks.*"
    for number, floor in enumerate(FLOORS):
        if name in floor:
            return number, floor.index(name)
    raise KeyError(name)


def own_module(dotted: str) -> str | None:
    """`rayft.data.source.Rows` -> `data.source`; None for names outside rayft."""
    if dotted != "rayft" and not dotted.startswith("rayft."):
        return None
    name = dotted.removeprefix("rayft").removeprefix(".")
    while name not in FILES:
        name = name.rpartition(".")[0]
    return name


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names that the import statements among `nodes` bring in (`from a import b` gives `a.b`)."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run when the module is imported: not the bodies of functions, not what is for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if is_type_checking(child):
            continue
        yield child
        yield from run_at_import(child)


def own_imports(name: str, at_import: bool = False) -> set[str]:
    """Modules of rayft that module `name` imports anywhere, or with `at_import` only when it is imported itself."""
    tree = TREES[name]
    nodes = run_at_import(tree) if at_import else ast.walk(tree)
    return {module for dotted in imported(nodes) if (module := own_module(dotted)) is not None} - {name}


def heavy_at_import(name: str) -> dict[str, set[str]]:
    """Module -> heavy libraries, for `name` and everything of rayft that importing it imports, parent packages too."""
    seen: set[str] = set()
    waiting = {name}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        parents = {module.rpartition(".")[0]} if module else set()
        waiting |= (own_imports(module, at_import=True) | parents) - seen
    found = {module: {d.partition(".")[0] for d in imported(run_at_import(TREES[module]))} & HEAVY for module in seen}
    return {module: libraries for module, libraries in found.items() if libraries}


@pytest.mark.parametrize("name", FILES)
def test_module_has_its_place_in_the_house(name: str) -> None:
    try:
        slot(name)
    except KeyError:
        pytest.fail(f"rayft.{name} stands on no floor: give it a place in FLOORS, above all that it imports")


def stands_below(other: str, name: str) -> bool:
    """Whether `name` may import `other`; a task that is a folder is built from its parts, and these from each other."""
    if name in TASKS and other in TASKS:
        folder, part = name.split(".")[:2], other.split(".")
        return part[:2] == folder and len(part) > 2
    return slot(other) < slot(name)


@pytest.mark.parametrize("name", FILES)
def test_module_imports_only_what_stands_below_it(name: str) -> None:
    wrong = sorted(other for other in own_imports(name) if not stands_below(other, name))
    assert not wrong, f"rayft.{name} (floor {slot(name)[0]}) imports {', '.join(f'rayft.{w}' for w in wrong)}"


@pytest.mark.parametrize("name", FILES)
def test_module_imports_no_relative_names(name: str) -> None:
    assert not [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("name", FILES)
def test_no_import_of_rayft_is_for_type_checkers_only(name: str) -> None:
    guarded = (inner for node in ast.walk(TREES[name]) if is_type_checking(node) for inner in ast.walk(node))
    assert not {dotted for dotted in imported(guarded) if own_module(dotted) is not None}


def light_modules() -> list[str]:
    """Floor 0 without the tasks and how they load (imported only when a recipe names one), and what help imports."""
    return [name for name in (*FLOORS[0], "cli", "__main__") if name in FILES and name not in PARTS[1:]]


@pytest.mark.parametrize("name", light_modules())
def test_reading_a_recipe_or_help_imports_no_heavy_library(name: str) -> None:
    assert heavy_at_import(name) == {}


def names_of_tasks() -> dict[str, str]:
    """Every way to name a task -> its module: the type as in a recipe, the file's name, the names of its classes."""
    found = {}
    for module in TASKS:
        parts = module.split(".")
        if len(parts) > 2:  # a part of a task that outgrew one file
            continue
        found[parts[1]] = module
        found[parts[1].replace("_", "-")] = module
        for node in TREES[module].body:
            bases = {ast.unparse(base).rpartition(".")[2] for base in getattr(node, "bases", ())}
            if isinstance(node, ast.ClassDef) and "Task" in bases:
                found[node.name] = module
    return found


def docstrings(tree: ast.AST) -> set[int]:
    """Identities of the nodes that are docstrings: prose may name a task, code may not."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
    }


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("tasks")])
def test_nothing_outside_tasks_knows_a_task(name: str) -> None:
    tasks = names_of_tasks()
    pattern = re.compile("|".join(rf"(?<![\w-]){re.escape(task)}(?![\w-])" for task in sorted(tasks)))
    prose = docstrings(TREES[name])
    faults = [f"imports {module}" for module in sorted(own_imports(name)) if module in TASKS]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            faults += [f"line {node.lineno}: says {match}" for match in pattern.findall(node.value)]
        elif isinstance(node, ast.Name | ast.Attribute):
            word = node.id if isinstance(node, ast.Name) else node.attr
            faults += [f"line {node.lineno}: uses {word}"] if word in tasks else []
    assert not faults, f"rayft.{name} {'; '.join(faults)}"


def test_there_are_tasks_to_look_for() -> None:
    assert TASKS


def test_top_level_holds_what_the_design_names() -> None:
    patterns = [line.strip("/\n") for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"]
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    kept = {name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    assert kept == TOP_LEVEL, f"too many: {sorted(kept - TOP_LEVEL)}, missing: {sorted(TOP_LEVEL - kept)}"


def test_no_file_is_a_drawer() -> None:
    names = {path.stem for path in [*FILES.values(), *(ROOT / "tests").rglob("*.py")]}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_readme_says_in_one_line_what_each_file_answers() -> None:
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.+?) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = [file for file, _ in rows]
    there = {str(path.relative_to(PACKAGE)) for name, path in FILES.items() if name and len(TREES[name].body) > 1}
    assert sorted(set(listed)) == sorted(listed), "a file is listed twice"
    assert set(listed) == there, f"not there: {sorted(set(listed) - there)}, not listed: {sorted(there - set(listed))}"
    assert all(len(text) > 10 for _, text in rows)


def test_users_of_the_package_get_its_types() -> None:
    """By the marker of PEP 561, which has to be in the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert (PACKAGE / "py.typed").exists()
    assert "py.typed" in settings["rayft"]
