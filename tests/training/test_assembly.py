"""A network that is made ready for an engine: what is frozen stays so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayft.fields.sections import Lora
from rayft.training import freeze
from rayft.training.assembly import checkpoint_activations
from test_freeze import MODELS

DEPTH = 2


def network_and_last_frozen(kind: str, adapters: bool) -> tuple[Any, torch.nn.Module]:
    """A network whose embeddings and first blocks are frozen, and the last of these blocks."""
    torch.manual_seed(0)
    network, blocks = MODELS[kind][0](), MODELS[kind][1]
    last = network.get_submodule(f"{blocks}.{DEPTH - 1}")
    network.requires_grad_(False)
    if adapters:
        below = [f"{blocks}.{number}" for number in range(DEPTH)]
        network = freeze.adapt(network, Lora(r=2), (), 0, below)
    else:
        network.get_submodule(f"{blocks}.{DEPTH}").requires_grad_()
    return network.train(), last


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_no_backward_pass_goes_through_frozen_blocks_where_activations_are_computed_again(
    kind: str, adapters: bool
) -> None:
    needs: list[bool] = []

    def learned(again: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        network, last = network_and_last_frozen(kind, adapters)
        if again:
            checkpoint_activations(network)
        last.register_forward_hook(lambda _, __, output: needs.append(output.requires_grad))
        torch.manual_seed(1)
        logits = network(input_ids=torch.arange(1, 13).view(2, 6)).logits
        logits.square().sum().backward()
        return logits, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    plain, gradients = learned(again=False)
    logits, found = learned(again=True)
    assert needs == [False, False]
    assert torch.equal(logits, plain)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
