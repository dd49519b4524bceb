"""What each field of a recipe says of itself: in its schema, and on the page that is written from it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from rayft.recipe import json_schema

Node = dict[str, Any]

PAGE = Path(__file__).resolve().parent.parent / "jobs" / "FIELDS.md"
HEAD = """\
# Fields of a recipe

Each field that a recipe may have: what fits, what it is by default, and what it does. Any can be overridden by its
dotted name, as in `rayft run recipe.yaml train.learning_rate=1e-4`. The sections of `task:`, one for each `type`, come
last. This page is written from what `rayft schema` prints, by `pytest --update-goldens tests/test_fields.py`.
"""
SCHEMA = json_schema()


def definition(node: Node) -> Node:
    return SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def members(node: Node) -> list[Node]:
    """What a union is of, in its order; else the node itself."""
    return [one for union in ("anyOf", "oneOf") for one in node.get(union, ())] or [node]


def all_fields() -> Iterator[tuple[str, str, Node]]:
    """(section's class, field, its schema) of every section and every task."""
    for name, section in [("Recipe", SCHEMA), *SCHEMA["$defs"].items()]:
        for field, node in section.get("properties", {}).items():
            yield name, field, node


def test_every_field_says_what_it_does() -> None:
    assert [f"{name}.{field}" for name, field, node in all_fields() if not node.get("description", "").strip()] == []


def test_fields_that_say_the_same_have_one_name() -> None:
    """As `text` has in several tasks; a sentence that was copied to another field speaks of the wrong one."""
    names = defaultdict(set)
    for _, field, node in all_fields():
        names[node["description"]].add(field)
    assert {says: sorted(fields) for says, fields in names.items() if len(fields) > 1} == {}


def test_defaults_are_values_that_fit() -> None:
    """As they are written in a recipe: editors put them there."""
    misfits = []
    for name, field, node in all_fields():
        schema = {**node, "$defs": SCHEMA["$defs"]}
        if "default" in node and not Draft202012Validator(schema).is_valid(node["default"]):
            misfits.append(f"{name}.{field}: {node['default']}")
    assert misfits == []


# --- the page


def sections() -> dict[str, tuple[list[str], Node]]:
    """Of each section, by its reference: the dotted names that it has in recipes, and its schema; in their order."""
    found: dict[str, tuple[list[str], Node]] = {}

    def walk(node: Node, path: str) -> None:
        if "$ref" in node:
            names, section = found.setdefault(node["$ref"], ([], definition(node)))
            names.append(path)
            if len(names) == 1:
                for field, below in section["properties"].items():
                    walk(below, f"{path}.{field}")
        for one in members(node):
            if one is not node:
                walk(one, f"task: {type_of(one)}" if path == "task" else path)
        for inner, end in (("items", ""), ("additionalProperties", ".FIELD")):
            if isinstance(node.get(inner), dict):
                walk(node[inner], path + end)

    for field, node in SCHEMA["properties"].items():
        walk(node, field)
    plain = [(one, (list(dict.fromkeys(names)), section)) for one, (names, section) in found.items()]
    return dict(sorted(plain, key=lambda entry: entry[1][0][0].startswith("task")))  # the many tasks last


def type_of(task: Node) -> str:
    return definition(task)["properties"]["type"]["const"]


def anchor(title: str) -> str:
    """What the link to a heading is on GitHub."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def title_of(names: list[str]) -> str:
    return ", ".join(names)


def kind(node: Node, known: dict[str, tuple[list[str], Node]]) -> str:
    """The values that fit, in words."""
    if "$ref" in node:
        names = known[node["$ref"]][0]
        shown = names[0].removeprefix("task: ") if len(names) == 1 else "section"
        return f"[{shown}](#{anchor(title_of(names))})"
    if "anyOf" in node or "oneOf" in node:
        return union(members(node), known)
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if "examples" in node:
        return "such as " + ", ".join(f"`{example}`" for example in node["examples"])
    if "prefixItems" in node:
        return f"[{', '.join(kind(one, known) for one in node['prefixItems'])}]"
    if node.get("type") == "array":
        return f"list of {kind(node['items'], known)}" if node.get("items") else "list"
    if node.get("type") == "object":
        inner = node.get("additionalProperties")
        return f"mapping to {kind(inner, known)}" if isinstance(inner, dict) else "mapping"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {node[bound]:g}" for bound, sign in signs.items() if bound in node)
    words = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text", "null": "null"}
    return f"{words.get(node.get('type', ''), 'anything')} {bounds}".strip()


def union(nodes: list[Node], known: dict[str, tuple[list[str], Node]]) -> str:
    """One of several; a list of what is named anyway is only called that, and null comes last."""
    plain = [kind(one, known) for one in nodes if one.get("type") not in ("array", "null")]
    lists = [one for one in nodes if one.get("type") == "array"]
    for one in lists:
        inner = {kind(entry, known) for entry in members(one.get("items", {}))}
        plain.append("a list of them" if inner - {"null"} <= set(plain) else kind(one, known))
    plain += ["null"] if any(one.get("type") == "null" for one in nodes) else []
    return " or ".join([", ".join(dict.fromkeys(plain[:-1])), plain[-1]] if plain[1:] else plain)


def default(field: str, node: Node, section: Node) -> str:
    if field in section.get("required", ()):
        return "needed"
    value = node.get("default")
    if isinstance(value, dict) and value:  # a section's own, which is that of its fields
        return ""
    return "`" + (value if isinstance(value, str) else json.dumps(value)) + "`"


def table(section: Node, known: dict[str, tuple[list[str], Node]]) -> Iterator[str]:
    yield "| field | type | default | |"
    yield "| --- | --- | --- | --- |"
    for field, node in section["properties"].items():
        if field == "type":  # a task's, which its heading says
            continue
        cells = (f"`{field}`", kind(node, known), default(field, node, section), flowing(node["description"]))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def flowing(says: str) -> str:
    """On one line, and with no tags in it that Markdown would leave out."""
    return " ".join(says.split()).replace("<", "&lt;")


def page() -> str:
    known = sections()
    lines = [HEAD, *table(SCHEMA, known)]
    for names, section in known.values():
        depth = "###" if "." in names[0] else "##"
        lines += ["", f"{depth} {title_of(names)}", "", flowing(section["description"]), "", *table(section, known)]
    return "\n".join(lines) + "\n"


def test_the_page_of_fields_is_what_the_schema_says(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-goldens"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "run pytest with --update-goldens and look at the difference"


def test_links_of_the_page_lead_to_its_headings() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = {anchor(title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(.+?)\)", text)) <= headings
