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
    ViTConfig,
)

from rayft.tasks import find
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
