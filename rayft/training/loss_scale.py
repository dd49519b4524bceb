"""The loss scale of float16 mixed precision: the same for a whole step, on every rank.

DeepSpeed's sharded optimizers (ZeRO 1 to 3) step one group of parameters after another, each rank its own part, and ask
their scaler after each whether gradients overflowed. A group, or a rank, would then be left out alone, and the others
step with another scale than they were computed with. They also clip what still carries the scale.
"""

from __future__ import annotations

import math
from typing import Any

import torch


class StepScaler:
    """A GradScaler (PyTorch's) that judges once a step, by `settle`; all else is the scaler's."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler
        self.overflowed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scaler, name)

    def step(self, optimizer: Any) -> None:
        """Steps a group of parameters, unless gradients overflowed in this step.

        What lies on the CPU is divided here. The scaler would copy its scale from the GPU without waiting for the copy,
        and the optimizer's step on the CPU would read whatever was there before.
        """
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if any(gradient.device.type != "cpu" for gradient in gradients):
            self._scaler.step(optimizer)
        elif not self.overflowed:
            scale = self._scaler.get_scale()
            for gradient in gradients:
                gradient.div_(scale)
            optimizer.step()

    def update(self) -> None:
        """After a group: the scaler forgets the group and keeps the scale."""
        self._scaler.update(self._scaler.get_scale())

    def settle(self) -> None:
        """After a step: halves the scale where gradients overflowed, doubles it after many steps where none did."""
        scaler = self._scaler
        found = torch.full((), float(self.overflowed), dtype=torch.float32, device=scaler._scale.device)
        growth = (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval())
        torch._amp_update_scale_(scaler._scale, scaler._growth_tracker, found, *growth)


def gradient_scaler(engine: Any) -> Any:
    """The gradient scaler of float16 mixed precision, or None."""
    own = getattr(engine, "torch_autocast_z0_gradscaler", None)
    return own or getattr(engine.optimizer, "torch_autocast_gradscaler", None)


def install(engine: Any) -> None:
    """Has a sharded optimizer ask a StepScaler; one that is not sharded steps once anyway."""
    if engine.zero_optimization_stage() > 0 and (scaler := gradient_scaler(engine)) is not None:
        engine.optimizer.torch_autocast_gradscaler = StepScaler(scaler)


def before_step(engine: Any, max_norm: float) -> None:
    """Has a sharded optimizer clip to `max_norm` what is still multiplied by the scale, or leave out the step whole."""
    scaler = gradient_scaler(engine)
    if not isinstance(scaler, StepScaler):
        return
    device = scaler._scale.device
    held = [gradient for group in engine.optimizer.averaged_gradients.values() for gradient in group or ()]
    offloaded = [flat.grad for flat in _masters(engine.optimizer) if flat.grad is not None]
    if offloaded:
        torch.get_device_module(device).synchronize(device)  # they may still be on their way from it
    held += offloaded
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in held)
    overflows = torch.tensor(float(not finite), device=device)
    torch.distributed.all_reduce(overflows, op=torch.distributed.ReduceOp.MAX)
    scaler.overflowed = bool(overflows)
    if scaler.overflowed:
        for gradient in held:
            gradient.fill_(math.inf)
    engine.optimizer.clip_grad = max_norm * scaler.get_scale()


def after_step(engine: Any) -> None:
    scaler = gradient_scaler(engine)
    if isinstance(scaler, StepScaler):
        scaler.settle()


def _masters(optimizer: Any) -> list[Any]:
    """The float32 tensors that the inner optimizer steps."""
    sharded: list[Any] = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.__dict__.get(
        "single_partition_of_fp32_groups", []
    )
    return list(sharded)
