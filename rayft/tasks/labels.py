"""What tasks with named labels share: how a cell names one, their order, and a head that answers for them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator

from rayft.tasks.cells import QUOTED, quoted, short
from rayft.tasks.drawing import draw_parameters, gathered
from rayft.tasks.later import torch

NUMBER = re.compile(r"-?\d+(\.\d+)?")
COMPARED = 200  # labels among which the nearest to a wrong one is looked for
SHOWN = 8  # labels that a message lists before it only counts them


def _named(value: Any) -> Any:
    """YAML reads `[0, 1]` as numbers; they name the same labels as the numbers in the data do."""
    return [label_name(entry) for entry in value] if isinstance(value, list | tuple) else value


def _different(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) < max(2, len(value)):
        raise ValueError("labels needs two different names at least, and none twice")
    return value


# The type of a task's field that fixes the labels and their order.
LabelNames = Annotated[tuple[str, ...], BeforeValidator(_named), AfterValidator(_different)]


def in_order(names: Iterable[str]) -> list[str]:
    """Numbers in numerical order, other names alphabetically."""
    found = set(names)
    numeric = all(NUMBER.fullmatch(name) for name in found)
    return sorted(found, key=lambda name: (float(name) if numeric else 0.0, name))


def index_of(name: str, index: Mapping[str, int], what: str) -> int:
    """The index of a label, which the task calls `what`; ValueError says what is wrong with it and what would fit."""
    if name not in index:
        # Each bad row is compared with every label: of thousands, or of texts, that takes a second a row.
        few = len(index) <= COMPARED and len(name) <= QUOTED
        near = difflib.get_close_matches(name, index, n=1) if few else []
        raise ValueError(
            f"{what} {quoted(name)} is not one of {shown(index)}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return index[name]


def label_name(value: Any) -> str | None:
    """A label as its name: true is "true", 3 and 3.0 are "3", text loses the blanks around it; None: there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() or None


def shown(names: Iterable[str]) -> str:
    known = list(names)
    return ", ".join(map(short, known[:SHOWN])) + (f", … ({len(known)} in all)" if len(known) > SHOWN else "")


def known_labels(config: Any) -> tuple[str, ...]:
    """The label names of a model in the order of their ids; a config.json may hold them as text sorts: 0, 1, 10, 2."""
    return tuple(name for _, name in sorted(config.id2label.items()))


def fit_head(network: Any, known: Sequence[str], names: Sequence[str], seed: int) -> None:
    """Makes the network's heads answer for `names` in their order, given that it was loaded for `known`.

    Their rows are rearranged where both are the same names, else drawn from (seed, module's name): weights that were
    trained for other labels only happen to have a shape that fits.
    """
    if list(known) == list(names):
        return
    for name, head in _heads(network, len(names)):
        if sorted(known) != sorted(names):
            drawn = draw_parameters(network, [f"{name}.{parameter}" for parameter, _ in head.named_parameters()], seed)
            network.rayft_drawn = tuple(sorted({*getattr(network, "rayft_drawn", ()), *drawn}))
            continue
        order = [list(known).index(entry) for entry in names]
        with gathered(list(head.parameters())), torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(parameter[order].clone())


def _heads(network: Any, labels: int) -> list[tuple[str, Any]]:
    """The last linear layer with `labels` outputs, and those beside it that read as much, outside the base model.

    A distilled DeiT, LeViT or SwiftFormer has a second head and answers with the mean of both. A square layer is none:
    where there are as many labels as it has inputs, the dense layer before a head looks just like it.
    """
    found = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == labels
    ]
    inputs, base = found[-1][1].in_features, f"{network.base_model_prefix}."
    beside = [
        (name, module)
        for name, module in found[:-1]
        if module.in_features == inputs != labels and not name.startswith(base)
    ]
    return [*beside, found[-1]]
