"""A head that reads the first token's state gets the same one where the last block computes no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from rayft.recipe import Recipe
from rayft.tasks.task import Task
from rayft.tasks.text_classification import TextClassification
from rayft.tasks.token_classification import TokenClassification
from rayft.training.first_token import read_first

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "num_labels": 3,
}
# Kind -> what its config needs beyond SIZES.
ALIKE: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Camembert": {},
    "Data2VecText": {},
    "Electra": {"embedding_size": 8},
    "Ernie": {},
    "Roberta": {},
    "RoCBert": {"enable_pronunciation": False, "enable_shape": False},
    "XLMRoberta": {},
}
OTHER = {
    "MPNet": {},
    "MegatronBert": {},
    "RemBert": {"input_embedding_size": 8},
    "ModernBert": {},
    "Xmod": {"default_language": "en_XX"},
}
TASK = TextClassification(labels=("a", "b", "c"))


def network(kind: str, more: dict[str, Any], attention: str = "sdpa", **fields: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(hf, f"{kind}Config")(**{**SIZES, **more, **fields})
    model = getattr(hf, f"{kind}ForSequenceClassification")._from_config(made, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():  # norms at 1 and biases at 0 would hide what they do
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def rows() -> dict[str, torch.Tensor]:
    """Five rows of up to seven tokens, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 4, 6, 3, 7])
    tokens = torch.randint(3, 60, (5, 7), generator=generator)
    mask = (torch.arange(7) < lengths[:, None]).long()
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0, 1])}


def learned(model: Any, batch: dict[str, torch.Tensor], task: Task = TASK) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits, and gradients by parameter."""
    model.zero_grad()
    outputs = task.forward(model, batch)
    task.loss(outputs, batch).backward()
    return outputs.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "attention"), [*((kind, "sdpa") for kind in ALIKE), ("Bert", "eager")])
def test_logits_and_gradients_are_those_of_the_whole_last_block(kind: str, attention: str) -> None:
    model, batch = network(kind, ALIKE[kind], attention), rows()
    logits, gradients = learned(model, batch)
    names = list(model.state_dict())
    blocks = TASK.blocks(model)
    assert read_first(TASK, model, blocks)
    shapes = []
    model.get_submodule(blocks.blocks[-1]).register_forward_hook(lambda _, __, output: shapes.append(output.shape))
    narrow, found = learned(model, batch)
    assert shapes == [(5, 1, 16)]
    assert list(model.state_dict()) == names
    torch.testing.assert_close(narrow, logits, rtol=1e-5, atol=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_without_padding_need_no_mask() -> None:
    model = network("Bert", {})
    batch = {name: value[:1] for name, value in rows().items()}
    logits, _ = learned(model, batch)
    assert read_first(TASK, model, TASK.blocks(model))
    torch.testing.assert_close(learned(model, batch)[0], logits, rtol=1e-5, atol=1e-6)


def test_dropout_and_gradient_checkpointing_work_on_one_token() -> None:
    model = network("Bert", {}).train()
    assert read_first(TASK, model, TASK.blocks(model))
    torch.manual_seed(1)
    logits, gradients = learned(model, rows())
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    again, found = learned(model, rows())
    assert torch.equal(again, logits)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("kind", OTHER)
def test_other_architectures_stay_as_they_are(kind: str) -> None:
    model, batch = network(kind, OTHER[kind], "eager"), rows()
    logits, _ = learned(model, batch)
    assert not read_first(TASK, model, TASK.blocks(model))
    assert torch.equal(learned(model, batch)[0], logits)


def test_a_task_that_reads_all_tokens_keeps_them() -> None:
    model = network("Bert", {})
    assert not read_first(TokenClassification(), model, TASK.blocks(model))


def test_attention_whose_mask_is_no_tensor_stays_as_it_is() -> None:
    model = network("Bert", {}, "flex_attention")
    assert not read_first(TASK, model, TASK.blocks(model))


def test_adapters_learn_the_same(tmp_path: Any) -> None:
    from rayft.training.freeze import adapted

    plain = {
        "name": "x",
        "task": {"type": "text-classification"},
        "model": {"path": "m", "lora": {"r": 2, "dropout": 0.0}},
        "data": {"train": "t.csv"},
        "train": {"epochs": 1},
    }
    model = network("Bert", {})
    model = adapted(model, Recipe.parse(plain), TASK.blocks(model), ())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    logits, gradients = learned(model, rows())
    assert any("layer.2" in name and "lora_A" in name for name in gradients)
    assert read_first(TASK, model, TASK.blocks(model))
    narrow, found = learned(model, rows())
    torch.testing.assert_close(narrow, logits, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
