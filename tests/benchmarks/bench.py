"""Every benchmark that this machine can run, and what comes of it: a table in the README and figures in results.json.

    python tests/benchmarks/bench.py [rounds=3] [only=speed,preparing,sweep,saving,trials,growth,runs,gpu]

Each runs in a process of its own, one after another; nothing else should run beside. The README's table lies between
two comments and is replaced; results.json lies beside this file, and growth.png, the picture of what grows. What is
left out, by `only` or because the machine lacks something, keeps its earlier figures, and is named.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth_picture import draw

HERE = Path(__file__).parent
README, RESULTS = HERE.parents[1] / "README.md", HERE / "results.json"
BEGIN, END = "<!-- benchmarks -->", "<!-- end of benchmarks -->"

Line = tuple[str, str, str, str, str]  # what, rayft, the other, how many times better, the goal


@dataclass(frozen=True)
class Part:
    """`arguments` of the script, with {rounds}; `lines` make the table's of its JSON; `lacks` says why it can't run.

    A script that knows no rounds is run so many times, and `middle` names the figure by which the middle one is found;
    without it, it runs once.
    """

    script: str
    arguments: tuple[str, ...]
    lines: Callable[[Any], list[Line]]
    lacks: Callable[[], str | None] = lambda: None
    middle: str | None = None

    @property
    def once(self) -> bool:
        return self.middle is None and "{rounds}" not in "".join(self.arguments)


def no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "this machine has no GPU"


def made(found: Any) -> list[Line]:
    """Of scripts that make their own lines."""
    return [tuple(line) for line in found["lines"]]  # type: ignore[misc]


def preparing(found: Any) -> list[Line]:
    texts: list[Line] = [
        (
            f"preparing {one['rows']:,} texts", f"{one['rows_per_s']['rayft']:,} rows/s",
            f"the tokenizer in a pool of processes: {one['rows_per_s']['plain']:,}", f"{one['ratio']:.2f}", "1",
        )
        for one in found["texts"]
    ]  # fmt: skip
    waited = f"{100 * found['waited_on_s3']:.2f} % of the time"
    return [*texts, ("workers wait for rows, S3 answers after 30 ms", waited, "", "", "under 2 %")]


def sweep(found: Any) -> list[Line]:
    seconds, asha = found["seconds"], found["asha"]
    other = "Ray Tune over the trainer"
    return [
        (
            "3 x 3 sweep", f"{seconds['rayft']:.0f} s", f"{other}: {seconds['peer']:.0f} s",
            f"{found['faster']:.2f}", "4.50 (6.00)",
        ),
        (
            "24 trials, ASHA", f"{asha['seconds']:.0f} s",
            f"{other}, all to their end: {asha['peer_extrapolated']:.0f} s", f"{asha['faster']:.2f}", "8.00 (12.00)",
        ),
    ]  # fmt: skip


def saving(found: Any) -> list[Line]:
    own, waiting = f"{1000 * found['held_up']:.0f} ms", f"training waits: {1000 * found['waiting']:.0f} ms"
    return [("a save holds up training", own, waiting, f"{1 / found['ratio']:.0f}", "")]


def many(found: Any) -> list[Line]:
    return [("a sweep's own time for a trial, 1,000 trials", f"{found['ms_per_trial']:.0f} ms", "", "", "")]


def none(found: Any) -> list[Line]:
    """Of scripts whose figures are in the picture."""
    return []


PARTS = {
    "speed": Part("speed.py", ("rounds={rounds}",), made),
    "preparing": Part("preparing.py", ("rounds={rounds}",), preparing),
    "sweep": Part("sweep.py", ("rounds={rounds}", "asha"), sweep),
    "saving": Part("save_stall.py", ("local", "rounds={rounds}"), saving),
    "trials": Part("many_trials.py", (), many, middle="ms_per_trial"),
    "growth": Part("growth.py", (), none),
    "runs": Part("growth_runs.py", (), none),
    "gpu": Part("gpu.py", ("rounds={rounds}",), made, no_gpu),
}


def run(part: Part, rounds: int) -> Any:
    if part.middle is None:
        return ran(part, rounds)
    return sorted((ran(part, 1) for _ in range(rounds)), key=lambda found: found[part.middle])[(rounds - 1) // 2]


def ran(part: Part, rounds: int) -> Any:
    """The JSON of the last line that the script prints."""
    arguments = [argument.format(rounds=rounds) for argument in part.arguments]
    done = subprocess.run(
        [sys.executable, str(HERE / part.script), *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{part.script} failed with exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> str:
    name = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{os.cpu_count()} cores of {name}"


def table(results: dict[str, Any]) -> str:
    lines = ["| what | rayft | other | times | goal (beyond) |", "| --- | --- | --- | --- | --- |"]
    for name, part in PARTS.items():
        if name in results:
            lines += [f"| {' | '.join(line)} |" for line in part.lines(results[name]["found"])]
    rounds: dict[str, list[str]] = {}
    for name, one in results.items():
        if PARTS[name].lines is none:
            continue
        rounds.setdefault(one["machine"], []).append(f"{name} {1 if PARTS[name].once else one['rounds']}")
    measured = "; ".join(f"{', '.join(names)} on {where}" for where, names in rounds.items())
    return "\n".join([*lines, "", f"Medians over rounds: {measured}."])


def written(readme: str, text: str) -> str:
    """The README with `text` between its two comments."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(*options: str) -> None:
    given = dict(option.split("=", 1) for option in options)
    rounds, chosen = int(given.get("rounds", 3)), given.get("only", ",".join(PARTS)).split(",")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, part in PARTS.items():
        why = "it was not asked for" if name not in chosen else part.lacks()
        if why is None:
            print(f"{name}: running", file=sys.stderr, flush=True)
            results[name] = {"machine": machine(), "rounds": rounds, "found": run(part, rounds)}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        else:
            print(f"{name}: left out, {why}", file=sys.stderr, flush=True)
    draw(results)
    README.write_text(written(README.read_text(encoding="utf-8"), table(results)), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
