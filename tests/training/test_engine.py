"""The engine: its configuration for each stage, offload and precision; none of them changes what is learned."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from group import TIMEOUT_S, run_group
from rayft.training import engine
from runs import compiled, losses_of, memory_of, patience_of, plain, scaled_steps
from test_loop import recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "deepspeed"
CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {
    "stage-0": (0, {}),
    "stage-1": (1, {}),
    "stage-2": (2, {}),
    "stage-3": (3, {}),
    "stage-2-no-clipping": (2, {"train__max_grad_norm": 0}),
    "stage-1-offload-optimizer": (1, {"deepspeed__offload": "optimizer"}),
    "stage-2-offload-optimizer": (2, {"deepspeed__offload": "optimizer"}),
    "stage-3-offload-optimizer": (3, {"deepspeed__offload": "optimizer"}),
    "stage-3-offload-parameters": (3, {"deepspeed__offload": "parameters"}),
    "stage-0-bfloat16": (0, {"model__dtype": "bfloat16"}),
    "stage-3-bfloat16": (3, {"model__dtype": "bfloat16"}),
    "stage-2-float16": (2, {"model__dtype": "float16", "cluster__gpus_per_worker": 1}),
    "stage-1-gpu-offload-optimizer": (1, {"deepspeed__offload": "optimizer", "cluster__gpus_per_worker": 1}),
    "stage-3-gpu-offload-parameters": (3, {"deepspeed__offload": "parameters", "cluster__gpus_per_worker": 1}),
    "stage-3-extra": (
        3,
        {
            "model__dtype": "bfloat16",
            "deepspeed__extra": "{zero_optimization: {stage3_max_live_parameters: 1000}, wall_clock_breakdown: true}",
        },
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_are_the_golden_ones(name: str, request: pytest.FixtureRequest) -> None:
    stage, fields = CONFIGS[name]
    text = json.dumps(engine.deepspeed_config(recipe(**fields), stage), indent=2) + "\n"
    golden = GOLDEN / f"{name}.json"
    if request.config.getoption("--update-goldens", default=False):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert golden.read_text(encoding="utf-8") == text, "run pytest with --update-goldens and look at the difference"


def test_there_is_no_golden_file_without_a_test() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(CONFIGS)


def test_extra_keys_do_not_reach_the_next_configuration() -> None:
    stage, fields = CONFIGS["stage-3-extra"]
    engine.deepspeed_config(recipe(**fields), stage)
    assert "stage3_max_live_parameters" not in engine.deepspeed_config(recipe(), stage)["zero_optimization"]


@pytest.mark.parametrize(("elements", "overlaps"), [(10, True), (11, False)])
def test_no_gradient_is_reduced_beside_the_backward_pass_that_is_larger_than_a_bucket(
    elements: int, overlaps: bool
) -> None:
    """DeepSpeed would free its memory too early."""
    fields = {"cluster__gpus_per_worker": 1, "deepspeed__extra": "{zero_optimization: {reduce_bucket_size: 10}}"}
    network = torch.nn.Module()
    network.small, network.large = (torch.nn.Parameter(torch.zeros(size)) for size in (3, elements))
    network.frozen = torch.nn.Parameter(torch.zeros(99), requires_grad=False)
    for stage, expected in ((1, False), (2, overlaps), (3, True)):
        config = engine.deepspeed_config(recipe(**fields), stage)
        safe = engine._safely_overlapped(config, network)
        assert safe["zero_optimization"] == {**config["zero_optimization"], "overlap_comm": expected}


def test_a_parameter_without_a_part_in_the_loss_has_a_gradient_of_zero_on_one_worker_too() -> None:
    """The optimizer would leave it out there, and let it decay on several."""
    network = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "unused": torch.nn.Linear(2, 1)})
    network["used"](torch.ones(1, 2)).sum().backward()
    engine.reduce_gradients(SimpleNamespace(module=network, enable_backward_allreduce=False))
    assert [float(parameter.grad.abs().sum()) for parameter in network.parameters()] == [2.0, 1.0, 0.0, 0.0]


# --- what it learns


UNTIL = 5
LEARNED: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "float32": [(stage, {}) for stage in range(4)],
    "offload": [
        *((stage, {"deepspeed__offload": "optimizer"}) for stage in (1, 2, 3)),
        (3, {"deepspeed__offload": "parameters"}),
    ],
    "as on gpus": [
        *((stage, {"cluster__gpus_per_worker": 1}) for stage in range(4)),
        *((stage, {"cluster__gpus_per_worker": 1, "deepspeed__offload": "optimizer"}) for stage in (1, 2, 3)),
    ],
    "bfloat16": [(stage, {"model__dtype": "bfloat16"}) for stage in range(4)],
    "frozen": [(0, {"model__freeze": 1})],
    "bfloat16 frozen": [(stage, {"model__dtype": "bfloat16", "model__freeze": 1}) for stage in range(4)],
    "lora": [(0, {"model__lora": "{r: 3}"})],
    # On a GPU, says the recipe; a scaler of losses works here as well.
    "float16": [(stage, {"model__dtype": "float16", "cluster__gpus_per_worker": 1}) for stage in range(4)],
    "bfloat16 lora": [(stage, {"model__dtype": "bfloat16", "model__lora": "{r: 3}"}) for stage in range(4)],
    "sent in 16 bits": [(stage, {"deepspeed__extra": "{communication_data_type: bf16}"}) for stage in range(4)],
    # What DeepSpeed does unless told otherwise, so that the test below is known to see it.
    "narrow reduction": [
        (
            2,
            {
                "model__dtype": "bfloat16",
                "deepspeed__extra": "{torch_autocast: {lower_precision_safe_modules: [torch.nn.Linear]}}",
            },
        )
    ],
}


@pytest.fixture(scope="module")
def learned(bert: str) -> dict[str, list[dict[str, Any]]]:
    """Two workers, five steps of each configuration above, in one group: an engine after another."""
    flat = [(name, stage, fields) for name, entries in LEARNED.items() for stage, fields in entries]
    cases = [{"recipe": plain(deepspeed__zero_stage=stage, **fields), "until": UNTIL} for _, stage, fields in flat]
    found: dict[str, list[dict[str, Any]]] = {}
    for (name, _, _), result in zip(flat, run_group(losses_of, 2, bert, cases)[0], strict=True):
        found.setdefault(name, []).append(result)
    return found


@pytest.mark.slow
def test_offload_changes_no_loss(learned: dict[str, list[dict[str, Any]]]) -> None:
    whole = learned["float32"][0]["losses"]
    assert len(whole) == UNTIL
    for result in [*learned["float32"], *learned["offload"], *learned["as on gpus"]]:
        assert result["losses"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", " frozen", " lora"])
def test_bfloat16_stays_close_to_float32(learned: dict[str, list[dict[str, Any]]], kind: str) -> None:
    whole = learned[kind.strip() or "float32"][0]["losses"]
    for stage, result in enumerate(learned["bfloat16" + kind]):
        assert result["losses"] == pytest.approx(whole, rel=0.02), stage
        assert result["losses"] != whole, stage
        assert result["learning"] == result["masters"] == {"torch.float32"}, stage
        assert result["frozen"] == ({"torch.float32" if stage == 3 else "torch.bfloat16"} if kind else set()), stage


@pytest.mark.slow
def test_a_loss_scale_that_is_too_large_is_halved_and_its_steps_left_out(
    learned: dict[str, list[dict[str, Any]]],
) -> None:
    """It begins at 65,536, by which gradients overflow; the losses of left-out steps stay where they were."""
    whole = learned["float32"][0]["losses"]
    for result in learned["float16"]:
        assert result["losses"][0] == pytest.approx(whole[0], rel=0.02)
        assert all(loss == pytest.approx(whole[0], rel=0.2) for loss in result["losses"])


CLIPPED = 0.05  # far below the norm of the first gradients


@pytest.mark.slow
def test_with_a_loss_scale_gradients_are_clipped_as_without(bert: str, tmp_path: Path) -> None:
    """The scale grows by steps, not by groups of parameters; an overflow on one rank leaves the step out on all."""
    half = {"model__dtype": "float16", "cluster__gpus_per_worker": 1, "train__max_grad_norm": CLIPPED}
    for decay in (1.0, 0.9):  # one group of parameters, and several
        kinds = [(stage, "none") for stage in range(4)] + [(stage, "optimizer") for stage in (1, 2, 3)]
        cases = [
            plain(deepspeed__zero_stage=stage, deepspeed__offload=offload, train__layer_lr_decay=decay, **half)
            for stage, offload in kinds
        ]
        found = run_group(scaled_steps, 2, bert, cases)[0]
        for moments, scales, growth in found:
            assert moments == pytest.approx(0.1 * CLIPPED, rel=0.02)  # what is left of Adam's first average
            assert scales == [65536.0, 65536.0, 32768.0]
            assert growth == [1, 2, 0]


@pytest.mark.slow
def test_gradients_are_reduced_in_float32(learned: dict[str, list[dict[str, Any]]]) -> None:
    for result in [*learned["bfloat16"], *learned["float32"], *learned["bfloat16 lora"]]:
        assert result["buckets"] == {"torch.float32"}
    assert learned["narrow reduction"][0]["buckets"] == {"torch.bfloat16", "torch.float32"}


@pytest.mark.slow
def test_gradients_are_sent_in_16_bits_where_that_is_asked_for(learned: dict[str, list[dict[str, Any]]]) -> None:
    whole = learned["float32"][0]["losses"]
    for stage, result in enumerate(learned["sent in 16 bits"]):
        assert result["losses"][0] == pytest.approx(whole[0], rel=1e-6), stage  # nothing was sent before it
        assert result["losses"] == pytest.approx(whole, rel=0.01), stage
        assert all(loss != plain for loss, plain in zip(result["losses"][1:], whole[1:], strict=True)), stage
        assert result["masters"] == {"torch.float32"}, stage


# --- one engine after another


@pytest.mark.slow
def test_deepspeed_waits_as_long_as_the_group_that_it_is_given(bert: str) -> None:
    """For each engine of a process, and in a group that the process joins later."""
    for found in run_group(patience_of, 2, bert, [0, 2, 3]):
        assert found == [(TIMEOUT_S, TIMEOUT_S)] * 3 + [(77.0, 77.0)]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "most"), [(0, 1), (2, 1), (3, 5)])
def test_memory_is_flat_over_engines(tmp_path: Path, stage: int, most: float) -> None:
    """A model of 21.8 MB. Measured: 0.1 to 0.6 MB more per engine at stages 0 and 2, 1.3 to 2.7 at stage 3."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2000,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=1024,
        num_labels=3,
    )
    BertForSequenceClassification(config).save_pretrained(str(tmp_path))
    allocated = run_group(memory_of, 2, str(tmp_path), plain(deepspeed__zero_stage=stage), 5)[0]
    assert max(later - earlier for earlier, later in pairwise(allocated)) < most, allocated


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(bert: str) -> None:
    """Not at stage 3, which the recipe refuses: DeepSpeed's hooks were compiled anew at each module, for minutes."""
    for stage, (eager, fast, graphs) in zip((0, 2), run_group(compiled, 2, bert, [0, 2])[0], strict=True):
        assert fast == pytest.approx(eager, rel=1e-5), stage
        assert graphs > 0, stage
