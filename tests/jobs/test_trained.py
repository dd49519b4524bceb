"""A small version of every job, trained whole: what a task's training has to keep, whatever the task is.

One process of a group trains all of them, then two do; what Ray adds around that is the same for every task, and tested
in tests/test_run.py, tests/test_plain_ray.py and beyond.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

from group import run_group
from rayft.data.pieces import fragments
from rayft.data.prepare import prepare
from rayft.data.source import read
from rayft.inference import Answering, Block, Model
from rayft.models import fetch_model
from rayft.recipe import Recipe, set_field
from rayft.training.assembly import pretrained
from small import ROOT, small_bert
from whole import trained_all

STEPS = 20
FEW, HALF = 4, 2  # of steps where weights are sharded
ROWS = 32
PREDICTED = 4
GOLDEN = ROOT / "tests" / "golden" / "losses.json"
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.yaml"))
SMALL = {  # what makes a job small, beside what all have
    "causal_lm": {"task.max_length": 96},
    "consultations": {"task.max_length": 96},
    "mathematics": {"task.max_length": 96, "task.max_new_tokens": 4, "task.answer_share": 1.0},
    "masked_lm": {"task.max_length": 48},
    "question_answering": {"task.max_length": 96, "task.stride": 32},
    "sentence_embedding": {"task.group_size": 4},
    # At their own learning rate roundings of the networks from nothing grow faster than what is asked of two workers.
    "image_classification": {"model.batch_norm_rows": 4, "train.learning_rate": 1e-4},
    "face_recognition": {"model.batch_norm_rows": 4, "train.learning_rate": 1e-4},
    "text_to_image": {"task.sample_share": 0.1, "task.sample_steps": 2},
    "text_to_image_subject": {"task.sample_steps": 2},
}
NOISE = np.random.default_rng(0).normal(size=12_000).astype(np.float32)
ASKED = {  # what the exported model of a job is asked, where that is no question
    "masked_lm": "May I ask a [MASK]?",
    "image_classification": str(next((ROOT / "jobs/data/blood_cells/test/RBC").glob("*.jpg"))),
    "audio_classification": NOISE,
    "speech_recognition": NOISE,
    "face_recognition": str(ROOT / "jobs/data/london_faces/test/014/neutral.jpg"),
}
ALONE = Path(__file__).with_name("alone.py")
SHOWN = {  # rows that are predicted, where the job's own rows would not ask for anything
    "masked_lm": {"answer": ["Take one [MASK] a day.", "The [MASK] of the [MASK] is rare.", "[MASK] is a disease."]},
}


def some_rows(path: str, folder: Path) -> str:
    """The first rows of a file, as a file of its own; a folder, or a list of files, stays as it is."""
    file = ROOT / path
    target = folder / f"{file.parent.name}-{file.name}"
    if file.suffix == ".parquet":
        pd.read_parquet(file).head(ROWS).to_parquet(target)
    elif file.suffix in (".csv", ".jsonl") and file.name != "metadata.csv":
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        target.write_text("".join(lines[: ROWS + 1]), encoding="utf-8")
    else:
        return str(file)
    return str(target)


def small_version(job: str, folder: Path, bert: str) -> dict[str, Any]:
    """The job's recipe on a few of its validation rows, for one worker without dropout; MiniLM becomes a small BERT."""
    plain = Recipe.load(str(ROOT / "jobs" / f"{job}.yaml")).dump()
    rows = plain["data"]["validation"][0]
    rows = {**rows, "path": some_rows(rows["path"], folder)}
    path = plain["model"]["path"]
    fields = {
        "name": job,
        "storage": str(folder / "runs"),
        "data.train": rows,
        "data.validation": rows,
        "data.test": None,
        "model.path": bert if path.startswith("pkg:") else str(ROOT / path),
        "model.dropout": 0.0,
        "train.epochs": None,
        "train.max_steps": STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
        "train.schedule": "constant",
        "train.warmup": 0.0,
        "train.evaluate_every": f"{STEPS} steps",
        "train.save_every": f"{STEPS} steps",
        "cluster.workers": 1,
        "deepspeed.zero_stage": 0,
        "tune": None,
        **SMALL.get(job, {}),
    }
    for name, value in fields.items():
        set_field(plain, name, value)
    return plain


def sharded_by_two(plain: dict[str, Any], name: str) -> dict[str, Any]:
    """The first steps of a small recipe, by two workers with ZeRO-3."""
    copied = json.loads(json.dumps(plain))
    fields = {
        "name": name,
        "train.max_steps": FEW,
        "train.evaluate_every": f"{FEW} steps",
        "train.save_every": f"{HALF} steps",
        "cluster.workers": 2,
        "deepspeed.zero_stage": 3,
    }
    for field, value in fields.items():
        set_field(copied, field, value)
    return copied


