"""An exported model over any number of rows, on Ray Data: read, encode, one pass through the model, in the rows' order.

    readers (tasks)  ->  blocks of rows  ->  actors that hold the model  ->  blocks of answers, in the source's order

A block's rows are put into batches by their length, and back into their order behind the model.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from rayft import storage
from rayft.data.pieces import Fragment, row_id
from rayft.data.places import cut_hashes
from rayft.data.source import BadRow, Rows, read, table_of
from rayft.data.splits import units_of
from rayft.data.spread import Batched, packed, unpacked
from rayft.errors import ModelError, RayftError, TrainingError, WorkersLost
from rayft.launch import ahead
from rayft.launch.session import DATA_CPUS, cluster
from rayft.models import fetch_model
from rayft.recipe import Source
from rayft.tasks.task import Columns, Encoded, Prediction, Pretrained, Task

FEW_BYTES = 4 << 20  # of a source whose blocks are small, so that all actors get some and progress is seen
BLOCK_ROWS, SMALL_BLOCK_ROWS = 256, 64
ACTOR_BYTES = 1 << 30  # what an actor takes besides three times the model's weights


@dataclass(frozen=True)
class Model:
    """An exported model: its folder (absolute, or an URL), and what its details say.

    `dtype` is that of its weights; `batch_size` the rows, or their features, of one forward pass.
    """

    folder: str
    task: Task
    facts: dict[str, Any]
    dtype: str = "float32"
    trust_remote_code: bool = False
    batch_size: int = 32


@dataclass(frozen=True)
class Reading:
    """Which rows are read. No task is in it: unpickled in a reader, it would bring torch there.

    names      their column names -> ours; `columns` are the ones that the task asks for
    whole      all columns of the source are wanted, for they go where the predictions go
    threshold  only rows with a cut hash up to this one: the validation rows that were cut from train
    """

    sources: tuple[Source, ...]
    names: dict[str, str]
    columns: tuple[str, ...]
    whole: bool
    threshold: int | None = None


@dataclass(frozen=True)
class Block:
    """Rows of a fragment, in `rows.numbers` the good ones; `inputs` the whole rows, bad ones too, where wanted."""

    fragment: Fragment
    rows: Rows
    inputs: list[dict[str, Any]]


@dataclass
class Answers:
    """A block behind the model, by the places of its rows: each has a prediction, or is among `bad` or `dropped`.

    `loss` (a sum over `items`) and the `references` are there where rows with truth were scored.
    """

    rows: int
    inputs: list[dict[str, Any]]
    predictions: dict[int, Prediction] = field(default_factory=dict)
    references: dict[int, Any] = field(default_factory=dict)
    bad: dict[int, BadRow] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)
    loss: float = 0.0
    items: int = 0


def answers(
    pieces: Sequence[Fragment], reading: Reading, model: Model, labelled: bool
) -> Generator[Answers, None, None]:
    """Passes the rows through the model, in their order; with `labelled` they are scored, else predicted.

    Ray has to be initialised. A RayftError on the way is raised as it was.
    """
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    units = [{"item": packed(unit)} for unit in units_of(pieces)]
    size = SMALL_BLOCK_ROWS if sum(piece.size for piece in pieces) <= FEW_BYTES else BLOCK_ROWS
    actors, gpus = _room(model)
    dataset: Any = ray.data.from_items(units, override_num_blocks=len(units))
    # Readers take no CPU of their own: paused by a full queue they would hold one that an actor waits for.
    dataset = dataset.map_batches(
        Batched(_Read(reading, size)),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        compute=TaskPoolStrategy(size=min(len(units), actors + 1)),
    )
    dataset = dataset.map_batches(
        _Actor,
        fn_constructor_args=(model, labelled, gpus > 0),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
        num_gpus=gpus or None,
        compute=ActorPoolStrategy(min_size=1, max_size=actors),
    )
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # or answers wait until 128 MB of them have come together
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, so pages about them say nothing more
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for item in batch["item"]:
                yield unpacked(item.as_buffer())
    except ray.exceptions.RayError as error:
        lost = f"a process that read rows or held the model was lost: {_first_line(error)}"
        raise WorkersLost(f"{lost} Too little memory is the usual cause.") from error


@contextlib.contextmanager
def cluster_for_models() -> Iterator[None]:
    """A cluster with a CPU for a model on each of this machine's.

    What Ray would print past all settings of Python's logging (a notice about every pool of actors) is kept from the
    user; failures are raised, and none is only printed.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with contextlib.ExitStack() as stack:
        stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)  # that the level was set is printed, too
            stack.enter_context(ahead.importing(*ahead.DRIVER))
            stack.enter_context(cluster(os.cpu_count() or 1))
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(nowhere)
        yield


