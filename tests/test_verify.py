"""What `verify` says of two runs: where they are equal and, above all, where they are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rayft import verify
from rayft.recipe import Recipe
from rayft.text import verified_lines
from rayft.training import repeatable
from rayft.verify import compared


def left(folder: Path, losses: dict[int, float], tensors: dict[str, torch.Tensor]) -> str:
    """A run's folder with these losses by step, and an export of these tensors."""
    (folder / "export").mkdir(parents=True)
    rows = [{"step": step, "loss": loss} for step, loss in losses.items()] + [{"step": 4, "eval_loss": 0.3}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_file(tensors, str(folder / "export" / "model.safetensors"))
    return str(folder)


LOSSES = {1: 0.7, 2: 0.6, 3: 0.5, 4: 0.4}
TENSORS = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}


def test_equal_runs_are_told_to_be(tmp_path: Path) -> None:
    found = compared(left(tmp_path / "one", LOSSES, TENSORS), left(tmp_path / "other", LOSSES, TENSORS))
    assert found == {
        "losses": {"equal": True, "first_difference": None, "largest": 0.0},
        "weights": {"equal": True, "tensors": 2, "different": 0},
    }
    assert verified_lines({**found, "exact": True, "killed_at": 2, "steps": 4}) == [
        "killed after step 2 and gone on to step 4: resumes exactly, 4 losses and 2 tensors are bit-equal"
    ]


@pytest.mark.parametrize(
    ("losses", "first", "largest"),
    [
        ({**LOSSES, 3: 0.5000001, 4: 0.44}, [3, 0.5, 0.5000001], 0.1),
        ({step: LOSSES[step] for step in (1, 2, 3)}, [4, 0.4, None], 0.0),  # a step is missing
        ({**LOSSES, 5: 0.3}, [5, None, 0.3], 0.0),  # one too many
    ],
)
def test_the_first_step_that_differs_is_named(
    tmp_path: Path, losses: dict[int, float], first: list[float], largest: float
) -> None:
    found = compared(left(tmp_path / "one", LOSSES, TENSORS), left(tmp_path / "other", losses, TENSORS))
    assert found["losses"]["equal"] is False
    assert found["losses"]["first_difference"] == first
    assert found["losses"]["largest"] == pytest.approx(largest)
    lines = verified_lines({**found, "exact": False, "killed_at": 2, "steps": 4})
    assert lines[0] == "killed after step 2 and gone on to step 4: does not resume exactly"
    assert lines[1].startswith(f"losses differ from step {first[0]} on: ")
    assert len(lines) == 3


@pytest.mark.parametrize(
    "tensors",
    [
        {**TENSORS, "a": torch.tensor([0.0, 1.0, 2.0, 3.0000002])},  # the last bit
        {"a": TENSORS["a"]},
        {**TENSORS, "a": TENSORS["a"].double()},
    ],
)
def test_tensors_that_differ_in_a_bit_a_type_or_are_missing_are_counted(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    found = compared(left(tmp_path / "one", LOSSES, TENSORS), left(tmp_path / "other", LOSSES, tensors))
    assert found["weights"] == {"equal": False, "tensors": 2, "different": 1}
    lines = verified_lines({**found, "exact": False, "killed_at": 2, "steps": 4})
    assert lines[1:] == ["1 of 2 exported tensors differ"]


@pytest.mark.parametrize("gpus", [0, 1])
def test_with_gpus_both_runs_are_asked_to_repeat_their_sums(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {
        "name": "x", "task": {"type": "text-classification"}, "model": {"path": "m"}, "data": {"train": "d.csv"},
        "train": {"epochs": 1}, "cluster": {"gpus_per_worker": gpus},
    }  # fmt: skip
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(verify.subprocess, "Popen", lambda *_, env, **__: seen.append(env))
    verify._start(Recipe.parse(plain), tmp_path)
    assert (repeatable.ENVIRONMENT.items() <= seen[0].items()) is bool(gpus)


def test_where_gpus_may_be_the_cause_of_a_difference_that_is_said(tmp_path: Path) -> None:
    runs = left(tmp_path / "one", LOSSES, TENSORS), left(tmp_path / "other", {**LOSSES, 4: 0.4000001}, TENSORS)
    found = {**compared(*runs), "exact": False, "killed_at": 2, "steps": 4}
    assert not any("GPUs" in line for line in verified_lines({**found, "gpus": False}))
    assert "GPUs" in verified_lines({**found, "gpus": True})[-1]
