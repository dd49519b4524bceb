"""The loss scale of a step that is taken on the CPU, whatever device the scale is on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rayft.training import loss_scale
from rayft.training.loss_scale import StepScaler

SCALE = 1024.0


def scaler() -> StepScaler:
    made = torch.amp.GradScaler("cpu", init_scale=SCALE)
    made.scale(torch.zeros(()))  # only then it has its tensors
    return StepScaler(made)


def offloaded() -> tuple[torch.Tensor, Any]:
    """A float32 master on the CPU whose gradient still carries the scale, and its optimizer."""
    master = torch.arange(8.0).requires_grad_()
    master.grad = SCALE * torch.linspace(-1, 1, 8)
    return master, torch.optim.AdamW([master], lr=0.1, fused=True)


def test_masters_on_the_cpu_are_stepped_without_the_tensors_of_the_scaler() -> None:
    """On a GPU these would be copied here without anybody waiting for it."""
    handed: list[bool] = []
    master, optimizer = offloaded()
    optimizer.register_step_pre_hook(lambda inner, *_: handed.append(hasattr(inner, "grad_scale")))
    plain, expected = offloaded()
    assert plain.grad is not None
    plain.grad /= SCALE
    expected.step()
    own = scaler()
    own.step(optimizer)
    own.update()
    assert handed == [False]
    assert torch.equal(master, plain)
    assert torch.equal(optimizer.state[master]["exp_avg"], expected.state[plain]["exp_avg"])
    assert own.get_scale() == SCALE


def test_a_step_that_overflowed_elsewhere_leaves_masters_on_the_cpu_alone() -> None:
    master, optimizer = offloaded()
    own = scaler()
    own.overflowed = True
    own.step(optimizer)
    assert torch.equal(master.detach(), torch.arange(8.0))
    assert not optimizer.state[master]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_an_overflow_on_its_way_to_the_cpu_is_waited_for(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    master, _ = offloaded()

    def arrives(_: torch.device) -> None:
        assert master.grad is not None
        master.grad[3] = math.inf

    monkeypatch.setattr(torch.cpu, "synchronize", arrives)
    own = scaler()
    optimizer = SimpleNamespace(
        averaged_gradients={}, single_partition_of_fp32_groups=[master], torch_autocast_gradscaler=own
    )
    loss_scale.before_step(SimpleNamespace(optimizer=optimizer), 1.0)
    assert own.overflowed
