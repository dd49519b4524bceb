"""Training in a worker group of a test, as `attempt.Run` builds and `loop.steps` steps it; no evaluation, no export."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups

from rayft import attempts, storage
from rayft.recipe import Recipe
from rayft.tasks.stacked import Blocks
from rayft.training import assembly, checkpoint, checkpoints, engine, freeze
from rayft.training.assembly import pretrained
from rayft.training.attempt import Run, Setting
from rayft.training.laps import Laps
from rayft.training.loop import Job, save_checkpoint, steps
from rayft.training.loss_scale import gradient_scaler
from rayft.training.progress import Progress
from rayft.training.saver import Saver
from rayft.training.timing import Timing
from rayft.training.watch import Watch
from test_loop import STEPS, Processor, recipe, rows, shares_of

OWN = {"labels": ["LABEL_0", "LABEL_1", "LABEL_2"]}  # the model's: its head stays
NEW = {"labels": ["a", "b", "c"]}  # others: a new head is drawn


def plain(**fields: Any) -> dict[str, Any]:
    """A recipe of test_loop's, to be sent to workers; micro-batches of 8 rows."""
    return recipe(**{"train__micro_batch_size": 8, **fields}).dump()


def run_of(folder: str, given: dict[str, Any], start: str | None, steps_per_epoch: int = STEPS) -> Run:
    """A run over test_loop's batches on the model in `folder`, going on from checkpoint `start`."""
    run = object.__new__(Run)
    run.recipe = Recipe.parse(given)
    run.task, run.processor = run.recipe.task, Processor()
    run.facts = NEW if run.recipe.model.lora else OWN
    run.base = pretrained(run.recipe, folder)
    run.order = SimpleNamespace(steps_per_epoch=steps_per_epoch)  # type: ignore[assignment]
    run.start, run.attempt, run.total = start, 1, STEPS
    run.progress, run.timing, run.engine, run.watch = Progress(), Timing(), None, Watch(None, dist.get_rank())
    run.setting, run.load, run.blocks = Setting(), run.task.load, Blocks((), ())
    if start:
        run._restore()
    return run


def job_of(run: Run, folder: str) -> Job:
    return Job(
        recipe=run.recipe, task=run.task, engine=run.engine, processor=run.processor, facts=run.facts, prepared={},
        steps_per_epoch=run.order.steps_per_epoch, total_steps=run.total, device=torch.device("cpu"), run=folder,
        attempt=run.attempt, emit=lambda event: None, metrics=None,
        saver=Saver(folder, run.attempt, 99, 60, None, lambda step: None), watch=Watch(None, dist.get_rank()),
        blocks=run.blocks, prefix=None, norms=run.norms, laps=Laps(),
    )  # fmt: skip


def stretch(run: Run, folder: str, until: int) -> list[float]:
    """Trains up to step `until`; the losses."""
    batches = rows()[run.progress.step : until]
    size = run.recipe.train.micro_batch_size
    freeze.train_mode(run.engine.module, run.blocks)
    found = []
    first = run.progress.step
    for share in shares_of(batches, dist.get_rank(), dist.get_world_size(), size):
        later = replace(share, step=first + share.step)
        found += [step.loss for step in steps(job_of(run, folder), iter([later]))]
        run.progress.step += 1
    return found


def save(run: Run, folder: str) -> str:
    """Saves where the run stands below `folder`; the checkpoint's path. Another's of the same step and attempt goes."""
    if dist.get_rank() == 0:
        storage.delete(storage.join(folder, "checkpoints", checkpoints.folder_name(run.progress.step, run.attempt)))
        if not attempts.newest(folder):
            attempts.claim(folder, [], 0)
    dist.barrier()
    job = job_of(run, folder)
    save_checkpoint(job, run.progress, run.timing)
    job.saver.finish()
    dist.barrier()
    return storage.join(folder, "checkpoints", checkpoints.folder_name(run.progress.step, run.attempt))


def released(run: Run) -> None:
    engine.destroy(run.engine)
    run.engine = None
    gc.collect()


def seen(run: Run) -> dict[str, Any]:
    """What the engine holds: dtypes of what learns, of the rest and of the masters."""
    parameters = list(run.engine.module.parameters())
    inner = engine.inner_optimizer(run.engine)
    return {
        "learning": {str(p.dtype) for p in parameters if p.requires_grad},
        "frozen": {str(p.dtype) for p in parameters if not p.requires_grad and len(engine.shape_of(p)) > 1},
        "masters": {str(piece.master.dtype) for piece in engine.pieces(run.engine)}
        | {str(state[key].dtype) for state in inner.state.values() for key in ("exp_avg", "exp_avg_sq")},
        "buckets": {str(dtype) for dtype in getattr(run.engine.optimizer, "ipg_buckets", {torch.float32: None})},
    }


