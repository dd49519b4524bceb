"""Preparation on a real Ray cluster: what depends on what, every row once, and a commit that holds."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from rayft import leftovers, storage
from rayft.data import prepare as module
from rayft.data import scan, splits
from rayft.data.prepare import Preparation, prepare
from rayft.data.prepared import Manifest, Prepared
from rayft.errors import DataError, StorageDenied, StorageDown
from rayft.recipe import Recipe
from rayft.tasks.task import Columns, Encoded, Pretrained, Task

ROWS = 1000


class Words(Task):
    """Words as numbers: light enough to be encoded anywhere, and with every way for a row to go."""

    type: Literal["words"] = "words"
    window: int = 8
    packed: int | None = None
    apart: bool = False  # whether its scores need two labels

    def check_references(self, references: Iterable[Any]) -> None:
        if self.apart and len(found := set(references)) < 2:
            raise DataError(f"its rows have only {', '.join(found)}")

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        return ("text", "label")

    def fact_columns(self) -> tuple[str, ...]:
        return ("label",)

    def processor(self, model: Pretrained) -> Any:
        return json.loads((Path(model.path) / "tokenizer.json").read_text())

    def facts(self, rows: Iterable[Columns]) -> dict[str, Any]:
        return {"labels": sorted({str(value) for batch in rows for value in batch["label"] if value != "unknown"})}

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        return pa.schema([("words", pa.list_(pa.int32())), *([("text", pa.string())] if evaluation else [])])

    def packs(self) -> int | None:
        return self.packed

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        assert not labelled or processor["shift"] >= 0
        found: list[tuple[int, list[int]]] = []
        dropped, bad = {}, {}
        for row, (text, label) in enumerate(zip(rows["text"], rows["label"], strict=True)):
            words = [len(word) + processor["shift"] for word in text.split()]
            if label not in facts["labels"]:
                bad[row] = f"label {label!r} is not one of {', '.join(facts['labels'])}"
            elif not words:
                dropped[row] = "no words"
            found += [(row, words[i : i + self.window]) for i in range(0, len(words), self.window) if row not in bad]
        features: Columns = {"words": [words for _, words in found]}
        if evaluation:
            features["text"] = [rows["text"][row] for row, _ in found]
        return Encoded(
            features,
            [row for row, _ in found],
            [len(words) for _, words in found],
            [rows["label"][row] for row, _ in found] if evaluation else None,
            truncated=[row for row, words in found if len(words) == self.window],
            dropped=dropped,
            bad=bad,
        )


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with train.csv (sorted by label, 1 to 11 words a row), test.csv and a model."""
    rows = [f"{'w ' * (i % 11 + 1)}{i},{'a' if i < ROWS // 2 else 'b'}\n" for i in range(ROWS)]
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(rows))
    (tmp_path / "test.csv").write_text("text,label\n" + "".join(rows[:90]))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text('{"shift": 0}')
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    return tmp_path


def recipe(place: Path, task: Words | None = None, **data: Any) -> Recipe:
    fields = {
        "name": "try",
        "task": {"type": "text-classification"},
        "model": {"path": str(place / "model")},
        "data": {"train": str(place / "train.csv"), **data},
        "train": {"epochs": 1},
        "storage": str(place / "runs"),
    }
    return Recipe.parse(fields).model_copy(update={"task": task or Words()})


def made(place: Path, task: Words | None = None, **data: Any) -> dict[str, Prepared]:
    return prepare(recipe(place, task, **data), str(place / "model"))


def table(prepared: Prepared) -> pa.Table:
    return pa.concat_tables(
        [pq.read_table(storage.join(prepared.folder, shard["path"])) for shard in prepared.manifest.shards]
    )


def rows_of(prepared: Prepared) -> list[int]:
    return table(prepared)["row_id"].to_pylist()


def content(prepared: dict[str, Prepared]) -> dict[str, Any]:
    """Everything of a preparation but where it lies."""
    return {
        name: [
            split.manifest.model_dump(exclude={"shards"}),
            [{**shard, "path": shard["path"].partition("/")[2]} for shard in split.manifest.shards],
        ]
        for name, split in prepared.items()
    }


