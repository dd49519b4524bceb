"""YAML text to plain values with the line of each key, plain values to YAML text, and dotted overrides.

Scalars follow YAML 1.2, not PyYAML's 1.1: `1e-4` is a number, `on` and `no` are words, `2024-01-01` and `007` are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from rayft.errors import Fault, RecipeError

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_BOOLEAN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BREAKS = re.compile("[\x85\u2028\u2029]")  # YAML 1.1 ends a line at these; of YAML 1.2 they are plain characters

# Mappings whose keys are names with dots of their own: an override's rest is one key there.
_DOTTED_KEYS = frozenset({"tune.search", "data.columns"})
# Values that stand for a section with one field, by place and type.
_SHORT_FORMS: dict[tuple[str, type], str] = {
    **{("model.freeze", kind): "patterns" for kind in (str, list)},
    **{(f"data.{split}", str): "path" for split in ("train", "validation", "test")},
}


class _Loader(yaml.SafeLoader):
    """Knows YAML 1.2's scalars only."""


_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML version would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern in (("int", _INTEGER), ("float", _FLOAT), ("bool", _BOOLEAN), ("null", _NULL)):
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, None)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, None)


def scalar(dumper: yaml.SafeDumper, text: str, style: str | None = None) -> yaml.ScalarNode:
    """`text` in a style of PyYAML's, or in double quotes where it would not be read back as it is."""
    return dumper.represent_scalar(_TAG + "str", text, style='"' if _BREAKS.search(text) else style)


_Dumper.add_representer(str, scalar)


@dataclass
class Document:
    """The value of a YAML text, the line (1-based) of each dotted path, and what is wrong with the text itself."""

    value: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def read(text: str) -> Document:
    """Reads one YAML document; never raises: what can't be read is a fault, and its value None."""
    document = Document()
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        document.faults.append(Fault("the text", f"not valid YAML ({error.problem or error.context})", line=line))
    except yaml.YAMLError as error:  # a character that YAML does not allow
        document.faults.append(Fault("the text", "not valid YAML: " + " ".join(str(error).split())))
    else:
        if node is not None:
            document.value = _value(node, (), document, ())
    return document


def write(value: Any, one_line: bool = False) -> str:
    """YAML text that `read` reads back to an equal value; with `one_line` in braces and brackets."""
    style: dict[str, Any] = {"width": math.inf, "default_flow_style": True} if one_line else {"width": 120}
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
    return text


def _value(node: yaml.Node, path: tuple[str, ...], document: Document, above: tuple[yaml.Node, ...]) -> Any:
    where, line = ".".join(path) or "the text", node.start_mark.line + 1
    if any(node is one for one in above):
        document.faults.append(Fault(where, "an alias that contains itself", line=line))
        return None
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return dict(_entries(node, path, document, (*above, node)))
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        items = []
        for index, item in enumerate(node.value):
            document.lines[".".join((*path, str(index)))] = item.start_mark.line + 1
            items.append(_value(item, (*path, str(index)), document, (*above, node)))
        return items
    if isinstance(node, yaml.ScalarNode):
        try:
            return _scalar(node)
        except (ValueError, KeyError):
            pass
    document.faults.append(Fault(where, f"the tag {node.tag.replace(_TAG, '!!')} is not read", line=line))
    return None


def _entries(
    node: yaml.MappingNode, path: tuple[str, ...], document: Document, above: tuple[yaml.Node, ...]
) -> Iterator[tuple[str, Any]]:
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            document.faults.append(Fault(".".join(path) or "the text", "a key that is not plain text", line=line))
            continue
        here = (*path, key.value)
        dotted = ".".join(here)
        if dotted in document.lines:
            document.faults.append(Fault(dotted, f"given twice, first in line {document.lines[dotted]}", line=line))
            continue
        document.lines[dotted] = line
        yield key.value, _value(value, here, document, above)


def _scalar(node: yaml.ScalarNode) -> Any:
    text: str = node.value
    match node.tag.removeprefix(_TAG):
        case "str" | "!":
            return text
        case "null":
            return None
        case "bool":
            return {"true": True, "false": False}[text.lower()]
        case "int":
            return int(text.replace("_", ""))
        case "float":
            return float(re.sub(r"^([-+]?)\.(?=[inIN])", r"\1", text.replace("_", "")))
    raise ValueError(node.tag)


def parse_override(text: str) -> tuple[str, Any]:
    """`"train.learning_rate=1e-4"` -> `("train.learning_rate", 0.0001)`; the value is YAML. RecipeError if not."""
    dotted, equals, value = text.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted or not all(dotted.split(".")):
        fault = Fault(
            f"the override {text!r}",
            "not of the right form",
            fits="`section.field=value` fits, as in `train.learning_rate=1e-4`",
        )
        raise RecipeError("overrides", (fault,))
    document = read(value)
    if document.faults:
        raise RecipeError("overrides", tuple(Fault(dotted, one.what, repr(value)) for one in document.faults))
    return dotted, document.value


def set_field(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets the field `dotted` of a recipe's plain form, in place; sections that are missing, null or short are made.

    RecipeError where the path leads into a list at a place that the list does not have.
    """
    parts = dotted.split(".")
    for prefix in _DOTTED_KEYS:
        if dotted.startswith(prefix + "."):
            depth = prefix.count(".") + 1
            parts = [*parts[:depth], ".".join(parts[depth:])]
    node: Any = data
    for depth, part in enumerate(parts):
        key: Any = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                where = ".".join(parts[:depth])
                fits = f"a number from 0 to {len(node) - 1} fits there" if node else "the list is empty"
                raise RecipeError("overrides", (Fault(dotted, f"`{where}` is a list", repr(part), fits),))
            key = int(part)
        if depth == len(parts) - 1:
            node[key] = value
            return
        below = node[key] if isinstance(node, list) else node.get(key)
        long = _SHORT_FORMS.get((".".join(parts[: depth + 1]), type(below)))
        if long:
            below = {long: below}
        elif not isinstance(below, dict | list):
            below = {}
        node[key] = below
        node = below
