"""Stable Diffusion: what its loss is, what of a row is stored, what it draws, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_models import TINY, make_pipeline_folder
from rayft.errors import ModelError
from rayft.fields.sections import Lora, Model
from rayft.models import without_weights
from rayft.tasks.task import Pretrained
from rayft.tasks.text_to_image import TextToImage
from rayft.training import freeze
from small import ROOT

EMOJI = ROOT / "jobs" / "data" / "blobmoji" / "validation"


def rows(count: int) -> dict[str, list[Any]]:
    found = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text().splitlines()[:count]]
    return {
        "file_name": [str(EMOJI / row["file_name"]) for row in found],
        "text": [row["text"] for row in found],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = str(tmp_path_factory.mktemp("pipeline"))
    make_pipeline_folder(made)
    return made


def batch_of(task: TextToImage, processor: Any, count: int = 3, evaluation: bool = False) -> dict[str, Any]:
    return task.collate(task.encode(rows(count), processor, {}, evaluation=evaluation).features, processor, {})


@pytest.mark.parametrize("evaluation", [False, True])
def test_the_error_is_that_of_the_noise_as_diffusers_lays_it_over(folder: str, evaluation: bool) -> None:
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    task = TextToImage(score_draws=3)
    source = Pretrained(folder)
    processor = task.processor(source)
    batch = batch_of(task, processor, evaluation=evaluation)
    draws = 3 if evaluation else 1
    noise, steps = batch["noise"].flatten(0, 1), batch["timesteps"].flatten()
    with torch.no_grad():
        errors, weights = task.forward(task.load(source, {}, processor).eval(), batch)
        theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        latents = theirs.vae.encode(batch["pixel_values"]).latent_dist.mode() * theirs.vae.config.scaling_factor
        latents = latents.repeat_interleave(draws, dim=0)
        noisy = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").add_noise(latents, noise, steps)
        text = theirs.text_encoder(batch["input_ids"])[0].repeat_interleave(draws, dim=0)
        answer = theirs.unet(noisy, steps, encoder_hidden_states=text).sample
    expected = torch.nn.functional.mse_loss(answer, noise, reduction="none").mean(dim=(1, 2, 3)).view(3, draws)
    torch.testing.assert_close(errors, expected, rtol=1e-5, atol=1e-6)
    assert weights.tolist() == [[1.0] * draws] * 3
    told = task.predict((errors, weights), batch, {}, processor, {})
    torch.testing.assert_close(torch.tensor([one["mse"] for one in told]), expected.mean(dim=1))
    torch.testing.assert_close(task.loss((errors, weights), batch), expected.mean(dim=1).sum())


def test_a_row_is_scored_at_noise_from_least_to_most(folder: str) -> None:
    task = TextToImage(score_draws=8)
    processor = task.processor(Pretrained(folder))
    scored, trained = (batch_of(task, processor, evaluation=evaluation) for evaluation in (True, False))
    assert scored["noise"].shape[:2] == scored["timesteps"].shape == (3, 8)
    eighths = scored["timesteps"] * 8 // processor.steps
    assert eighths.sort().values.tolist() == [list(range(8))] * 3
    assert len(scored["noise"][:, :, 0, 0, 0].unique()) == 24
    assert torch.equal(trained["noise"], scored["noise"][:, :1])  # what is drawn of the row begins with it


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_steps_with_little_noise_weigh_less(tmp_path: Path, kind: str) -> None:
    """As `compute_snr` of diffusers and the weights of its training scripts have it."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    make_pipeline_folder(str(tmp_path), prediction_type=kind)
    task = TextToImage(snr_gamma=5.0)
    processor = task.processor(Pretrained(str(tmp_path)))
    network = task.load(Pretrained(str(tmp_path)), {}, processor)
    batch = {**batch_of(task, processor), "timesteps": torch.tensor([[1], [400], [999]])}
    ratio = compute_snr(DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler"), batch["timesteps"])
    expected = ratio.clamp(max=5.0)
    expected = expected / ratio if kind == "epsilon" else expected / (ratio + 1)
    _, weights = task.forward(network, batch)
    torch.testing.assert_close(weights, expected)
    assert weights[0] < weights[1] <= 1


def test_noise_is_a_function_of_seed_epoch_and_row_and_the_encoders_see_nothing_of_it(folder: str) -> None:
    task = TextToImage()
    processor = task.processor(Pretrained(folder))
    features = task.encode(rows(1), processor, {}, evaluation=False).features
    varied = [task.vary(features, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert varied[0] == varied[1] != varied[2]
    assert {name for name in features if varied[2][name] != features[name]} == {"draw"}
    one, other = (task.collate(some, processor, {}) for some in (varied[0], varied[2]))
    assert not torch.equal(one["noise"], other["noise"])
    assert torch.equal(one["pixel_values"], other["pixel_values"])
    assert [task.steady(depth) for depth in (0, 1, 3)] == [0, 1, 1]


def test_encoders_never_learn_and_get_no_adapters(folder: str) -> None:
    task = TextToImage()
    source = Pretrained(folder)
    network = task.load(source, {}, task.processor(source))
    learning = freeze.freeze(network, Model(path=folder), task.blocks(network))
    assert learning.depth == 1
    assert learning.trainable
    assert all(name.startswith("unet.") for name in learning.trainable)
    assert {learning.trainable[f"unet.{name}.weight"] for name in ("conv_in", "time_embedding.linear_1")} == {1}
    below = task.blocks(network).blocks[:1]
    adapted = freeze.adapt(network, Lora(r=2), (), 0, below)
    named = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert any("to_out.0" in name for name in named)  # a module whose last name is a number
    assert all(".unet." in name and "lora_" in name for name in named)
    assert task.blocks(adapted).blocks[0] == "base_model.model.conditions"


def test_an_exported_folder_is_a_pipeline_that_draws_the_same(folder: str, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    task = TextToImage(sample_steps=4, guidance=3.0)
    source = Pretrained(folder)
    processor = task.processor(source)
    network = task.load(source, {}, processor).eval()
    network.save_pretrained(str(tmp_path))
    processor.save_pretrained(str(tmp_path))
    made = task.encode({"text": ["an open book"]}, processor, {}, evaluation=True, labelled=False)
    batch = task.collate(made.features, processor, {})
    (answer,) = task.generate(network, batch, made.features, processor, {})
    ours = np.asarray(Image.open(io.BytesIO(answer["picture"]))).astype(int)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs(
        "an open book", latents=batch["noise"][:, 0], num_inference_steps=4, guidance_scale=3.0, output_type="np"
    ).images[0]
    assert ours.shape == (64, 64, 3)
    assert np.abs(ours - np.round(drawn * 255)).max() <= 1


def test_a_share_of_the_rows_is_drawn_and_shown(folder: str) -> None:
    task = TextToImage(sample_share=0.3, sample_steps=1, guidance=1.0)
    processor = task.processor(Pretrained(folder))
    made = task.encode(rows(30), processor, {}, evaluation=True)
    places, asked = task.asked(made.features)
    assert 3 <= len(places) <= 15
    assert asked["draw"] == [made.features["draw"][place] for place in places]
    assert TextToImage().asked(made.features) == ([], {})
    network = task.load(Pretrained(folder), {}, processor).eval()
    drawn = task.generate(network, task.collate(asked, processor, {}), asked, processor, {})
    predictions: list[dict[str, Any]] = [{"mse": 1.0} for _ in made.rows]
    for place, found in zip(places, drawn, strict=True):
        predictions[place] |= found
    pictures = task.pictures(predictions, made.references or [])
    assert list(pictures) == ["samples"]
    assert Image.open(io.BytesIO(pictures["samples"])).width > 250 * min(4, len(places))
    assert task.pictures([{"mse": 1.0}], ["a text"]) == {}


def test_pictures_are_squares_around_the_middle_and_long_texts_are_cut(folder: str, tmp_path: Path) -> None:
    task = TextToImage(size=32)
    processor = task.processor(Pretrained(folder))
    wide = Image.new("RGB", (200, 100), "blue")
    wide.paste("red", (50, 0, 150, 100))
    wide.save(tmp_path / "wide.png")
    given = {"file_name": [str(tmp_path / "wide.png")], "text": ["word " * 100]}
    made = task.encode(given, processor, {}, evaluation=False)
    channels = np.frombuffer(made.features["pixels"][0], np.uint8).reshape(3, 32, 32)
    assert channels[0].min() > 230  # red, up to what shrinking makes of the edges
    assert channels[2].max() < 25
    assert made.truncated == [0]
    assert len(made.features["input_ids"][0]) == 32


def test_bad_rows_are_named(folder: str, tmp_path: Path) -> None:
    task = TextToImage()
    whole = (EMOJI / rows(1)["file_name"][0]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    given = {
        "file_name": [str(tmp_path / "cut.png"), str(tmp_path / "none.png"), rows(1)["file_name"][0]],
        "text": ["a", "b", " "],
    }
    made = task.encode(given, task.processor(Pretrained(folder)), {}, evaluation=False)
    assert "cut.png is no whole picture" in made.bad[0]
    assert "there is no file" in made.bad[1]
    assert "needs text" in made.bad[2]
    assert made.rows == []


def test_configs_alone_are_drawn_from_the_seed() -> None:
    assert without_weights(str(TINY))
    task = TextToImage()
    source = Pretrained(str(TINY))
    processor = task.processor(source)
    one, same, other = (
        task.load(replace(source, seed=seed), {}, processor).state_dict()["unet.conv_in.weight"] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("fields", "options", "told"),
    [
        ({"size": 36}, {}, r"task\.size is 36; a multiple of 8 fits .*, such as 64"),
        ({}, {"attention": "sdpa"}, r"model\.attention is 'sdpa', which text-to-image has no use for; null fits"),
        ({}, {"path": str(ROOT / "jobs/models/tiny_resnet")}, r"the model_index\.json of .* can't be loaded"),
    ],
)
def test_what_does_not_fit_is_refused(folder: str, fields: dict[str, Any], options: dict[str, Any], told: str) -> None:
    task = TextToImage(**fields)
    source = Pretrained(**{"path": folder, **options})
    with pytest.raises(ModelError, match=told):
        task.load(source, {}, task.processor(source))


def test_other_pipelines_and_targets_are_refused(folder: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    schedule = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    changed = json.dumps({**schedule, "prediction_type": "sample"})
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(changed)
    task, source = TextToImage(), Pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="predicts 'sample'; epsilon or v_prediction fits"):
        task.load(source, {}, task.processor(source))
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(ModelError, match="is a FluxPipeline; text-to-image trains what is a StableDiffusionPipeline"):
        task.processor(source)
