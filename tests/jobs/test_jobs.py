"""Every recipe in jobs/: valid as it stands, its data and their licence beside it, and a small version of it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rayft import tasks
from rayft.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "May I ask a question?"
NOISE = np.random.default_rng(0).normal(size=12_000).astype(np.float32)
ASKED = {  # what the exported model of a job is asked, where that is no question
    "masked_lm": "May I ask a [MASK]?",
    "image_classification": str(next((ROOT / "jobs/data/blood_cells/test/RBC").glob("*.jpg"))),
    "audio_classification": NOISE,
    "speech_recognition": NOISE,
    "face_recognition": str(ROOT / "jobs/data/london_faces/test/014/neutral.jpg"),
}
MORE = {"quickstart", "sweep", "mathematics", "consultations"}  # beside one for each task
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the recipes start at the repository's root, where the README says to run them."""
    monkeypatch.chdir(ROOT)


def test_one_job_per_task_and_the_others_are_there() -> None:
    assert {path.stem for path in JOBS} == {name.replace("-", "_") for name in tasks.names()} | MORE


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_is_valid(path: Path) -> None:
    recipe = Recipe.load(str(path.relative_to(ROOT)))
    assert Recipe.parse(recipe.dump()) == recipe


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_says_what_to_change_for_a_large_model(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert [
        word for word in ("model.path", "cluster", "storage", "zero_stage", "dtype") if word not in str(comments)
    ] == []


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_data_of_job_is_bundled_with_origin_and_licence(path: Path) -> None:
    data = Recipe.load(str(path.relative_to(ROOT))).data
    assert data.train
    assert data.validation
    assert data.test
    for source in (*data.train, *data.validation, *data.test):
        file = ROOT / source.path
        assert file.exists()
        assert "Licence" in (file.parent / "README.md").read_text()
        assert list(file.parent.glob("LICENSE*"))


def test_jobs_have_different_names() -> None:
    names = [Recipe.load(str(path.relative_to(ROOT))).name for path in JOBS]
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_small_version_of_the_job_runs(path: Path, tmp_path: Path, ray_local: None) -> None:
    """Three steps on the validation rows, and a model that transformers loads."""
    from transformers import pipeline

    from rayft.run import run

    name = str(path.relative_to(ROOT))
    rows = Recipe.load(name).data.validation
    assert rows is not None
    small = ["train.max_steps=3", "data.test=null", f"data.train={rows[0].path}", f"storage={tmp_path}"]
    result = run(Recipe.load(name, small), show=lambda event: None)
    assert (result["status"], result["steps"]) == ("finished", 3)
    assert (tmp_path / result["run"].rsplit("/", 1)[1] / "export" / "model.safetensors").exists()
    if result["pipeline"]:
        answer = pipeline(result["pipeline"], model=result["export"], device="cpu")(ASKED.get(path.stem, QUESTION))
        assert answer or result["pipeline"] == "token-classification"  # three steps may find no name
