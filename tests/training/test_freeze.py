"""What learns: by depth, by pattern, by adapters, by epoch; and how fast, by depth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from rayft.errors import ModelError
from rayft.fields.sections import Lora, Model, Train
from rayft.tasks.loading import from_pretrained
from rayft.tasks.stacked import Blocks, stacked_blocks
from rayft.tasks.task import Pretrained
from rayft.training import freeze
from rayft.training.export import new_parameters

BLOCKS = 3
_TEXT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}

# Model type -> (the model, its list of blocks, a parameter below the blocks).
MODELS: dict[str, tuple[Any, str, str]] = {
    "bert": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**_TEXT)),
        "bert.encoder.layer",
        "bert.embeddings.word_embeddings.weight",
    ),
    "roberta": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_TEXT)),
        "roberta.encoder.layer",
        "roberta.embeddings.word_embeddings.weight",
    ),
    "distilbert": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(vocab_size=60, dim=16, n_layers=BLOCKS, n_heads=2, hidden_dim=24)
        ),
        "distilbert.transformer.layer",
        "distilbert.embeddings.position_embeddings.weight",
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=60, n_embd=16, n_layer=BLOCKS, n_head=2, n_positions=32)),
        "transformer.h",
        "transformer.wpe.weight",
    ),
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT, tie_word_embeddings=True)),
        "model.layers",
        "model.embed_tokens.weight",
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=16,
                num_hidden_layers=BLOCKS,
                num_attention_heads=2,
                intermediate_size=24,
                image_size=16,
                patch_size=8,
            )
        ),
        "",  # its name changed between versions of transformers
        "vit.embeddings.cls_token",
    ),
}


def model(**fields: Any) -> Model:
    return Model.model_validate({"path": "unused", **fields})


def built(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]()


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_are_found(kind: str) -> None:
    network = built(kind)
    _, path, below = MODELS[kind]
    blocks = stacked_blocks(network)
    assert len(blocks.blocks) == BLOCKS
    if path:
        assert blocks.blocks == tuple(f"{path}.{number}" for number in range(BLOCKS))
    assert freeze.block_of(below, blocks) == -1
    for number, name in enumerate(blocks.blocks):
        inside = [f"{name}.{inner}" for inner, _ in network.get_submodule(name).named_parameters()]
        assert inside
        assert {freeze.block_of(one, blocks) for one in inside} == {number}


@pytest.mark.parametrize("kind", MODELS)
def test_depth_freezes_the_embeddings_and_so_many_blocks(kind: str) -> None:
    for depth in (0, 1, 2, "all"):
        network = built(kind)
        blocks = stacked_blocks(network)
        learning = freeze.freeze(network, model(freeze=depth), blocks)
        number = BLOCKS if depth == "all" else int(depth)
        place = {name: freeze.block_of(name, blocks) for name, _ in network.named_parameters()}
        expected = {name for name in place if number == 0 or place[name] >= number}
        assert set(learning.trainable) == expected
        assert learning.depth == number
        assert {name for name, value in network.named_parameters() if value.requires_grad} == expected
        assert set(learning.frozen) == place.keys() - expected


def test_no_more_can_be_frozen_than_there_is() -> None:
    network = built("bert")
    with pytest.raises(ModelError, match=r"model\.freeze\.layers: 4 is more than the model's 3 blocks; 0 to 3"):
        freeze.freeze(network, model(freeze=4), stacked_blocks(network))
    with pytest.raises(ModelError, match="nothing is left to train"):
        freeze.freeze(
            network,
            model(freeze={"layers": "all", "patterns": ["bert.pooler", "classifier.*"]}),
            stacked_blocks(network),
        )


def test_all_blocks_of_a_model_without_blocks_is_refused() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    blocks = stacked_blocks(network)
    assert blocks.blocks == ()
    with pytest.raises(ModelError, match="none were found"):
        freeze.freeze(network, model(freeze="all"), blocks)


def test_patterns_match_parameters_and_modules() -> None:
    network = built("bert")
    learning = freeze.freeze(network, model(freeze=["bert.embeddings", "*.LayerNorm.bias"]), stacked_blocks(network))
    names = {name for name, _ in network.named_parameters()}
    expected = {name for name in names if name.startswith("bert.embeddings.") or name.endswith(".LayerNorm.bias")}
    assert set(learning.frozen) == expected
    assert len(expected) == 3 + 2 + 2 * BLOCKS


def test_a_pattern_that_matches_nothing_is_refused_with_a_near_name() -> None:
    network = built("bert")
    says = (
        r"'bert\.embedings\.word_embeddings\.weight' matches no parameter.*`bert\.embeddings\.word_embeddings\.weight`"
    )
    with pytest.raises(ModelError, match=says):
        freeze.freeze(network, model(freeze=["bert.embedings.word_embeddings.weight"]), stacked_blocks(network))


@pytest.mark.parametrize(
    ("kind", "first"), [("gpt2", "transformer.wte.weight"), ("llama", "model.embed_tokens.weight")]
)
def test_a_tied_tensor_is_frozen_with_the_embeddings(kind: str, first: str) -> None:
    for how in (1, ["lm_head"], [first]):
        network = built(kind)
        learning = freeze.freeze(network, model(freeze=how), stacked_blocks(network))
        assert first in learning.frozen
        assert network.lm_head.weight is network.get_parameter(first)
        assert not network.lm_head.weight.requires_grad


def modes(network: torch.nn.Module, blocks: Any) -> set[str]:
    """The modules in training mode."""
    freeze.train_mode(network, blocks)
    return {name for name, module in network.named_modules() if module.training}


def test_frozen_modules_and_their_dropout_are_in_evaluation_mode() -> None:
    network = built("bert")
    blocks = stacked_blocks(network)
    freeze.freeze(network, model(freeze=2), blocks)
    training = modes(network, blocks)
    assert not any(
        name.startswith(("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1")) for name in training
    )
    last = network.get_submodule("bert.encoder.layer.2")
    assert {f"bert.encoder.layer.2.{name}" for name, _ in last.named_modules() if name} <= training
    assert {"bert.pooler", "dropout", "classifier"} <= training
    assert not {"bert", "bert.encoder"} & training  # what they do to embeddings or whole blocks by chance
    freeze.freeze(network, model(freeze=0), blocks)
    assert {"bert", "bert.encoder"} <= modes(network, blocks)


def test_what_lies_between_frozen_embeddings_and_the_blocks_is_fixed() -> None:
    network = built("gpt2")
    blocks = stacked_blocks(network)
    freeze.freeze(network, model(freeze=1), blocks)
    training = modes(network, blocks)
    assert "transformer.drop" not in training
    assert {"transformer.h.1.attn.attn_dropout", "transformer.h.1.mlp.dropout", "transformer.ln_f"} <= training
    ids = torch.arange(12).view(1, 12)
    seen: list[torch.Tensor] = []
    network.transformer.h[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(input_ids=ids)
    network(input_ids=ids)
    assert torch.equal(seen[0], seen[1])
    freeze.freeze(network, model(freeze=0), blocks)
    assert "transformer.drop" in modes(network, blocks)


def test_batch_norm_keeps_its_running_statistics() -> None:
    network = hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )
    blocks = stacked_blocks(network)
    freeze.freeze(network, model(), blocks)
    freeze.train_mode(network, blocks)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(module.training for module in norms)
    before = [norm.running_mean.clone() for norm in norms]
    network(pixel_values=torch.randn(2, 3, 32, 32)).logits.sum().backward()
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))
    assert all(norm.weight.requires_grad for norm in norms)


def test_frozen_matrices_are_stored_in_half_and_still_compute() -> None:
    network = built("bert")
    ids = torch.arange(1, 13).view(2, 6)
    freeze.freeze(
        network,
        model(freeze=["*.attention.*", "*.LayerNorm.*", "bert.embeddings.position_embeddings"]),
        stacked_blocks(network),
    )
    whole = network.eval()(input_ids=ids).logits
    freeze.store_frozen_in(network, torch.bfloat16)
    for _, parameter in network.named_parameters():
        narrow = not parameter.requires_grad and parameter.dim() > 1
        assert parameter.dtype == (torch.bfloat16 if narrow else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(input_ids=ids).logits
        logits.sum().backward()
    assert torch.allclose(logits.float(), whole, atol=0.02)


# --- rates and decay


def train(**fields: Any) -> Train:
    return Train.model_validate({"epochs": 1, "learning_rate": 1e-3, **fields})


@pytest.mark.parametrize("kind", MODELS)
def test_weight_decay_is_that_of_the_hugging_face_trainer(kind: str) -> None:
    network = built(kind)
    blocks = stacked_blocks(network)
    learning = freeze.freeze(network, model(), blocks)
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = freeze.parameter_groups(network, learning, BLOCKS, train(weight_decay=0.1))
    decays = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    trainer = hf.Trainer.get_decay_parameter_names(None, network)
    assert decays == {name for name in trainer if name in set(names.values())}


def test_a_table_of_relative_positions_does_not_decay() -> None:
    config = hf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    network = hf.T5EncoderModel(config)
    blocks = stacked_blocks(network)
    learning = freeze.freeze(network, model(), blocks)
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = freeze.parameter_groups(network, learning, 2, train(weight_decay=0.1))
    decays = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert not any("relative_attention_bias" in name for name in decays)
    trainer = set(hf.Trainer.get_decay_parameter_names(None, network))
    # The Trainer lets `layer_norm.weight` of T5LayerNorm off by its name; here it has one dimension.
    assert decays == trainer & set(names.values())


def test_each_block_learns_at_its_share_of_the_one_above() -> None:
    network = built("bert")
    blocks = stacked_blocks(network)
    learning = freeze.freeze(network, model(), blocks)
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = freeze.parameter_groups(network, learning, BLOCKS, train(layer_lr_decay=0.5, weight_decay=0.01))
    scales = {names[p]: group["scale"] for group in groups for p in group["params"]}
    assert scales["classifier.weight"] == scales["bert.pooler.dense.bias"] == 1.0
    assert scales["bert.encoder.layer.2.output.dense.weight"] == 0.5
    assert scales["bert.encoder.layer.1.output.dense.weight"] == 0.25
    assert scales["bert.encoder.layer.0.output.dense.bias"] == 0.125
    assert scales["bert.embeddings.word_embeddings.weight"] == 0.0625
    assert len(groups) == 2 * (BLOCKS + 2)
    assert len({group["name"] for group in groups}) == len(groups)
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_gradual_unfreezing_frees_one_block_at_a_time() -> None:
    gradual, three = model(freeze="all", unfreeze_every=2), Blocks((), ("a", "b", "c"))
    assert [freeze.depth_at(gradual, epoch, three) for epoch in range(9)] == [3, 3, 2, 2, 1, 1, 0, 0, 0]
    assert [freeze.depth_at(model(freeze=2), epoch, three) for epoch in range(3)] == [2, 2, 2]
    assert freeze.depth_at(model(), 5, three) == 0
    fixed = Blocks((), ("a", "b", "c"), fixed=1)
    assert [freeze.depth_at(gradual, epoch, fixed) for epoch in range(9)] == [3, 3, 2, 2, 1, 1, 1, 1, 1]
    assert freeze.depth_at(model(), 0, fixed) == 1
    network = built("bert")
    blocks = stacked_blocks(network)
    counts = [len(freeze.freeze(network, gradual, blocks, epoch).trainable) for epoch in (0, 2, 4, 6)]
    assert counts == [4, 4 + 16, 4 + 32, 4 + 48 + 5]


def test_what_joins_later_has_groups_of_its_own() -> None:
    network = built("bert")
    blocks = stacked_blocks(network)
    learning = freeze.freeze(network, model(freeze=1), blocks)
    cohorts = {name: 0 if block > 1 else 2 for name, block in learning.trainable.items()}
    groups = freeze.parameter_groups(network, learning, BLOCKS, train(weight_decay=0.0), cohorts)
    assert sorted(len(group["params"]) for group in groups) == [16, 4 + 16]


# --- adapters


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_and_the_new_head_learn_and_all_else_stays(kind: str) -> None:
    network = built(kind)
    heads = {"roberta": ("classifier.dense", "classifier.out_proj"), "distilbert": ("pre_classifier", "classifier")}
    head = heads.get(kind, () if kind in ("gpt2", "llama") else ("classifier",))
    new = [f"{name}.{inner}" for name in head for inner, _ in network.get_submodule(name).named_parameters()]
    wrapped = freeze.adapt(network, Lora(r=4), new, seed=1)
    blocks = stacked_blocks(wrapped)
    assert len(blocks.blocks) == BLOCKS
    learning = freeze.freeze(wrapped, model(lora={"r": 4}), blocks)
    adapters = {name for name in learning.trainable if "lora_" in name}
    others = set(learning.trainable) - adapters
    assert others == {
        f"base_model.model.{name}.modules_to_save.default.{leaf}" for name in head for leaf in ("weight", "bias")
    }
    linear = [
        name
        for name, module in built(kind).named_modules()
        if isinstance(module, torch.nn.Linear | hf.pytorch_utils.Conv1D)
        and any(part.isdigit() for part in name.split("."))
    ]
    inside = {name for name in adapters if 0 <= learning.trainable[name] < BLOCKS}
    assert len(inside) == 2 * len(linear)
    assert not any(".classifier" in name or "lm_head" in name for name in adapters)
    assert {block for name, block in learning.trainable.items() if name in others} <= {BLOCKS}


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (hf.BertConfig, ["cls.predictions.transform.LayerNorm", "cls.predictions.transform.dense"]),
        (hf.RobertaConfig, ["lm_head.dense", "lm_head.layer_norm"]),
    ],
)
def test_beside_adapters_no_copy_of_tied_embeddings_learns(config: Any, kept: list[str], tmp_path: Path) -> None:
    """A copy is tied no more: it counted as trainable, and the export lacked the bias that went with it."""
    torch.manual_seed(0)
    hf.AutoModel.from_config(config(**_TEXT)).save_pretrained(tmp_path)
    network: Any = from_pretrained(hf.AutoModelForMaskedLM, Pretrained(str(tmp_path)))
    wrapped: Any = freeze.adapt(network, Lora(r=2), new_parameters(network), seed=0)
    learning = freeze.freeze(wrapped, model(lora={}), stacked_blocks(wrapped))
    assert {name for name in learning.trainable if "lora_" not in name} == {
        f"base_model.model.{name}.modules_to_save.default.{leaf}" for name in kept for leaf in ("weight", "bias")
    }
    merged = wrapped.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    merged.save_pretrained(tmp_path)
    assert new_parameters(from_pretrained(hf.AutoModelForMaskedLM, Pretrained(str(tmp_path)))) == ()


def test_a_module_within_another_that_learns_whole_is_copied_once() -> None:
    wrapped = freeze.adapt(built("bert"), Lora(targets=("query",)), ["bert.pooler.dense.bias", "bert.pooler.x"], seed=0)
    learning = freeze.freeze(wrapped, model(lora={}), stacked_blocks(wrapped))
    assert {name for name in learning.trainable if "lora_" not in name} == {
        f"base_model.model.bert.pooler.modules_to_save.default.dense.{leaf}" for leaf in ("weight", "bias")
    }


def test_a_block_with_adapters_trains_as_a_whole() -> None:
    network = freeze.adapt(built("bert"), Lora(targets=("query",)), ["classifier.weight", "classifier.bias"], seed=0)
    blocks = stacked_blocks(network)
    freeze.freeze(network, model(lora={}), blocks)
    training = modes(network, blocks)
    prefix = "base_model.model.bert"
    assert f"{prefix}.encoder.layer.0.output.dropout" in training
    assert f"{prefix}.encoder.layer.0.attention.output.dropout" in training
    assert f"{prefix}.embeddings.dropout" not in training
    assert "base_model.model.dropout" in training


def test_adapters_are_drawn_from_the_seed_and_the_name() -> None:
    def drawn(seed: int, before: int) -> dict[str, torch.Tensor]:
        network = built("gpt2")
        torch.manual_seed(before)
        wrapped = freeze.adapt(network, Lora(r=4, targets=("c_attn", "wte")), (), seed)
        return {name: value.detach() for name, value in wrapped.named_parameters() if "lora_" in name}

    first, second, other = drawn(3, 100), drawn(3, 200), drawn(4, 100)
    assert any("lora_embedding_B" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in first:
        partner = "lora_B" in name or "lora_embedding_A" in name
        assert torch.equal(first[name], other[name]) == partner
        assert (first[name].abs().sum() == 0) == partner
    a = next(value for name, value in first.items() if "lora_A" in name)
    assert a.abs().max() <= 1 / math.sqrt(16)
    assert len({tuple(value.flatten()[:3].tolist()) for name, value in first.items() if "lora_A" in name}) == BLOCKS


def test_what_learns_is_float32_above_a_narrow_model() -> None:
    network = freeze.adapt(built("bert").to(torch.bfloat16), Lora(), ["classifier.weight", "classifier.bias"], seed=0)
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in network.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.lora\.targets: .*qery"):
        freeze.adapt(built("bert"), Lora(targets=("qery",)), (), seed=0)
    with pytest.raises(ModelError, match="no linear layers inside its blocks"):
        freeze.adapt(torch.nn.Embedding(3, 4), Lora(), (), seed=0)