def losses_of(folder: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On a worker: for each case the losses from where it starts to `until`, and what its engine holds.

    A case has `recipe`, and may have `start` (a checkpoint), `until` (20), `save` ({step: folder}), `steps_per_epoch`,
    `between` (a folder for what gradual unfreezing saves), and `forget`: to begin with moments of zero.
    """
    results = []
    for case in cases:
        run = run_of(folder, case["recipe"], case.get("start"), case.get("steps_per_epoch", STEPS))
        run._build()
        if case.get("forget"):
            engine.reset_moments(run.engine)
        found: list[float] = []
        for step, target in sorted(case.get("save", {}).items()):
            found += advance(run, case, step)
            save(run, target)
        found += advance(run, case, case.get("until", STEPS))
        results.append({"losses": found, **seen(run)})
        released(run)
    return results


def advance(run: Run, case: dict[str, Any], until: int) -> list[float]:
    """Trains up to step `until`, with an engine of its own for each depth of gradual unfreezing; the losses."""
    found: list[float] = []
    while run.progress.step < until:
        end = run._stretch_end()
        found += stretch(run, "unused", min(end, until))
        if run.progress.step == end and end < case.get("until", STEPS):
            run.start = save(run, case["between"])
            released(run)
            run._build()
    return found


def order_of_loading(folder: str, target: str, given: dict[str, Any]) -> list[str]:
    """On a worker: what a run that goes on from its own checkpoint does, in which order, until it is built."""
    run = run_of(folder, given, None)
    run._build()
    stretch(run, "unused", 1)
    start = save(run, target)
    released(run)
    told: list[str] = []

    def telling(name: str, plain: Any) -> Any:
        return lambda *arguments: (told.append(name), plain(*arguments))[1]

    again = run_of(folder, given, start)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fetch", "load_weights", "load_moments"):
            patch.setattr(checkpoint.Checkpoint, name, telling(name, getattr(checkpoint.Checkpoint, name)))
        patch.setattr(checkpoint, "_sha256", telling("check", checkpoint._sha256))
        patch.setattr(assembly, "together", telling("together", assembly.together))
        again._build()
    released(again)
    return told


def unfrozen_gradually(folder: str, target: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On a worker: losses and last step counters of runs whose engine is built anew at each depth, as by `Run.go`."""
    results = []
    for number, case in enumerate(cases):
        run = run_of(folder, case["recipe"], None, case["steps_per_epoch"])
        found: list[float] = []
        where = str(Path(target) / str(number))
        while run.progress.step < run.total:
            run._build()
            found += stretch(run, where, run._stretch_end())
            run.start = save(run, where)
            counters = {
                piece.name: int(engine.inner_optimizer(run.engine).state[piece.flat]["step"])
                for piece in engine.pieces(run.engine)
            }
            released(run)
        results.append({"losses": found, "counters": counters})
    return results


class Mallinfo(ctypes.Structure):
    """What `mallinfo2` of glibc answers, in bytes."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def memory_of(folder: str, given: dict[str, Any], engines: int) -> list[float]:
    """On a worker: allocated MB after each of so many engines, built, stepped and destroyed one after another.

    Not what is resident: by how much of what was freed the allocator keeps, that differs from engine to engine.
    """
    library = ctypes.CDLL("libc.so.6")
    library.mallinfo2.restype = Mallinfo
    allocated = []
    for _ in range(engines):
        run = run_of(folder, given, None)
        run._build()
        stretch(run, "unused", 2)
        released(run)
        del run
        gc.collect()
        now = library.mallinfo2()
        allocated.append((now.uordblks + now.hblkhd) / 1e6)
    return allocated


def patience_of(folder: str, stages: list[int]) -> list[tuple[float, float]]:
    """On a worker: for an engine of each stage how many seconds collectives of its group, and of the one that DeepSpeed
    would make, may take; and for one more, when the process has left its group and joined another with 77 s."""

    def seconds(group: Any) -> float:
        return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())

    def held(stage: int) -> tuple[float, float]:
        run = run_of(folder, plain(deepspeed__zero_stage=stage), None)
        run._build()
        stretch(run, "unused", 1)
        found = seconds(run.engine.data_parallel_group), seconds(groups._clone_world_group())
        released(run)
        return found

    results = [held(stage) for stage in stages]
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    store = dist.FileStore(str(Path(folder) / "again"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=77))
    engine.prepare_process(1, world, gpu=False)
    return [*results, held(stages[-1])]


def compiled(folder: str, stages: list[int]) -> list[tuple[list[float], list[float], int]]:
    """On a worker: losses of three steps without and with `compile`, and how many graphs were compiled."""
    import torch._dynamo

    results = []
    for stage in stages:
        losses, graphs = [], 0
        for wanted in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            run = run_of(folder, plain(deepspeed__zero_stage=stage, model__compile=wanted), None)
            run._build()
            losses.append(stretch(run, "unused", 3))
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            released(run)
        results.append((losses[0], losses[1], graphs))
    return results


def scaled_steps(folder: str, cases: list[dict[str, Any]]) -> list[tuple[float, list[float], list[int]]]:
    """On a worker: for each recipe the norm of the first moments after one step; after each of three steps the loss
    scale and how many steps it has stood. Gradients of the third are infinite on the last rank."""
    results = []
    for given in cases:
        run = run_of(folder, given, None)
        run._build()
        norm, scales, growth = 0.0, [], []
        for step in (1, 2, 3):
            if step == 3 and dist.get_rank() == dist.get_world_size() - 1:
                learning = engine.trainable(run.engine)[-1]
                learning.register_hook(lambda gradient: gradient * float("inf"))
            stretch(run, folder, step)
            scaler = gradient_scaler(run.engine)
            scales.append(float(scaler.get_scale()))
            growth.append(int(scaler.state_dict()["_growth_tracker"]))
            if step == 1:
                norm = _norm_of_moments(run)
        results.append((norm, scales, growth))
        released(run)
    return results


def _norm_of_moments(run: Run) -> float:
    """Of all ranks; at stage 0 each holds all."""
    own = sum(float(piece.moment(run.engine, "exp_avg").double().pow(2).sum()) for piece in engine.pieces(run.engine))
    total = torch.tensor(own, dtype=torch.float64)
    if run.engine.zero_optimization_stage():
        dist.all_reduce(total)
    return float(total.sqrt())
