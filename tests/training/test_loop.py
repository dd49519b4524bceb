"""What one optimizer step does must not depend on how its global batch is cut, nor on the sharding."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from group import run_group
from rayft.recipe import Every, Recipe, Train
from rayft.training import loop
from rayft.training.evaluate import to_device
from rayft.training.loop import source_rows
from rayft.training.schedule import due, learning_rate, total_steps

STEPS = 20
BATCH = 22  # divides by none of the worker counts but 1 and 2
CLASSES = {"labels": ["LABEL_0", "LABEL_1", "LABEL_2"]}  # the model's
GROUPED = {"type": "sentence-embedding", "negative": "negative", "group_size": 4, "max_length": 32}


def recipe(**fields: Any) -> Recipe:
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in fields.items()]
    plain = {
        "name": "cut",
        "task": {"type": "text-classification", "max_length": 32},
        "model": {"path": "unused", "dropout": 0.0},
        "data": {"train": "unused.csv"},
        "train": {"max_steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 16, "learning_rate": 1e-3},
    }
    return Recipe.parse(plain, overrides=overrides)


def rows() -> list[list[dict[str, Any]]]:
    """Global batches of unequal rows; the last has two rows, fewer than there may be ranks."""
    rng = np.random.default_rng(1)
    batches = []
    for step in range(STEPS):
        size = 2 if step == STEPS - 1 else BATCH
        row = lambda: {"input_ids": rng.integers(1, 100, rng.integers(3, 30)).tolist(), "label": int(rng.integers(3))}  # noqa: E731
        batches.append([row() for _ in range(size)])
    return batches


def coupled_rows() -> list[list[dict[str, Any]]]:
    """Global batches whose rows know of each other in fours, some of them with equal texts; the last has two rows."""
    rng = np.random.default_rng(2)
    texts = [rng.integers(1, 100, rng.integers(3, 30)).tolist() for _ in range(60)]
    batches = []
    for step in range(STEPS):
        chosen = rng.integers(0, len(texts), (2 if step == STEPS - 1 else BATCH, 3))
        roles = ("anchor", "positive", "negative")
        batches.append(
            [{**{r: texts[i] for r, i in zip(roles, row, strict=True)}, "keys": row} for row in chosen.tolist()]
        )
    return batches


class Processor:
    """What the task's collate asks of a tokenizer."""

    pad_token_id = 0
    padding_side = "right"


def shares_of(batches: list[list[dict[str, Any]]], rank: int, world: int, micro: int, group: int = 1) -> Any:
    from rayft.data.order import micro_batches, share
    from rayft.data.window import Share

    for step, batch in enumerate(batches):
        table = pa.Table.from_pylist(
            [
                {**row, "row_id": i, "position": i, "length": len(next(iter(row.values())))}
                for i, row in enumerate(batch)
            ]
        )
        own = table.take(share(len(batch), world, rank, group))
        cuts = micro_batches(len(batch), world, rank, micro, group)
        parts = [own.slice(cut.start, cut.stop - cut.start) for cut in cuts]
        yield Share(0, step, own, len(batch), parts, table.slice(0, 1))


Seen = list[tuple[list[float], list[float]]]


def all_losses(folder: str, jobs: list[tuple[dict[str, Any], list[tuple[int, int]]]]) -> list[Seen]:
    """On a worker: `losses` of each recipe with its cases."""
    return [losses(folder, plain, cases) for plain, cases in jobs]


