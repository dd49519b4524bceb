"""The training loop: a generator of optimizer steps, and `train`, the only place that drains it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from rayft.data.prepared import Prepared
from rayft.data.window import Share
from rayft.errors import NotFinite
from rayft.recipe import Recipe
from rayft.tasks.stacked import Blocks
from rayft.tasks.task import Task
from rayft.training import checkpoint, pictures
from rayft.training.batch_norm import BatchNorms
from rayft.training.engine import grad_norm, gradient_scale, reduce_gradients, sum_over_ranks, update
from rayft.training.evaluate import Network, evaluate, features_of, to_device
from rayft.training.freeze import train_mode
from rayft.training.laps import Laps
from rayft.training.loss_scale import gradient_scaler
from rayft.training.metrics import Metrics
from rayft.training.progress import Progress, leading_metric, patient_metric
from rayft.training.saver import Saver
from rayft.training.schedule import due, learning_rate, seed_step
from rayft.training.standin import Prefix
from rayft.training.timing import Timing
from rayft.training.together import together
from rayft.training.watch import Watch

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """All that a step needs and that stays the same through a stretch of training."""

    recipe: Recipe
    task: Task
    engine: Any
    processor: Any
    facts: dict[str, Any]
    prepared: dict[str, Prepared]
    steps_per_epoch: int
    total_steps: int
    device: torch.device
    run: str
    attempt: int
    emit: Emit
    metrics: Metrics | None  # on rank 0
    saver: Saver
    watch: Watch
    blocks: Blocks
    prefix: Prefix | None  # what stands in for the frozen blocks
    norms: BatchNorms
    laps: Laps

    def serve(self, split: str, rows: list[int]) -> None:
        """The next forward pass is over these rows of `split`, by their numbers in it."""
        if self.prefix is not None:
            self.prefix.serve(split, rows, self.device)

    def learn(self) -> None:
        """Training mode for what learns."""
        train_mode(self.engine.module, self.blocks, self.recipe.model.batch_norm_rows is not None)

    @property
    def rank(self) -> int:
        return dist.get_rank()


@dataclass(frozen=True)
class Step:
    """One optimizer step: `number` counts from 1, `loss` is the mean over the items of the global batch."""

    number: int
    epoch: int
    loss: float
    learning_rate: float
    rows: int
    tokens: int
    padded: int
    seconds: float
    waited: float
    save: bool  # the clock asks for a checkpoint
    leave: bool  # the driver asks to save and to leave


def steps(job: Job, shares: Iterator[Share], save_after: float | None = None) -> Iterator[Step]:
    """Runs one optimizer step per global batch and yields after each.

    The items (tokens, rows) of the global batch are counted and all-reduced before the forward pass, so that the sum of
    each micro-batch's loss is scaled once and gradients are those of the mean over all items, however the batch is cut.
    The same count carries to all ranks that `save_after` seconds have passed on rank 0, and that any rank should leave.
    Raises NotFinite before the optimizer's step where the loss is NaN or infinite.
    """
    saved, laps = time.monotonic(), job.laps
    while True:
        asked_at = time.monotonic()
        laps.to("wait")
        job.watch.at("waiting for rows")
        share = next(shares, None)
        if share is None:
            laps.to(None)
            return
        waited = time.monotonic() - asked_at
        laps.to("batch")
        number = share.step + 1
        job.watch.at("agreeing on the batch", number)
        seed_step(job.recipe.train.seed, share.step, job.rank)
        batches = [_micro(job, table if table.num_rows else share.spare, table.num_rows > 0) for table in share.micro]
        late = save_after is not None and job.rank == 0 and time.monotonic() - saved > save_after
        items, rows, tokens, padded, save, leave = _count(job, batches, share, late)
        rate = learning_rate(job.recipe.train, share.step, job.total_steps)
        for group in job.engine.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss = _accumulate(job, batches, gradient_scale(job.engine) / max(1, items)) / max(1, items)
        if not math.isfinite(loss):
            raise NotFinite(number, "loss", "lower train.learning_rate, or look at the rows of that step")
        laps.to("collective")
        reduce_gradients(job.engine)
        laps.to("optimizer")
        norm = grad_norm(job.engine, job.recipe.train.max_grad_norm)
        _finite_gradient(job.engine, norm, number)
        job.watch.at("updating the weights")
        update(job.engine)
        laps.to("collective")
        job.norms.follow()
        _finite_gradient(job.engine, float(job.engine.get_global_grad_norm() or 0.0), number)
        job.saver.check()
        if save:
            saved = time.monotonic()
        seconds = time.monotonic() - asked_at
        laps.to(None)
        yield Step(number, share.epoch, loss, rate, rows, tokens, padded, seconds, waited, save > 0, leave > 0)


@dataclass(frozen=True)
class Micro:
    """One forward pass: its batch, the rows' numbers in the split, and whether it counts (else it is a spare row).

    The batch waits in the host's memory until it is its turn: a GPU holds one of them, however large the share is.
    """

    batch: dict[str, Any]
    rows: list[int]
    real: bool


def _micro(job: Job, table: pa.Table, real: bool) -> Micro:
    batch = job.task.collate(features_of(table), job.processor, job.facts)
    return Micro(batch, table.column("position").to_pylist(), real)


def _count(job: Job, batches: list[Micro], share: Share, late: bool) -> tuple[int, ...]:
    """Items, source rows, tokens, padded tokens of the global batch; and how many ranks are late and should leave."""
    sources = source_rows(share.rows)
    tokens = sum(share.rows.column("length").to_pylist())
    padded = sum(job.task.padded(micro.batch) for micro in batches if micro.real)
    counts = [
        sum(job.task.items(micro.batch) for micro in batches if micro.real),
        sources,
        tokens,
        padded,
        int(late),
        int(job.watch.leave),
    ]
    shared = torch.tensor(counts, dtype=torch.int64, device=job.device)
    job.laps.to("collective")
    sum_over_ranks(shared)
    job.laps.to("batch")
    return tuple(shared.tolist())


def source_rows(features: pa.Table) -> int:
    """How many rows of the source features come from; windows of one text that are packed together are one row."""
    if "row_ids" not in features.column_names:
        return features.num_rows
    return sum(len(set(ids)) for ids in features.column("row_ids").to_pylist())


def _accumulate(job: Job, batches: list[Micro], scale: float) -> float:
    """Backward over all micro-batches; the loss summed over all ranks.

    A rank whose share is used up runs the spare row with weight 0: the collectives of sharded weights and gradients
    need every rank, in the same order. The sum stays on the device and is read once, in the end: whoever reads from a
    GPU waits until all that it was given is done.
    """
    total = torch.zeros((), dtype=torch.float64, device=job.device)
    for number, micro in enumerate(batches):
        job.watch.at("in the forward and backward pass")
        job.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
        job.serve("train", micro.rows)
        job.norms.at(len(micro.rows))
        job.laps.to("forward")
        batch = to_device(micro.batch, job.device)
        outputs = job.task.forward(job.engine, batch)
        loss = job.task.loss(outputs, batch, job.recipe.train.label_smoothing)
        job.laps.to("backward")
        job.engine.backward(loss * (scale if micro.real else 0.0), scale_wrt_gas=False)
        if micro.real:
            total += loss.detach().double()
    job.laps.to("collective")
    sum_over_ranks(total)
    return float(total)


def _finite_gradient(engine: Any, norm: float, step: int) -> None:
    """With a loss scale an infinite gradient says that it is too large: it is halved, and the step left out."""
    if math.isfinite(norm):
        return
    scaler = gradient_scaler(engine)
    if scaler is None or scaler.get_scale() < 1:
        raise NotFinite(step, "gradient norm", "lower train.learning_rate, or set train.max_grad_norm lower")


def train(
    job: Job, shares: Iterator[Share], progress: Progress, timing: Timing, until: int
) -> Generator[None, None, bool]:
    """Drains `steps` up to optimizer step `until`: metrics, evaluation, checkpoints, early stopping, in this order.

    Yields after each evaluation, when what follows from it is done: whoever asks for more decides. Returns False where
    it was asked to leave before: a checkpoint is committed then.
    """
    every = job.recipe.train.save_every
    if progress.pending:
        if not _settle(job, progress, timing, save=False, leave=False):
            return False
        yield
    if progress.finished:
        return True
    job.learn()
    try:
        for step in steps(job, shares, every.count * 60 if every.unit == "minutes" else None):
            progress.step = step.number
            progress.pending = evaluates = step.number == job.total_steps or due(
                job.recipe.train.evaluate_every, step.number, job.steps_per_epoch
            )
            _record(job, step, timing)
            save = step.save or step.number == until or due(every, step.number, job.steps_per_epoch)
            if not _settle(job, progress, timing, save, step.leave):
                return False
            if evaluates:
                yield
            if progress.finished or step.number == until:
                return True
            if evaluates:
                job.learn()
    except NotFinite:  # on every rank alike
        _written(job)  # by all: the group ends with the first that raises
        raise
    return True


def _settle(job: Job, progress: Progress, timing: Timing, save: bool, leave: bool) -> bool:
    """What follows a step: the evaluation that is due, and a checkpoint. False where the run was asked to leave."""
    better, due_now = False, progress.pending and not leave
    if due_now:
        better, leave = _evaluate(job, progress, timing)
    stopping = job.recipe.train.early_stopping
    patient = stopping is None or progress.waited < stopping.patience
    # Only with an evaluation: a run that ended impatient and is asked for more goes on until the next one.
    progress.finished = due_now and not progress.pending and (progress.step == job.total_steps or not patient)
    if save or better or leave or progress.finished:
        save_checkpoint(job, progress, timing)
    if leave:
        _written(job)
    return not leave


def _written(job: Job) -> None:
    """Waits until the checkpoint that may be on its way is committed, on every rank, and as long as that takes."""
    with job.watch.busy("writing a checkpoint"):
        job.saver.finish()
        together()  # whoever uploads more slowly is not waited for in a collective


def _record(job: Job, step: Step, timing: Timing) -> None:
    job.laps.to("logging")
    timing.stepped(step.seconds, step.waited, step.rows, step.tokens, step.padded)
    row = {
        "step": step.number,
        "epoch": round(step.number / job.steps_per_epoch, 6),
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        **timing.recent(),
    }
    if job.metrics is not None:
        job.metrics.write(row)
    told = {"seconds": round(step.seconds, 4), "waited": round(step.waited, 4)}
    job.emit({"event": "step", "steps": job.total_steps, **row, **told})
    job.laps.to(None)


def _evaluate(job: Job, progress: Progress, timing: Timing) -> tuple[bool, bool]:
    """Scores the validation split. (Is the model the best so far, was the run asked to leave before that was known.)"""
    begun = time.monotonic()
    job.emit({"event": "stage", "name": "evaluating"})
    network = Network(job.engine, job.task, job.processor, job.facts, job.device)
    scores = evaluate(
        network,
        job.prepared["validation"],
        2 * job.recipe.train.micro_batch_size,
        job.watch,
        lambda rows: job.serve("validation", list(rows)),
        pictures.keep(job.run, progress.step, "eval"),
    )
    timing.evaluating += time.monotonic() - begun
    if scores is None:
        return False, True
    metric, patient_with = leading_metric(job.recipe), patient_metric(job.recipe)
    better = progress.judge(scores, metric, job.task.lower_is_better, job.attempt, patient_with)
    row = {"step": progress.step, "epoch": round(progress.step / job.steps_per_epoch, 6), **progress.scores}
    if job.metrics is not None:
        job.metrics.write(row)
    job.emit({"event": "scores", **row})
    return better, False


def save_checkpoint(job: Job, progress: Progress, timing: Timing) -> None:
    """Begins to save a checkpoint of where the run stands, when the one before it is committed; see `Saver`."""
    begun = time.monotonic()
    _written(job)
    job.watch.at("copying a checkpoint")
    state = {
        **vars(progress),
        "attempt": job.attempt,
        "steps_per_epoch": job.steps_per_epoch,
        "total_steps": job.total_steps,
        "loss_scale": checkpoint.loss_scale(job.engine),
        "prepared": {split: prepared.manifest.key for split, prepared in job.prepared.items()},
        "recipe": job.recipe.dump(),
        "torch": str(torch.__version__),
    }
    job.saver.save(job.engine, state, job.norms.statistics())
    timing.saving += time.monotonic() - begun
