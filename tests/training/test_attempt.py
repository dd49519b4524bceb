"""One attempt, whole: what its result says is true of the model that it exports."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from group import run_group
from rayft.recipe import Recipe
from rayft.training import attempt
from rayft.training.attempt import Run
from rayft.training.progress import Progress
from rayft.training.watch import Watch
from small import recipe, small_bert
from whole import trained_all


def test_a_model_that_was_best_before_blocks_were_unfrozen_is_the_one_tested(tmp_path: Path) -> None:
    """The learning rate is far too high for the last block, so the best model is that of the first epoch."""
    fields = {
        "model__freeze": 3,
        "model__unfreeze_every": 1,
        "train__learning_rate": 0.06,
        "train__schedule": "constant",
        "train__metric": "eval_loss",
        "deepspeed__zero_stage": 0,
        "cluster__workers": 1,
    }
    plain = Recipe.parse(recipe(tmp_path, small_bert(tmp_path / "model", blocks=3), **fields)).resolved()
    (found,) = run_group(trained_all, 1, [plain.dump()], True)[0]
    result = found["result"]
    assert (result["best"]["step"], result["steps"]) == (13, 26)
    assert plain.data.test is not None
    with Path(plain.data.test[0].path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    folder = result["export"]
    network, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    inputs = tokenizer([row["text"] for row in rows], truncation=True, max_length=32, padding=True, return_tensors="pt")
    labels = torch.tensor([network.config.label2id[row["label"]] for row in rows])
    with torch.inference_mode():
        loss = network(**inputs, labels=labels).loss
    assert result["metrics"]["test_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_a_rank_goes_back_to_the_best_model_only_once_rank_0_has_committed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one rank has written is no checkpoint yet: another's part may still be on its way."""
    told: list[str] = []
    run = object.__new__(Run)
    run.watch, run.progress = Watch(None, 0), Progress(finished=True)
    run.saver = SimpleNamespace(release=lambda: told.append("written"))  # type: ignore[assignment]
    monkeypatch.setattr(run, "_build", lambda: None)
    monkeypatch.setattr(attempt, "together", lambda: told.append("all have"))
    assert list(run._trained(None)) == []
    assert told == ["written", "all have"]


def test_the_best_model_is_read_once_every_rank_has_fetched_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded weights are read in collectives, which do not wait as long as a copy from object storage may take."""
    told: list[str] = []
    saved = MagicMock(names={"weight"})
    saved.__enter__.return_value = saved
    saved.fetch.side_effect = lambda network: told.append("fetch")
    saved.load_weights.side_effect = lambda network: told.append("load_weights")
    run = object.__new__(Run)
    run.watch, run.engine = Watch(None, 0), MagicMock()
    run.norms = MagicMock()
    monkeypatch.setattr(attempt.checkpoint, "Checkpoint", lambda path: saved)
    monkeypatch.setattr(attempt.checkpoint, "shapes", lambda engine, statistics: {"weight": (1,)})
    monkeypatch.setattr(attempt, "together", lambda: told.append("together"))
    run._go_back_to("best")
    assert told == ["fetch", "together", "load_weights"]