def losses(folder: str, plain: dict[str, Any], cases: list[tuple[int, int]]) -> Seen:
    """On a worker: for each (stage, micro-batch size), the losses of all steps and the sums of the final weights."""
    import torch.distributed as dist

    from rayft.recipe import Recipe
    from rayft.tasks.task import Blocks, Pretrained
    from rayft.training import engine, freeze
    from rayft.training.batch_norm import BatchNorms
    from rayft.training.laps import Laps
    from rayft.training.loop import Job, steps
    from rayft.training.saver import Saver
    from rayft.training.watch import Watch

    results = []
    for stage, micro in cases:
        base = Recipe.parse({**plain, "train": {**plain["train"], "micro_batch_size": micro}})
        config = engine.deepspeed_config(base, stage)
        sharded = None
        if stage == 3:
            from transformers.integrations import HfDeepSpeedConfig

            sharded = HfDeepSpeedConfig(config)
        network = base.task.load(Pretrained(folder, dropout=0.0), CLASSES, Processor())
        blocks = base.task.blocks(network)
        learning = freeze.freeze(network, base.model, blocks)
        groups = freeze.parameter_groups(network, learning, len(blocks.blocks), base.train)
        built = engine.build(network, groups, config)
        freeze.train_mode(built.module, blocks)
        job = Job(
            recipe=base,
            task=base.task,
            engine=built,
            processor=Processor(),
            facts=CLASSES,
            prepared={},
            steps_per_epoch=STEPS,
            total_steps=STEPS,
            device=torch.device("cpu"),
            run="unused",
            attempt=1,
            emit=lambda event: None,
            metrics=None,
            saver=Saver("unused", 1, 1, 60, None, lambda step: None),
            watch=Watch(None, dist.get_rank()),
            blocks=Blocks((), ()),
            prefix=None,
            norms=BatchNorms(built.module, None),
            laps=Laps(),
        )
        group = base.task.coupled()
        batches = rows() if group == 1 else coupled_rows()
        shares = shares_of(batches, dist.get_rank(), dist.get_world_size(), micro, group)
        seen = [step.loss for step in steps(job, shares)]
        sums = torch.zeros(2, dtype=torch.float64)
        for piece in engine.pieces(built):
            sums += torch.stack([piece.master.double().sum(), piece.master.double().abs().sum()]).detach()
        if stage > 0:
            dist.all_reduce(sums)
        results.append((seen, sums.tolist()))
        engine.destroy(built)
        del sharded
    return results


def plain_loop(folder: str, learns: Callable[[str, int], bool] = lambda name, step: True) -> list[float]:
    """The same steps by torch alone: one process, one batch, mean loss.

    `learns` says of a parameter whether it does yet.
    """
    from transformers import BertForSequenceClassification

    network = BertForSequenceClassification.from_pretrained(
        folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )

    def loss_of(batch: list[dict[str, Any]]) -> torch.Tensor:
        ids, mask = padded([row["input_ids"] for row in batch])
        return network(input_ids=ids, attention_mask=mask, labels=torch.tensor([row["label"] for row in batch])).loss

    return plain_steps(network, rows(), loss_of, learns)


def plain_coupled_loop(folder: str) -> list[float]:
    """The same with in-batch negatives, row by row: the texts of a row's group, but for those that are no negatives."""
    from transformers import BertModel

    network = BertModel.from_pretrained(
        folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, add_pooling_layer=False
    )

    def vectors(texts: list[list[int]]) -> torch.Tensor:
        ids, mask = padded(texts)
        states = network(input_ids=ids, attention_mask=mask).last_hidden_state
        means = torch.stack([row[:length].mean(dim=0) for row, length in zip(states, map(len, texts), strict=True)])
        return means / means.norm(dim=1, keepdim=True)

    def loss_of(batch: list[dict[str, Any]]) -> torch.Tensor:
        found = {role: vectors([row[role] for row in batch]) for role in ("anchor", "positive", "negative")}
        total = torch.zeros(())
        for number, row in enumerate(batch):
            group = range(number // 4 * 4, min(len(batch), number // 4 * 4 + 4))
            anchor = row["keys"][0]
            right = {batch[other]["keys"][1] for other in group if batch[other]["keys"][0] == anchor}
            wrong = [
                found[role][other]
                for other in group
                for place, role in ((1, "positive"), (2, "negative"))
                if batch[other]["keys"][place] not in {anchor, *right}
            ]
            close = 20 * torch.stack([found["positive"][number], *wrong]) @ found["anchor"][number]
            total = total - close.log_softmax(dim=0)[0]
        return total / len(batch)

    return plain_steps(network, coupled_rows(), loss_of)


def padded(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    return ids, torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])


def plain_steps(
    network: Any,
    batches: list[list[dict[str, Any]]],
    loss_of: Callable[[list[dict[str, Any]]], torch.Tensor],
    learns: Callable[[str, int], bool] = lambda name, step: True,
) -> list[float]:
    decayed = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    found = []
    for number, batch in enumerate(batches):
        loss = loss_of(batch)
        loss.backward()
        for name, parameter in network.named_parameters():
            if not learns(name, number):
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - number / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_losses_are_the_same_however_the_batch_is_cut(bert: str, world: int) -> None:
    cases = [(0, 16), (0, 4), (1, 8), (1, 4), (2, 16), (2, 4), (2, 8), (3, 4), (3, 16), (3, 1)]
    coupled = [(0, 16), (0, 4), (2, 8), (3, 4)]
    jobs = [(recipe().dump(), cases), (recipe(task=GROUPED, train__global_batch_size=24).dump(), coupled)]
    references = [plain_loop(bert), plain_coupled_loop(bert)]
    for ranks in run_group(all_losses, world, bert, jobs):
        for (_, tried), seen, reference in zip(jobs, ranks, references, strict=True):
            for case, (found, sums) in zip(tried, seen, strict=True):
                assert found == pytest.approx(reference, rel=1e-5), case
                assert sums == pytest.approx(seen[0][1], rel=1e-5), case


