"""The pretrained model of a sweep, in Ray's object store: read from disk once, mapped by every trial, not copied whole.

A network is pickled with its tensors as buffers of their own, which Ray stores apart and maps back without a copy. What
a trial trains it copies; frozen weights stay where they are, once per machine.
"""

from __future__ import annotations

import io
import pickle
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import torch

from rayft.tasks.task import Pretrained, Task


@dataclass(frozen=True)
class Packed:
    """A network without its tensors' contents, and these."""

    outline: bytes
    tensors: list[Any]  # arrays of bytes


class _Pickler(cloudpickle.Pickler):
    """Leaves the contents of tensors to `tensors`; a tensor that is used twice stays one."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Any] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return super().reducer_override(value)
        data = value.detach().cpu().contiguous()
        self.tensors.append(data.reshape(-1).view(torch.uint8).numpy())
        kind = (str(data.dtype).removeprefix("torch."), tuple(data.shape), value.requires_grad)
        return _restored, (len(self.tensors) - 1, *kind, isinstance(value, torch.nn.Parameter))


_open = threading.local()  # `tensors`: those of the network that is being unpacked


def _restored(number: int, dtype: str, shape: tuple[int, ...], learns: bool, parameter: bool) -> torch.Tensor:
    content = _open.tensors[number]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the memory is read-only; nobody writes there
        flat = torch.from_numpy(content) if len(content) else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(getattr(torch, dtype)).view(shape)
    return torch.nn.Parameter(tensor, requires_grad=learns) if parameter else tensor.requires_grad_(learns)


def packed(network: torch.nn.Module) -> Packed:
    """`network` as plain data for `ray.put`."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(network)
    return Packed(file.getvalue(), pickler.tensors)


def unpacked(given: Packed) -> torch.nn.Module:
    """The network, whose tensors are views of `given`: read-only memory where Ray mapped it."""
    _open.tensors = [np.asarray(content) for content in given.tensors]
    try:
        network: torch.nn.Module = pickle.loads(given.outline)
    finally:
        del _open.tensors
    return network


def own_trainable(network: torch.nn.Module) -> None:
    """Copies what learns and all buffers, so that they can be written."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
    for buffer in network.buffers():
        buffer.data = buffer.data.clone()


@dataclass(frozen=True)
class Warm:
    """The network that `task` has loaded from `base` for rows with these `facts`; `reference` is Ray's, to its Packed
    form."""

    base: Pretrained
    task: Task
    facts: dict[str, Any]
    reference: Any

    def load(self, base: Pretrained, task: Task, facts: dict[str, Any]) -> torch.nn.Module | None:
        """The network that `task` would load; None where one of the three differs: it has to be loaded as always."""
        if (base, task, facts) != (self.base, self.task, self.facts):
            return None
        import ray

        return unpacked(ray.get(self.reference))
