"""What stands in for the first blocks of a network: given their output, they pass it on instead of computing it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rayft.tasks.stacked import Blocks
from rayft.training.states import States


class Prefix:
    """The first `depth` blocks of a network, which they stand in for from now on. `rows_served` counts what was saved.

    Until `serve` is given states, and whenever it gets none, the blocks compute as they did. `first`: what they give is
    the first token's state alone.
    """

    def __init__(self, network: Any, blocks: Blocks, depth: int, first: bool = False) -> None:
        """Of a model with an encoder and a decoder, the encoder's blocks at most: a decoder's take what both give.

        `first`: the last block of the network gives the first token's state alone (`first_token.py`).
        """
        self.depth = depth = blocks.chained(depth)
        self.first = first and depth == len(blocks.blocks)
        self.stores: dict[str, States] = {}
        self.rows_served = 0
        self._shared = _Shared()
        self.blocks: list[_Block] = []
        for number, name in enumerate(blocks.blocks[:depth]):
            holder, _, last = name.rpartition(".")
            parent = network.get_submodule(holder)
            block = _Block(parent.get_submodule(last), self._shared, first=number == 0)
            parent._modules[last] = block
            self.blocks.append(block)

    def serve(self, split: str, rows: Sequence[int], device: torch.device) -> None:
        """The next forward passes get the states of these rows of `split`; without rows, or stored ones, the blocks
        compute."""
        store = self.stores.get(split)
        if store is None or not rows:
            self._shared.states = None
            return
        self._shared.ragged = store.ragged
        # From pinned memory, as a batch: nobody waits for the copy to a GPU.
        self._shared.states = store.rows(rows, pinned=device.type == "cuda").to(device, non_blocking=True)
        self.rows_served += len(rows)

    @property
    def saved_s(self) -> float:
        """Seconds of computing that stored states have saved, at the pace at which they were computed."""
        return self.rows_served * max((store.seconds_per_row for store in self.stores.values()), default=0.0)

    def offer(self, states: torch.Tensor | None) -> None:
        """The next forward passes get `states` as they are; None: the blocks compute again."""
        self._shared.ragged, self._shared.states = False, states

    @property
    def first_computes(self) -> bool:
        """Do blocks hand on tensors beside the states? The first block's are computed anew for each batch."""
        return any(any(block.others or ()) for block in self.blocks)


@dataclass
class _Shared:
    """What the stand-ins of one network have in common: the states to give, on the model's device.

    `handed` is what the first block handed on beside its states in this forward pass (T5's position bias).
    """

    states: torch.Tensor | None = None
    ragged: bool = False
    handed: tuple[Any, ...] = ()


class _Block(torch.nn.Module):
    """Stands in for `block`, and answers for it where the model asks for its attributes.

    Where the block gave a tuple when it last computed, `others` says for each member behind the states whether it was
    something or None; something is what the first block hands on. Whether a model bears that, a trial has to show.
    """

    def __init__(self, block: torch.nn.Module, shared: _Shared, first: bool) -> None:
        super().__init__()
        self.block = block
        self.others: tuple[bool, ...] | None = None
        self._prefix, self._first = shared, first

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shared = self._prefix
        if shared.states is None:
            output = self.block(*args, **kwargs)
            several = isinstance(output, tuple)
            self.others = tuple(value is not None for value in output[1:]) if several else None
            return output
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._first:
            shared.handed = ()
            if any(self.others or ()):
                shared.handed = self.block(*args, **kwargs)[1:]
            hidden = _fitted(shared.states, hidden) if shared.ragged else shared.states
        if self.others is None:
            return hidden
        handed = dict(enumerate(shared.handed))
        return (hidden, *(handed.get(place) if something else None for place, something in enumerate(self.others)))


def _fitted(states: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """`states` with as many positions as the batch has, where rows' states end with their last token."""
    missing = hidden.shape[1] - states.shape[1]
    if missing <= 0:
        return states[:, : hidden.shape[1]]
    filling = states.new_zeros((states.shape[0], missing, *states.shape[2:]))
    return torch.cat([states, filling], dim=1)


class Enough(Exception):  # no error: ends a forward pass
    """All that is to be caught has been."""


@contextmanager
def captured(
    network: Any, blocks: Blocks, depths: Sequence[int], ending: bool = False, at: dict[int, float] | None = None
) -> Iterator[dict[int, Any]]:
    """While open, a forward pass leaves in the dict the states that the last block below each depth gives, by depth.

    `at` gets when that was (seconds of time.perf_counter), by depth. With `ending` the pass goes no further.
    """
    caught: dict[int, Any] = {}
    hooks = []
    deepest = max(depths, default=0)
    for depth in depths:

        def keep(_: Any, __: Any, output: Any, depth: int = depth) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor) and output.is_cuda:
                torch.cuda.synchronize()
            caught[depth] = output
            if at is not None:
                at[depth] = time.perf_counter()
            if ending and depth == deepest:
                raise Enough

        hooks.append(network.get_submodule(blocks.blocks[depth - 1]).register_forward_hook(keep))
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()
