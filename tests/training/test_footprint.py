"""What parameters take, and what is counted once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from rayft.launch import placement
from rayft.training import footprint
from rayft.training.footprint import Parameters
from test_loop import recipe


def test_the_least_sharding_that_fits_is_taken() -> None:
    """100 M parameters on 4 workers: 1,600 MB whole; 800 + 300, 400 + 100 + 300 and 400 MB at stages 1, 2 and 3."""
    of = recipe(deepspeed__zero_stage="auto", cluster__workers=4)
    sizes = [footprint.state_bytes(of, stage, 100_000_000, 0) / 1e6 for stage in range(4)]
    assert sizes == [1600, 1100, 800, 400]
    for stage, size in enumerate(sizes):
        assert footprint.zero_stage(of, 100_000_000, 0, int(2e6 * size)) == stage
        assert footprint.zero_stage(of, 100_000_000, 0, int(2e6 * size) - 2) == min(3, stage + 1)
    assert footprint.zero_stage(of, 100_000_000, 0, None) == 0
    compiled = recipe(deepspeed__zero_stage="auto", cluster__workers=4, model__compile=True)
    assert footprint.zero_stage(compiled, 100_000_000, 0, 1) == 2
    assert footprint.zero_stage(recipe(deepspeed__zero_stage=1), 100_000_000, 0, 1) == 1
    assert footprint.zero_stage(recipe(deepspeed__zero_stage="auto", deepspeed__offload="optimizer"), 9, 0, 10**9) == 1
    assert footprint.zero_stage(recipe(deepspeed__zero_stage="auto", deepspeed__offload="parameters"), 9, 0, 10**9) == 3


def test_frozen_parameters_count_in_the_precision_they_are_stored_in() -> None:
    narrow = recipe(model__dtype="bfloat16", cluster__workers=2)
    assert [footprint.state_bytes(narrow, stage, 0, 1000) for stage in range(4)] == [2000, 2000, 2000, 2000]
    assert [footprint.state_bytes(recipe(cluster__workers=2), stage, 0, 1000) for stage in range(4)] == [
        4000,
        4000,
        4000,
        2000,
    ]


def test_a_machine_with_gpus_needs_memory_of_its_own_for_weights_on_their_way() -> None:
    """1 B parameters of float32, 4 workers on a machine: 16 GB at stage 2, 4 GB at stage 3, where one alone reads."""
    whole = Parameters(trainable=10**9, most=10**9, total=10**9)
    own = {"cluster__workers": 8, "cluster__gpus_per_worker": 1}
    of = {stage: recipe(deepspeed__zero_stage=stage, **own) for stage in (0, 2, 3)}
    assert [whole.machine_bytes(of[stage], 4) / 1e9 for stage in (0, 2, 3)] == [16, 16, 4]
    offloaded = recipe(deepspeed__zero_stage=2, deepspeed__offload="optimizer", **own)
    assert whole.machine_bytes(offloaded, 4) / 1e9 == 16 + 16 / 2
    adapters = recipe(deepspeed__zero_stage=0, model__lora={"r": 8}, model__dtype="bfloat16", **own)
    assert Parameters(trainable=10**6, most=10**6, total=10**9).machine_bytes(adapters, 4) / 1e9 == 8


def test_machines_with_too_little_memory_beside_their_gpus_are_told_of() -> None:
    whole, gib = Parameters(trainable=10**9, most=10**9, total=10**9), 1 << 30
    gpus = recipe(deepspeed__zero_stage=2, cluster__workers=8, cluster__gpus_per_worker=1)
    assert placement.short_of_memory(gpus, whole, [(64 * gib, 4), (16 * gib, 4)]) is None
    told = placement.short_of_memory(gpus, whole, [(64 * gib, 4), (8 * gib, 4)])
    assert told is not None
    assert "4 workers of one machine need about 16.0 GB beside the GPUs', and it has 8.6 GB" in told
    assert placement.short_of_memory(gpus, whole, []) is None
    assert placement.short_of_memory(recipe(deepspeed__zero_stage=2), whole, [(1, 2)]) is None


# --- counted once

COUNTED = Parameters(trainable=3, most=5, total=8, norms=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}", encoding="utf-8")
    return tmp_path / "model"


def found(model: Path, epochs: int = 1, **fields: Any) -> Parameters | None:
    training: Any = SimpleNamespace(folder=str(model.parent / "prepared"))
    return footprint.known(recipe(**fields), str(model), training, epochs)


def kept(model: Path, epochs: int = 1, **fields: Any) -> None:
    training: Any = SimpleNamespace(folder=str(model.parent / "prepared"))
    footprint.keep(recipe(**fields), str(model), training, epochs, COUNTED)


def test_what_was_counted_is_found_by_runs_that_train_the_same_parameters(model: Path) -> None:
    assert found(model) is None
    kept(model)
    same = ({"name": "other"}, {"train__learning_rate": 1e-5}, {"cluster__workers": 4}, {"deepspeed__zero_stage": 3})
    assert [found(model, 7, **fields) for fields in same] == [COUNTED] * len(same)
    others = ({"model__freeze": "{layers: 1}"}, {"model__lora": "{r: 4}"}, {"task__max_length": 31})
    assert [found(model, **fields) for fields in others] == [None] * len(others)
    (model / "config.json").write_text('{"hidden_size": 32}', encoding="utf-8")
    assert found(model) is None


@pytest.mark.parametrize("torn", ["", '{"trainable": 3', "[]", '{"trainable": 3}'])
def test_what_was_kept_only_in_part_is_counted_again(model: Path, torn: str) -> None:
    kept(model)
    (memo,) = (model.parent / "prepared").iterdir()
    memo.write_text(torn, encoding="utf-8")
    assert found(model) is None


def test_with_gradual_unfreezing_the_epochs_count(model: Path) -> None:
    gradually = {"model__freeze": "{layers: 1}", "model__unfreeze_every": 1}
    kept(model, 2, **gradually)
    assert found(model, 2, **gradually) == COUNTED
    assert found(model, 3, **gradually) is None


def test_of_a_model_on_the_hub_nothing_is_kept(tmp_path: Path) -> None:
    kept(tmp_path / "owner/name")
    assert found(tmp_path / "owner/name") is None
    assert not (tmp_path / "owner").exists()
