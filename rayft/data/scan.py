"""What has to be known from all training rows before any can be encoded: the task's facts and the validation cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from rayft import storage
from rayft.data import places
from rayft.data.pieces import Fragment, row_id
from rayft.data.source import BadRow, read, unmatched
from rayft.data.spread import READ_BYTES, processors, sooner_here, spread
from rayft.errors import DataError
from rayft.recipe import Source
from rayft.tasks.task import Columns, Task

PART_ROWS = 65_536  # rows whose values go to the driver at once
FILE_BYTES = 1 << 20  # as long as so much takes, an object store may take to find a file
EXAMPLES = 10


class Scan(BaseModel):
    """`rows` are the training rows that could be read; the `cut` ones whose hash is at most `threshold` validate."""

    model_config = ConfigDict(frozen=True)

    facts: dict[str, Any]
    rows: int | None = None
    threshold: int | None = None
    cut: int = 0

    @classmethod
    def kept(cls, path: str) -> Scan | None:
        """What an earlier preparation has written there; None where nothing is, or it is damaged."""
        try:
            return cls.model_validate(storage.read_object(path))
        except ValidationError:
            return None


def scan(
    task: Task,
    units: Sequence[Sequence[Fragment]],
    sources: Sequence[Source],
    names: dict[str, str],
    cut: bool,
    progress: Callable[[int], None],
) -> Scan:
    """Reads the columns that `task.facts` needs; starts nothing where neither facts nor a cut need a row.

    DataError where no row can be read, or none is left to train on beside the cut.
    """
    columns = task.fact_columns()
    if not columns and not cut:
        return Scan(facts=task.facts(iter(())))
    rows, hashes = 0, np.empty(0, np.uint64)
    bad, examples = 0, list[BadRow]()

    def batches() -> Iterator[Columns]:
        nonlocal rows, hashes, bad
        pieces = [piece for unit in units for piece in unit]
        work = partial(_scan, sources=sources, names=names, columns=columns, cut=cut)
        size = sum(piece.size if storage.is_local(piece.path) else max(piece.size, FILE_BYTES) for piece in pieces)
        here = sooner_here(size, READ_BYTES, processors())
        for part in spread(units, work, in_order=True, here=here):
            rows, bad = rows + part["rows"], bad + part["bad"]
            examples.extend(part["examples"][: EXAMPLES - len(examples)])
            hashes = places.smallest(np.concatenate([hashes, part["hashes"]]))
            progress(rows)
            if part["rows"] and columns:
                yield part["columns"]
        if not rows:
            raise DataError(nothing("data.train", bad, examples, unmatched(pieces, sources)))

    given = batches()
    facts = task.facts(given)
    for _ in given:  # a task that needs no row of its own takes none
        pass
    if not cut:
        return Scan(facts=facts, rows=rows)
    if rows < 2:
        raise DataError("data.train has 1 row, so none can be cut for validation; give data.validation or more rows")
    size = places.cut_size(rows)
    return Scan(facts=facts, rows=rows, threshold=int(np.sort(hashes)[size - 1]), cut=size)


def nothing(what: str, bad: int, examples: Sequence[BadRow], asked: str) -> str:
    """The sentence for a split without a row; `asked` is what `unmatched` says of it."""
    if not bad:
        return f"{what} has no rows: its files are empty, or `where` lets none through{asked}"
    listed = "".join(f"\n  {row}" for row in examples)
    return f"{what} has no usable row; {bad:,} {'are' if bad > 1 else 'is'} bad:{listed}"


def _scan(
    unit: Sequence[Fragment], sources: Sequence[Source], names: dict[str, str], columns: Sequence[str], cut: bool
) -> Iterator[dict[str, Any]]:
    part = _Part(columns)
    for fragment in unit:
        for rows in read(fragment, sources[fragment.source], names, columns):
            for name in columns:
                part.columns[name].extend(rows.columns.get(name, ()))
            part.rows += len(rows.numbers)
            part.bad.extend(rows.bad[: EXAMPLES - len(part.bad)])
            part.bad_count += len(rows.bad)
            if cut:
                ids = row_id(fragment.file, np.asarray(rows.numbers, np.int64))
                part.hashes = places.smallest(np.concatenate([part.hashes, places.cut_hashes(ids)]))
            if part.rows + part.bad_count >= PART_ROWS:
                yield part.result()
                part = _Part(columns)
    yield part.result()


class _Part:
    """What has come together of a unit since the last result."""

    def __init__(self, columns: Sequence[str]):
        self.columns: Columns = {name: [] for name in columns}
        self.rows = self.bad_count = 0
        self.bad: list[BadRow] = []
        self.hashes = np.empty(0, np.uint64)

    def result(self) -> dict[str, Any]:
        return {
            "columns": self.columns,
            "rows": self.rows,
            "bad": self.bad_count,
            "examples": self.bad,
            "hashes": self.hashes,
        }
