"""Tiny models of many architectures, their inputs, and what is expected of their blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf

from rayft.tasks.task import Batch, Columns, Task

ROWS = 5
LENGTHS = (7, 4, 6, 3, 7)  # tokens of each row of text


@dataclass(frozen=True)
class Architecture:
    """A class of transformers with a config of its own, what it is given, and what is expected.

    `blocks` counts the blocks by the config, `encoder` those of the encoder where a decoder follows; `first` is the
    first block's name. `uncached` says, as a user is told, why stored states can't stand in for its blocks.
    """

    model: str
    config: str
    fields: dict[str, Any]
    inputs: str
    first: str
    blocks: Callable[[Any], int] = lambda config: int(config.num_hidden_layers)
    encoder: Callable[[Any], int] = lambda config: 0
    uncached: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)  # of the config, set after it is made

    def network(self) -> Any:
        torch.manual_seed(0)
        config = getattr(hf, self.config)(**self.fields)
        for name, value in self.changes.items():
            setattr(config, name, value)
        return getattr(hf, self.model)(config).eval()


_TEXT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
_IMAGE = {**_SIZES, "image_size": 32, "patch_size": 16, "num_labels": 3}
_STAGES = {"hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "num_labels": 3}
_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 2, 1],
    "num_heads": [1, 2, 2],
    "window_size": 2,
}
_BART = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "encoder_layerdrop": 0.5,  # a frozen block that is left out would be noticed
}
_T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
_WHISPER = {**_BART, "num_mel_bins": 8, "max_source_positions": 20, "bos_token_id": 1, "eos_token_id": 2}
_WHISPER |= {"classifier_proj_size": 8, "apply_spec_augment": True, "mask_time_prob": 0.3, "mask_time_length": 2}
_WAVES = {
    **_SIZES,
    "vocab_size": 20,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "layerdrop": 0.5,
    "mask_time_prob": 0.3,
    "mask_time_length": 2,
}
_LAYERS = {"blocks": lambda config: config.encoder_layers + config.decoder_layers}
_PAIR = {**_LAYERS, "encoder": lambda config: config.encoder_layers}
_PAIR_T5 = {
    "blocks": lambda config: config.num_layers + config.num_decoder_layers,
    "encoder": lambda config: config.num_layers,
}
_BY_STAGE = {"blocks": lambda config: len(config.depths)}


def _classifier(kind: str, first: str, fields: dict[str, Any], inputs: str = "text", **more: Any) -> Architecture:
    return Architecture(f"{kind}ForSequenceClassification", f"{kind}Config", fields, inputs, first, **more)


def _decoder(kind: str, first: str, fields: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(f"{kind}ForCausalLM", f"{kind}Config", fields, "text", first, **more)


def _vision(kind: str, first: str, fields: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(f"{kind}ForImageClassification", f"{kind}Config", fields, "image", first, **more)


ARCHITECTURES: dict[str, Architecture] = {
    # Text encoders
    "bert": _classifier("Bert", "bert.encoder.layer.0", _TEXT),
    "roberta": _classifier("Roberta", "roberta.encoder.layer.0", _TEXT),
    "distilbert": _classifier(
        "DistilBert",
        "distilbert.transformer.layer.0",
        {"vocab_size": 60, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24},
    ),
    "electra": _classifier("Electra", "electra.encoder.layer.0", {**_TEXT, "embedding_size": 8}),
    "modernbert": _classifier("ModernBert", "model.layers.0", _TEXT),
    "deberta-v2": _classifier(
        "DebertaV2",
        "deberta.encoder.layer.0",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "mpnet": _classifier("MPNet", "mpnet.encoder.layer.0", _TEXT),
    "t5-encoder": Architecture(
        "T5EncoderModel", "T5Config", _T5, "text", "encoder.block.0", blocks=lambda config: config.num_layers
    ),
    "xlm": _classifier(
        "XLM",
        "transformer.ffns.0",
        {"vocab_size": 60, "emb_dim": 16, "n_layers": 3, "n_heads": 2},
        blocks=lambda config: config.n_layers,
        uncached="with stored states",  # attention and feed-forward layers are two lists: no block gives all states
    ),
    "xlnet": _classifier(
        "XLNet",
        "transformer.layer.0",
        {"vocab_size": 60, "d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 24},
        blocks=lambda config: config.n_layer,
        uncached="don't give one tensor that begins with the rows",
    ),
    "albert": _classifier(
        "Albert",
        "",
        {**_TEXT, "embedding_size": 8},
        blocks=lambda config: 0,
        uncached="one block, used again and again",
    ),
    # Text decoders
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
        "text",
        "transformer.h.0",
    ),
    "llama": _decoder("Llama", "model.layers.0", _GROUPED),
    "qwen3": _decoder("Qwen3", "model.layers.0", {**_HEADS, "tie_word_embeddings": True}),
    "mistral": _decoder("Mistral", "model.layers.0", _GROUPED),
    "gemma2": _decoder("Gemma2", "model.layers.0", _HEADS),
    "mixtral": _decoder("Mixtral", "model.layers.0", {**_GROUPED, "num_local_experts": 2}),
    "phi3": _decoder("Phi3", "model.layers.0", _GROUPED),
    "gpt-neox": _decoder("GPTNeoX", "gpt_neox.layers.0", _TEXT),
    "opt": _decoder(
        "OPT", "model.decoder.layers.0", {**_TEXT, "ffn_dim": 24, "word_embed_proj_dim": 8, "layerdrop": 0.5}
    ),
    "bloom": _decoder(
        "Bloom", "transformer.h.0", {"vocab_size": 60, "hidden_size": 16, "n_layer": 3, "n_head": 2, "pad_token_id": 0}
    ),
    "falcon": _decoder("Falcon", "transformer.h.0", _TEXT),
    # Encoders with decoders: the encoder's blocks, then the decoder's
    "bart": Architecture(
        "BartForConditionalGeneration", "BartConfig", _BART, "pairs", "model.encoder.layers.0", **_PAIR
    ),
    "marian": Architecture("MarianMTModel", "MarianConfig", _BART, "pairs", "model.encoder.layers.0", **_PAIR),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", _T5, "pairs", "encoder.block.0", **_PAIR_T5),
    "whisper": Architecture(
        "WhisperForConditionalGeneration", "WhisperConfig", _WHISPER, "speech", "model.encoder.layers.0", **_PAIR
    ),
    # Images
    "vit": _vision("ViT", "vit.layers.0", _IMAGE),
    "deit": _vision("DeiT", "deit.layers.0", _IMAGE),
    "beit": _vision("Beit", "beit.layers.0", {**_IMAGE, "use_shared_relative_position_bias": True}),
    "dinov2": _vision("Dinov2", "dinov2.encoder.layer.0", _IMAGE),
    "clip-vision": Architecture("CLIPVisionModel", "CLIPVisionConfig", _IMAGE, "image", "encoder.layers.0"),
    "resnet": _vision(
        "ResNet", "resnet.encoder.stages.0", {**_STAGES, "embedding_size": 8, "layer_type": "basic"}, **_BY_STAGE
    ),
    "convnext": _vision("ConvNext", "convnext.encoder.stages.0", {**_STAGES, "num_stages": 3}, **_BY_STAGE),
    "mobilenet-v2": _vision(
        "MobileNetV2", "mobilenet_v2.layer.0", {"depth_multiplier": 0.25, "num_labels": 3}, blocks=lambda config: 16
    ),
    "mobilevit": _vision(
        "MobileViT",
        "mobilevit.encoder.layer.0",
        {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8] * 7, "num_attention_heads": 2, "num_labels": 3},
        blocks=lambda config: 5,
    ),
    "swin": _vision("Swin", "swin.encoder.layers.0", _SWIN, **_BY_STAGE),
    "swinv2": _vision(
        "Swinv2", "swinv2.encoder.layers.0", _SWIN, **_BY_STAGE, uncached="does not work on stored states"
    ),
    # Sounds
    "wav2vec2": _classifier("Wav2Vec2", "wav2vec2.encoder.layers.0", _WAVES, "waves"),
    "wav2vec2-stable": Architecture(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {**_WAVES, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        "waves",
        "wav2vec2.encoder.layers.0",
    ),
    "hubert": _classifier("Hubert", "hubert.encoder.layers.0", _WAVES, "waves"),
    "wavlm": _classifier("WavLM", "wavlm.encoder.layers.0", _WAVES, "waves"),
    "ast": Architecture(
        "ASTForAudioClassification",
        "ASTConfig",
        {**_SIZES, "patch_size": 8, "max_length": 24, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        "spectrum",
        "audio_spectrogram_transformer.layers.0",
    ),
    "whisper-encoder": Architecture(
        "WhisperForAudioClassification",
        "WhisperConfig",
        _WHISPER,
        "sound",
        "encoder.layers.0",
        blocks=lambda config: config.encoder_layers,
    ),
}


def inputs(kind: str) -> Batch:
    """Random inputs of `ROWS` rows; text is padded with zeros."""
    drawn = torch.Generator().manual_seed(1)
    if kind in ("text", "pairs"):
        mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
        ids = torch.randint(5, 60, mask.shape, generator=drawn) * mask
        answers = torch.randint(5, 60, (ROWS, 4), generator=drawn)
        return {"input_ids": ids, "attention_mask": mask, **({"decoder_input_ids": answers} if kind == "pairs" else {})}
    name, shape = {
        "image": ("pixel_values", (3, 32, 32)),
        "waves": ("input_values", (800,)),
        "spectrum": ("input_values", (24, 16)),
        "sound": ("input_features", (8, 40)),
        "speech": ("input_features", (8, 40)),
    }[kind]
    given = {name: torch.randn((ROWS, *shape), generator=drawn)}
    if kind == "speech":
        given["decoder_input_ids"] = torch.randint(5, 60, (ROWS, 4), generator=drawn)
    return given


class Rows(Task):
    """A task whose rows are those of `inputs`, which are its processor: column `row` says which."""

    type: str = "rows"

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        batch = {name: values[features["row"]] for name, values in processor.items()}
        if "attention_mask" in batch:  # as long as the longest row
            longest = int(batch["attention_mask"].sum(1).max())
            batch |= {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}
        return batch

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        return real(model(**batch)[0], batch)

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        return outputs.float().square().sum()


def real(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    """An output without what belongs to padding."""
    mask = batch.get("attention_mask")
    return output[mask.bool()] if mask is not None and output.shape[:2] == mask.shape else output