def test_a_device_holds_one_micro_batch_at_a_time_and_reads_nothing_back_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However large a share is; and host and device work side by side until the step's loss is read."""
    events: list[str] = []
    plain = recipe()
    device = torch.device("meta")  # what is read from it fails

    def moved(batch: dict[str, Any], to: torch.device) -> dict[str, Any]:
        events.append("moved")
        return to_device(batch, to)

    def forward(_: Any, batch: dict[str, Any]) -> torch.Tensor:
        events.append(f"passed, on {batch['input_ids'].device.type}")
        return batch["input_ids"].float()

    monkeypatch.setattr(loop, "to_device", moved)
    monkeypatch.setattr(loop, "sum_over_ranks", lambda total: events.append(f"summed, in {total.dtype}"))
    monkeypatch.setattr(loop, "float", lambda total: events.append(f"read, from {total.device.type}"), raising=False)
    silent = SimpleNamespace(at=lambda *_: None, to=lambda *_: None)
    task: Any = SimpleNamespace(collate=plain.task.collate, forward=forward, loss=lambda outputs, *_: outputs.sum())
    engine = SimpleNamespace(
        set_gradient_accumulation_boundary=lambda last: None, backward=lambda loss, scale_wrt_gas: None
    )
    job: Any = SimpleNamespace(
        recipe=plain, task=task, engine=engine, processor=Processor(), facts=CLASSES, device=device, watch=silent,
        norms=silent, laps=silent, serve=lambda split, rows: None,
    )  # fmt: skip
    (share, *_) = shares_of(rows(), 0, 1, 8)
    batches = [loop._micro(job, table, True) for table in share.micro]
    assert {value.device.type for micro in batches for value in micro.batch.values()} == {"cpu"}
    loop._accumulate(job, batches, 1.0)
    assert events == ["moved", "passed, on meta"] * 3 + ["summed, in torch.float64", "read, from meta"]


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    train = Train(epochs=1, learning_rate=1.0, warmup=2, schedule="linear")
    assert [learning_rate(train, step, 6) for step in range(6)] == pytest.approx([0, 0.5, 1.0, 0.75, 0.5, 0.25])
    cosine = Train(epochs=1, learning_rate=1.0, warmup=0.5, schedule="cosine")
    assert [learning_rate(cosine, step, 4) for step in range(4)] == pytest.approx([0, 0.5, 1.0, 0.5])
    assert learning_rate(Train(epochs=1, learning_rate=0.3, schedule="constant"), 99, 100) == 0.3


@pytest.mark.parametrize(
    ("every", "steps_per_epoch", "expected"),
    [
        (Every(count=1, unit="epoch"), 4, [4, 8]),
        (Every(count=0.5, unit="epoch"), 4, [2, 4, 6, 8, 10]),
        (Every(count=0.5, unit="epoch"), 5, [3, 5, 8, 10]),
        (Every(count=3, unit="steps"), 4, [3, 6, 9]),
        (Every(count=1, unit="minutes"), 4, []),
    ],
)
def test_intervals_end_where_they_should(every: Every, steps_per_epoch: int, expected: list[int]) -> None:
    assert [step for step in range(1, 11) if due(every, step, steps_per_epoch)] == expected


def test_a_packed_row_counts_each_text_once_however_many_of_its_windows_it_holds() -> None:
    assert source_rows(pa.table({"row_id": [4, 4, 5]})) == 3
    assert source_rows(pa.table({"row_id": [4, 5], "row_ids": [[4, 7, 4, 4], [5]]})) == 3


def test_the_run_ends_at_whichever_comes_first() -> None:
    assert total_steps(Train(epochs=2), 10) == 20
    assert total_steps(Train(epochs=2, max_steps=7), 10) == 7
    assert math.isclose(total_steps(Train(max_steps=70), 10), 70)