@pytest.fixture(scope="module")
def small_jobs(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> dict[str, dict[str, Any]]:
    """{job: its small recipe}, whose rows are prepared."""
    folder = tmp_path_factory.mktemp("jobs")
    bert = small_bert(folder / "bert")
    made = {job: small_version(job, folder, bert) for job in JOBS}
    for plain in made.values():
        recipe = Recipe.parse(plain)
        prepare(recipe, fetch_model(recipe.model.path))
    return made


@pytest.fixture(scope="module")
def alone(small_jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{job: what its run by one worker gave}, model folder included."""
    return dict(zip(small_jobs, run_group(trained_all, 1, list(small_jobs.values()), True)[0], strict=True))


@pytest.fixture(scope="module")
def sharded(small_jobs: dict[str, dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """{job: its runs by two workers with ZeRO-3, untouched and gone on from the middle}."""
    whole = [sharded_by_two(plain, f"{job}-sharded") for job, plain in small_jobs.items()]
    again = [sharded_by_two(plain, f"{job}-again") for job, plain in small_jobs.items()]
    return dict(zip(small_jobs, zip(*run_group(_whole_and_again, 2, whole, again)[0], strict=True), strict=True))


def _whole_and_again(whole: list[dict[str, Any]], again: list[dict[str, Any]]) -> tuple[Any, Any]:
    """On a worker: the first runs, then the others from those's first checkpoints."""
    import torch.distributed as dist

    untouched = trained_all(whole)
    if dist.get_rank() == 0:
        for one, other in zip(whole, again, strict=True):
            name = f"checkpoints/step-{HALF:06d}-a1"
            shutil.copytree(Path(Recipe.parse(one).folder) / name, Path(Recipe.parse(other).folder) / name)
    dist.barrier()
    return untouched, trained_all(again)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_the_job_runs_and_transformers_loads_its_model(job: str, alone: dict[str, dict[str, Any]]) -> None:
    result = alone[job]["result"]
    assert (result["status"], result["steps"]) == ("finished", STEPS)
    assert list(Path(result["export"]).rglob("*.safetensors"))
    if result["pipeline"]:
        asked = ASKED.get(job, "May I ask a question?")
        few = {"max_new_tokens": 4} if result["pipeline"] == "text-generation" else {}
        answer = pipeline(result["pipeline"], model=result["export"], device="cpu")(asked, **few)
        assert answer or result["pipeline"] == "token-classification"  # so few steps may find no name


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_losses_are_those_of_before(job: str, alone: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> None:
    """Up to what processors with other instructions round otherwise."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--update-goldens"):
        golden[job] = [float(f"{loss:.6g}") for loss in alone[job]["losses"]]
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    found = alone[job]["losses"]
    assert found[:5] == pytest.approx(golden[job][:5], rel=1e-3)
    assert found == pytest.approx(golden[job], rel=1e-2)  # roundings grow from step to step
    assert len(golden[job]) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_two_workers_with_sharded_weights_learn_the_same(
    job: str, alone: dict[str, dict[str, Any]], sharded: dict[str, Any]
) -> None:
    untouched, _ = sharded[job]
    assert untouched["losses"] == pytest.approx(alone[job]["losses"][:FEW], rel=1e-5)
    assert untouched["scores"][0].keys() == alone[job]["scores"][0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_stopped_half_way_goes_on_bit_equal(job: str, sharded: dict[str, Any]) -> None:
    untouched, again = sharded[job]
    assert again["losses"] == untouched["losses"][HALF:]
    assert again["scores"][-1] == untouched["scores"][-1]


@pytest.fixture(scope="module")
def asked(small_jobs: dict[str, dict[str, Any]], alone: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{job: its exported model's folder, some rows, and what rayft predicts for them}"""
    return {job: predicted(job, Recipe.parse(small_jobs[job]), alone[job]["result"]["export"]) for job in small_jobs}


def predicted(job: str, recipe: Recipe, folder: str) -> dict[str, Any]:
    task = recipe.task
    if task.type == "speech-recognition":
        _make_it_spell(Path(folder))
    facts = json.loads((Path(folder) / "rayft.json").read_text())["facts"]
    source = recipe.data.validation[0]
    piece = fragments([source])[0]
    rows = next(read(piece, source, recipe.data.columns, task.columns(labelled=False), PREDICTED))
    if job in SHOWN:
        rows.columns, count = SHOWN[job], len(SHOWN[job]["answer"])
        rows.numbers, rows.lines = rows.numbers[:count], rows.lines[:count]
    (answers,) = Answering(Model(folder, task, facts), labelled=False)(Block(piece, rows, []))
    assert not answers.bad
    given = dict(rows.columns)
    if task.type == "text-to-image":
        processor = task.processor(pretrained(recipe, folder))
        drawn = task.encode(rows.columns, processor, facts, evaluation=True, labelled=False).features["draw"]
        given["noise"] = [processor.drawn(draw)[0][0].tolist() for draw in drawn]
    found = [dict(answers.predictions[place]) for place in range(answers.rows)]
    for one in found:
        if "picture" in one:
            one["picture"] = base64.b64encode(one["picture"]).decode()
    return {"folder": folder, "task": task.model_dump(), "rows": given, "predictions": found}


def _make_it_spell(folder: Path) -> None:
    """After so few steps a recogniser gives blanks alone: they are made less probable than letters."""
    blank = json.loads((folder / "config.json").read_text())["pad_token_id"]
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.bias"][blank] -= 20
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def answered(asked: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """{job: what its exported model predicts for the same rows in a process that has no rayft}"""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "asked.json").write_text(json.dumps(list(asked.values())))
    subprocess.run([sys.executable, str(ALONE), str(folder / "asked.json"), str(folder / "answers.json")], check=True)
    return dict(zip(asked, json.loads((folder / "answers.json").read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_the_exported_model_predicts_the_same_without_rayft(
    job: str, asked: dict[str, dict[str, Any]], answered: dict[str, Any]
) -> None:
    own, others = asked[job]["predictions"], answered[job]
    assert len(own) == len(others) > 1
    for mine, plain in zip(own, others, strict=True):
        for name, value in plain.items():
            assert value
            if name == "picture":
                pixels, expected = (np.asarray(_picture(one), np.int16) for one in (value, mine[name]))
                assert np.abs(pixels - expected).max() <= 1
            elif name in ("score", "scores", "embedding"):
                assert value == pytest.approx(mine[name], abs=1e-5)
            else:
                assert value == mine[name]


def _picture(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))
