"""What a worker takes for its own: the device that the recipe asks for, whatever its machine has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray.train.torch
import torch

from rayft.training import worker


def test_deepspeed_takes_the_gpu_that_ray_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than ten GPUs Ray lists "10" before "2", and counts the workers as numbers."""
    taken = []
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda:3"))
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "11")
    assert worker.own_device(gpu=True) == torch.device("cuda:3")
    assert taken == [torch.device("cuda:3")]
    assert os.environ["LOCAL_RANK"] == "3"


def test_a_worker_without_gpus_looks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail(f"{device} was taken"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert worker.own_device(gpu=False) == torch.device("cpu")
    assert os.environ["LOCAL_RANK"] == "1"


SEEN = """
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
from rayft.sweeps.trial import alone
alone(1, gpu=False)
from deepspeed.accelerator import get_accelerator
print(get_accelerator().device_name(), torch.distributed.get_backend())
"""


@pytest.mark.slow
def test_a_recipe_without_gpus_trains_on_the_cpu_of_a_machine_with_some() -> None:
    own = {**os.environ, "DS_ACCELERATOR": "cuda"}
    done = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, check=True, env=own)
    assert done.stdout.split() == ["cpu", "gloo"]
