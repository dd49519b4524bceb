"""Every recipe in jobs/: valid as it stands, its data and their licence beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft import tasks
from rayft.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
MORE = {
    "quickstart",
    "sweep",
    "mathematics",
    "consultations",
    "text_to_image_subject",
    "medical_topics",
}  # beside one for each task
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
