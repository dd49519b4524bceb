"""Small speech models that nobody trained, and rows of the spoken digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

SOUNDS = Path(__file__).resolve().parents[1] / "jobs" / "data" / "spoken_digits" / "sounds"
NAMES = ("0_george_7", "3_theo_7", "6_lucas_9")  # 0.67, 0.24 and 0.48 seconds at 8 kHz
DIGITS = {
    "file_name": [str(SOUNDS / f"{name}.flac") for name in NAMES],
    "text": ["zero", "three", "six"],
    "label": ["0", "3", "6"],
    "accent": ["Greek", "neutral", "German"],
}


def make_listener(folder: str, layers: int) -> None:
    """A wav2vec2-bert without a tokenizer: it reads spectra, and masks padding."""
    config = Wav2Vec2BertConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        classifier_proj_size=8,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    Wav2Vec2BertModel(config).save_pretrained(folder)
    SeamlessM4TFeatureExtractor().save_pretrained(folder)


def wav2vec2(layers: int, norm: str = "group", **fields: Any) -> Wav2Vec2Config:
    """Three convolutions below the blocks; `norm` "group" is wav2vec2-base's, "layer" the large ones'."""
    return Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        classifier_proj_size=8,
        conv_dim=(8, 8, 8),
        conv_kernel=(10, 8, 4),
        conv_stride=(8, 8, 5),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        initializer_range=0.3,
        **fields,
    )


def make_letters(folder: str, layers: int) -> None:
    """A wav2vec2 for letters in capitals, whose first layer normalises over time."""
    letters = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4}
    letters |= {letter: number for number, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ", start=len(letters))}
    vocabulary = Path(folder) / "vocab.json"
    vocabulary.write_text(json.dumps(letters))
    Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    torch.manual_seed(0)
    Wav2Vec2ForCTC(wav2vec2(layers, vocab_size=len(letters))).save_pretrained(folder)


def make_writer(folder: str, layers: int) -> None:
    """A Whisper that reads one second and writes bytes."""
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|translate|>"]
    special += ["<|notimestamps|>"]
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyzĠ")}
    tokenizer = WhisperTokenizer(vocab=letters, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.pad_token = special[0]
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=16,
        d_model=16,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=50,
        max_target_positions=300,  # a pipeline writes 256 tokens
        classifier_proj_size=8,
        init_std=0.3,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids(special[1]),
    )
    torch.manual_seed(0)
    network = WhisperForConditionalGeneration(config)
    network.generation_config._from_model_config = False  # or it is made anew where it is loaded
    network.generation_config.lang_to_id = {name: tokenizer.convert_tokens_to_ids(name) for name in special[2:4]}
    network.generation_config.task_to_id = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("transcribe", "translate")
    }
    network.generation_config.is_multilingual = True
    network.generation_config.no_timestamps_token_id = tokenizer.convert_tokens_to_ids(special[-1])
    network.generation_config.suppress_tokens = None
    network.generation_config.begin_suppress_tokens = None
    network.save_pretrained(folder)
