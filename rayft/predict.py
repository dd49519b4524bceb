"""Using a model that a run has exported: its scores on rows with truth, and its predictions for rows without."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rayft import output, storage, tasks
from rayft.errors import DataError, ModelError, RunRefused
from rayft.recipe import Recipe, Source
from rayft.record import Record

Show = Callable[[dict[str, Any]], None]

DETAILS = "rayft.json"
EXAMPLES = 10
COUNTED_BYTES = 64 << 20  # sources up to this size are counted first, so that progress has a total
TOLD_S = 0.5


@dataclass(frozen=True)
class Target:
    """`folder` is the exported model's, `details` its rayft.json; `recipe` None where it is a model folder alone."""

    folder: str
    details: dict[str, Any]
    recipe: Recipe | None

    @property
    def names(self) -> dict[str, str]:
        """The recipe's column names: theirs -> the task's."""
        return self.recipe.data.columns if self.recipe else {}


def evaluate(target: str, data: str | None, *, show: Show) -> dict[str, float]:
    """The scores of RUN or MODEL: `test_…` on the run's own test rows, `eval_…` on its validation rows or on `data`."""
    found = _find(target)
    if data is None and found.recipe is None:
        raise RunRefused(f"{target} is a model folder, which knows no rows; say with --data which ones to score")
    model = _model(found)
    from rayft.inference import Reading, cluster_for_models

    with cluster_for_models():
        if found.recipe is None or data is not None:
            rows = _given(data or "")
        else:
            rows = _own_rows(found.recipe)
            show({"event": "note", "text": f"scored are the run's own {rows.what} rows"})
        reading = Reading(rows.sources, found.names, model.task.columns(), whole=False, threshold=rows.threshold)
        scores = _scores(model, rows, reading, show)
    return {f"{rows.prefix}_{metric}": value for metric, value in scores.items()}


def predict(target: str, data: str, path: str, *, show: Show) -> dict[str, Any]:
    """Writes `data` with its predictions to `path`, one row for each of its rows, in their order.

    Rows that can't be used have no prediction and say why in the column `error`. Returns {"rows", "failed" (how many
    can't be used), "output", "seconds"}. What is refused (an existing output among it) is refused before the start.
    """
    begun = time.monotonic()
    output.refuse(path)
    found = _find(target)
    model = _model(found)
    from rayft.data.pieces import fragments
    from rayft.inference import Reading, answers, cluster_for_models

    sources = (Source(path=data),)
    reading = Reading(sources, found.names, model.task.columns(labelled=False), whole=True)
    failed = 0
    examples: list[str] = []
    with cluster_for_models(), output.Output(path) as file:
        pieces = fragments(sources, "test")
        told = _Progress("predicting", _total(pieces, reading), show)
        with contextlib.closing(answers(pieces, reading, model, labelled=False)) as blocks:
            for block in blocks:
                errors = {**block.dropped, **{place: row.reason for place, row in block.bad.items()}}
                file.add(
                    block.inputs,
                    [block.predictions.get(place) for place in range(block.rows)],
                    [errors.get(place) for place in range(block.rows)],
                )
                failed += block.rows - len(block.predictions)
                examples += [str(row) for row in block.bad.values()][: EXAMPLES - len(examples)]
                examples += list(block.dropped.values())[: EXAMPLES - len(examples)]
                told.add(block.rows)
        if not file.rows:
            raise DataError(f"{data} has no rows")
        if failed == file.rows:
            listed = "".join(f"\n  {example}" for example in examples)
            raise DataError(f"{data}: none of its {failed:,} rows can be predicted, so nothing was written{listed}")
        show({"event": "stage", "name": "writing"})
        file.commit()
    if failed:
        text = f"{failed:,} of {file.rows:,} rows have no prediction, see the column `error`, such as {examples[0]}"
        show({"event": "warning", "text": text})
    return {"rows": file.rows, "failed": failed, "output": path, "seconds": round(time.monotonic() - begun, 3)}


def _find(target: str) -> Target:
    """The exported model that RUN or MODEL stands for; RunRefused where there is none."""
    folder = storage.absolute(target.rstrip("/"))
    recipe = Record(folder).recipe()
    if recipe is not None:
        export = storage.join(folder, "export")
        if not storage.exists(storage.join(export, DETAILS)):
            raise RunRefused(
                f"{target} has no exported model: a run exports when it ends, and `rayft run` with its recipe goes on"
            )
        return Target(export, storage.read_json(storage.join(export, DETAILS)), recipe)
    if storage.exists(storage.join(folder, DETAILS)):
        return Target(folder, storage.read_json(storage.join(folder, DETAILS)), None)
    if storage.exists(storage.join(folder, "config.json")):
        raise RunRefused(
            f"{target} holds a model without {DETAILS}, so its task is unknown; name a run, or what one exported"
        )
    raise RunRefused(
        f"{target} is neither a run's folder nor an exported model: it holds neither recipe.yaml nor {DETAILS}"
    )


