"""The pretrained network in the object store: the same network, mapped and not copied, tied tensors still one."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from rayft.sweeps.warm import Warm, own_trainable, packed, unpacked
from rayft.tasks import find
from rayft.tasks.task import Pretrained


def network() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertForMaskedLM(config).eval()


def test_a_network_comes_back_as_it_was_with_tied_tensors_tied() -> None:
    given = network()
    given.rayft_drawn = ("cls.bias",)
    found = unpacked(packed(given))
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(found(ids).logits, given(ids).logits)
    assert found.rayft_drawn == ("cls.bias",)
    assert found.get_input_embeddings().weight is found.get_output_embeddings().weight
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in given.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_frozen_stays_where_ray_mapped_it_and_what_learns_is_copied(
    ray_local: None, dtype: torch.dtype
) -> None:
    import ray

    base, task, facts = Pretrained("somewhere"), find("masked-lm").model_validate({"type": "masked-lm"}), {"rows": 3}
    warm = Warm(base, task, facts, ray.put(packed(network().to(dtype))))
    first, second = (warm.load(base, task.model_copy(), dict(facts)) for _ in range(2))
    assert first is not None
    assert second is not None
    for model in (first, second):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layer.0" not in name)
        own_trainable(model)
    frozen, learns = "bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.output.dense.weight"
    assert first.get_parameter(frozen).data_ptr() == second.get_parameter(frozen).data_ptr()
    assert first.get_parameter(frozen).dtype == dtype
    with torch.no_grad():
        first.get_parameter(learns).zero_()
    assert second.get_parameter(learns).any()


def test_another_model_task_or_labels_have_no_network_there(ray_local: None) -> None:
    import ray

    base, facts = Pretrained("somewhere"), {"labels": ["ham", "spam"]}
    task = find("text-to-image").model_validate({"type": "text-to-image"})
    other = find("text-to-image").model_validate({"type": "text-to-image", "snr_gamma": 5.0})
    warm = Warm(base, task, facts, ray.put(packed(network())))
    assert warm.load(base, task, facts) is not None
    assert warm.load(Pretrained("elsewhere"), task, facts) is None
    assert warm.load(base, other, facts) is None
    assert warm.load(base, task, {"labels": ["ham", "spam", "eggs"]}) is None
