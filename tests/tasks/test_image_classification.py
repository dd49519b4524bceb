"""Image classification: pictures as the processor sees them, how they vary, weights of classes, and what is refused."""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import (
    EfficientNetImageProcessorPil,
    ImageGPTImageProcessorPil,
    MobileViTImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
    SamImageProcessorPil,
    Siglip2ImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from rayft.errors import DataError, ModelError
from rayft.tasks.face_recognition import FaceRecognition
from rayft.tasks.image_classification import ImageClassification
from rayft.tasks.images import Augment, augmented
from rayft.tasks.task import Pretrained

ROOT = Path(__file__).resolve().parents[2]
CELLS = sorted(str(path) for path in (ROOT / "jobs/data/blood_cells/validation").glob("*/*.jpg"))[::30]
LABELS = [Path(path).parent.name for path in CELLS]
FACTS = {"labels": ["Platelets", "RBC", "WBC"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small ViT whose processor cuts out the middle."""
    made = str(tmp_path_factory.mktemp("vit"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    names = dict(enumerate(FACTS["labels"]))
    config = ViTConfig(**sizes, image_size=32, patch_size=8, id2label=names, initializer_range=0.5)
    ViTForImageClassification(config).save_pretrained(made)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(made)
    return made


def encoded(folder: str, cells: list[Any], task: ImageClassification | None = None, **options: Any) -> Any:
    task = task or ImageClassification()
    rows = {"file_name": cells, "label": ["RBC"] * len(cells)}
    return task.encode(rows, task.processor(Pretrained(folder)), FACTS, evaluation=True, **options)


def png(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png", **options)
    return file.getvalue()


def tiff(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "tiff", **options)
    return file.getvalue()


def packed_tiff(values: np.ndarray) -> bytes:
    """A TIFF file of 12-bit grey values, three bytes for two, which Pillow reads and doesn't write."""
    height, width = values.shape
    content = int("".join(f"{value:012b}" for value in values.flat), 2).to_bytes(values.size * 3 // 2, "big")
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(content)}
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = struct.pack("<I", 8 + len(content))
    return b"II*\0" + start + content + struct.pack("<H", len(tags)) + listed + bytes(4)


def test_the_model_sees_what_its_pipeline_shows_it(folder: str) -> None:
    task = ImageClassification()
    source = Pretrained(folder)
    processor = task.processor(source)
    network = task.load(source, FACTS, processor).eval()
    made = task.encode({"file_name": CELLS}, processor, FACTS, evaluation=True, labelled=False)
    batch = task.collate(made.features, processor, FACTS)
    assert torch.equal(
        batch["pixel_values"][0], processor(Image.open(CELLS[0]), return_tensors="pt")["pixel_values"][0]
    )
    with torch.no_grad():
        ours = task.predict(task.forward(network, batch), batch, made.features, processor, FACTS)
    theirs = pipeline("image-classification", model=folder, image_processor=processor, device="cpu")(CELLS, top_k=1)
    assert [one["label"] for one in ours] == [one[0]["label"] for one in theirs]
    assert [one["score"] for one in ours] == pytest.approx([one[0]["score"] for one in theirs], rel=1e-5)


def test_a_model_that_was_saved_in_bfloat16_answers_as_it_did(tmp_path: Path) -> None:
    """A ResNet's convolutions take pictures of their own width alone."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = ResNetConfig(**sizes, id2label=dict(enumerate(FACTS["labels"])))
    ResNetForImageClassification(config).to(torch.bfloat16).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    task = ImageClassification()
    processor = task.processor(Pretrained(str(tmp_path)))
    made = encoded(str(tmp_path), CELLS)
    batch = task.collate(made.features, processor, FACTS)
    with torch.no_grad():
        whole, narrow = (
            task.forward(task.load(Pretrained(str(tmp_path), dtype=dtype), FACTS, processor).eval(), batch).logits
            for dtype in ("float32", "bfloat16")
        )
    torch.testing.assert_close(narrow.float(), whole, rtol=0.05, atol=0.02)


def test_grey_transparent_and_turned_pictures_are_read(folder: str) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    turned = Image.fromarray(np.asarray(grey)[:, ::-1])  # as a camera stores it that was held upside down and mirrored
    exif = Image.Exif()
    exif[274] = 2  # mirrored
    made = encoded(folder, [png(grey), png(grey.convert("RGBA")), {"bytes": png(turned, exif=exif), "path": None}])
    assert not made.bad
    assert len(set(made.features["pixels"])) == 1


def test_grey_values_of_16_bits_keep_their_shades(folder: str) -> None:
    """As scans have them; Pillow knows several kinds of them."""
    shades = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    wide = shades.astype(np.uint16) * 256 + 255
    exif = Image.Exif()
    exif[274] = 2  # mirrored
    turned = png(Image.fromarray(np.ascontiguousarray(wide[:, ::-1])), exif=exif)
    cells = [png(Image.fromarray(shades)), png(Image.fromarray(wide)), turned]
    cells += [tiff(Image.fromarray(wide.astype(kind))) for kind in (">u2", np.int32)]
    assert [Image.open(io.BytesIO(cell)).mode for cell in cells] == ["L", "I;16", "I;16", "I;16B", "I"]
    made = encoded(folder, cells)
    assert not made.bad
    assert len(set(made.features["pixels"])) == 1
    assert len(set(made.features["pixels"][0])) > 32


def test_grey_values_of_12_bits_keep_their_shades_where_the_file_says_so(folder: str) -> None:
    """X-rays and microscopes give these; by their upper 8 of 16 bits they would be nearly black."""
    shades = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    narrow = shades.astype(np.uint16) * 16 + 15
    highest = {281: 4095}
    cells = [png(Image.fromarray(shades)), packed_tiff(narrow), tiff(Image.fromarray(narrow), tiffinfo=highest)]
    cells.append(tiff(Image.fromarray(shades.astype(np.uint16) * 256), tiffinfo={281: 50_000}))  # a statistic
    made = encoded(folder, cells)
    assert not made.bad
    assert len(set(made.features["pixels"])) == 1
    assert encoded(folder, [tiff(Image.fromarray(narrow * 2), tiffinfo=highest)]).bad == {
        0: "`file_name`: it has grey values up to 8094, and says that it uses 12 bits"
    }


@pytest.mark.parametrize("made", [png, tiff])
def test_grey_values_that_leave_the_upper_bits_empty_are_named_and_black_is_not(folder: str, made: Any) -> None:
    """Nothing in the file tells 12 bits from a picture that is nearly black."""
    values = [np.full((8, 8), most, np.uint16) for most in (255, 4095, 4096, 0)]
    told = "in 16 bits, nearly black, and doesn't say that it uses fewer bits; rescale such pictures to 8 bits, or to"
    assert encoded(folder, [made(Image.fromarray(value)) for value in values]).bad == {
        0: f"`file_name`: it has grey values up to 255 {told} all of 16",
        1: f"`file_name`: it has grey values up to 4095 {told} all of 16",
    }
    dark = tiff(Image.fromarray(values[0]), tiffinfo={281: 65535})
    assert not encoded(folder, [dark]).bad


def test_the_model_card_says_how_wide_grey_values_are_narrowed() -> None:
    assert "divided by 256" in ImageClassification().usage()
    assert "divided by 256" in FaceRecognition().usage()


def test_wider_grey_values_are_named(folder: str) -> None:
    shades = np.arange(64).reshape(8, 8)
    cells = [
        tiff(Image.fromarray(values)) for values in (shades.astype(np.float32) / 64, (shades * 2000 - 1).astype("i4"))
    ]
    assert encoded(folder, cells).bad == {
        0: "`file_name`: it has grey values from 0 to 0.984375 (fractions); whole numbers of 8 or 16 bits fit",
        1: "`file_name`: it has grey values from -1 to 125999 (32 bits); whole numbers of 8 or 16 bits fit",
    }


def test_every_bad_picture_is_named(folder: str, tmp_path: Path) -> None:
    content = Path(CELLS[0]).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    cells = [str(tmp_path / name) for name in ("cut.jpg", "text.jpg", "empty.jpg", "missing.jpg")]
    made = encoded(folder, [*cells, "cells/a.jpg", None, CELLS[0]])
    assert made.rows == [6]
    told = [made.bad[row] for row in range(6)]
    assert all(name in text for name, text in zip(cells, told[:4], strict=True))
    assert "no whole picture: " in told[0]
    assert "no whole picture: cannot identify" in told[1]
    assert "is empty" in told[2]
    assert "there is no file" in told[3]
    assert "relative path" in told[4]
    assert told[5].startswith("`file_name` is None")


def test_an_unknown_label_is_named_with_those_that_are_known(folder: str) -> None:
    task = ImageClassification()
    processor = task.processor(Pretrained(folder))
    made = task.encode({"file_name": CELLS[:2], "label": ["WBK", None]}, processor, FACTS, evaluation=False)
    assert made.bad == {
        0: "label 'WBK' is not one of Platelets, RBC, WBC; did you mean 'WBC'?",
        1: "`label` has no label; it needs one of Platelets, RBC, WBC",
    }


def test_a_picture_varies_with_its_random_numbers_alone() -> None:
    row, shape = np.random.default_rng(0).integers(0, 255, (3, 16, 24), np.uint8), [3, 16, 24]
    how = Augment(flip=0.5, flip_vertical=0.5, crop=0.5, rotate=20, brightness=0.3, contrast=0.3, saturation=0.3)

    def made(seed: int, way: Augment = how) -> bytes:
        return augmented(row.tobytes(), shape, way, np.random.default_rng(seed))

    assert made(1) == made(1)
    assert len({made(seed) for seed in range(8)}) == 8
    assert {len(made(seed)) for seed in range(8)} == {row.size}
    assert made(1, Augment(flip=1.0)) == row[:, :, ::-1].tobytes()
    assert made(1, Augment(flip=0.0, flip_vertical=1.0)) == row[:, ::-1].tobytes()
    assert made(1, Augment(flip=0.0)) == row.tobytes()
    brighter = np.frombuffer(made(3, Augment(flip=0.0, brightness=0.5)), np.uint8).reshape(shape)
    factors = brighter[row > 100].astype(float) / row[row > 100]
    assert 0.5 < np.median(factors) < 1.5
    assert np.median(factors) != 1


def test_without_augment_nothing_varies() -> None:
    assert not ImageClassification().varies
    assert ImageClassification(augment=Augment()).varies


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("balanced", [2.0, 2 / 3]), ({"rare": 3.0}, [2.0, 2 / 3]), (None, None)],
)
def test_class_weights_have_the_mean_1_over_the_training_rows(weights: Any, expected: Any) -> None:
    task = ImageClassification(class_weights=weights, labels=("rare", "usual"))
    facts = task.facts([{"label": ["usual", "rare"]}, {"label": ["usual", "usual"]}] if weights else [])
    assert facts.get("weights") == (None if expected is None else pytest.approx(expected))


def test_weights_multiply_a_row_s_loss(folder: str) -> None:
    task = ImageClassification()
    made = encoded(folder, CELLS[:2])
    processor = task.processor(Pretrained(folder))
    network = task.load(Pretrained(folder), FACTS, processor).eval()

    def loss(facts: dict[str, Any]) -> float:
        batch = task.collate(made.features, processor, facts)
        return task.loss(task.forward(network, batch), batch).item()

    assert loss({**FACTS, "weights": [9.0, 3.0, 9.0]}) == pytest.approx(3 * loss(FACTS))


def test_weights_of_unknown_classes_and_bad_fields_are_refused() -> None:
    with pytest.raises(DataError, match="class_weights names blue; the labels are green, red"):
        ImageClassification(class_weights={"blue": 2.0}).facts([{"label": ["red", "green"]}])
    with pytest.raises(DataError, match="only the label 'red'"):
        ImageClassification().facts([{"label": ["red"]}])
    for fields in (
        {"labels": ["a"]},
        {"class_weights": {"a": 0.0}},
        {"class_weights": {"a": math.nan}},
        {"class_weights": {"a": math.inf}},
        {"augment": {"crop": 0}},
        {"augment": {"flop": 1}},
    ):
        with pytest.raises(ValidationError):
            ImageClassification.model_validate(fields)


def test_a_processor_that_keeps_sizes_is_refused(tmp_path: Path) -> None:
    ViTImageProcessorPil(do_resize=False).save_pretrained(tmp_path)
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="brings pictures to different sizes"):
        ImageClassification().processor(Pretrained(str(tmp_path)))


@pytest.mark.parametrize(
    "own",
    [
        MobileViTImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        EfficientNetImageProcessorPil(size={"height": 32, "width": 32}),
        EfficientNetImageProcessorPil(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5, rescale_offset=True),
    ],
    ids=["channels turned round", "normalised twice", "from -1 to 1"],
)
def test_pictures_are_made_in_two_steps_as_the_processor_makes_them_at_once(own: Any, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    ViTConfig().save_pretrained(tmp_path)
    task = ImageClassification()
    processor = task.processor(Pretrained(str(tmp_path)))
    made = task.encode({"file_name": CELLS}, processor, FACTS, evaluation=True, labelled=False)
    batch = task.collate(made.features, processor, FACTS)
    expected = processor([Image.open(cell) for cell in CELLS], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (SamImageProcessorPil(), "does more than resize, cut, rescale, normalise"),
        (
            Siglip2ImageProcessorPil(),
            r"makes no picture of a fixed size \(ValueError: Could not make a flat list .*\);",
        ),
        (ImageGPTImageProcessorPil(), r"makes no picture of a fixed size \(ValueError: Clusters must be provided"),
    ],
    ids=["pads what is normalised", "patches", "colours that are counted"],
)
def test_a_processor_that_two_steps_do_not_reproduce_is_refused(own: Any, says: str, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=says):
        ImageClassification().processor(Pretrained(str(tmp_path)))


def test_scores_and_their_picture() -> None:
    given = [{"label": name, "score": 0.9} for name in ("a", "a", "b", "b")]
    truth = ["a", "a", "a", "b"]
    task = ImageClassification()
    assert task.score(given, truth) == {"accuracy": 0.75, "f1_macro": pytest.approx((0.8 + 2 / 3) / 2)}
    ((name, content),) = task.pictures(given, truth).items()
    picture = Image.open(io.BytesIO(content))
    assert name == "confusion_matrix"
    assert picture.format == "PNG"
    colours = picture.convert("RGB").getcolors(1 << 24) or []
    assert len(colours) > 50  # axes, names and four shades
