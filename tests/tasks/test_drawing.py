"""Parameters that weights lack, drawn from the seed and their module's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayft.tasks.drawing import draw_parameters


class Network(torch.nn.Module):
    """Of one linear layer, as transformers initialises it; `initialised` are the tensors that were."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.initialised: list[torch.Tensor] = []

    def _init_weights(self, module: Any) -> None:
        for value in (module.weight, module.bias):
            self.initialised.append(value)
            torch.nn.init.normal_(value)


def test_parameters_are_drawn_beside_where_they_lie_so_that_every_device_has_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU draws other numbers. Its generator draws dropout, and is not seeded by the way."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator was seeded"))
    first, again, other = (Network() for _ in range(3))
    held = {network: dict(network.named_parameters()) for network in (first, again, other)}
    for network, seed in ((first, 1), (again, 1), (other, 2)):
        assert draw_parameters(network, ["layer.weight"], seed) == ("layer.weight",)
        assert {value.device.type for value in network.initialised} == {"cpu"}
        places = {value.data_ptr() for value in held[network].values()}
        assert not places & {value.data_ptr() for value in network.initialised}
        assert all(value is held[network][name] for name, value in network.named_parameters())
    assert torch.equal(first.layer.weight, again.layer.weight)
    assert not torch.equal(first.layer.weight, other.layer.weight)


def test_what_is_not_to_be_drawn_stays_and_the_generator_with_it() -> None:
    network = Network()
    bias, state = network.layer.bias.detach().clone(), torch.get_rng_state()
    draw_parameters(network, ["layer.weight", "gone.weight"], 1)
    assert torch.equal(network.layer.bias, bias)
    assert torch.equal(torch.get_rng_state(), state)


def test_of_an_outline_parameters_are_named_and_nothing_is_drawn() -> None:
    with torch.device("meta"):
        network = Network()
    assert draw_parameters(network, ["layer.weight"], 1) == ("layer.weight",)
    assert not network.initialised
