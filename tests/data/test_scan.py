"""The scan of training rows: facts from batches in the source's order, and the cut."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import ray

from rayft.data import scan as module
from rayft.data.pieces import fragments, row_id
from rayft.data.places import cut_hashes
from rayft.data.scan import Scan, scan
from rayft.errors import DataError
from rayft.recipe import Source
from rayft.tasks.task import Columns, Task

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Labels(Task):
    """Keeps the labels in the order in which they came, or takes none at all."""

    type: Literal["labels"] = "labels"
    wanted: tuple[str, ...] = ("label",)
    looks: bool = True

    def fact_columns(self) -> tuple[str, ...]:
        return self.wanted

    def facts(self, rows: Iterable[Columns]) -> dict[str, Any]:
        return {"labels": [label for batch in rows for label in batch["label"]] if self.looks else []}


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    for file in range(3):
        rows = "".join(f'{{"label": "{file}-{row}"}}\n' for row in range(20))
        (tmp_path / f"{file}.jsonl").write_text(rows + '{"other": 1}\n{\n')
    return [Source(path=str(tmp_path))]


def scanned(task: Task, sources: list[Source], cut: bool) -> Scan:
    return scan(task, [[piece] for piece in fragments(sources)], sources, {}, cut, lambda done: None)


@pytest.mark.usefixtures("ray_local")
def test_facts_see_all_good_rows_in_the_sources_order(sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    found = scanned(Labels(), sources, cut=False)
    assert found == Scan(facts={"labels": [f"{file}-{row}" for file in range(3) for row in range(20)]}, rows=60)


@pytest.mark.usefixtures("ray_local")
def test_the_threshold_cuts_exactly_the_tenth_with_the_smallest_hashes(sources: list[Source]) -> None:
    found = scanned(Labels(looks=False), sources, cut=True)
    hashes = np.concatenate([cut_hashes(row_id(file, np.arange(20))) for file in range(3)])
    assert (found.rows, found.cut, found.facts) == (60, 6, {"labels": []})
    assert found.threshold == np.sort(hashes)[5]
    assert np.count_nonzero(hashes <= np.uint64(found.threshold)) == 6
    assert Scan.model_validate_json(found.model_dump_json()) == found


def test_nothing_is_started_where_no_row_is_needed(sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "spread", None)
    assert scanned(Labels(wanted=(), looks=False), sources, cut=False) == Scan(facts={"labels": []})


@pytest.mark.usefixtures("ray_local")
def test_rows_that_are_all_bad_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 30)
    with pytest.raises(DataError, match=r"data.train has no usable row; 30 are bad") as raised:
        scanned(Labels(), [Source(path=str(path))], cut=True)
    assert str(raised.value).count("broken JSON") == 10
