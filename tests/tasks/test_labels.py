"""Heads that answer for named labels: kept for the same names, in whatever order the model's folder holds them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DeiTConfig,
    DistilBertConfig,
    LevitConfig,
    SwiftFormerConfig,
    ViTConfig,
)

from rayft.tasks import find
from rayft.tasks.labels import index_of
from rayft.tasks.task import Pretrained
from speech_models import wav2vec2

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
NAMES = [f"label {letter}" for letter in "lkjihgfedcba"]  # twelve: as text, the ids 10 and 11 come before 2
KINDS = {
    "text-classification": (AutoModelForSequenceClassification, BertConfig(**SIZES, vocab_size=20)),
    "token-classification": (AutoModelForTokenClassification, BertConfig(**SIZES, vocab_size=20)),
    "image-classification": (AutoModelForImageClassification, ViTConfig(**SIZES, image_size=16, patch_size=8)),
    "audio-classification": (AutoModelForAudioClassification, wav2vec2(1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [NAMES, sorted(NAMES)])
def test_ids_that_are_stored_in_the_order_of_text_keep_their_names(kind: str, names: list[str], tmp_path: Path) -> None:
    auto, config = KINDS[kind]
    config.id2label, config.label2id = dict(enumerate(NAMES)), {name: place for place, name in enumerate(NAMES)}
    torch.manual_seed(0)
    before: Any = auto.from_config(config)
    before.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["id2label"] = dict(sorted(stored["id2label"].items()))
    assert list(stored["id2label"])[:3] == ["0", "1", "10"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    network: Any = find(kind)().load(Pretrained(str(tmp_path)), {"labels": names}, SimpleNamespace(pad_token_id=0))
    rows = [NAMES.index(name) for name in names]
    assert torch.equal(network.classifier.weight, before.classifier.weight[rows])
    assert network.rayft_drawn == ()


def test_the_nearest_label_is_told_of_some_hundreds_and_of_no_text() -> None:
    names = [f"label {number}" for number in range(200)]
    with pytest.raises(ValueError, match=r"label 'label 1x' is not one of .* \(200 in all\); did you mean 'label 1'\?"):
        index_of("label 1x", dict.fromkeys(names, 0), "label")
    for name, known in (("label 1x", [*names, "more"]), ("label 1" * 20, names), ("a" * 10**5, ["a" * 10**5 + "b"])):
        with pytest.raises(ValueError, match="is not one of") as caught:
            index_of(name, dict.fromkeys(known, 0), "label")
        assert "did you mean" not in str(caught.value)
        assert len(str(caught.value)) < 250


DISTILLED = {
    "deit": DeiTConfig(**SIZES, image_size=16, patch_size=8, architectures=["DeiTForImageClassificationWithTeacher"]),
    "levit": LevitConfig(
        image_size=32,
        hidden_sizes=[16, 16, 16],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
        architectures=["LevitForImageClassificationWithTeacher"],
    ),
    "swiftformer": SwiftFormerConfig(image_size=32, depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16]),
}


@pytest.mark.parametrize("model", DISTILLED)
def test_both_heads_of_a_distilled_model_answer_for_the_labels(model: str, tmp_path: Path) -> None:
    config = DISTILLED[model]
    config.id2label, config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    torch.manual_seed(0)
    before: Any = AutoModelForImageClassification.from_config(config).eval()
    before.save_pretrained(tmp_path)
    task, picture = find("image-classification")(), torch.rand(1, 3, config.image_size, config.image_size)
    turned: Any = task.load(Pretrained(str(tmp_path)), {"labels": ["c", "a", "b"]}, None).eval()
    with torch.no_grad():
        expected = before(pixel_values=picture).logits[:, [2, 0, 1]]
        torch.testing.assert_close(turned(pixel_values=picture).logits, expected)
    other: Any = task.load(Pretrained(str(tmp_path)), {"labels": ["x", "y", "z"]}, None)
    heads = {name for name, value in other.named_parameters() if not name.startswith(f"{before.base_model_prefix}.")}
    weights = {name for name in heads if dict(before.named_parameters())[name].shape[0] == 3}
    assert len(weights) == 4
    assert set(other.rayft_drawn) == weights


def test_the_layer_before_a_head_is_none_though_it_has_its_shape(tmp_path: Path) -> None:
    """DistilBERT's of width 4, for four labels."""
    names = ["a", "b", "c", "d"]
    config = DistilBertConfig(
        dim=4, hidden_dim=8, n_layers=1, n_heads=2, vocab_size=20, id2label=dict(enumerate(names))
    )
    before: Any = AutoModelForSequenceClassification.from_config(config)
    before.save_pretrained(tmp_path)
    task, facts = find("text-classification")(), {"labels": names[::-1]}
    network: Any = task.load(Pretrained(str(tmp_path)), facts, SimpleNamespace(pad_token_id=0))
    assert torch.equal(network.pre_classifier.weight, before.pre_classifier.weight)
    assert torch.equal(network.classifier.weight, before.classifier.weight.flip(0))
