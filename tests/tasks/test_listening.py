"""Padding is not heard: a row's outputs in a batch are those that transformers gives for the row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    HubertConfig,
    HubertForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    WavLMConfig,
    WavLMForSequenceClassification,
)

from rayft.errors import ModelError
from rayft.tasks.listening import ignore_padding, inputs, listen, load_extractor
from rayft.tasks.task import Pretrained
from speech_models import make_listener, make_writer, wav2vec2

LENGTHS = (12_000, 9_000, 20_123)


def sounds() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=length) * 3000).astype(np.int16).tobytes() for length in LENGTHS]


def classifier(kind: Any, config: Any, norm: str) -> Any:
    fields = wav2vec2(2, norm).to_dict()
    known = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
    torch.manual_seed(0)
    return kind(config(**known)).eval()


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM in transformers 5.23
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Wav2Vec2ForSequenceClassification, Wav2Vec2Config),
        (HubertForSequenceClassification, HubertConfig),
        (WavLMForSequenceClassification, WavLMConfig),
    ],
)
def test_a_row_in_a_batch_gets_what_transformers_gives_it_alone(kind: Any, config: Any, norm: str) -> None:
    extractor = Wav2Vec2FeatureExtractor()
    network = classifier(kind, config, norm)
    alone = []
    for content in sounds():
        samples = np.frombuffer(content, np.int16).astype(np.float32) / 32768
        alone.append(network(**extractor(samples, sampling_rate=16_000, return_tensors="pt")).logits[0])
    batch = inputs(extractor, sounds())
    assert batch["attention_mask"].sum(dim=1).tolist() == list(LENGTHS)
    if norm == "group":  # else the test shows nothing
        assert not torch.allclose(listen(network, batch).logits, torch.stack(alone), atol=1e-3)
    ignore_padding(network)
    torch.testing.assert_close(listen(network, batch).logits, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_masked_spans_follow_from_the_seed_of_torch_and_short_sounds_have_room_for_one() -> None:
    torch.manual_seed(0)
    network = Wav2Vec2ForSequenceClassification(wav2vec2(2, mask_time_prob=0.5, hidden_dropout=0.0)).train()
    ignore_padding(network)

    def seen(numbers: int, rows: list[bytes]) -> torch.Tensor:
        torch.manual_seed(1)
        np.random.seed(numbers)
        return listen(network, inputs(Wav2Vec2FeatureExtractor(), rows)).logits

    assert torch.equal(seen(5, sounds()), seen(6, sounds()))
    assert seen(5, [content[:2000] for content in sounds()]).isfinite().all()  # less than a span, 0.2 seconds


def test_extractors_that_read_less_than_is_asked_for_are_refused(tmp_path: Path) -> None:
    make_writer(str(tmp_path), 1)
    load_extractor(Pretrained(str(tmp_path)), 1.0)
    with pytest.raises(ModelError, match=r"task.max_seconds is 2, but .* reads 1 seconds; at most 1 fits"):
        load_extractor(Pretrained(str(tmp_path)), 2.0)


def test_a_model_without_extractor_is_refused_in_a_sentence(tmp_path: Path) -> None:
    make_listener(str(tmp_path), 1)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"model\.path: the feature extractor of") as caught:
        load_extractor(Pretrained(str(tmp_path)), 2.0)
    assert "\n" not in str(caught.value)
