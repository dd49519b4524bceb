"""Face recognition: the margin, people never seen, the scores of verification, and what an export is good for."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score, roc_curve
from transformers import BertConfig, ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessorPil, ViTModel

from rayft.errors import DataError, ModelError
from rayft.recipe import Lora
from rayft.tasks.face_recognition import FaceRecognition, verification
from rayft.tasks.face_recognition.arcface import arcface_loss, with_margin
from rayft.tasks.task import Pretrained
from rayft.training.export import new_parameters
from rayft.training.freeze import adapt

FACES = Path(__file__).resolve().parents[2] / "jobs/data/london_faces"
PEOPLE = ("003", "008", "018")
ROWS = {
    "file_name": [str(FACES / "validation" / one / f"{look}.jpg") for one in PEOPLE for look in ("neutral", "smiling")],
    "identity": [one for one in PEOPLE for _ in range(2)],
}
FACTS = {"identities": ["003", "008"]}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small ViT."""
    made = str(tmp_path_factory.mktemp("vit"))
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8, initializer_range=0.3)).save_pretrained(made)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(made)
    return made


def loaded(folder: str, facts: dict[str, Any] = FACTS, **options: Any) -> tuple[FaceRecognition, Any, Any]:
    task, source = FaceRecognition(), Pretrained(folder, **options)
    processor = task.processor(source)
    return task, processor, task.load(source, facts, processor).eval()


def by_hand(cosines: np.ndarray, labels: np.ndarray, scale: float, margin: float, smoothing: float) -> float:
    """The paper's equation 3, row by row."""
    total = 0.0
    for row, label in zip(cosines, labels, strict=True):
        logits = [scale * math.cos(math.acos(c) + margin * (place == label)) for place, c in enumerate(row)]
        log_sum = math.log(sum(map(math.exp, logits)))
        losses = [log_sum - one for one in logits]
        total += (1 - smoothing) * losses[label] + smoothing * sum(losses) / len(losses)
    return total


@pytest.mark.parametrize(("scale", "margin", "smoothing"), [(64.0, 0.5, 0.0), (16.0, 0.2, 0.1), (30.0, 0.0, 0.0)])
def test_the_loss_is_the_paper_s(scale: float, margin: float, smoothing: float) -> None:
    rng = np.random.default_rng(0)
    cosines, labels = rng.uniform(-0.6, 0.95, (5, 7)), rng.integers(0, 7, 5)
    found = arcface_loss(torch.tensor(cosines), torch.tensor(labels), scale, margin, smoothing)
    assert found.item() == pytest.approx(by_hand(cosines, labels, scale, margin, smoothing))


def test_the_margin_is_added_to_the_angle_of_the_own_identity_alone() -> None:
    cosines = torch.tensor([[0.9, 0.1, -0.3], [0.2, 0.5, 0.4]], dtype=torch.float64)
    moved = with_margin(cosines, torch.tensor([2, 0]), 0.5)
    assert (moved != cosines).nonzero().tolist() == [[0, 2], [1, 0]]
    own = [moved[0, 2].item(), moved[1, 0].item()]
    assert own == pytest.approx([math.cos(math.acos(-0.3) + 0.5), math.cos(math.acos(0.2) + 0.5)])


def test_the_own_value_rises_with_the_cosine_everywhere_and_has_a_slope() -> None:
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64).requires_grad_()
    moved = with_margin(cosines[:, None], torch.zeros(2001, dtype=torch.int64), 0.5)[:, 0]
    assert (moved.diff() > 0).all()
    moved.sum().backward()
    assert cosines.grad is not None
    assert torch.isfinite(cosines.grad).all()


def test_people_never_seen_have_embeddings_and_no_loss(folder: str) -> None:
    task, processor, network = loaded(folder)
    made = task.encode(ROWS, processor, FACTS, evaluation=True)
    assert made.features["label"] == [0, 0, 1, 1, None, None]
    assert made.references == ROWS["identity"]

    def measured(rows: slice) -> tuple[int, float, list[Any]]:
        features = {name: values[rows] for name, values in made.features.items()}
        batch = task.collate(features, processor, FACTS)
        with torch.no_grad():
            outputs = task.forward(network, batch)
        found = task.predict(outputs, batch, features, processor, FACTS)
        return task.items(batch), float(task.loss(outputs, batch)), found

    items, loss, found = measured(slice(0, 6))
    assert (items, loss) == (4, pytest.approx(measured(slice(0, 4))[1]))
    assert measured(slice(4, 6))[:2] == (0, 0.0)
    assert [math.hypot(*one["embedding"]) for one in found] == pytest.approx([1.0] * 6, abs=1e-5)