@pytest.mark.usefixtures("ray_local")
def test_every_row_is_in_one_split_once_and_the_manifest_adds_up(place: Path) -> None:
    prepared = made(place, Words(window=4), test=str(place / "test.csv"))
    assert list(prepared) == ["train", "validation", "test"]
    rows = {name: rows_of(split) for name, split in prepared.items()}
    assert sorted({*rows["train"], *rows["validation"]}) == list(range(ROWS))
    assert not {*rows["train"]} & {*rows["validation"]}
    assert sorted(set(rows["test"])) == list(range(90))
    for name, split in prepared.items():
        manifest, found = split.manifest, table(split)
        assert manifest.rows == len(rows[name]) == sum(shard["rows"] for shard in manifest.shards)
        assert manifest.source_rows == len(set(rows[name]))
        assert manifest.tokens == sum(len(words) for words in found["words"].to_pylist())
        assert (manifest.longest, sum(count for _, count in manifest.lengths)) == (4, manifest.rows)
        assert found["length"].to_pylist() == [len(words) for words in found["words"].to_pylist()]
        assert [shard["row_groups"] for shard in manifest.shards] == [
            [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            for shard in manifest.shards
            for file in [pq.ParquetFile(storage.join(split.folder, shard["path"]))]
        ]
        for row in set(rows[name]):  # the features of a row follow one another
            places = [at for at, other in enumerate(rows[name]) if other == row] if row % 97 == 0 else [0]
            assert places == list(range(places[0], places[0] + len(places)))
    assert prepared["train"].manifest.facts == {"labels": ["a", "b"]}
    assert not [path for path in (place / "runs").rglob("*") if "scratch" in path.name]


@pytest.mark.usefixtures("ray_local")
def test_a_sorted_source_is_shuffled_and_evaluation_keeps_its_order(place: Path) -> None:
    prepared = made(place, test=str(place / "test.csv"))
    train = rows_of(prepared["train"])
    assert prepared["train"].manifest.order == "hash"
    # 900 rows of two sorted halves: each chunk of 128 holds between 30 and 70 % of the first.
    shares = [np.mean(np.array(train[start : start + 128]) < ROWS // 2) for start in range(0, 896, 128)]
    assert min(shares) > 0.3
    assert max(shares) < 0.7
    for name in ("validation", "test"):
        assert rows_of(prepared[name]) == sorted(rows_of(prepared[name]))
        assert prepared[name].manifest.order == "source"
    references = table(prepared["test"])["reference"].to_pylist()
    assert [json.loads(reference) for reference in references] == ["a"] * len(references)


@pytest.mark.usefixtures("ray_local")
def test_without_shuffling_train_keeps_the_order_over_many_shards(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "three"):
        (place / "many").mkdir(exist_ok=True)
        (place / "many" / f"{name}.csv").write_text((place / "train.csv").read_text())
    monkeypatch.setattr(splits, "SHARD_BYTES", 20_000)
    prepared = made(place, train=str(place / "many"), validation=str(place / "test.csv"), shuffle=False)["train"]
    ids = rows_of(prepared)
    assert ids == sorted(ids)
    assert len(ids) == prepared.manifest.rows > 3 * ROWS
    assert len(prepared.manifest.shards) > 1


@pytest.mark.usefixtures("ray_local")
def test_the_result_is_the_same_however_the_work_is_cut(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "many").mkdir()
    lines = (place / "train.csv").read_text().splitlines(keepends=True)
    for part in range(10):
        (place / "many" / f"{part}.csv").write_text(lines[0] + "".join(lines[1 + part * 100 : 1 + (part + 1) * 100]))
    monkeypatch.setattr(splits, "SHARD_BYTES", 3000)
    results = []
    for unit_bytes, here, storage_name in ((1, 0, "a"), (1 << 20, 1 << 20, "b"), (5000, 0, "c")):
        monkeypatch.setattr(splits, "UNIT_BYTES", unit_bytes)
        for using, name in ((scan, "READ_BYTES"), (module, "READ_BYTES"), (module, "ENCODE_BYTES")):
            monkeypatch.setattr(using, name, here)  # 0: over the cluster
        one = recipe(
            place, Words(window=3), train=[{"path": str(place / "many"), "weight": 1.5}], test=str(place / "test.csv")
        )
        results.append(
            content(prepare(one.model_copy(update={"storage": str(place / storage_name)}), str(place / "model")))
        )
    assert len(results[0]["train"][1]) > 2
    assert results[0] == results[1] == results[2]


@pytest.mark.usefixtures("ray_local")
def test_a_second_call_starts_no_execution(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(place, test=str(place / "test.csv"))

    def started(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError("an execution was started")

    for using in (module, scan):
        monkeypatch.setattr(using, "spread", started)
    assert made(place, test=str(place / "test.csv")) == first
    (place / "model" / "model.safetensors").write_text("other weights")
    assert prepare(recipe(place).model_copy(update={"name": "other"}), str(place / "model"))["train"] == first["train"]
    (place / "moved").mkdir()
    (place / "moved" / "rows.csv").write_text((place / "train.csv").read_text())
    assert made(place, train=str(place / "moved"))["train"] == first["train"]
    with pytest.raises(AssertionError, match="an execution was started"):
        made(place, Words(window=5))


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("torn", ["", '{"key": "', "[]", '{"key": "a"}'])
def test_what_a_power_cut_has_damaged_is_named_and_prepared_anew(place: Path, torn: str) -> None:
    first, path = made(place), str(place / "model")
    files = [f"{first['train'].folder}/manifest.json", *map(str, (place / "runs" / "prepared").glob("facts-*.json"))]
    assert len(files) == 2
    for file in files:
        storage.write_text(file, torn)
        again = Preparation(recipe(place), path)
        assert again.found() is None
        assert content(again.made()) == content(first)
        assert again.damaged == [file]
        sound = Preparation(recipe(place), path)
        assert sound.found() is not None
        assert sound.damaged == []


def aged(where: str, days: float) -> None:
    then = time.time() - days * leftovers.DAY_S
    for entry in storage.listing(where):
        os.utime(entry.path, (then, then))


@pytest.mark.usefixtures("ray_local")
def test_old_shards_that_a_starting_run_has_found_are_kept(place: Path) -> None:
    made(place)
    where = str(place / "runs")
    for find in (Preparation(recipe(place), str(place / "model")).found, lambda: made(place)):
        aged(where, 2)
        assert len(leftovers.leftovers(where)) == 2  # train, and the validation rows that were cut from it
        assert find()
        assert leftovers.leftovers(where) == []


@pytest.mark.usefixtures("ray_local")
def test_use_is_marked_once_an_hour_and_reading_needs_no_right_to_write(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, tries, write = made(place), list[str](), storage.write_bytes
    aged(str(place / "runs"), 0.1)

    def refused(path: str, data: bytes) -> None:
        tries.append(path)
        raise StorageDenied(path)

    def counted(path: str, data: bytes) -> None:
        tries.append(path)
        write(path, data)

    monkeypatch.setattr(storage, "write_bytes", refused)
    assert made(place) == first
    monkeypatch.setattr(storage, "write_bytes", counted)
    for _ in range(3):
        assert made(place) == first
    assert tries == [storage.join(one.folder, "used") for one in first.values()] * 2


@pytest.mark.usefixtures("ray_local")
def test_whatever_the_result_depends_on_changes_the_key(place: Path) -> None:
    base = {name: split.manifest.key for name, split in made(place, test=str(place / "test.csv")).items()}
    other = {
        name: split.manifest.key for name, split in made(place, Words(window=5), test=str(place / "test.csv")).items()
    }
    assert not set(base.values()) & set(other.values())
    in_order = made(place, test=str(place / "test.csv"), shuffle=False)
    assert in_order["train"].manifest.key != base["train"]
    assert in_order["test"].manifest.key == base["test"]
    (place / "model" / "tokenizer.json").write_text('{"shift": 1}')
    shifted = made(place)
    assert shifted["train"].manifest.key != base["train"]
    assert table(shifted["train"])["words"][0].as_py()[0] == 2
    (place / "train.csv").write_text((place / "train.csv").read_text() + "one more,b\n")
    assert made(place)["train"].manifest.key not in (base["train"], shifted["train"].manifest.key)


@pytest.mark.usefixtures("ray_local")
def test_bad_rows_are_told_with_file_and_row_or_skipped_and_counted(place: Path) -> None:
    path = place / "bad.jsonl"
    good = '{"text": "fine", "label": "a"}\n'
    lines = [good] * 15 + ["{broken\n", '{"text": "x"}\n', '{"text": "x", "label": "unknown"}\n'] + [good] * 15
    path.write_bytes("".join(lines).encode() + b'{"text": "\xff", "label": "a"}\n' + good.encode() * 17)
    with pytest.raises(DataError) as raised:
        made(place, train=str(path), validation=str(place / "test.csv"))
    assert str(raised.value).splitlines() == [
        "data.train: 4 of 51 rows are bad; mend them, or leave them out with data.on_bad_row=skip",
        f"  {path} row 16 (line 16): broken JSON: Expecting property name enclosed in double quotes at position 2",
        f"  {path} row 17 (line 17): column 'label' is missing; there is text",
        f"  {path} row 18 (line 18): label 'unknown' is not one of a",
        f"  {path} row 34 (line 34): byte 0xff at position 11 of its line is not UTF-8; save it as that",
    ]
    assert not list((place / "runs").rglob("*.parquet"))
    skipped = made(place, train=str(path), validation=str(place / "test.csv"), on_bad_row="skip")["train"].manifest
    assert (skipped.rows, skipped.source_rows, skipped.bad["count"]) == (47, 47, 4)
    assert skipped.bad["examples"][0].startswith(f"{path} row 16 (line 16): broken JSON")
    assert skipped.notes("train")[-1].startswith("train: 4 bad rows were skipped, such as ")
    path.write_text("".join(lines))
    with pytest.raises(DataError, match=r"data.train: 3 of 33 rows are bad") as raised:
        made(place, train=str(path), validation=str(place / "test.csv"))
    path.write_text("".join(lines[10:20]))
    with pytest.raises(DataError, match=r"data.train: 3 of 10 rows are bad, and at most 10% are skipped"):
        made(place, train=str(path), validation=str(place / "test.csv"), on_bad_row="skip")
    with pytest.raises(DataError) as raised:  # what would be refused is not offered
        made(place, train=str(path), validation=str(place / "test.csv"))
    told = "data.train: 3 of 10 rows are bad; mend them (data.on_bad_row=skip leaves out at most 10%)"
    assert str(raised.value).splitlines()[0] == told


@pytest.mark.usefixtures("ray_local")
def test_many_bad_rows_end_the_preparation_early(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENOUGH_BAD", 20)
    monkeypatch.setattr(splits, "UNIT_BYTES", 1)
    for part in range(20):
        (place / "many" / f"{part:02d}.jsonl").parent.mkdir(exist_ok=True)
        (place / "many" / f"{part:02d}.jsonl").write_text('{"label": "a", "text": "x"}\n' + '{"label": "a"}\n' * 10)
    with pytest.raises(DataError, match=r"data.train: at least \d+ rows are bad; mend them") as raised:
        made(place, train=str(place / "many"), validation=str(place / "test.csv"))
    assert len(str(raised.value).splitlines()) == 11
    assert made(place)["train"].manifest.rows > 0


@pytest.mark.usefixtures("ray_local")
def test_a_data_set_that_would_train_on_nothing_is_refused(place: Path) -> None:
    empty = place / "empty.csv"
    test = str(place / "test.csv")
    empty.write_text("text,label\n")
    with pytest.raises(DataError, match=r"data.train has no rows"):
        made(place, train=str(empty), validation=test)
    asked = [{"path": str(place / "train.csv"), "where": {"label": "c"}}]
    told = r"has no rows: .*lets none through; `where` asks for 'c' in `label`, which holds 'a', 'b'$"
    with pytest.raises(DataError, match=rf"data.train {told}"):
        made(place, train=asked, validation=test)
    with pytest.raises(DataError, match=rf"data.validation {told}"):
        made(place, validation=asked)
    with pytest.raises(DataError, match=r"data.validation has no rows"):
        made(place, validation=str(empty))
    empty.write_text("text,label\n" + ",a\n" * 5)
    with pytest.raises(DataError, match="none of its 5 rows leaves anything to train on\n  5 rows: no words"):
        made(place, train=str(empty), validation=test)
    empty.write_text("text,label\nx,a\n")
    with pytest.raises(DataError, match=r"data.train has 1 row, so none can be cut for validation"):
        made(place, train=str(empty))
    empty.write_text("text,label\nx,a,b\n")
    with pytest.raises(
        DataError, match=r"no usable row; 1 is bad:\n.*row 1 \(line 2\): 3 fields where the header has 2"
    ):
        made(place, train=str(empty))
    empty.write_text("txt,label\nx,a\n")
    with pytest.raises(DataError, match="column 'text' is missing; there are txt, label; did you mean 'txt'"):
        made(place, train=str(empty), validation=test)


@pytest.mark.usefixtures("ray_local")
def test_rows_that_can_not_be_scored_together_are_refused_before_training(place: Path) -> None:
    few = str(place / "test.csv")  # of one label
    with pytest.raises(DataError, match=r"^data.validation: its rows have only a$"):
        made(place, Words(apart=True), validation=few)
    assert not storage.listing(storage.join(str(place / "runs"), "prepared"), recursive=True)[1:]
    assert set(made(place, Words(apart=True))) == {"train", "validation"}  # cut from rows of both
    assert set(made(place, validation=few)) == {"train", "validation"}


@pytest.mark.usefixtures("ray_local")
def test_dropped_and_truncated_rows_are_counted(place: Path) -> None:
    path = place / "train.csv"
    path.write_text(path.read_text() + ",a\n" * 3)
    manifest = made(place, validation=str(place / "test.csv"))["train"].manifest
    assert manifest.dropped == {"no words": 3}
    assert manifest.source_rows == ROWS + 3
    assert manifest.truncated == sum(1 for i in range(ROWS) if i % 11 + 2 >= 8)
    assert manifest.notes("train") == [
        f"train: {manifest.truncated:,} of 1,003 rows were truncated to what fits",
        "train: 3 rows were dropped: no words",
    ]


@pytest.mark.usefixtures("ray_local")
def test_files_that_give_no_rows_are_told_of_the_split_that_was_named(place: Path) -> None:
    folder = place / "data"
    (folder / "listed").mkdir(parents=True)
    (place / "train.csv").rename(folder / "listed" / "metadata.csv")
    (folder / "a.png").touch()
    found = made(place, train=str(folder))
    assert {name: split.manifest.passed_over for name, split in found.items()} == {
        "train": {".png": 1},
        "validation": {},  # cut from train
    }


@pytest.mark.usefixtures("ray_local")
def test_values_asked_for_that_no_row_has_are_told_again_of_prepared_rows(place: Path) -> None:
    train = {"path": str(place / "train.csv"), "where": {"label": ["a", "xyz", "B"]}}
    both = [train, {"path": str(place / "test.csv"), "where": {"label": ["a"]}}]
    for sources, source in ((train, ""), (both, " of source 1")):
        first, again = (made(place, train=sources) for _ in range(2))
        asks = "asks for 'xyz', 'B' (did you mean 'b'?) in `label`, which no row has; there are 'a', 'b'"
        assert first["train"].manifest.notes("train")[0] == f"train: `where`{source} {asks}"
        assert again["train"].manifest.absent == first["train"].manifest.absent
        assert first["validation"].manifest.absent == []  # cut from train


@pytest.mark.usefixtures("ray_local")
def test_weights_repeat_rows_in_places_of_their_own(place: Path) -> None:
    sources = [{"path": str(place / "train.csv"), "weight": 2.25}, {"path": str(place / "test.csv"), "weight": 0.5}]
    prepared = made(place, Words(window=100), train=sources, validation=str(place / "test.csv"))["train"]
    ids = rows_of(prepared)
    counts = Counter(ids)
    first = [counts[number] for number in range(ROWS)]
    second = [counts[(1 << 40) + number] for number in range(90)]
    assert set(first) == {2, 3}
    assert np.mean(first) == pytest.approx(2.25, abs=0.05)
    assert set(second) == {0, 1}
    assert np.mean(second) == pytest.approx(0.5, abs=0.15)
    assert sum(a == b for a, b in itertools.pairwise(ids)) < 10
    assert prepared.manifest.source_rows == ROWS + 90
    assert prepared.manifest.rows == len(ids)


@pytest.mark.usefixtures("ray_local")
def test_the_validation_cut_is_a_tenth_and_a_function_of_the_rows(place: Path) -> None:
    first = made(place)
    cut = rows_of(first["validation"])
    assert len(set(cut)) == ROWS // 10 == first["validation"].manifest.cut
    assert first["validation"].manifest.notes("validation")[0].startswith("validation: not given, so 100 rows were cut")
    again = made(place, Words(window=3), on_bad_row="skip")
    assert set(rows_of(again["validation"])) == set(cut)
    assert np.mean(np.array(cut) < ROWS // 2) == pytest.approx(0.5, abs=0.15)
    # Rows that a filter leaves out don't count.
    half = made(place, train=[{"path": str(place / "train.csv"), "where": {"label": "b"}}])
    assert len(set(rows_of(half["validation"]))) == ROWS // 20
    assert min(rows_of(half["validation"]) + rows_of(half["train"])) >= ROWS // 2


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("shuffle", [True, False])
def test_only_train_is_packed_and_no_sequence_is_lost(place: Path, shuffle: bool) -> None:
    prepared = made(place, Words(packed=20, window=20), validation=str(place / "test.csv"), shuffle=shuffle)
    packed = table(prepared["train"])
    assert max(packed["length"].to_pylist()) == prepared["train"].manifest.longest <= 20
    ids = [row for rows in packed["row_ids"].to_pylist() for row in rows]
    assert sorted(ids) == list(range(ROWS))
    assert (ids == sorted(ids)) is not shuffle
    assert prepared["train"].manifest.rows < ROWS // 2
    assert prepared["train"].manifest.tokens == sum(i % 11 + 2 for i in range(ROWS))
    assert sum(count for _, count in prepared["train"].manifest.lengths) == ROWS
    assert prepared["validation"].manifest.rows == 90


@pytest.mark.usefixtures("ray_local")
def test_other_rows_are_prepared_with_the_facts_of_a_trained_model(place: Path) -> None:
    (place / "train.csv").unlink()
    facts = {"labels": ["z", "a", "b"]}
    one = recipe(place, validation=str(place / "test.csv"), test=str(place / "test.csv"))
    prepared = prepare(one, str(place / "model"), splits=["test"], facts=facts)
    assert list(prepared) == ["test"]
    assert prepared["test"].manifest.facts == facts


@pytest.mark.usefixtures("ray_local")
def test_two_at_once_end_with_one_result(place: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = [call.result() for call in [pool.submit(made, place) for _ in range(2)]]
    later = made(place)
    assert content(results[0]) == content(results[1]) == content(later)
    for result in (*results, later):
        assert sorted(set(rows_of(result["train"]) + rows_of(result["validation"]))) == list(range(ROWS))


@pytest.mark.usefixtures("ray_local")
def test_the_loser_of_a_race_uses_the_winners_shards_and_deletes_its_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather, won = module._gather, list[dict[str, Prepared]]()

    def slow(*arguments: Any) -> None:
        gather(*arguments)
        if not won:
            won.append({})
            won.append(made(place))

    monkeypatch.setattr(module, "_gather", slow)
    assert made(place) == won[1]
    for split in won[1].values():
        assert len(storage.folders(split.folder)) == 1


@pytest.mark.usefixtures("ray_local")
def test_an_outage_between_two_commits_keeps_what_was_committed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = module._commit

    def failing(folder: str, attempt: str, manifest: Manifest) -> Prepared:
        if manifest.split == "validation":
            raise StorageDown("no answer")
        return commit(folder, attempt, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_commit", failing)
        with pytest.raises(StorageDown):
            made(place, test=str(place / "test.csv"))
    prepared = made(place, test=str(place / "test.csv"))
    assert sorted({*rows_of(prepared["train"]), *rows_of(prepared["validation"])}) == list(range(ROWS))
    assert len(storage.folders(prepared["train"].folder)) == 1
    assert len(storage.folders(prepared["test"].folder)) == 1


@pytest.mark.usefixtures("ray_local")
def test_progress_counts_rows_and_shards_up_to_their_totals(place: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    prepare(recipe(place), str(place / "model"), progress=lambda *event: seen.append(event))
    assert [stage for stage, *_ in seen] == ["reading rows", "encoding rows", "encoding rows", *["writing shards"] * 2]
    assert seen[0] == ("reading rows", ROWS, None)
    assert seen[2] == ("encoding rows", ROWS, ROWS)
    assert seen[-1] == ("writing shards", 2, 2)


ALONE = """
import json, psutil, sys
sys.path.insert(0, sys.argv[1])
from test_prepare import *
scan.READ_BYTES = module.READ_BYTES = module.ENCODE_BYTES = 0  # over the cluster

def peak(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

ray.init(address="local", num_cpus=int(sys.argv[5]), include_dashboard=False, log_to_driver=False)
one = recipe(Path(sys.argv[2]), Words(window=64), train=sys.argv[4]).model_copy(update={"storage": sys.argv[3]})
prepared = prepare(one, str(Path(sys.argv[2]) / "model"))
children = psutil.Process().children(recursive=True)
workers = [peak(child.pid) for child in children if "".join(child.cmdline()).startswith("ray::")]
print(json.dumps({"content": content(prepared), "peaks": [peak("self"), max(workers)]}))
"""


def alone(place: Path, where: str, train: str, cpus: int) -> dict[str, Any]:
    """Prepares `train` in a process with its own Ray cluster: {"content", "peaks" of driver and largest worker}."""
    arguments = [str(Path(__file__).parent), str(place), where, train, str(cpus)]
    done = subprocess.run([sys.executable, "-c", ALONE, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_object_storage_and_other_clusters_give_the_same_shards(place: Path, s3: str) -> None:
    there = storage.join(s3, "prepare", "train.csv")
    storage.write_bytes(there, (place / "train.csv").read_bytes())
    remote = alone(place, storage.join(s3, "runs"), there, cpus=1)["content"]
    local = alone(place, str(place / "runs"), str(place / "train.csv"), cpus=3)["content"]
    for name in ("train", "validation"):
        assert remote[name][1] == local[name][1]
        assert remote[name][0] | {"key": ""} == local[name][0] | {"key": ""}  # an etag is no hash of the content
    assert not [entry.path for entry in storage.listing(storage.join(s3, "runs")) if "scratch" in entry.path]


@pytest.mark.slow
def test_memory_is_that_of_the_buffers_and_not_of_the_rows(place: Path) -> None:
    peaks = {}
    for rows in (10_000, 200_000, 600_000):
        path = place / f"{rows}.csv"
        with path.open("w") as file:
            file.write("text,label\n")
            file.writelines(f"{'some words ' * (i % 7 + 3)}{i},{'ab'[i % 2]}\n" for i in range(rows))
        peaks[rows] = [peak >> 20 for peak in alone(place, str(place / "runs"), str(path), cpus=2)["peaks"]]
    driver, worker = zip(*peaks.values(), strict=True)
    assert max(driver) - min(driver) < 30, peaks
    # A batch to encode and a shard to sort are not yet full at 10,000 rows (0.7 MB); from 200,000 on they are.
    assert worker[1] - worker[0] < 120, peaks
    assert worker[2] - worker[1] < 90, peaks
