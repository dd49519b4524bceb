"""From pydantic's errors and a JSON schema to faults: where, what, the value given, what fits, the nearest known name.

Everything is read off the JSON schema, so that an option is described in one place only, where it is declared.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from rayft.errors import Fault
from rayft.fields import elsewhere

# What a signed URL has in its query, whatever store has signed it (`sig`, `X-Amz-Signature`, `X-Goog-Signature`): who
# holds it can read, or write.
SIGNATURE = re.compile(r"([?&](?:[\w-]*(?:signature|security-token)|sig)=)[^&#\s'\"]+", re.IGNORECASE)

Path = tuple[str | int, ...]
Schema = dict[str, Any]

_WHAT = {
    "missing": "missing",
    "extra_forbidden": "unknown key",
    "int_type": "not a whole number",
    "int_from_float": "not a whole number",
    "float_type": "not a number",
    "finite_number": "not a finite number",
    "string_type": "not text",
    "bool_type": "not true or false",
    "literal_error": "not a known choice",
    "greater_than": "too small",
    "greater_than_equal": "too small",
    "less_than": "too large",
    "less_than_equal": "too large",
    "string_too_short": "empty",
    "string_pattern_mismatch": "not of the right form",
    "model_type": "not a section",
    "model_attributes_type": "not a section",
    "dict_type": "not a section",
    "tuple_type": "not a list",
    "list_type": "not a list",
    "too_short": "too few entries",
    "too_long": "too many entries",
}

_BOUNDS = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})


def translate(errors: Sequence[ErrorDetails], data: Any, schema: Schema) -> list[tuple[Path, Fault]]:
    """One fault for each place in `data` that `errors` complain about, in their order."""
    by_place: dict[Path, list[ErrorDetails]] = {}
    for error in errors:
        by_place.setdefault(place(error, data), []).append(error)
    # Of a union's complaints those that look deepest are about the form that was meant.
    deepest = [path for path in by_place if not any(_above(path, other) for other in by_place)]
    listed: set[Path] = set()  # the sections whose names are told already, with the first of their unknown keys
    return [(path, _fault(path, by_place[path], data, schema, listed)) for path in deepest]


def _above(path: Path, other: Path) -> bool:
    return len(path) < len(other) and other[: len(path)] == path


def place(error: ErrorDetails, data: Any) -> Path:
    """The keys in `data` that an error is about: its location without the names of a union's members."""
    path: list[str | int] = []
    node = data
    for index, part in enumerate(error["loc"]):
        inside = isinstance(node, dict) and part in node
        inside = inside or (isinstance(node, list | tuple) and isinstance(part, int) and part < len(node))
        if inside:
            path.append(part)
            node = node[part]
        elif index == len(error["loc"]) - 1 and error["type"] == "missing":
            path.append(part)
    return tuple(path)


def _fault(path: Path, errors: list[ErrorDetails], data: Any, schema: Schema, listed: set[Path]) -> Fault:
    where, error = dotted(path), errors[0]
    kind, context = error["type"], error.get("ctx", {})
    here = list(at(schema, path))
    if kind == "missing":
        return Fault(where, "missing", fits=_fits(here, schema))
    value = _inside(data, path)
    if kind == "extra_forbidden":
        near, fits = nearest(path, schema), elsewhere.sentence(where)
        if not near and not fits and path[:-1] not in listed:
            listed.add(path[:-1])
            fits = _known(list(at(schema, path[:-1])))
        return Fault(where, "unknown key", show(value), fits, near)
    if kind == "rayft":
        return Fault(where, context["what"], show(value), context["fits"] or _fits(here, schema), context["nearest"])
    if kind == "value_error":  # a validator's own sentence
        return Fault(where, _sentence(str(context.get("error", error["msg"]))), _scalar(value))
    kinds = {one["type"] for one in errors}
    if kind in _BOUNDS and isinstance(value, bool | str):  # made a number first, by a field that is not strict
        kind = "int_type" if any(node.get("type") == "integer" for node in here) else "float_type"
    what = _WHAT.get(kind, _sentence(error["msg"])) if len(kinds) == 1 else "not a value that fits"
    near = None
    if isinstance(value, str):
        words = [str(word) for word in _choices(here)]
        near = closest(value, words)
    fits = _fits(here, schema)
    if kinds == {"string_type"} and isinstance(value, int | float):
        fits = f"text fits, so put it in quotes: '{value}'"
    elif kinds == {"string_type"} and isinstance(value, dict | list):  # as YAML reads {words} and [words]
        fits = "text fits; where this is meant as text, put it in quotes, in two pairs on a command line: '\"...\"'"
    return Fault(where, what, show(value), fits, near)


def _scalar(value: Any) -> str | None:
    return None if isinstance(value, dict | list) else show(value)


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path) or "the recipe"


def show(value: Any) -> str:
    """A value as a message quotes it: short, in YAML's words, never with a URL's password or signature."""
    plain = isinstance(value, str | float)
    text = repr(value) if plain else json.dumps(value, default=str, ensure_ascii=False)
    text = re.sub(r"(\w+://)[^/@\s'\"]+@", r"\1***@", text)
    text = SIGNATURE.sub(r"\1***", text)
    return text if len(text) <= 80 else text[:76] + " ..."


def _inside(data: Any, path: Path) -> Any:
    for part in path:
        data = data[part]
    return data


# --- the schema


