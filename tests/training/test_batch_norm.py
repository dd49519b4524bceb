"""BatchNorm with statistics of groups: against torch's own on each group, and what follows a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from group import run_group
from rayft.training.batch_norm import BatchNorms

ROWS = 4


def network(kind: type = torch.nn.BatchNorm2d, **options: Any) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 5, 3), kind(5, **options), torch.nn.ReLU(), torch.nn.Conv2d(5, 4, 3), kind(4)]
    return torch.nn.Sequential(*layers).train()


def pictures(count: int) -> torch.Tensor:
    return torch.randn((count, 3, 9, 9), generator=torch.Generator().manual_seed(1))


class Activated(torch.nn.BatchNorm2d):
    """One that does more than its kind, as those of timm do."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states).tanh()


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm2d, Activated])
@pytest.mark.parametrize("count", [3, 4, 8, 10])
def test_each_group_is_normalised_as_if_it_were_alone(kind: type, count: int) -> None:
    plain, grouped = network(kind), network(kind)
    rows, before = pictures(count), copy.deepcopy(grouped.state_dict())
    norms = BatchNorms(grouped, ROWS)
    norms.at(count)
    given = grouped(rows)
    wanted = torch.cat([plain(group) for group in rows.split(ROWS)])
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-6)
    given.square().sum().backward()
    wanted.square().sum().backward()
    for one, other in zip(grouped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    for name, value in grouped.state_dict().items():
        assert torch.equal(value, before[name]), name  # until the step is done


def test_a_row_that_is_alone_gets_the_running_statistics() -> None:
    given, plain = network(), network()
    rows = pictures(2 * ROWS + 1)
    norms = BatchNorms(given, ROWS)
    norms.at(len(rows))
    found = given(rows)
    torch.testing.assert_close(found[-1:], plain.eval()(rows[-1:]), rtol=0, atol=1e-6)


def test_evaluation_is_as_it_was() -> None:
    given, plain = network(), network().eval()
    norms = BatchNorms(given, ROWS)
    rows = pictures(7)
    assert torch.equal(given.eval()(rows), plain(rows))
    assert set(norms.statistics()) == {
        f"{place}.{name}" for place in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_only_those_that_learn_take_part() -> None:
    given = network()
    given[1].eval()
    assert {name.partition(".")[0] for name in BatchNorms(given, ROWS).statistics()} == {"4"}
    assert not BatchNorms(network(), None).statistics()


Case = tuple[list[int], float | None, bool]


def followed(cases: list[Case]) -> list[tuple[dict[str, Any], Any]]:
    """On a worker: the statistics after two steps and the first layer's gradient, for each of the cases.

    A case has the rows of a step's micro-batches, dealt to the ranks; the momentum; and whether states are recomputed.
    """
    import torch.distributed as dist

    rank, world, results = dist.get_rank(), dist.get_world_size(), []
    for cut, momentum, again in cases:
        given = network(momentum=momentum)
        norms = BatchNorms(given, ROWS)
        for _ in range(2):
            for micro, rows in enumerate(pictures(sum(cut)).split(cut)):
                if micro % world != rank:
                    continue
                norms.at(len(rows))
                states = checkpoint(given, rows, use_reentrant=False) if again else given(rows)
                states.square().sum().backward()
            norms.follow()
        gradient = given[0].weight.grad
        dist.all_reduce(gradient)
        results.append(({name: value.tolist() for name, value in norms.statistics().items()}, gradient.tolist()))
    return results


def test_statistics_and_gradients_are_the_same_however_the_batch_is_cut() -> None:
    """Sixteen rows and one more, in groups of four, on one and on two workers; recomputed in the backward pass too."""
    cuts = ([17], [8, 9], [4, 4, 4, 5])
    cases = [(cut, momentum, again) for momentum in (0.1, None) for cut in cuts for again in (False, True)]
    alone = run_group(followed, 1, cases)[0]
    shared = [case for case in cases if len(case[0]) > 1]
    both = run_group(followed, 2, shared)
    # Each step's new part is the mean over the four whole groups, as torch finds it in each.
    states = [network()[0](group) for group in pictures(17)[:16].split(ROWS)]
    mean, variance = (torch.stack([kind(state) for state in states]).mean(0) for kind in (_mean, _variance))
    for (_, momentum, _), (statistics, gradient) in zip(
        [*cases, *shared, *shared], [*alone, *both[0], *both[1]], strict=True
    ):
        first, gradients = alone[0 if momentum else len(cases) // 2]
        for name, value in statistics.items():
            assert value == pytest.approx(first[name], rel=1e-5, abs=1e-6), name
        torch.testing.assert_close(torch.tensor(gradient), torch.tensor(gradients), rtol=1e-4, atol=1e-4)
        assert (first["1.num_batches_tracked"], first["4.num_batches_tracked"]) == (2, 2)
        for name, begin, new in (("mean", torch.zeros(5), mean), ("var", torch.ones(5), variance)):
            kept = begin.lerp(new, 0.1).lerp(new, 0.1) if momentum else new
            assert first[f"1.running_{name}"] == pytest.approx(kept.tolist(), rel=1e-5, abs=1e-6)


def _mean(states: torch.Tensor) -> torch.Tensor:
    return states.mean((0, 2, 3))


def _variance(states: torch.Tensor) -> torch.Tensor:
    return states.var((0, 2, 3))
