"""Dropout on a CPU keeps each element with its chance, as torch's seed says, whatever the tensor."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from rayft.training.dropout import bernoulli_


@pytest.mark.parametrize("p", [0.9, 0.5, 0.1, 0.001])
def test_elements_are_kept_with_their_chance_and_independently(p: float) -> None:
    torch.manual_seed(0)
    kept = bernoulli_(torch.empty(1000, 1003), p)
    count = kept.numel()
    room = 5 * math.sqrt(p * (1 - p) / count)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert kept.mean().item() == pytest.approx(p, abs=room)
    # Neither neighbours nor elements that share 64 bits or a row know of each other.
    flat = kept.reshape(-1) - p
    for distance in (1, 2, 3, 4, 1003):
        assert (flat[:-distance] * flat[distance:]).mean().item() == pytest.approx(0.0, abs=5 * p * (1 - p) / 1000)
    assert kept.mean(dim=0).var().item() == pytest.approx(p * (1 - p) / 1000, rel=0.3)


def test_the_seed_of_torch_says_what_is_drawn() -> None:
    torch.manual_seed(3)
    first, second = bernoulli_(torch.empty(500), 0.5), bernoulli_(torch.empty(500), 0.5)
    torch.manual_seed(3)
    assert torch.equal(bernoulli_(torch.empty(500), 0.5), first)
    assert not torch.equal(first, second)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(bernoulli_(torch.empty(500), 0.5, generator=generator), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_tensor_is_filled(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = torch.full((64, 32), 7.0, dtype=dtype)
    bernoulli_(whole.t()[:16], 0.5)  # not contiguous
    assert set(whole[:, :16].unique().tolist()) == {0.0, 1.0}
    assert set(whole[:, 16:].unique().tolist()) == {7.0}
    assert bernoulli_(torch.empty(9, dtype=dtype), 0.0).sum() == 0
    assert bernoulli_(torch.empty(9, dtype=dtype), 1.0).sum() == 9
    assert bernoulli_(torch.empty(0, dtype=dtype), 0.5).numel() == 0


# In a process of its own: torch's operation is replaced for good.
INSTALLED = """
import torch
from rayft.training import dropout
torch.manual_seed(0)
plain = torch.nn.functional.dropout(torch.ones(4000), 0.1)
dropout.install()
dropout.install()
torch.manual_seed(0)
given = torch.ones(4000, requires_grad=True)
found = torch.nn.functional.dropout(given, 0.1)
found.sum().backward()
torch.manual_seed(0)
assert torch.equal(torch.nn.functional.dropout(torch.ones(4000), 0.1), found)
torch.manual_seed(0)
assert torch.equal(dropout.bernoulli_(torch.empty(4000), 0.9) / 0.9, found)
assert not torch.equal(found, plain)
assert torch.equal(given.grad, found)
query = torch.ones(2, 4, 8, 16)
torch.manual_seed(0)
attended = torch.nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.5)
assert attended.std() > 0.1
assert torch.equal(torch.nn.functional.dropout(torch.ones(8), 0.5, training=False), torch.ones(8))
"""


def test_installed_it_is_what_every_dropout_draws_and_gradients_follow() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", INSTALLED], check=True, timeout=120)