def at(schema: Schema, path: Path) -> Iterator[Schema]:
    """The schemas that describe the value at `path`; none where no such field can be."""
    nodes = list(_alternatives(schema, schema))
    for part in path:
        below: list[Schema] = []
        for node in nodes:
            if "properties" in node and part in node["properties"]:
                below.append(node["properties"][part])
            elif isinstance(node.get("additionalProperties"), dict):
                below.append(node["additionalProperties"])
            elif node.get("additionalProperties") is True:
                below.append({})
            elif isinstance(part, int) and "prefixItems" in node and part < len(node["prefixItems"]):
                below.append(node["prefixItems"][part])
            elif (isinstance(part, int) or part.isdecimal()) and isinstance(node.get("items"), dict):
                below.append(node["items"])
        nodes = [one for node in below for one in _alternatives(node, schema)]
    yield from nodes


def _alternatives(node: Schema, root: Schema) -> Iterator[Schema]:
    """`node` with references followed and unions opened."""
    if "$ref" in node:
        yield from _alternatives(root["$defs"][node["$ref"].rpartition("/")[2]], root)
    for union in ("anyOf", "oneOf", "allOf"):
        for one in node.get(union, ()):
            yield from _alternatives(one, root)
    if not {"$ref", "anyOf", "oneOf", "allOf"} & node.keys():
        yield node


def names(schema: Schema) -> list[str]:
    """The dotted names of every field, sections before what they hold, in the order of declaration."""

    def walk(node: Schema, prefix: str, depth: int) -> Iterator[str]:
        for one in _alternatives(node, schema):
            for name, below in one.get("properties", {}).items():
                yield prefix + name
                if depth < 5:
                    yield from walk(below, f"{prefix}{name}.", depth + 1)

    return list(dict.fromkeys(walk(schema, "", 0)))


def nearest(path: Path, schema: Schema) -> str | None:
    """The known field that an unknown key at `path` was probably meant to be, looking in its own section first."""
    key, prefix = str(path[-1]), "".join(f"{part}." for part in path[:-1])
    known = [name for name in names(schema) if name != dotted(path)]
    siblings = [name for node in at(schema, path[:-1]) for name in node.get("properties", ())]
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    plain = elsewhere.plain(key)
    if plain in siblings:
        return prefix + plain
    if there := elsewhere.field(dotted(path)):
        return there if there in known else None
    if plain in leaves:
        return leaves[plain]
    if elsewhere.sentence(plain):  # a name that looks like it would mislead
        return None
    if close := difflib.get_close_matches(plain, siblings, 1, 0.6):
        return prefix + close[0]
    if close := difflib.get_close_matches(plain, list(leaves), 1, 0.8):
        return leaves[close[0]]
    return None


def nearest_name(name: str, schema: Schema) -> str | None:
    """The known dotted name nearest to a whole dotted name."""
    head, _, leaf = name.rpartition(".")
    found = nearest((*head.split("."), leaf) if head else (leaf,), schema)
    return found or (None if elsewhere.sentence(name) else closest(name, names(schema)))


def closest(word: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word.lower(), known, 1, 0.6)), None)


def _known(nodes: list[Schema]) -> str | None:
    found = list(dict.fromkeys(name for node in nodes for name in node.get("properties", {})))
    return f"known here: {', '.join(found)}" if found else None


def _choices(nodes: list[Schema]) -> list[Any]:
    return [value for node in nodes for value in node.get("enum", [node["const"]] if "const" in node else [])]


def _fits(nodes: list[Schema], root: Schema) -> str | None:
    phrases = list(dict.fromkeys(phrase for node in nodes for phrase in _phrases(node, root)))
    if not phrases:
        return None
    return f"{', '.join(phrases[:-1])}{' or ' if phrases[1:] else ''}{phrases[-1]} fits"


def _phrases(node: Schema, root: Schema) -> Iterator[str]:
    """What fits a schema, in words; null is left unsaid."""
    if choices := _choices([node]):
        yield from (f"`{choice}`" for choice in choices)
    elif "examples" in node:
        yield from (f"`{example}`" for example in node["examples"])
    elif node.get("type") == "integer":
        yield "a whole number" + _bounds(node)
    elif node.get("type") == "number":
        yield "a number" + _bounds(node)
    elif node.get("type") == "boolean":
        yield "`true` or `false`"
    elif node.get("type") == "string":
        yield "text"
    elif node.get("type") == "array":
        entries = (
            [phrase for one in _alternatives(node["items"], root) for phrase in _phrases(one, root)]
            if "items" in node
            else []
        )
        yield "a list" + (f" of {' or '.join(dict.fromkeys(entries))}" if entries else "")
    elif node.get("type") == "object":
        inner = list(node.get("properties", {}))
        yield f"a section with {', '.join(inner)}" if inner else "a section"


def _bounds(node: Mapping[str, Any]) -> str:
    low = f"at least {node['minimum']:g}" if "minimum" in node else None
    low = f"above {node['exclusiveMinimum']:g}" if "exclusiveMinimum" in node else low
    high = f"at most {node['maximum']:g}" if "maximum" in node else None
    high = f"below {node['exclusiveMaximum']:g}" if "exclusiveMaximum" in node else high
    limits = [limit for limit in (low, high) if limit]
    return f" {'' if limits[0].startswith(('above', 'below')) else 'of '}{' and '.join(limits)}" if limits else ""