def test_rows_without_a_person_or_a_whole_picture_are_named(folder: str) -> None:
    task, processor, _ = loaded(folder)
    cells = [ROWS["file_name"][0], str(FACES / "nobody.jpg"), str(FACES / "README.md"), ROWS["file_name"][1]]
    made = task.encode({"file_name": cells, "identity": [" ", "1", "2", 3]}, processor, FACTS, evaluation=True)
    assert made.bad[0] == "`identity` is ' '; it needs a person's name or number"
    assert made.bad[1] == f"`file_name`: there is no file {cells[1]}"
    assert "is no whole picture" in made.bad[2]
    assert (made.rows, made.references) == ([3], ["3"])


def test_identities_are_those_of_the_training_rows_in_order() -> None:
    task = FaceRecognition(identity="who")
    assert task.facts([{"who": [10, "9", None]}, {"who": [2.0]}]) == {"identities": ["2", "9", "10"]}
    with pytest.raises(DataError, match="names only 'Ada'"):
        task.facts([{"who": ["Ada", "Ada"]}])
    for fields in ({"scale": 0}, {"margin": -0.1}, {"margin": 2}, {"pairs": 1}):
        with pytest.raises(ValidationError):
            FaceRecognition.model_validate(fields)


def scored(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    same = rng.random(count) < 0.2
    return same, (rng.normal(0, 1, count) + 1.5 * same).astype(np.float32)


def test_scores_agree_with_the_curve_of_scikit_learn() -> None:
    same, similarity = scored()
    found = verification.scores(same, similarity)
    accepted, right, _ = roc_curve(same, similarity)
    grid = np.linspace(0, 1, 1_000_001)
    refused = 1 - np.interp(grid, accepted, right)
    assert found["eer"] == pytest.approx(grid[np.argmin(abs(grid - refused))], abs=2e-6)
    assert found["auc"] == pytest.approx(roc_auc_score(same, similarity))
    told = similarity >= found["threshold"]
    assert found["eer"] == pytest.approx((told[~same].mean() + (~told[same]).mean()) / 2, abs=0.01)
    assert list(found) == ["auc", "accuracy", "eer", "threshold"]


@pytest.mark.parametrize(
    ("similarity", "auc", "accuracy", "eer"),
    [
        ([0.9, 0.8, 0.7, 0.3, 0.2, 0.1], 1.0, 1.0, 0.0),
        ([0.1, 0.2, 0.3, 0.7, 0.8, 0.9], 0.0, None, 1.0),
        ([0.9, 0.8, 0.2, 0.7, 0.1, 0.0], 8 / 9, None, 1 / 3),
    ],
)
def test_scores_of_six_pairs(similarity: list[float], auc: float, accuracy: float | None, eer: float) -> None:
    found = verification.scores(np.array([True] * 3 + [False] * 3), np.array(similarity))
    assert (found["auc"], found["eer"]) == (pytest.approx(auc), pytest.approx(eer))
    assert accuracy is None or found["accuracy"] == accuracy


def test_accuracy_is_no_better_than_chance_where_similarity_says_nothing() -> None:
    rng = np.random.default_rng(0)
    same = np.arange(5000) % 50 == 0
    accuracy = verification.folded_accuracy(same, rng.random(5000))
    assert accuracy == pytest.approx(0.5, abs=0.1)


def test_all_pairs_are_asked_about_or_a_fixed_sample_of_both_kinds() -> None:
    people = [str(number % 40) for number in range(200)]
    every = verification.pairs(people)
    assert (len(every.same), every.same.sum()) == (200 * 199 // 2, 40 * 10)
    some, again = (verification.pairs(people, most=2000) for _ in range(2))
    asked = set(zip(some.first.tolist(), some.second.tolist(), strict=True))
    assert len(asked) == len(some.same) <= 2000
    assert some.same.sum() == 400  # all there are: fewer than half
    assert 900 < (~some.same).sum() <= 1000
    assert all(
        (people[a] == people[b]) == same and a < b
        for (a, b), same in zip(zip(some.first, some.second, strict=True), some.same, strict=True)
    )
    assert all(np.array_equal(one, other) for one, other in zip(vars(some).values(), vars(again).values(), strict=True))
    few = verification.pairs(people, most=200)
    assert 60 < few.same.sum() <= 100


@pytest.mark.parametrize(
    ("people", "lacking"),
    [(["a", "b", "c"], "two pictures of one person"), (["a", "a"], "pictures of two people"), ([], "one person")],
)
def test_rows_without_pairs_of_both_kinds_are_told(people: list[str], lacking: str) -> None:
    with pytest.raises(DataError, match=lacking):
        verification.pairs(people)


def test_the_curve_is_drawn() -> None:
    given = [{"embedding": [math.cos(angle), math.sin(angle)]} for angle in (0, 0.1, 1.0, 1.2, 2.0)]
    ((name, content),) = FaceRecognition().pictures(given, ["a", "a", "b", "b", "c"]).items()
    assert (name, Image.open(io.BytesIO(content)).format) == ("roc", "PNG")


def exported(folder: str, target: Path) -> tuple[FaceRecognition, Any, Any]:
    task, processor, network = loaded(folder, seed=3)
    network.save_pretrained(target)
    processor.save_pretrained(target)
    task.export(str(target), network, processor, FACTS)
    return task, processor, network


def test_training_goes_on_from_an_export_with_the_same_people_alone(folder: str, tmp_path: Path) -> None:
    _, _, network = exported(folder, tmp_path)
    weight = network.arcface.weight
    assert new_parameters(network) == ("arcface.weight",)
    again = loaded(str(tmp_path), {"identities": ["008", "003"]}, seed=7)[2]
    assert torch.equal(again.arcface.weight, weight[[1, 0]])
    assert new_parameters(again) == ()
    other = loaded(str(tmp_path), {"identities": ["003", "018"]}, seed=7)[2]
    assert new_parameters(other) == ("arcface.weight",)
    assert not torch.equal(other.arcface.weight[0], weight[0])


def test_transformers_alone_gives_the_embeddings_as_the_model_card_says(folder: str, tmp_path: Path) -> None:
    task, processor, network = exported(folder, tmp_path)
    assert not any("arcface" in name for name in load_file(tmp_path / "model.safetensors"))
    exif = Image.Exif()
    exif[274] = 6  # taken with the camera on its side
    turned = [str(tmp_path / f"{place}.png") for place in range(2)]
    for path, target in zip(ROWS["file_name"], turned, strict=False):
        Image.open(path).save(target, exif=exif)
    rows = {**ROWS, "file_name": [*turned, *ROWS["file_name"][2:]]}
    made = task.encode(rows, processor, FACTS, evaluation=True)
    batch = task.collate(made.features, processor, FACTS)
    with torch.no_grad():
        ours = task.predict(task.forward(network, batch), batch, made.features, processor, FACTS)
    code = task.usage().split("```python\n")[1].split("```")[0].replace('"."', json.dumps(str(tmp_path)))
    said: dict[str, Any] = {}
    exec(code, said)
    theirs = said["embed"](*rows["file_name"])
    torch.testing.assert_close(torch.tensor([one["embedding"] for one in ours]), theirs, rtol=1e-4, atol=1e-5)


def test_an_export_in_bfloat16_gives_nearly_the_same_embeddings(folder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic")
    ResNetModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    shutil.copy(Path(folder) / "preprocessor_config.json", tmp_path)
    found = []
    for dtype in ("float32", "bfloat16"):
        task, processor, network = loaded(str(tmp_path), dtype=dtype)
        made = task.encode(ROWS, processor, FACTS, evaluation=True)
        batch = task.collate(made.features, processor, FACTS)
        with torch.no_grad():
            found.append(task.forward(network, batch)["embeddings"])
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.02)


def test_adapters_leave_the_directions_whole(folder: str, tmp_path: Path) -> None:
    task, processor, network = loaded(folder)
    wrapped: Any = adapt(network, Lora(r=2, alpha=4), new_parameters(network), seed=0)
    learning = {name for name, value in wrapped.named_parameters() if value.requires_grad}
    assert any("arcface" in name for name in learning)
    assert all("lora_" in name or "arcface" in name for name in learning)
    made = task.encode(ROWS, processor, FACTS, evaluation=False)
    batch = task.collate(made.features, processor, FACTS)
    task.loss(task.forward(wrapped, batch), batch).backward()
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path)
    task.export(str(tmp_path), merged, processor, FACTS)
    assert {"model.safetensors", "arcface.safetensors", "config.json"} <= {file.name for file in tmp_path.iterdir()}


def test_models_without_a_pooled_output_or_for_other_pictures_are_refused(folder: str, tmp_path: Path) -> None:
    for name, config in (
        ("text", BertConfig(**SIZES, vocab_size=20)),
        ("large", ViTConfig(**SIZES, image_size=64, patch_size=8)),
    ):
        config.save_pretrained(tmp_path / name)
        shutil.copy(Path(folder) / "preprocessor_config.json", tmp_path / name)
        with pytest.raises(ModelError, match="takes no pictures of 32 x 32 pixels"):
            loaded(str(tmp_path / name))


def test_the_width_is_that_of_any_model_that_pools(tmp_path: Path, folder: str) -> None:
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic").save_pretrained(tmp_path)
    shutil.copy(Path(folder) / "preprocessor_config.json", tmp_path)
    assert loaded(str(tmp_path))[2].arcface.weight.shape == (2, 24)
    assert loaded(folder)[2].arcface.weight.shape == (2, 16)
