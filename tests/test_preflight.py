"""What `check` says of a run before it starts, on real rows and a real cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import ResNetConfig

import small
from rayft import preflight, storage
from rayft.errors import ClusterError, ModelError, RunRefused, StorageError
from rayft.launch import placement, session
from rayft.recipe import Cluster, Recipe
from rayft.tasks.task import Pretrained
from rayft.training import export, freeze, plan


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.small_bert(tmp_path_factory.mktemp("bert"))


def check(plain: dict[str, Any]) -> dict[str, Any]:
    report = preflight.check(Recipe.parse(plain), show=lambda event: None)
    json.dumps(report)
    return report


def append(path: str, **row: str) -> None:
    with Path(path).open(encoding="utf-8") as file:
        columns = file.readline().strip().split(",")
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(",".join(row.get(column, "") for column in columns) + "\n")


def parameters(plain: dict[str, Any], epochs: int = 1) -> plan.Parameters:
    recipe = Recipe.parse(plain)
    base = Pretrained(recipe.model.path)
    return plan.parameters(recipe, base, {"labels": ["ham", "spam"]}, recipe.task.processor(base), epochs)


# --- what a sound run will do


def test_a_sound_run_is_described_and_its_rows_are_kept(tmp_path: Path, bert: str, ray_local: None) -> None:
    from rayft.data.prepare import prepare

    report = check(small.recipe(tmp_path, bert, train__epochs=3, data__test=None))
    assert report["faults"] == []
    assert report["run"]["state"] == "new"
    assert report["steps"] == {
        "total": 39, "per_epoch": 13, "global_batch_size": 16, "rows_per_worker": 8, "micro_batches": 2,
    }  # fmt: skip
    train = report["data"]["train"]
    assert (train["rows"], train["prepared"], train["bad"]["count"], train["dropped"]) == (203, 203, 0, {})
    assert sum(train["balance"].values()) == 203
    assert set(train["balance"]) == {"ham", "spam"}
    lengths = train["lengths"]
    assert lengths["limit"] == lengths["longest"] == 32 >= lengths["p95"] >= lengths["median"] > 4
    assert train["truncated"] > 0
    assert f"train: {train['truncated']} of 203 rows were truncated to what fits" in report["warnings"]
    needed = list(report["memory"]["zero"].values())
    assert needed == sorted(needed, reverse=True)
    assert report["memory"]["zero_stage"] == 0
    assert report["memory"]["worker"] == placement.host_memory() // 2
    assert needed[0] == 16 * report["parameters"]["total"]
    assert not storage.exists(str(tmp_path / "runs" / "small"))
    again = Recipe.parse(small.recipe(tmp_path, bert, data__test=None))  # found: a progress would fail
    found = prepare(again, bert, progress=lambda *_: pytest.fail("prepared again"))
    assert found["train"].manifest.rows == 203
    text = preflight.text(report)
    for words in ("39, 13 an epoch", "16 rows: 8 rows a worker in 2 micro-batches", "<- this run", "nothing is wrong"):
        assert words in text
    assert text.isascii()


# --- what does nothing


def test_fields_that_do_nothing_with_the_model_are_told(tmp_path: Path, bert: str, ray_local: None) -> None:
    report = check(small.recipe(tmp_path, bert, model__revision="v2", model__dropout=0.1))
    assert report["faults"] == []
    assert [text for text in report["warnings"] if text.startswith("model.")] == [
        "model.revision: 'v2' does nothing, a folder has no revisions"
    ]


def test_only_a_model_without_any_dropout_has_none(tmp_path: Path, bert: str) -> None:
    assert parameters(small.recipe(tmp_path, bert)).drops
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic").save_pretrained(tmp_path)
    plain = small.recipe(tmp_path, str(tmp_path), task={"type": "image-classification"}, model__dropout=0.1)
    recipe, base = Recipe.parse(plain), Pretrained(str(tmp_path))
    assert not plan.parameters(recipe, base, {"labels": ["ham", "spam"]}, None, 1).drops


# --- everything that is wrong, at once


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, bert: str, ray_local: None) -> None:
    plain = small.recipe(tmp_path, bert, cluster__workers=9, model__freeze={"patterns": ["nothing.like.it"]})
    append(plain["data"]["train"], text="", label="ham")
    append(plain["data"]["validation"], text="hello", label="hamm")
    (tmp_path / "file").write_text("no folder")
    report = check({**plain, "storage": str(tmp_path / "file" / "runs")})
    told = "\n".join(report["faults"])
    assert "file is not a folder" in told
    assert "9 workers with 1 CPU each need 9, and the cluster has 6" in told
    assert "data.train: 1 of 204 rows are bad" in told
    assert "data.validation: 1 of 42 rows are bad" in told
    assert "validation.csv" in told
    assert "label 'hamm' is not one of ham, spam" in told
    assert "model.freeze.patterns: 'nothing.like.it' matches no parameter" in told
    assert len(report["faults"]) == len(set(report["faults"])) == 5
    assert report["storage"]["prepared"] is None
    assert report["data"] is None
    text = preflight.text(report)
    assert f"{len(report['faults'])} faults:" in text
    assert "nothing is wrong" not in text


def test_missing_files_of_all_splits_and_a_missing_model_are_told_together(tmp_path: Path, ray_local: None) -> None:
    plain = small.recipe(tmp_path, str(tmp_path / "nowhere"), data__test="gone.csv", data__validation="away.csv")
    told = check(plain)["faults"]
    assert any(fault.startswith("model.path: there is no folder") for fault in told)
    assert any("away.csv" in fault for fault in told)
    assert any("gone.csv" in fault for fault in told)


def test_a_label_that_no_training_row_has_is_told(tmp_path: Path, bert: str, ray_local: None) -> None:
    plain = small.recipe(tmp_path, bert, task__labels=["ham", "hamm", "spam"], data__test=None)
    report = check(plain)
    assert report["faults"] == []
    assert "no training row has the label hamm; the model can't learn to give it" in report["warnings"]


def test_what_is_hardly_meant_is_told_by_check_and_run(tmp_path: Path, bert: str, ray_local: None) -> None:
    from rayft.data.prepare import prepare
    from rayft.run import shown_plan

    plain = small.recipe(tmp_path, bert, task__labels=["ham", "Ham", "spam"], data__test=None)
    doubt = "labels that differ only in how they are written count as different ones: 'ham', 'Ham'"
    assert doubt in check(plain)["warnings"]
    events: list[dict[str, Any]] = []
    recipe = Recipe.parse(plain).resolved()
    shown_plan(recipe, bert, prepare(recipe, bert), events.append)
    assert {"event": "note", "text": doubt} in events


def test_bad_rows_that_are_skipped_are_counted_with_examples(tmp_path: Path, bert: str, ray_local: None) -> None:
    plain = small.recipe(tmp_path, bert, data__on_bad_row="skip", data__validation=None, data__test=None)
    append(plain["data"]["train"], text="", label="ham")
    report = check(plain)
    assert report["faults"] == []
    bad = [split["bad"] for split in report["data"].values() if split["bad"]["count"]]
    assert [found["count"] for found in bad] == [1]
    assert "train.csv" in bad[0]["examples"][0]
    assert report["data"]["validation"]["cut"]
    assert "validation (cut from train)" in preflight.text(report)


# --- a run that exists


def test_a_run_that_exists_goes_on_or_is_refused_with_its_differences(
    tmp_path: Path, bert: str, ray_local: None
) -> None:
    plain = small.recipe(tmp_path, bert, data__test=None)
    folder = str(tmp_path / "runs" / "small")
    storage.write_text(storage.join(folder, "recipe.yaml"), Recipe.parse(plain).resolved().to_yaml())
    assert check(plain)["run"]["state"] == "resumed"
    storage.write_json(storage.join(folder, "result.json"), {"status": "finished"})
    assert check(plain)["run"]["state"] == "finished"
    longer = {**plain, "train": {**plain["train"], "epochs": 5}}
    assert check(longer)["run"]["state"] == "longer"
    report = check({**plain, "train": {**plain["train"], "learning_rate": 0.5}})
    assert report["run"]["state"] is None
    assert "train.learning_rate: 0.001 -> 0.5" in report["faults"][0]
    for split, told in (("train", "the training rows"), ("validation", "the validation rows")):
        storage.write_json(storage.join(folder, "run.json"), {"prepared": {split: "other rows"}})
        report = check(plain)
        assert report["run"]["state"] is None
        assert told in report["faults"][0]
    searched = {**plain, "tune": {"search": {"train.seed": {"choice": [1, 2]}}, "trials": 2}}
    storage.write_text(storage.join(folder, "recipe.yaml"), Recipe.parse(searched).resolved().to_yaml())
    assert "is a sweep; `rayft tune` goes on with it" in check(plain)["faults"][0]


# --- a run refuses the same


def test_run_refuses_what_check_refuses_before_anything_starts(tmp_path: Path, bert: str, ray_local: None) -> None:
    from rayft.run import run

    plain = small.recipe(tmp_path, bert)
    with pytest.raises(ClusterError, match="9 workers"):
        run(Recipe.parse({**plain, "cluster": {"workers": 9}}), show=lambda event: None)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="not a folder"):
        run(Recipe.parse({**plain, "storage": str(tmp_path / "file" / "x")}), show=lambda event: None)
    assert not storage.exists(str(tmp_path / "runs"))


def test_starting_over_deletes_nothing_where_it_is_refused(tmp_path: Path, bert: str, ray_local: None) -> None:
    from rayft.run import run

    kept = tmp_path / "runs" / "small" / "recipe.yaml"
    plain = small.recipe(tmp_path, bert, cluster__workers=9)
    storage.write_text(str(kept), Recipe.parse(small.recipe(tmp_path, bert)).resolved().to_yaml())
    with pytest.raises(ClusterError):
        run(Recipe.parse(plain), show=lambda event: None, restart=True)
    assert kept.exists()
    with pytest.raises(RunRefused):
        run(Recipe.parse({**plain, "train": {"epochs": 1}}), show=lambda event: None)


def nodes(*resources: dict[str, float]) -> list[dict[str, Any]]:
    return [{"Alive": True, "NodeID": str(number), "Resources": each} for number, each in enumerate(resources)]


@pytest.mark.parametrize(
    ("cluster", "machines", "told"),
    [
        ({"workers": 2}, [{"CPU": 1}, {"CPU": 1}], None),
        ({"workers": 2, "cpus_per_worker": 3}, [{"CPU": 4}, {"CPU": 2}], "room for 1 of 2"),
        ({"workers": 2, "gpus_per_worker": 1}, [{"CPU": 8, "GPU": 1}], "2 workers with 1 GPU each need 2"),
        ({"workers": 2, "gpus_per_worker": 1}, [{"CPU": 8}, {"CPU": 1, "GPU": 2}], "room for 1 of 2"),
        ({"workers": {"min": 1, "max": 4}}, [{"CPU": 2}], None),
    ],
)
def test_a_worker_has_to_fit_on_one_machine(
    cluster: dict[str, Any], machines: list[dict[str, float]], told: str | None
) -> None:
    plain = {
        "name": "x", "task": {"type": "text-classification"}, "model": {"path": "owner/name"},
        "data": {"train": "s3://b/rows.csv"}, "train": {"epochs": 1}, "storage": "s3://b/runs", "cluster": cluster,
    }  # fmt: skip
    found = placement.faults(Recipe.parse(plain), nodes(*machines))
    assert bool(found) == (told is not None)
    if told:
        assert told in found[0]


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        ({"workers": 2}, False),
        ({"workers": 4, "cpus_per_worker": 1}, False),
        ({"workers": 4, "cpus_per_worker": 2}, True),
        ({"workers": {"min": 1, "max": 5}}, True),
    ],
)
def test_workers_that_share_processors_are_told(cluster: dict[str, Any], told: bool) -> None:
    text = placement.crowded(Cluster.model_validate(cluster), 4)
    assert ("share this machine's 4 processors" in (text or "")) == told


def test_the_processors_of_this_machine_are_shown_and_not_ray_s_room(
    tmp_path: Path, bert: str, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "is_own", lambda: True)
    monkeypatch.setattr(preflight.os, "cpu_count", lambda: 1)
    report = check(small.recipe(tmp_path, bert))
    assert (report["faults"], report["cluster"]["cpus"]) == ([], 1)
    assert "1 machine with 1 CPU; 2 workers with 1 CPU each" in preflight.text(report)
    (warned,) = [text for text in report["warnings"] if text.startswith("cluster: ")]
    assert warned.startswith("cluster: 2 workers with 1 CPU each share this machine's 1 processor, ")


def test_local_paths_on_several_machines_are_refused_unless_they_share_them(tmp_path: Path, bert: str) -> None:
    plain = small.recipe(tmp_path, bert)
    two = nodes({"CPU": 4}, {"CPU": 4})
    (fault,) = placement.faults(Recipe.parse(plain), two)
    assert "storage (" in fault
    assert "data.train (" in fault
    assert "model.path (" in fault
    assert not placement.faults(Recipe.parse({**plain, "cluster": {"workers": 2, "shared_storage": True}}), two)
    assert not placement.faults(Recipe.parse(plain), two[:1])


@pytest.mark.parametrize("written", ["file://{}", "~/{}", "{}"])
def test_no_way_to_write_a_path_hides_it_from_several_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    path = written.format("model" if "~" in written else tmp_path / "model")
    plain = small.recipe(tmp_path, path) | {"storage": "s3://bucket/runs", "data": {"train": "s3://bucket/train.csv"}}
    two = nodes({"CPU": 4}, {"CPU": 4})
    (fault,) = placement.faults(Recipe.parse(plain), two)
    assert f"and model.path ({path}) may exist on this one alone" in fault
    choices = {"tune": {"search": {"model.path": {"choice": ["org/name", path]}}, "trials": 2}}
    (fault,) = placement.faults(Recipe.parse({**plain, "model": {"path": "org/name"}, **choices}), two)
    assert f"and tune.search.model.path ({path}) may exist on this one alone" in fault


# --- parameters, from an outline of the model


@pytest.mark.parametrize(
    "model", [{}, {"freeze": 1}, {"freeze": "all"}, {"lora": {"r": 4}}, {"freeze": ["*embeddings*"]}], ids=str
)
def test_parameters_are_those_that_training_finds(tmp_path: Path, bert: str, model: dict[str, Any]) -> None:
    plain = small.recipe(tmp_path, bert)
    plain["model"] |= model
    counted = parameters(plain)
    recipe = Recipe.parse(plain)
    base = Pretrained(bert)
    network = recipe.task.load(base, {"labels": ["ham", "spam"]}, recipe.task.processor(base))
    if recipe.model.lora:
        network = freeze.adapt(network, recipe.model.lora, export.new_parameters(network), 0)
    freeze.freeze(network, recipe.model, recipe.task.blocks(network))
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    assert counted.total == sum(size for size, _ in sizes)
    assert counted.trainable == counted.most == sum(size for size, learns in sizes if learns)
    assert counted.frozen == counted.total - counted.trainable


def test_the_stage_is_decided_by_what_learns_in_the_end(tmp_path: Path, bert: str) -> None:
    plain = small.recipe(tmp_path, bert, model__freeze="all", model__unfreeze_every=1)
    once, twice, thrice = (parameters(plain, epochs) for epochs in (1, 2, 3))
    assert once.trainable == once.most == twice.trainable < twice.most < twice.total
    assert thrice.most == thrice.total
    recipe = Recipe.parse(plain)
    needed = [thrice.state_bytes(recipe, stage) for stage in range(4)]
    assert [thrice.zero_stage(recipe, 2 * bytes_) for bytes_ in needed] == [0, 1, 2, 3]
    assert thrice.zero_stage(recipe, None) == 0
    assert thrice.zero_stage(recipe, 1) == 3


def test_a_head_for_other_labels_learns_whole_beside_adapters(tmp_path: Path, bert: str) -> None:
    """A classifier of as many other labels: its head is drawn anew, so it must not stay as it was drawn."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    folder = str(tmp_path / "classifier")
    network = BertForSequenceClassification.from_pretrained(bert, id2label={0: "good", 1: "bad"})
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    plain = small.recipe(tmp_path, folder, model__lora={"r": 4})
    head = sum(parameter.numel() for parameter in network.classifier.parameters())
    other = parameters(plain).trainable
    plain["task"] = {**plain["task"], "labels": ["good", "bad"]}
    recipe, base = Recipe.parse(plain), Pretrained(folder)
    same = plan.parameters(recipe, base, {"labels": ["good", "bad"]}, recipe.task.processor(base), 1).trainable
    assert other - same == head


# --- BatchNorm


def test_a_model_without_batch_norm_has_none_to_learn(tmp_path: Path, bert: str) -> None:
    with pytest.raises(ModelError, match=r"model.batch_norm_rows: 4, and no BatchNorm learns in this model; null fits"):
        parameters(small.recipe(tmp_path, bert, model__batch_norm_rows=4, train__micro_batch_size=4))


@pytest.mark.parametrize("rows", [None, 16])
def test_batch_norm_that_has_seen_no_data_is_told_unless_it_learns(
    rows: int | None, tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small.ROOT)
    plain = Recipe.load("jobs/image_classification.yaml", [f"storage={tmp_path}"]).dump()
    plain["model"] |= {"batch_norm_rows": rows, "dropout": 0.1}
    for split in ("train", "validation", "test"):
        plain["data"][split] = "jobs/data/blood_cells/test"
    report = check(plain)
    assert report["faults"] == []
    told = [text for text in report["warnings"] if text.startswith("model.batch_norm_rows: null keeps the statistics")]
    assert len(told) == (rows is None)
    assert "model.dropout: 0.1 does nothing, the model has no dropout" in report["warnings"]