def _room(model: Model) -> tuple[int, int]:
    """How many actors may hold the model, and the GPUs of each: one on each GPU, else as CPUs and memory allow."""
    import ray

    total = ray.cluster_resources()
    if gpus := int(total.get("GPU", 0)):
        return gpus, 1
    files = storage.listing(model.folder, recursive=False)
    weights = sum(entry.size for entry in files if entry.path.endswith((".safetensors", ".bin")))
    fits = int(total.get("memory", 0) // (3 * weights + ACTOR_BYTES))
    return max(1, min(int(total.get("CPU", 1)) - DATA_CPUS, fits)), 0


class _Read:
    """The first stage: fragments to blocks of rows."""

    def __init__(self, reading: Reading, size: int) -> None:
        self.reading, self.size = reading, size

    def __call__(self, unit: Sequence[Fragment]) -> Iterator[Block]:
        asked = self.reading
        for piece in unit:
            source = asked.sources[piece.source]
            inputs = _whole(piece) if asked.whole else iter(())
            for rows in read(piece, source, asked.names, asked.columns, self.size):
                count = len(rows.numbers) + len(rows.bad)
                yield Block(piece, _cut(piece, rows, asked.threshold), list(islice(inputs, count)))


def _whole(piece: Fragment) -> Iterator[dict[str, Any]]:
    """All rows of a piece with all their columns; broken ones have none."""
    columns = set(table_of(piece, set(), 1).columns or ())
    return (row.values for row in table_of(piece, columns, BLOCK_ROWS).rows)


def _cut(piece: Fragment, rows: Rows, threshold: int | None) -> Rows:
    """Those of `rows` that were cut for validation."""
    if threshold is None:
        return rows

    def mine(numbers: list[int]) -> Any:
        return cut_hashes(row_id(piece.file, np.asarray(numbers, np.int64))) <= np.uint64(threshold)

    places = np.flatnonzero(mine(rows.numbers)).tolist()
    return Rows(
        {name: [values[place] for place in places] for name, values in rows.columns.items()},
        [rows.numbers[place] for place in places],
        [rows.lines[place] for place in places],
        [row for row, own in zip(rows.bad, mine([row.row for row in rows.bad]), strict=True) if own],
    )


class _Actor:
    """The second stage as Ray Data holds it; the model comes with the first block, so that its faults are told."""

    def __init__(self, model: Model, labelled: bool, on_gpu: bool) -> None:
        self._stage = Batched(Answering(model, labelled, on_gpu))

    def __call__(self, batch: Any) -> Iterator[Any]:
        yield from self._stage(batch)


class Answering:
    """Blocks of rows to answers, by a model that is loaded once."""

    def __init__(self, model: Model, labelled: bool, on_gpu: bool = False) -> None:
        self.model, self.task, self.labelled = model, model.task, labelled
        self.device = "cuda" if on_gpu else "cpu"
        self.network: Any = None
        self.processor: Any = None

    def __call__(self, block: Block) -> Iterator[Answers]:
        if self.network is None:
            self.processor, self.network = load(self.model)
            self.network.to(self.device)
        numbers = sorted([*block.rows.numbers, *(row.row for row in block.rows.bad)])
        place = {number: index for index, number in enumerate(numbers)}
        found = Answers(len(numbers), block.inputs, bad={place[row.row]: row for row in block.rows.bad})
        if block.rows.numbers:
            places = [place[number] for number in block.rows.numbers]
            try:
                self._answer(block, places, found)
            except RayftError:
                raise
            except Exception as error:
                where = f"{block.fragment.path} rows {numbers[0] + 1} to {numbers[-1] + 1}"
                raise TrainingError(f"the model failed on {where}: {_first_line(error)}") from error
        yield found

    def _answer(self, block: Block, places: list[int], found: Answers) -> None:
        """Encodes the good rows, and fills `found`; `places` are theirs in it."""
        from rayft.training.evaluate import by_row

        rows = block.rows
        encoded = self.task.encode(
            rows.columns, self.processor, self.model.facts, evaluation=True, labelled=self.labelled
        )
        for row, reason in encoded.bad.items():
            found.bad[places[row]] = BadRow(block.fragment.path, rows.numbers[row], reason, rows.lines[row])
        found.dropped = {places[row]: reason for row, reason in encoded.dropped.items()}
        predictions: dict[int, Prediction] = {}  # of each feature
        by_length = np.argsort(encoded.lengths, kind="stable").tolist()
        for first in range(0, len(by_length), self.model.batch_size):
            chosen = by_length[first : first + self.model.batch_size]
            predictions.update(zip(chosen, self._forward(encoded, chosen, found), strict=True))
        if self.labelled:
            self._write(encoded, predictions)
        references = encoded.references or [None] * len(encoded.rows)
        entries = [(row, predictions[index], references[index]) for index, row in enumerate(encoded.rows)]
        for row, (prediction, reference) in by_row(self.task, entries).items():
            found.predictions[places[row]] = prediction
            found.references[places[row]] = reference

    def _forward(self, encoded: Encoded, chosen: list[int], found: Answers) -> list[Prediction]:
        """The predictions of some features, from one forward pass or what the task makes of it."""
        import torch

        from rayft.training.evaluate import measure, to_device

        features: Columns = {name: [values[index] for index in chosen] for name, values in encoded.features.items()}
        facts, device = self.model.facts, torch.device(self.device)
        with torch.inference_mode():
            if not self.labelled:
                batch = to_device(self.task.collate(features, self.processor, facts), device)
                return self.task.generate(self.network, batch, features, self.processor, facts)
            measured = measure(self.network, self.task, features, self.processor, facts, device)
        found.loss += measured.loss
        found.items += measured.items
        return measured.predictions

    def _write(self, encoded: Encoded, predictions: dict[int, Prediction]) -> None:
        """Joins to the predictions what the model writes for the features that the task has asked for."""
        import torch

        from rayft.training.evaluate import Network, generated

        network = Network(self.network, self.task, self.processor, self.model.facts, torch.device(self.device))
        places, asked = self.task.asked(encoded.features)
        by_length = sorted(range(len(places)), key=lambda number: encoded.lengths[places[number]])
        for first in range(0, len(by_length), self.model.batch_size):
            some = by_length[first : first + self.model.batch_size]
            with torch.inference_mode():
                written = generated(
                    network, {name: [values[number] for number in some] for name, values in asked.items()}
                )
            for number, found in zip(some, written, strict=True):
                predictions[places[number]] |= found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def load(model: Model) -> tuple[Any, Any]:
    """Processor and network, in evaluation mode. ModelError where the folder lacks weights that the task needs."""
    from rayft.training.first_token import read_first

    path = fetch_model(model.folder)
    source = Pretrained(path, dtype=model.dtype, trust_remote_code=model.trust_remote_code)
    try:
        processor = model.task.processor(source)
        network: Any = model.task.load(source, model.facts, processor)
    except RayftError:
        raise
    except Exception as error:
        raise ModelError(f"{model.folder} can't be loaded: {_first_line(error)}") from error
    if lacking := tuple(getattr(network, "rayft_drawn", ())):
        raise ModelError(f"{model.folder}: its weights lack {', '.join(lacking[:5])}; export it again")
    read_first(model.task, network, model.task.blocks(network))
    network.eval()
    return processor, network
