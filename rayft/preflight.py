"""What a run will do, what it will cost and what is wrong with it, before anything is started.

Rows are prepared for it, and what was prepared is kept: the run finds it. Everything else is arithmetic.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from rayft import storage
from rayft.balance import balance, unseen
from rayft.doubts import doubts
from rayft.errors import DataError, RayftError, RunRefused, StorageError
from rayft.findings import check_lines
from rayft.launch import ahead, placement
from rayft.models import UNTRAINED, fetch_model, model_identity, without_weights
from rayft.recipe import Recipe
from rayft.record import Record
from rayft.tasks.cells import short
from rayft.text import size

Show = Callable[[dict[str, Any]], None]
Report = dict[str, Any]

STAGES = (0, 1, 2, 3)
SPLITS = ("train", "validation", "test")
UNSEEN = (
    "model.batch_norm_rows: null keeps the statistics of the model's {} BatchNorms, which have seen no data; 16 lets "
    "them learn"
)
NO_DROPOUT = "model.dropout: {} does nothing, the model has no dropout"
NO_REVISIONS = "model.revision: {!r} does nothing, a folder has no revisions"


def check(recipe: Recipe, *, show: Show) -> Report:
    """What is known of the run of `recipe`, as plain values; a part is None where it can't be known.

    faults      sentences: each a reason why the run would be refused
    warnings    sentences: what works and may not be meant
    run         {folder, state: "new", "resumed", "longer" or "finished"}; state None: refused
    storage     {path, writable, prepared: the folder that keeps prepared rows, or None where nothing was kept}
    cluster     {machines, cpus, gpus, workers, cpus_per_worker, gpus_per_worker}
    data        {split: {rows, prepared, bad: {count, examples}, dropped: {reason: rows}, truncated,
                lengths: {median, p95, longest, limit}, cut, balance: {label: rows} or None}}; median and p95 are
                upper bounds of their classes
    parameters  {total, trainable, frozen, trainable_at_end}
    steps       {total, per_epoch, global_batch_size, rows_per_worker, micro_batches}
    sweep       {trials, at_once, scheduler, seconds: of all to their end, depths: [{depth, share: of the trials,
                stored: is the frozen blocks' output, trainable, memory: bytes a worker, seconds: of a trial}]}
    memory      {worker: bytes or None, zero: {stage: bytes of weights, gradients and optimizer state}, zero_stage}
    """
    return _Check(recipe.resolved(), show).report


def refuse_from_here(recipe: Recipe, show: Show) -> None:
    """RunRefused with every fault that shows without a cluster: in the model, the files and the columns of the rows.

    What can't be looked at from here (files without rights to them, a package that only the cluster has) is left to the
    cluster.
    """
    found = _Check(recipe.resolved(), show, here=True).faults
    if found:
        raise RunRefused("\n".join(found))


class _Check:
    """One check: each part is looked at even where another has failed, as far as it can be; `here`: from here alone."""

    def __init__(self, recipe: Recipe, show: Show, here: bool = False) -> None:
        self.recipe, self.show = recipe, show
        self.faults: list[str] = []
        self.model_path: str | None = None
        self.processor: Any = None
        self.facts: dict[str, Any] | None = None
        self.prepared: dict[str, Any] = {}
        self.balances: dict[str, dict[str, int] | None] = {}
        self.report: Report = {"faults": self.faults, "warnings": []}
        self.report |= dict.fromkeys(("run", "storage", "cluster", "data", "parameters", "steps", "memory", "sweep"))
        show({"event": "stage", "name": "checking"})
        if here:
            self._from_here()
            return
        self._place()
        with self._gathering():
            self._model()
        with self._gathering():
            self._on_cluster()

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        """What is raised inside becomes a fault, told once; several splits' faults come in one error, a line each."""
        try:
            yield
        except DataError as error:
            self._add(*re.split(r"\n(?! )", str(error)))
        except RunRefused as error:
            self.report["run"]["state"] = None
            self._add(str(error))
        except RayftError as error:
            self._add(str(error))

    def _add(self, *sentences: str) -> None:
        self.faults.extend(sentence for sentence in sentences if sentence not in self.faults)

    def _from_here(self) -> None:
        from rayft.data.pieces import fragments
        from rayft.data.source import peek

        recipe = self.recipe
        with self._gathering(), suppress(StorageError):
            if not recipe.model.path.startswith("pkg:"):
                fetch_model(recipe.model.path)
        wanted = [name for name in recipe.task.columns() if name not in recipe.data.columns.values()]
        for split in SPLITS:
            with self._gathering(), suppress(StorageError):
                sources = getattr(recipe.data, split) or ()
                if sources and not any(source.path.startswith("hf://") for source in sources):
                    first = fragments(sources, split)[0]
                    columns, _ = peek(first)
                    missing = [name for name in wanted if name not in columns]
                    if missing:
                        there = ", ".join(map(short, columns)) or "none"
                        self._add(
                            f"data.{split}: {first.path} has no column {', '.join(missing)}; its columns: {there}"
                        )

    def _place(self) -> None:
        """Storage, and what lies there of this run."""
        recipe = self.recipe
        self.report["storage"] = {"path": storage.shown(recipe.storage), "writable": False, "prepared": None}
        self.report["run"] = {"folder": storage.shown(recipe.folder), "state": None}
        self.record: Record | None = None
        with self._gathering():
            storage.check_writable(recipe.storage)
            self.report["storage"]["writable"] = True
        with self._gathering():
            self.record = Record(recipe.folder)
            if recipe.tune is None:
                self.record.refuse_sweep()
            self.report["run"]["state"] = self.record.standing(recipe)
        with self._gathering():
            if self.record is not None:
                self.record.refuse_second_writer(False, self.show)

    def _model(self) -> None:
        from rayft.launch.session import quiet
        from rayft.training.assembly import pretrained

        quiet()
        recipe = self.recipe
        path = fetch_model(recipe.model.path)
        if self.record is not None and self.report["run"]["state"] is not None:
            self.record.refuse_other_model(model_identity(path, recipe.model.revision, recipe.train.seed))
        self.processor = recipe.task.processor(pretrained(recipe, path))
        self.model_path = path
        self.report["warnings"] += recipe.task.notes(self.processor)
        if recipe.model.revision is not None and os.path.isdir(path):
            self.report["warnings"].append(NO_REVISIONS.format(recipe.model.revision))
        if without_weights(path):
            self.report["warnings"].append(UNTRAINED.format(recipe.model.path))

    def _on_cluster(self) -> None:
        from rayft.launch import session

        placed = self.recipe.cluster
        with ahead.importing(*ahead.DRIVER), session.cluster(placed.max_workers, placed.cpus_per_worker):
            nodes = placement.living_nodes()
            have = {name: int(sum(node["Resources"].get(name, 0) for node in nodes)) for name in ("CPU", "GPU")}
            # A Ray of this command's own is told of room for all workers, whatever the machine has.
            processors = (os.cpu_count() or 1) if session.is_own() else have["CPU"]
            if session.is_own() and (text := placement.crowded(placed, processors)):
                self.report["warnings"].append(text)
            self.report["cluster"] = {
                "machines": len(nodes),
                "cpus": processors,
                "gpus": have["GPU"],
                "workers": placed.max_workers,
                "cpus_per_worker": placed.cpus_per_worker,
                "gpus_per_worker": placed.gpus_per_worker,
            }
            self._add(*placement.faults(self.recipe, nodes))
            reachable = len(nodes) == 1 or not placement.unshared(self.recipe)
            if have["CPU"] and reachable:
                self._data(len(nodes))
            memory = placement.worker_memory(placed)
            machines = placement.memories(placed, gpu=False) if placed.gpus_per_worker else []
            if self.recipe.tune is not None and self.facts is not None and self.prepared:
                with self._gathering():
                    self._sweep(memory)
        self._tell_data()
        if self.facts is not None and self.processor is not None:
            self._tell_cost(self.facts, memory, machines)

    def _data(self, machines: int) -> None:
        """Prepares the rows, or where that fails at least finds the facts of the training rows."""
        from rayft.data.prepare import facts_of

        recipe, show = self.recipe, self.show
        writable = self.report["storage"]["writable"]
        if not writable and machines > 1:
            return

        def progress(stage: str, done: int, total: int | None) -> None:
            show({"event": "stage", "name": stage, "done": done, "total": total})

        # Where storage can't be written the rows are looked at all the same, and what comes of them is thrown away.
        elsewhere = nullcontext(recipe.storage) if writable else tempfile.TemporaryDirectory(prefix="rayft-check-")
        with elsewhere as folder:
            meant = recipe.model_copy(update={"storage": folder})
            self._prepare(meant, None, progress)
            if not self.prepared:
                sound = self._listed()
                if "train" in sound and len(sound) < len(SPLITS):  # the rows that are there may be bad too
                    self._prepare(meant, sound, progress)
            if writable and self.prepared:
                self.report["storage"]["prepared"] = storage.join(self.report["storage"]["path"], "prepared")
            if self.prepared:
                self.facts = self.prepared["train"].manifest.facts
                return
            with self._gathering():
                self.facts = facts_of(meant, progress=progress)

    def _prepare(self, meant: Recipe, splits: list[str] | None, progress: Callable[..., None]) -> None:
        from rayft.data.prepare import prepare

        with self._gathering():
            if self.model_path is not None:
                self.prepared = prepare(meant, self.model_path, progress=progress, splits=splits)
                self.balances = {split: balance(meant, prepared) for split, prepared in self.prepared.items()}

    def _listed(self) -> list[str]:
        """The splits whose files are there, or that are not to have any; a fault for each of the others."""
        from rayft.data.pieces import fragments

        found = []
        for split in SPLITS:
            sources = getattr(self.recipe.data, split)
            with self._gathering():
                if sources:
                    fragments(sources, split)
                found.append(split)
        return found

    def _tell_data(self) -> None:
        if not self.prepared:
            return
        report = self.report
        report["data"] = {
            split: _split(self.recipe, prepared.manifest) | {"balance": self.balances[split]}
            for split, prepared in self.prepared.items()
        }
        for split, prepared in self.prepared.items():
            report["warnings"] += prepared.manifest.notes(split)
        report["warnings"] += doubts(self.recipe, self.prepared["train"])
        report["warnings"] += unseen(self.prepared["train"].manifest.facts, self.balances)
        if self.record is not None and report["run"]["state"] is not None:
            with self._gathering():
                keys = {split: prepared.manifest.key for split, prepared in self.prepared.items()}
                self.record.refuse_other_data(keys["train"], keys.get("validation"))
        from rayft.data.order import micro_batches, share
        from rayft.training.schedule import order, total_steps

        train, workers = self.recipe.train, self.recipe.cluster.max_workers
        per_epoch = order(self.recipe, self.prepared["train"]).steps_per_epoch
        group = self.recipe.coupled
        report["steps"] = {
            "total": total_steps(train, per_epoch),
            "per_epoch": per_epoch,
            "global_batch_size": train.global_batch_size,
            "rows_per_worker": len(share(train.global_batch_size, workers, 0, group)),
            "micro_batches": len(micro_batches(train.global_batch_size, workers, 0, train.micro_batch_size, group)),
        }

    def _sweep(self, memory: int | None) -> None:
        """What the trials will cost at each depth that they may have."""
        import ray

        from rayft import forecast
        from rayft.run import decided
        from rayft.sweeps import depths
        from rayft.sweeps.room import at_once
        from rayft.training import plan
        from rayft.training.assembly import pretrained

        recipe, placed, facts = self.recipe, self.recipe.cluster, self.facts or {}
        base = pretrained(recipe, str(self.model_path))
        blocks = plan.blocks(recipe, base, facts, self.processor)
        counted: dict[int, Any] = {}
        for depth in depths.shares(recipe, blocks):
            freeze = {"layers": depth} if depth else None
            frozen = Recipe.parse({**recipe.dump(), "model": {**recipe.dump()["model"], "freeze": freeze}})
            one = plan.parameters(frozen, base, facts, self.processor, 1)
            stage = one.zero_stage(frozen, memory)
            counted[depth] = {"trainable": one.trainable, "memory": one.state_bytes(frozen, stage)}
        task = ray.remote(num_cpus=placed.cpus_per_worker, num_gpus=placed.gpus_per_worker)(forecast.measure)
        pace = ray.get(task.remote(recipe.dump(), self.prepared["train"].folder, list(counted)))
        alone = decided(recipe, placed.max_workers, plan.parameters(recipe, base, facts, self.processor, 1))
        self.report["sweep"] = forecast.forecast(alone, self.prepared, counted, pace, at_once(recipe))

    def _tell_cost(self, facts: dict[str, Any], memory: int | None, machines: list[tuple[int, int]]) -> None:
        """Parameters, and the memory that they need."""
        from rayft.training import plan
        from rayft.training.assembly import pretrained

        recipe, steps = self.recipe, self.report["steps"]
        epochs = -(-steps["total"] // steps["per_epoch"]) if steps else recipe.train.epochs or 1
        with self._gathering():
            base = pretrained(recipe, str(self.model_path))
            counted = plan.parameters(recipe, base, facts, self.processor, epochs)
            stage = counted.zero_stage(recipe, memory)
            needed = {str(one): counted.state_bytes(recipe, one) for one in STAGES}
            self.report["parameters"] = {
                "total": counted.total,
                "trainable": counted.trainable,
                "frozen": counted.frozen,
                "trainable_at_end": counted.most,
            }
            if counted.norms and recipe.model.batch_norm_rows is None and without_weights(base.path):
                self.report["warnings"].append(UNSEEN.format(counted.norms))
            if recipe.model.dropout is not None and not counted.drops:
                self.report["warnings"].append(NO_DROPOUT.format(recipe.model.dropout))
            self.report["memory"] = {"worker": memory, "zero": needed, "zero_stage": stage}
            if memory is not None and needed[str(stage)] > memory:
                self.report["warnings"].append(
                    f"memory: ZeRO {stage} needs {size(needed[str(stage)])} a worker without activations, and it "
                    f"has {size(memory)}; model.lora, model.freeze, deepspeed.offload, more workers or a higher "
                    "deepspeed.zero_stage lower that"
                )
            if text := placement.short_of_memory(recipe.at_stage(stage), counted, machines):
                self.report["warnings"].append(text)


def _split(recipe: Recipe, manifest: Any) -> Report:
    return {
        "rows": manifest.source_rows,
        "prepared": manifest.rows,
        "bad": manifest.bad,
        "dropped": manifest.dropped,
        "truncated": manifest.truncated,
        "lengths": _lengths(recipe, manifest),
        "cut": bool(manifest.cut) and manifest.split == "validation",
    }


def _lengths(recipe: Recipe, manifest: Any) -> Report:
    """Of the features, before they are packed."""
    longest = min(manifest.longest, manifest.lengths[-1][0])  # a packed row may be longer than any feature

    def share(part: float) -> int:
        wanted, seen = part * sum(count for _, count in manifest.lengths), 0
        for bound, count in manifest.lengths:
            seen += count
            if seen >= wanted:
                return int(min(bound, longest))
        return int(longest)

    return {"median": share(0.5), "p95": share(0.95), "longest": longest, "limit": recipe.task.limit()}


def text(report: Report) -> str:
    """The report for a reader."""
    return "\n".join(check_lines(report))
