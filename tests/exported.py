"""Small random models in folders as a run exports them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{number}" for number in range(60)]
LABELS = ["ham", "spam"]


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Words split at blanks; `special` are padding, unknown, and what begins and ends a text."""
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=special[1]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begin, end = special[2], special[3]
    made.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])],
    )
    names = {"pad_token": special[0], "unk_token": special[1], "cls_token": begin, "sep_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def save(folder: Path, network: Any, processor: Any, task: dict[str, Any], facts: dict[str, Any]) -> str:
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    details = {"rayft": "0", "task": task, "facts": facts, "metrics": {}, "data": {}}
    (folder / "rayft.json").write_text(json.dumps(details))
    return str(folder)


def _bert(**fields: Any) -> BertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertConfig(vocab_size=4 + len(WORDS), max_position_embeddings=64, pad_token_id=0, **sizes, **fields)


def classifier(folder: Path) -> str:
    """A BERT that tells LABELS apart, at random but decidedly."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: place for place, name in enumerate(LABELS)}}
    network = BertForSequenceClassification(_bert(**names))
    with torch.no_grad():
        network.classifier.weight.mul_(50)
        words = torch.randint(4, 4 + len(WORDS), (50, 8))
        words[:, 0], words[:, -1] = 2, 3
        network.classifier.bias.sub_(network.eval()(words).logits.mean(dim=0))  # or one label would always win
    task = {"type": "text-classification", "max_length": 16}
    return save(folder, network, tokenizer("[PAD]", "[UNK]", "[CLS]", "[SEP]"), task, {"labels": LABELS})


def reader(folder: Path) -> str:
    """A BERT that marks spans: windows of 16 tokens, overlapping by 4."""
    torch.manual_seed(0)
    task = {"type": "question-answering", "max_length": 16, "stride": 4}
    network = BertForQuestionAnswering(_bert())
    return save(folder, network, tokenizer("[PAD]", "[UNK]", "[CLS]", "[SEP]"), task, {})


def writer(folder: Path) -> str:
    """A Llama that goes on from a prompt, its output tied to its embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    processor = tokenizer("<pad>", "<unk>", "<s>", "</s>")
    processor.bos_token, processor.eos_token = "<s>", "</s>"
    task = {"type": "causal-lm", "prompt": "question", "completion": "answer", "max_length": 32, "max_new_tokens": 5}
    return save(folder, LlamaForCausalLM(config), processor, task, {})
