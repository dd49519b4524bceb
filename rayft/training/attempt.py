"""One attempt on one worker: build, train, score, export. The same for one worker and for many."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rayft import attempts, storage
from rayft.data.order import Position
from rayft.data.prepared import Prepared
from rayft.data.window import Cutter, Share, local_shares
from rayft.models import fetch_model
from rayft.recipe import Recipe
from rayft.tasks.stacked import Blocks
from rayft.tasks.task import Pretrained
from rayft.training import checkpoint, checkpoints, engine, export, freeze, overfitting, pictures
from rayft.training.assembly import assemble, pretrained
from rayft.training.evaluate import Network, evaluate
from rayft.training.loop import Emit, Job, save_checkpoint, train
from rayft.training.metrics import Metrics
from rayft.training.prefix import Source, fill
from rayft.training.progress import Progress, leading_metric
from rayft.training.saver import Saver
from rayft.training.schedule import order, total_steps
from rayft.training.standin import Prefix
from rayft.training.timing import Timing
from rayft.training.together import together
from rayft.training.watch import Watch

Load = Callable[[Pretrained, dict[str, Any], Any], Any]


@dataclass(frozen=True)
class Setting:
    """What may differ from a run under Ray Train.

    load        makes the pretrained network with its head; None: the task's own
    own         makes tensors that learn writable, where `load` maps them
    processor   the task's, where it was made before
    exports     whether the best model is tested and exported in the end
    trains      whether steps are made; else the run has ended where it stands
    """

    load: Load | None = None
    own: Callable[[Any], None] = lambda network: None
    processor: Any = None
    exports: bool = True
    trains: bool = True


class Run:
    """One attempt on one worker."""

    def __init__(
        self,
        recipe: Recipe,
        config: dict[str, Any],
        prepared: dict[str, Prepared],
        device: torch.device,
        emit: Emit,
        watch: Watch,
        setting: Setting,
    ) -> None:
        self.recipe, self.task, self.prepared = recipe, recipe.task, prepared
        with watch.busy("fetching the model"):
            self.base = pretrained(recipe, fetch_model(config["model"]))
            self.processor = setting.processor or self.task.processor(self.base)
        self.setting = setting
        self.load = setting.load or self.task.load
        self.facts = prepared["train"].manifest.facts
        self.start, self.attempt, self.begun = config["start"], config["attempt"], config["begun"]
        self.identity = config["identity"]
        self.device, self.emit, self.watch = device, emit, watch
        self.order = order(recipe, prepared["train"])
        self.total = total_steps(recipe.train, self.order.steps_per_epoch)
        self.progress, self.timing = Progress(), Timing()
        self.engine: Any = None
        self.prefix: Prefix | None = None
        self.shares: Iterator[Share] = iter(())
        self.blocks = Blocks((), ())

    def go(self, feed: Callable[[Run], Iterator[Share]] | None) -> Generator[None, None, None]:
        """Trains to the end, scores the best model on the test split, exports it and writes result.json.

        `feed` opens the stream of global batches from where the run stands; None where all steps are done. Yields after
        each evaluation. Ends early, with a checkpoint committed and the event `left`, where the watch brings that
        order.
        """
        if self.start:
            self._restore()
        chief = dist.get_rank() == 0
        metrics = Metrics(self.recipe.folder, self.progress.step, self.progress.pending) if chief else None
        self.saver = Saver(
            self.recipe.folder,
            self.attempt,
            self.recipe.checkpoints.keep,
            self.recipe.failure.timeout_s,
            metrics,
            self._saved,
        )
        self.shares = feed(self) if feed is not None else iter(())
        stayed = yield from self._trained(metrics)
        scores = self._finish() if stayed else None
        if scores is None:
            dist.barrier()
            self.emit({"event": "left", "step": self.progress.step})
            return
        if metrics is not None:
            warnings = overfitting.warnings(self.recipe, overfitting.points(metrics.lines()), self.best_step)
            if self.setting.exports:
                metrics.write({"step": self.progress.step, "epoch": self._epochs(), **scores})
            attempts.hold(self.recipe.folder, self.attempt)
            metrics.close()
            result = {**self._result(scores), "warnings": warnings}
            storage.write_json(storage.join(self.recipe.folder, "result.json"), result)
            self.emit({"event": "finished", "result": result})
        dist.barrier()

    def _trained(self, metrics: Metrics | None) -> Generator[None, None, bool]:
        """Stretch after stretch, each with an engine of its own. False where the run was asked to leave."""
        while True:
            self._build()
            if not self.done:
                self.prefix = self._filled()
                self.progress.stored = self.prefix.depth if self.prefix is not None else 0
                if self.timing.first_step is None:
                    self.emit({"event": "stage", "name": "training"})
                stayed = yield from train(
                    self._job(metrics), self.shares, self.progress, self.timing, self._stretch_end()
                )
                if not stayed:
                    return False
            with self.watch.busy("writing a checkpoint"):
                self.saver.release()
            together()  # rank 0 has committed what all go on from, or go back to
            if self.done:
                return True
            self.start = checkpoints.newest(self.saver.folder)
            self.close()

    def _saved(self, step: int) -> None:
        seconds = round(time.monotonic() - self.saver.begun, 3)
        self.emit({"event": "saved", "step": step, "seconds": seconds})

    def keep(self) -> None:
        """Commits a checkpoint of where the run stands, unless there is one; after an evaluation."""
        newest = checkpoints.newest(self.saver.folder)
        if newest is None or checkpoints.step_of(newest) < self.progress.step:
            save_checkpoint(self._job(None), self.progress, self.timing)
            self.saver.finish()

    def close(self) -> None:
        """Frees the engine, when no checkpoint of it is on its way any more."""
        if self.engine is not None:
            self.saver.wait()
            engine.destroy(self.engine)
            self.engine = self.prefix = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # for whoever shares the GPU, and so that the next one's peak is its own

    def own_shares(self) -> Generator[Share, None, None]:
        """This rank's shares of the global batches from where the run stands, read by itself; see `local_shares`."""
        data, task = self.prepared["train"], self.task if self.task.varies else None
        cut = Cutter(self.order, dist.get_world_size(), dist.get_rank(), self.recipe.train.micro_batch_size)
        return local_shares(data.folder, data.manifest.shards, cut, self.position, self.total, task)

    @property
    def position(self) -> Position:
        """Where in the order of the rows the run stands."""
        return self.order.position(self.progress.step)

    @property
    def done(self) -> bool:
        return self.progress.finished or (self.progress.step >= self.total and not self.progress.pending)

    def _restore(self) -> None:
        with checkpoint.Checkpoint(str(self.start)) as saved:
            state = saved.state
        names = ("step", "best", "waited", "pending", "scores", "cohorts", "finished")
        self.progress = Progress(
            **{name: state[name] for name in names},
            foremost=state.get("foremost", (state["best"] or {}).get("value")),
            stored=state.get("stored"),
        )
        # A run that ended goes on when its recipe now asks for more.
        if state["finished"] and self.total > state["total_steps"] and state["step"] >= state["total_steps"]:
            self.progress.finished = False
        self.progress.finished |= not self.setting.trains

    def _build(self) -> None:
        """The model at the current epoch's freezing depth, in an engine, with the newest checkpoint's state."""
        epoch = min(self.progress.step, self.total - 1) // self.order.steps_per_epoch

        def load() -> Any:
            return self.load(self.base, self.facts, self.processor)

        together()  # one machine may have had to fetch the model, and others not
        with self.watch.busy("loading the model"):
            made = assemble(self.recipe, load, self.setting.own, epoch, self.progress.cohorts, self.start)
        self.engine, self.blocks, self.norms, self.prefix = made.engine, made.blocks, made.norms, made.prefix

    def _filled(self) -> Prefix | None:
        """What stands in for the frozen blocks, with their states for the rows to come; None where that won't pay.

        With `auto` a run goes on as it has begun, whatever that costs now: stored states were computed in other batches
        and may differ from what the blocks give in the last bit.
        """
        if self.prefix is None:
            return None
        before = self.progress.stored if self.recipe.model.cache_frozen == "auto" else None
        if before == 0:
            self.emit({"event": "note", "text": "the output of the frozen blocks is not stored, as before"})
            return None
        todo = [split for split in ("train", "validation") if split in self.prepared]
        self.watch.at("computing the frozen blocks")
        self.engine.eval()
        source = Source(self._network, self.engine.module, self.blocks)
        left = self.total - self.progress.step
        begun = time.monotonic()
        filled = fill(
            self.recipe,
            source,
            self.prefix,
            {split: self.prepared[split] for split in todo},
            None if before == self.prefix.depth else {split: left / self._between(split) for split in todo},
            identity=self.identity,
            emit=self.emit,
            watch=self.watch,
        )
        self.timing.filling += time.monotonic() - begun
        return filled

    def _between(self, split: str) -> float:
        """Optimizer steps between two passes over a split."""
        every, per_epoch = self.recipe.train.evaluate_every, self.order.steps_per_epoch
        return per_epoch if split == "train" else every.count * (per_epoch if every.unit == "epoch" else 1)

    def _stretch_end(self) -> int:
        """The step at which the freezing depth changes next, or the last one."""
        if not self.recipe.model.unfreeze_every:
            return self.total
        epoch = self.progress.step // self.order.steps_per_epoch
        depth = freeze.depth_at(self.recipe.model, epoch, self.blocks)
        if depth <= self.blocks.fixed:
            return self.total
        while freeze.depth_at(self.recipe.model, epoch, self.blocks) == depth:
            epoch += 1
        return min(self.total, epoch * self.order.steps_per_epoch)

    def _job(self, metrics: Metrics | None) -> Job:
        return Job(
            recipe=self.recipe,
            task=self.task,
            engine=self.engine,
            processor=self.processor,
            facts=self.facts,
            prepared=self.prepared,
            steps_per_epoch=self.order.steps_per_epoch,
            total_steps=self.total,
            device=self.device,
            run=self.recipe.folder,
            attempt=self.attempt,
            emit=self.emit,
            metrics=metrics,
            saver=self.saver,
            watch=self.watch,
            blocks=self.blocks,
            prefix=self.prefix,
            norms=self.norms,
            laps=self.timing.laps,
        )

    def _finish(self) -> dict[str, float] | None:
        """The scores of the best model, which it exports; None where the run was asked to leave before."""
        best = self.progress.best
        if best is None:
            raise RuntimeError("a finished run has no evaluation")
        if not self.setting.exports:
            return dict(best["scores"])
        path = storage.join(self.recipe.folder, "checkpoints", best["checkpoint"])
        if best["step"] != self.progress.step:
            self._go_back_to(path)
        scores: dict[str, float] = dict(best["scores"])
        if "test" in self.prepared:
            self.emit({"event": "stage", "name": "testing"})
            size = 2 * self.recipe.train.micro_batch_size
            drawn = pictures.keep(self.recipe.folder, best["step"], "test")
            tested = evaluate(self._network, self.prepared["test"], size, self.watch, self._whole, drawn)
            if tested is None:
                return None
            scores |= {f"test_{name}": value for name, value in tested.items()}
        self.watch.at("exporting")
        if dist.get_rank() == 0:
            attempts.hold(self.recipe.folder, self.attempt)
            self.emit({"event": "stage", "name": "exporting"})
            data = {split: prepared.manifest.key for split, prepared in self.prepared.items()}
            target = storage.join(self.recipe.folder, "export")
            with self.watch.busy("exporting"):
                export.export(self.recipe, self.base, self.facts, path, scores, data, target)
        self.watch.at("waiting for the export")
        together()
        return scores

    def _go_back_to(self, path: str) -> None:
        """The model as it was at an earlier checkpoint; anew where parameters have learned since that did not then."""
        with checkpoint.Checkpoint(path) as saved, self.watch.busy("loading the best model"):
            if saved.names >= set(checkpoint.shapes(self.engine, self.norms.statistics())):
                saved.fetch(self.engine.module)
                together()  # whoever fetches is not waited for in a collective
                saved.load_weights(self.engine.module)
                return
        self.close()
        self.start = path
        self._build()

    @property
    def _network(self) -> Network:
        return Network(self.engine, self.task, self.processor, self.facts, self.device)

    def _whole(self, _: Any) -> None:
        """Test rows pass through all blocks: it is but once."""
        if self.prefix is not None:
            self.prefix.offer(None)

    @property
    def best_step(self) -> int:
        """The step of the best evaluation so far."""
        return int((self.progress.best or {"step": 0})["step"])

    def _epochs(self) -> float:
        return round(self.progress.step / self.order.steps_per_epoch, 6)

    @property
    def rows(self) -> int:
        """Source rows trained on so far, over all epochs."""
        return round(self.progress.step / self.order.steps_per_epoch * self.prepared["train"].manifest.source_rows)

    def _result(self, scores: dict[str, float]) -> dict[str, Any]:
        best, saved_s = self.progress.best or {}, self.prefix.saved_s if self.prefix is not None else 0.0
        return {
            "run": self.recipe.folder,
            "status": "finished",
            "error": None,
            "steps": self.progress.step,
            "epochs": self._epochs(),
            "rows": self.rows,
            "metrics": scores,
            "best": {"step": best["step"], "metric": f"eval_{leading_metric(self.recipe)}", "value": best["value"]},
            "export": storage.join(self.recipe.folder, "export") if self.setting.exports else None,
            "pipeline": self.task.pipeline(),
            "timing": self.timing.figures(self.begun, self.device, saved_s),
        }