def _model(target: Target) -> Any:
    """What the workers load. ModelError where the details name no task that this version knows."""
    from rayft.inference import Model

    path = storage.join(target.folder, DETAILS)
    try:
        fields = target.details["task"]
        kind = tasks.find(fields["type"])
        # What an earlier rayft has written may have fields that are gone since.
        task = kind.model_validate({name: value for name, value in fields.items() if name in kind.model_fields})
        facts = target.details["facts"]
    except (KeyError, TypeError, ValueError) as error:  # pydantic's errors are ValueErrors
        version = target.details.get("rayft") if isinstance(target.details, dict) else None
        raise ModelError(f"{path} (of rayft {version}) says nothing this rayft can use: {error}") from error
    config = storage.join(target.folder, "config.json")
    dtype = storage.read_json(config).get("dtype") if storage.exists(config) else None
    recipe = target.recipe
    return Model(
        folder=target.folder,
        task=task,
        facts=facts,
        dtype=dtype or "float32",
        trust_remote_code=recipe.model.trust_remote_code if recipe else False,
        batch_size=2 * recipe.train.micro_batch_size if recipe else 32,
    )


@dataclass(frozen=True)
class Scored:
    """Rows to score: `what` they are to the user, the `prefix` of their scores, and whether bad ones are left out.

    `threshold` is given where they were cut from train: the largest hash of those.
    """

    what: str
    prefix: str
    sources: tuple[Source, ...]
    pieces: Sequence[Any]
    threshold: int | None = None
    skip: bool = False


def _given(data: str) -> Scored:
    from rayft.data.pieces import fragments

    sources = (Source(path=data),)
    return Scored(data, "eval", sources, fragments(sources, "test"))


def _own_rows(recipe: Recipe) -> Scored:
    """The run's test rows, else its validation rows."""
    from rayft.data.splits import splits_of

    skip = recipe.data.on_bad_row == "skip"
    if recipe.data.test is not None:
        split = splits_of(recipe, ["test"], with_train=False)["test"]
        return Scored("test", "test", split.sources, split.pieces, skip=skip)
    parts = splits_of(recipe, ["validation"], with_train=recipe.data.validation is None)
    split = parts["validation"]
    threshold = _threshold(recipe, parts["train"]) if split.cut else None
    return Scored("validation", "eval", split.sources, split.pieces, threshold, skip)


def _threshold(recipe: Recipe, train: Any) -> int | None:
    """Up to which cut hash the training rows validate: as preparation has kept it, or found anew."""
    from rayft.data.scan import Scan, scan
    from rayft.data.splits import facts_key, units_of

    path = storage.join(storage.absolute(recipe.storage), "prepared", f"facts-{facts_key(recipe, train, True)}.json")
    if before := Scan.kept(path):
        return before.threshold
    units = units_of(train.pieces)
    return scan(recipe.task, units, train.sources, recipe.data.columns, True, lambda done: None).threshold


def _scores(model: Any, rows: Scored, reading: Any, show: Show) -> dict[str, float]:
    """Loss, where rows have items, and metrics. DataError where rows are bad and stay in, or none can be scored."""
    from rayft.inference import answers

    predictions: list[Any] = []
    references: list[Any] = []
    loss, items, bad = 0.0, 0, 0
    examples: list[str] = []
    dropped: Counter[str] = Counter()
    told = _Progress("evaluating", None if rows.threshold is not None else _total(rows.pieces, reading), show)
    with contextlib.closing(answers(rows.pieces, reading, model, labelled=True)) as blocks:
        for block in blocks:
            places = sorted(block.predictions)
            predictions += [block.predictions[place] for place in places]
            references += [block.references[place] for place in places]
            loss, items, bad = loss + block.loss, items + block.items, bad + len(block.bad)
            examples += [str(block.bad[place]) for place in sorted(block.bad)][: EXAMPLES - len(examples)]
            dropped.update(block.dropped.values())
            told.add(block.rows)
    listed = "".join(f"\n  {example}" for example in examples)
    if bad and not rows.skip:
        raise DataError(
            f"{rows.what}: {bad:,} of {told.done:,} rows are bad, so there are no scores; mend them{listed}"
        )
    for reason, count in [*sorted(dropped.items()), *([(f"bad, such as {examples[0]}", bad)] if bad else [])]:
        show({"event": "note", "text": f"{count:,} of {told.done:,} rows are not scored: {reason}"})
    if not predictions:
        raise DataError(f"{rows.what}: none of its {told.done:,} rows can be scored{listed}")
    metrics: dict[str, float] = model.task.score(predictions, references)
    return {"loss": loss / items, **metrics} if items else metrics


def _total(pieces: Sequence[Any], reading: Any) -> int | None:
    """How many rows there are, where it is known or quickly counted."""
    from rayft.data.source import read
    from rayft.data.splits import rows_of

    known = rows_of(pieces)
    filtered = any(source.where for source in reading.sources)
    if (known is not None and not filtered) or sum(piece.size for piece in pieces) > COUNTED_BYTES:
        return None if filtered else known
    return sum(_counted(read(piece, reading.sources[piece.source], {}, ())) for piece in pieces)


def _counted(batches: Iterator[Any]) -> int:
    return sum(len(rows.numbers) + len(rows.bad) for rows in batches)


class _Progress:
    """Tells how far it is, and how fast since the first rows came out of the model."""

    def __init__(self, name: str, total: int | None, show: Show) -> None:
        self.name, self.total, self.show = name, total, show
        self.done = self.first = 0
        self.began = self.told = time.monotonic()
        self._tell(None)

    def add(self, rows: int) -> None:
        now = time.monotonic()
        if not self.done:
            self.began, self.first = now, rows
        self.done += rows
        if self.done == self.total or now - self.told > TOLD_S:
            self.told = now
            self._tell((self.done - self.first) / (now - self.began) if now > self.began else None)

    def _tell(self, rate: float | None) -> None:
        event = {"event": "stage", "name": self.name, "done": self.done, "total": self.total}
        self.show({**event, "rows_per_s": rate})
