"""The recipe: YAML to one frozen, complete, validated value, or every fault in it at once."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, SerializeAsAny, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails

from rayft import document, tasks
from rayft.document import parse_override, set_field
from rayft.errors import Fault, RecipeError
from rayft.fields import faults, rules, task_section
from rayft.fields.machines import Checkpoints, Cluster, DeepSpeed, Failure, Kubernetes, Submit, Workers
from rayft.fields.search import Space, Tune, unsearchable
from rayft.fields.sections import Data, EarlyStopping, Every, Freeze, Lora, Model, Name, Section, Source, Text, Train
from rayft.tasks.task import Task

__all__ = [
    "Checkpoints",
    "Cluster",
    "Data",
    "DeepSpeed",
    "EarlyStopping",
    "Every",
    "Failure",
    "Freeze",
    "Kubernetes",
    "Lora",
    "Model",
    "Recipe",
    "Source",
    "Space",
    "Submit",
    "Train",
    "Tune",
    "Workers",
    "json_schema",
    "parse_override",
    "set_field",
]

# Fields that neither change the model nor what it is trained on.
_INDIFFERENT = (
    *("name", "storage", "cluster", "deepspeed", "failure", "checkpoints", "tune", "submit"),
    *("train.micro_batch_size", "train.save_every", "data.stream"),
    *("model.cache_frozen", "model.compile", "model.gradient_checkpointing", "model.attention"),
)
_ENDS = ("train.epochs", "train.max_steps")

# What stands in for a missing part, so that the rules about the others can still be asked.
_STAND_INS: dict[faults.Path, Any] = {
    ("name",): "unnamed",
    ("model",): {"path": "unnamed"},
    ("model", "path"): "unnamed",
    ("data",): {"train": "unnamed"},
    ("data", "train"): "unnamed",
}


class Recipe(Section):
    """One run, complete: every default is filled in. Build it with `load` or `parse`, which tell all faults at once."""

    name: Name
    """With `storage` the run's identity: run it again and it resumes."""
    task: SerializeAsAny[Task]
    """What is learned, and from which columns of a row: `type` names the task, which has fields of its own."""
    model: Model
    """The pretrained model, and what of it learns."""
    data: Data
    """The rows for training, validation and test."""
    train: Train = Train()
    """Batches, learning rate, length and what is done between steps."""
    checkpoints: Checkpoints = Checkpoints()
    """What a run keeps to go on from."""
    deepspeed: DeepSpeed = DeepSpeed()
    """How memory is saved by sharding and offloading."""
    cluster: Cluster = Cluster()
    """The workers."""
    failure: Failure = Failure()
    """Retries, and how long is waited for what."""
    storage: Text = "runs"
    """A folder, or an URL such as s3://bucket/prefix, for runs, prepared rows and the output of frozen blocks."""
    tune: Tune | None = None
    """What `rayft tune` searches; null: it is a single run."""
    submit: Submit | None = None
    """How it comes to a cluster; null: as its fields are by default."""

    @classmethod
    def load(cls, path: str, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in the YAML file `path` (or URL) with `overrides` ("a.b=value"); RecipeError has all faults."""
        read = document.read(_text(path))
        return cls._checked(read, path, overrides)

    @classmethod
    def parse(
        cls,
        data: Mapping[str, Any],
        source: str = "recipe",
        overrides: Sequence[str] = (),
        lines: Mapping[str, int] | None = None,
    ) -> Recipe:
        """The recipe whose plain form is `data`, which stays as it is.

        `source` and `lines` (the line of each dotted name) are what messages speak of.
        """
        given = document.Document(copy.deepcopy(dict(data)), dict(lines or {}))
        return cls._checked(given, source, overrides)

    @classmethod
    def written(cls, text: str, source: str) -> Recipe:
        """The recipe in the text of a file that rayft has written, less the fields that have gone since then."""
        read = document.read(text)
        if isinstance(read.value, dict):
            _mend(read.value, [error for error in _errors_of(read.value) if error["type"] == "extra_forbidden"])
        return cls._checked(read, source, ())

    @classmethod
    def _checked(cls, given: document.Document, source: str, overrides: Sequence[str]) -> Recipe:
        found = list(given.faults)
        if given.value is None and not found:
            given.value = {}
        if not isinstance(given.value, dict):
            raise RecipeError(source, tuple(found) or (_not_a_mapping(given.value),))
        _override(given, overrides, found)
        recipe, more = _check(given.value)
        found += more
        if recipe is None or found:
            placed = [_with_line(fault, given.lines) for fault in found]
            raise RecipeError(source, tuple(sorted(placed, key=lambda fault: fault.line or float("inf"))))
        return recipe

    def dump(self) -> dict[str, Any]:
        """The plain form, complete: `parse(recipe.dump()) == recipe`."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return document.write(self.dump())

    @property
    def folder(self) -> str:
        """The run's folder."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def coupled(self) -> int:
        """How many consecutive rows of a global batch stay together: for the task's loss, and for BatchNorm."""
        return math.lcm(self.task.coupled(), self.model.batch_norm_rows or 1)

    def at_stage(self, stage: int) -> Recipe:
        """The same with a fixed ZeRO stage."""
        return self.model_copy(update={"deepspeed": self.deepspeed.model_copy(update={"zero_stage": stage})})

    def resolved(self) -> Recipe:
        """The same with local relative paths made absolute; URLs, `pkg:` and Hub ids stay."""
        data = self.dump()
        data["storage"] = _absolute(self.storage)
        if os.path.isdir(os.path.expanduser(self.model.path)):
            data["model"]["path"] = _absolute(self.model.path)
        for split in ("train", "validation", "test"):
            for source in data["data"][split] or ():
                source["path"] = _absolute(source["path"])
        return Recipe.parse(data)

    def differences(self, other: Recipe) -> tuple[str, ...]:
        """What `other` has otherwise, of all that changes the model or its rows: `"train.seed: 0 -> 1"`.

        An end of training that lies further away is no difference: a run goes on with it.
        """
        mine, theirs = dict(_leaves(self.dump())), dict(_leaves(other.dump()))
        found = []
        for name in dict.fromkeys((*mine, *theirs)):
            before, after = mine.get(name), theirs.get(name)
            if before == after or any((name + ".").startswith(one + ".") for one in _INDIFFERENT):
                continue
            if name in _ENDS and (after is None or (before is not None and after > before)):
                continue
            found.append(f"{name}: {faults.show(before)} -> {faults.show(after)}")
        return tuple(found)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, with every task there is; imports all of them."""
    return copy.deepcopy(_schema(tuple(tasks.find(name) for name in tasks.names())))


@functools.cache
def _schema(kinds: tuple[type[Task], ...]) -> dict[str, Any]:
    """The schema of a recipe whose task is one of `kinds`; of any task where there is none."""
    models: list[type[BaseModel]] = [Recipe, *kinds]
    names, root = models_json_schema([(model, "validation") for model in models], title="rayft recipe")
    definitions = root["$defs"]
    own = definitions.pop(names[Recipe, "validation"]["$ref"].rpartition("/")[2])
    chosen = {}
    for kind in kinds:
        reference = names[kind, "validation"]["$ref"]
        definition = definitions[reference.rpartition("/")[2]]
        definition["required"] = ["type", *definition.get("required", ())]
        chosen[definition["properties"]["type"]["const"]] = reference
    if chosen:
        mapping = {"propertyName": "type", "mapping": chosen}
        says = own["properties"]["task"]["description"]
        one_of = [{"$ref": one} for one in chosen.values()]
        own["properties"]["task"] = {"description": says, "oneOf": one_of, "discriminator": mapping}
        definitions.pop("Task", None)
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**draft, **own, "title": root["title"], "$defs": definitions}


# --- reading


def _text(path: str) -> str:
    try:
        if "://" in path:
            from rayft import storage

            return storage.read_text(path)
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        fault = Fault(path, "no such file", fits="`rayft init DATA` writes a first recipe")
    except IsADirectoryError:
        fault = Fault(path, "a folder", fits="a YAML file fits")
    except PermissionError:
        fault = Fault(path, "may not be read", fits="the right to read it is missing")
    except UnicodeDecodeError as error:
        fault = Fault(path, f"not UTF-8 text (byte {error.start})", fits="a YAML file in UTF-8 fits")
    raise RecipeError(path, (fault,))


def _not_a_mapping(value: Any) -> Fault:
    return Fault("the recipe", "not a section", faults.show(value), "keys such as `name:` and `task:` fit")


def _override(given: document.Document, overrides: Sequence[str], found: list[Fault]) -> None:
    """Sets each override in `given.value`; faults go to `found`, and lines of what was set are forgotten."""
    for text in overrides:
        try:
            name, value = parse_override(text)
            set_field(given.value, name, value)
        except RecipeError as error:
            found += error.faults
            given.lines.update({fault.where: 0 for fault in error.faults})
            continue
        for line in [line for line in given.lines if line.startswith(name + ".")]:
            del given.lines[line]
        given.lines[name] = 0  # on no line, and not on its section's either


def _with_line(fault: Fault, lines: Mapping[str, int]) -> Fault:
    """The fault with the line of its place in the file, or of the section that it is missing from."""
    if fault.line:
        return fault
    name = fault.where
    while name and name not in lines:
        name = name.rpartition(".")[0]
    return Fault(fault.where, fault.what, fault.value, fault.fits, fault.nearest, lines.get(name) or None)


# --- checking


def _check(data: dict[str, Any]) -> tuple[Recipe | None, list[Fault]]:
    """The recipe whose plain form is `data`, and every fault in it; the recipe counts only where there are none."""
    task, kind, found, errors = task_section.read(data.get("task"))
    if "task" not in data:
        found = [Fault("task", "missing", fits=f"a section with `type` fits: {task_section.known_types()}")]
    unsound = [fault.where for fault in found]
    whole = {**data, "task": task or Task.model_construct(type="")}
    recipe, own = _validated(whole)
    errors += own
    if errors:
        schema = _schema((kind,) if kind else ())
        for path, fault in faults.translate(errors, data, schema):
            found.append(fault)
            unsound += [
                faults.dotted(path),
                *([fault.nearest] if fault.what == "unknown key" and fault.nearest else []),
            ]
        recipe = recipe or _sound_part(whole)
    if recipe is not None:
        found += rules.broken(recipe, unsound)
        if recipe.tune is not None and kind is not None:
            found += unsearchable(recipe.tune, data, _schema((kind,)), _errors_of, _broken_in)
    return recipe, found


def _validated(data: Mapping[str, Any]) -> tuple[Recipe | None, list[ErrorDetails]]:
    try:
        return Recipe.model_validate(data), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def _errors_of(data: Mapping[str, Any]) -> list[ErrorDetails]:
    task, _, _, errors = task_section.read(data.get("task"))
    return errors + _validated({**data, "task": task or Task.model_construct(type="")})[1]


def _broken_in(data: Mapping[str, Any]) -> list[Fault]:
    """The rules between fields that a trial with the plain form `data` breaks; none where a field itself is faulty."""
    task, _, _, errors = task_section.read(data.get("task"))
    recipe, more = _validated({**data, "task": task or Task.model_construct(type="")})
    return list(rules.broken(_alone(recipe), ())) if recipe is not None and not errors + more else []


def _alone(recipe: Recipe) -> Recipe:
    """As a trial has it: without a sweep, and no more rows passed through at once than its batch has."""
    train = recipe.train
    micro = min(train.micro_batch_size, train.global_batch_size)
    return recipe.model_copy(update={"tune": None, "train": train.model_copy(update={"micro_batch_size": micro})})


def _sound_part(data: Mapping[str, Any]) -> Recipe | None:
    """A recipe of what is right in `data`: faulty keys are left out, missing ones get stand-ins. None: that failed."""
    rest: dict[str, Any] = {key: copy.deepcopy(value) if key != "task" else value for key, value in data.items()}
    for _ in range(20):  # each round removes or adds something; nesting is less deep than that
        recipe, errors = _validated(rest)
        if recipe is not None:
            return recipe
        _mend(rest, errors)
    return None


def _mend(data: dict[str, Any], errors: Sequence[ErrorDetails]) -> None:
    """Removes what `errors` complain about, or its section where a part without a stand-in is missing.

    All places are found first, since what is gone is looked for in vain: its section would go too. The last go first,
    so that those before them in a list stay where they are.
    """
    places = dict.fromkeys((faults.place(error, data), error["type"] == "missing") for error in errors)
    for path, missing in reversed(places):
        _replace(data, path[:-1] if missing and path not in _STAND_INS else path, missing)


def _replace(data: dict[str, Any], path: faults.Path, missing: bool) -> None:
    """Removes what is at `path`, or puts its stand-in there; what is gone already is left."""
    node: Any = data
    try:
        for part in path[:-1]:
            node = node[part]
        if missing and path in _STAND_INS:
            node[path[-1]] = _STAND_INS[path]
        elif path:
            del node[path[-1]]
    except (KeyError, IndexError, TypeError):
        return


# --- paths and differences


def _absolute(path: str) -> str:
    if "://" in path or path.startswith("pkg:"):
        return path
    return os.path.abspath(os.path.expanduser(path))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values: mappings are opened, lists are not."""
    if isinstance(value, dict) and (value or not name):
        for key, below in value.items():
            yield from _leaves(below, f"{name}.{key}" if name else key)
    else:
        yield name, value
