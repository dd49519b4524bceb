"""BatchNorm that takes its statistics from groups of rows which stay together, however a global batch is cut.

In training each group is normalised by its own mean and variance, as in the "ghost" batches of Hoffer et al. 2017. So
neither the number of workers nor that of micro-batches changes what becomes of a row, and layers send nothing. Running
statistics, which evaluation uses, follow once per step: what is new in them is the mean over the global batch's groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from rayft.training.engine import sum_over_ranks


class _Grouped:
    """Stands in for the `forward` of one BatchNorm and does the same for each group of `rows` rows by itself.

    `seen` is (3, channels): mean and variance of the step's groups, each times its rows, summed; and the rows. Of a
    micro-batch the first pass counts alone: gradient checkpointing passes it again, not always to its end.
    """

    def __init__(self, module: Any, rows: int) -> None:
        self.module, self.rows = module, rows
        self._plain: Callable[[torch.Tensor], torch.Tensor] = module.forward
        self.seen = torch.zeros((3, module.num_features))
        self.size, self.first = 1, True

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if not self.module.training:
            return self._plain(states)
        parts = len(states) // self.size  # of a row: its views or frames, say
        groups = states.split(self.rows * parts)
        given = [self._normalised(group, len(group) // parts) for group in groups]
        self.first = False
        return given[0] if len(given) == 1 else torch.cat(given)

    def _normalised(self, group: torch.Tensor, rows: int) -> torch.Tensor:
        """A group by its own statistics. A row that is alone has none to speak of: it gets the running ones."""
        if rows == 1:
            with _running(self.module):
                return self._plain(group)
        with _own(self.module) as (mean, variance):
            given = self._plain(group)
        if self.first:
            self.seen = self.seen.to(mean.device) + rows * torch.stack([mean, variance, torch.ones_like(mean)])
        return given


@contextmanager
def _running(module: Any) -> Iterator[None]:
    """Inside, the module normalises by its running statistics."""
    module.training = False
    try:
        yield
    finally:
        module.training = True


@contextmanager
def _own(module: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inside, the module leaves its running statistics alone and writes what it sees, mean and variance, to these."""
    kept = module.running_mean, module.running_var, module.num_batches_tracked, module.momentum
    found = torch.zeros_like(module.running_mean), torch.zeros_like(module.running_var)
    module.running_mean, module.running_var = found
    module.num_batches_tracked, module.momentum = None, 1.0
    try:
        yield found
    finally:
        module.running_mean, module.running_var, module.num_batches_tracked, module.momentum = kept


def learning(network: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The BatchNorms in training mode, by name; those without running statistics always take the batch's."""
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            yield name, module


class BatchNorms:
    """The BatchNorms of a network that take their statistics from groups of `rows`; none where that is None."""

    def __init__(self, network: torch.nn.Module, rows: int | None) -> None:
        """They are those in training mode now."""
        self._grouped: dict[str, _Grouped] = {}
        if rows is not None:
            for name, module in learning(network):
                self._grouped[name] = module.forward = _Grouped(module, rows)

    def at(self, rows: int) -> None:
        """The next forward pass is over another micro-batch of the step, of so many rows."""
        for one in self._grouped.values():
            one.size, one.first = rows, True

    def follow(self) -> None:
        """After a step's last pass: running statistics take in its groups, the same on every rank; collective."""
        if not self._grouped:
            return
        seen = [one.seen.to(one.module.running_mean.device) for one in self._grouped.values()]
        shared = torch.cat([part.view(-1) for part in seen])
        sum_over_ranks(shared)
        for one, part in zip(self._grouped.values(), shared.split([part.numel() for part in seen]), strict=True):
            one.seen.zero_()
            mean, variance, rows = part.view(3, -1)
            if rows[0] > 0:
                _follow(one.module, mean / rows, variance / rows)

    def statistics(self) -> dict[str, torch.Tensor]:
        """Buffers that training changes, by name."""
        return {
            f"{name}.{buffer}": value
            for name, one in self._grouped.items()
            for buffer, value in one.module.named_buffers(recurse=False)
        }


def _follow(module: Any, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """What a plain BatchNorm does after a batch with these statistics."""
    module.num_batches_tracked += 1
    share = module.momentum if module.momentum is not None else 1.0 / float(module.num_batches_tracked)
    for kept, new in ((module.running_mean, mean), (module.running_var, variance)):
        kept.lerp_(new.to(kept.dtype), share)
