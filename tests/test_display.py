"""What a reader sees, on a real terminal and on plain streams."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from rayft.display import Display, Pace

RESULT = {
    "run": "runs/sms",
    "status": "finished",
    "error": None,
    "steps": 40,
    "epochs": 2.0,
    "metrics": {"eval_loss": 0.05, "eval_accuracy": 0.98, "test_loss": 0.06, "test_accuracy": 0.9857},
    "best": {"step": 40, "metric": "eval_accuracy", "value": 0.98},
    "export": "runs/sms/export",
    "pipeline": "a-pipeline",
    "timing": {"train_s": 81.4, "rows_per_s": 61.2},
}
PLAN = {
    "event": "plan",
    "steps": 40,
    "epochs": 2,
    "rows": 4457,
    "validation_rows": 557,
    "test_rows": 558,
    "trainable": 22_713_986,
    "frozen": 11_000,
    "workers": 2,
    "zero_stage": 2,
    "global_batch_size": 32,
}


class Clock:
    """A clock that stands still until it is set forward."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def step(number: int, steps: int = 40, **fields: Any) -> dict[str, Any]:
    known = {
        "epoch": 2 * number / steps,
        "loss": 0.69,
        "learning_rate": 4.2e-5,
        "rows_per_s": 61.2,
        "tokens_per_s": 1890.4,
    }
    return {"event": "step", "step": number, "steps": steps, **known, **fields}


def shown(events: Iterator[tuple[float, dict[str, Any]]], encoding: str = "utf-8", json: bool = False) -> list[str]:
    """The lines that a plain stream gets of `events`, each with the seconds that pass before it."""
    raw, clock = io.BytesIO(), Clock()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    with Display(Console(file=stream, width=60), json, clock) as display:
        for seconds, event in events:
            clock.now += seconds
            display(event)
    return raw.getvalue().decode(encoding).splitlines()


def test_plain_output_of_a_whole_run() -> None:
    def events() -> Iterator[tuple[float, dict[str, Any]]]:
        yield 0, {"event": "stage", "name": "preparing"}
        yield 3, {"event": "stage", "name": "preparing", "done": 1000, "total": 4457}
        yield 8, {"event": "stage", "name": "preparing", "done": 4457, "total": 4457}
        yield 0, {"event": "note", "text": "3 rows were cut to 128 tokens [train]"}
        yield 0, PLAN
        yield 0, {"event": "stage", "name": "starting workers"}
        for number in range(1, 41):
            yield 0.5, step(number)
            if number in (20, 40):
                yield 0, {"event": "stage", "name": "evaluating"}
                scores = {"eval_loss": 0.0512, "eval_accuracy": 0.98}
                yield 4, {"event": "scores", "step": number, "epoch": number / 20, **scores}
                yield 0, {"event": "saved", "step": number}
        yield 0, {"event": "warning", "text": "a worker was lost; retry 1 of 3"}
        yield 0, {"event": "finished", "result": RESULT}

    lines = shown(events())
    told = [line for line in lines if line.startswith("step ")]
    known = "loss 0.6900 · learning rate 4.2e-05 · 61 rows/s · 1,890 tokens/s"
    assert told[:5] == [
        f"step 4/40 · epoch 0.20 · {known} · 18.0 s left",
        f"step 8/40 · epoch 0.40 · {known} · 16.0 s left",
        f"step 12/40 · epoch 0.60 · {known} · 14.0 s left",
        f"step 16/40 · epoch 0.80 · {known} · 12.0 s left",
        f"step 20/40 · epoch 1.00 · {known} · 10.0 s left",
    ]
    assert [line.split(" · ")[0] for line in told[5:]] == [f"step {number}/40" for number in (24, 28, 32, 36, 40)]
    assert told[-1] == f"step 40/40 · epoch 2.00 · {known}"
    assert [line for line in lines if not line.startswith("step ")] == textwrap.dedent("""\
        preparing
        preparing: 4,457/4,457
        note: 3 rows were cut to 128 tokens [train]
        data: 4,457 rows, 557 for validation, 558 for test
        plan: 40 steps of 32 rows, 2 epochs, 22.7 M parameters to train, 11.0 k frozen, 2 workers, ZeRO 2
        starting workers
        training
        evaluated at step 20 (epoch 1.00): eval_accuracy 0.9800 · eval_loss 0.0512
        saved a checkpoint at step 20
        evaluated at step 40 (epoch 2.00): eval_accuracy 0.9800 · eval_loss 0.0512
        saved a checkpoint at step 40
        warning: a worker was lost; retry 1 of 3

        finished after 40 steps, 0:01:21 of training, 61 rows/s
          test_accuracy  0.9857
          test_loss      0.0600
          eval_accuracy  0.9800
          eval_loss      0.0500
        best: step 40, eval_accuracy 0.9800
        model: runs/sms/export
        use it: transformers.pipeline("a-pipeline", "runs/sms/export")""").splitlines()


def test_long_runs_are_heard_of_every_ten_seconds_between_the_tenths() -> None:
    lines = shown((1.0, step(number, 1000)) for number in range(1, 105))
    told = [int(re.match(r"step (\d+)/", line)[1]) for line in lines if line.startswith("step ")]  # type: ignore[index]
    assert told == [11, 21, 31, 41, 51, 61, 71, 81, 91, 101]  # the tenth itself was told a step later


def test_a_resumed_run_starts_its_lines_where_it_stands() -> None:
    lines = shown((0.1, step(number)) for number in range(31, 35))
    assert [line[:10] for line in lines] == ["training", "step 31/40"]


def test_what_is_not_known_yet_is_left_out() -> None:
    lines = shown(iter([(0, step(4, rows_per_s=None, tokens_per_s=None, loss=123.456))]))
    assert lines[-1] == "step 4/40 · epoch 0.20 · loss 123.5 · learning rate 4.2e-05"
    plan = {
        key: value for key, value in PLAN.items() if key not in ("trainable", "frozen", "test_rows", "validation_rows")
    }
    lines = shown(iter([(0, {**plan, "epochs": None, "zero_stage": "auto", "rows": 1, "workers": 1})]))
    assert lines == ["data: 1 row", "plan: 40 steps of 32 rows, 1 worker, ZeRO auto"]


def test_rows_of_one_item_each_have_no_second_rate() -> None:
    (line,) = (line for line in shown(iter([(0, step(4, tokens_per_s=61.2))])) if line.startswith("step"))
    assert "61 rows/s" in line
    assert "tokens" not in line


def test_failed_result_says_why() -> None:
    result = {
        "status": "failed",
        "error": "a worker was lost",
        "steps": None,
        "metrics": {},
        "best": None,
        "timing": {},
    }
    assert shown(iter([(0, {"event": "finished", "result": result})])) == ["", "failed", "  a worker was lost"]


def test_json_leaves_the_result_to_the_caller() -> None:
    events = [(0.0, {"event": "saved", "step": 3}), (0.0, {"event": "finished", "result": RESULT})]
    assert shown(iter(events), json=True) == ["saved a checkpoint at step 3"]


def test_ascii_alone_where_the_encoding_is_not_utf8() -> None:
    events = [(0.0, step(4)), (0.0, {"event": "note", "text": "£ in café.csv … 中"})]
    lines = shown(iter(events), "ascii")
    assert lines[1].startswith("step 4/40  epoch 0.20  loss 0.6900")
    assert lines[2] == r"note: \xa3 in caf\xe9.csv \u2026 \u4e2d"


def test_pace_follows_the_recent_steps_and_forgets_those_before_a_restart() -> None:
    pace = Pace()
    for number in range(1, 61):
        pace.add(10.0 * number if number < 10 else 90 + (number - 9), number)
    assert pace.left(100) == pytest.approx(40)
    pace.add(500, 31)
    assert pace.left(100) is None
    pace.add(502, 32)
    assert pace.left(100) == pytest.approx(136)


SHOW = """
import sys, time
from rich.console import Console
from rayft.display import Display
with Display(Console()) as show:
    show({"event": "stage", "name": "preparing", "done": 5, "total": 10})
    show({"event": "note", "text": "a note [with brackets] that is longer than the terminal is wide, so that it wraps"})
    for step in range(1, 31):
        time.sleep(0.02)
        show({"event": "step", "step": step, "steps": 30, "epoch": step / 30, "loss": 1 / step, "learning_rate": 1e-4,
              "rows_per_s": 10.0, "tokens_per_s": 100.0})
        if step == 15:
            show({"event": "stage", "name": "evaluating"})
            time.sleep(0.3)
            show({"event": "scores", "step": step, "epoch": 0.5, "eval_accuracy": 0.5})
    sys.exit("boom") if "boom" in sys.argv else None
    show({"event": "finished", "result": {"status": "finished", "steps": 30, "metrics": {"test_accuracy": 0.75},
                                          "export": "runs/x/export"}})
"""


def on_a_terminal(*arguments: str, encoding: str = "utf-8") -> str:
    """What a process that shows events writes to a terminal of 80 columns."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "PYTHONIOENCODING": encoding}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", SHOW, *arguments]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        written = b""
        while True:
            try:
                read = os.read(master, 65536)
            except OSError:  # how Linux says that the other side is closed
                break
            if not read:
                break
            written += read
        process.wait()
    os.close(master)
    return written.decode(encoding)


def permanent(written: str) -> list[str]:
    """The lines that stay on the screen: what is written and not erased again."""
    lines: list[str] = [""]
    row = 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if piece == "\n":
            row += 1
            lines += [""] * (row - len(lines) + 1)
        elif re.fullmatch(r"\x1b\[\d*A", piece):
            row -= int(piece[2:-1] or 1)
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif not piece.startswith(("\x1b", "\r")):
            lines[row] += piece
    return [line.rstrip() for line in lines]


def test_terminal_has_a_live_region_and_keeps_notes_scores_and_the_result() -> None:
    written = on_a_terminal()
    assert_terminal_is_given_back(written)
    colourless = re.sub(r"\x1b\[[0-9;]*m", "", written)
    assert re.search(r"training [━╸╺]+ \d+/30 \d\.\d s left", colourless)
    assert re.search(r"  epoch 0\.\d\d · loss 0\.\d+ · learning rate 0\.0001 · 10 rows/s · 100 tokens/s", colourless)
    lines = [line for line in permanent(written) if line]
    assert lines[1].startswith("preparing: ")
    assert [lines[0], *lines[2:]] == [
        "note: a note [with brackets] that is longer than the terminal is wide, so that it wraps",
        "evaluated at step 15 (epoch 0.50): eval_accuracy 0.5000",
        "finished after 30 steps",
        "  test_accuracy  0.7500",
        "model: runs/x/export",
    ]


def assert_terminal_is_given_back(written: str) -> None:
    """The cursor, which is hidden while the region lives, is shown again."""
    assert 0 <= written.rfind("\x1b[?25l") < written.rfind("\x1b[?25h")


def test_terminal_is_given_back_when_the_work_fails() -> None:
    written = on_a_terminal("boom")
    assert_terminal_is_given_back(written)
    assert [line for line in permanent(written) if line][-1] == "boom"


def test_terminal_that_is_not_utf8_gets_ascii() -> None:
    assert "evaluated at step 15" in on_a_terminal(encoding="ascii")


@pytest.mark.parametrize(("maximize", "order"), [(True, ["2", "0"]), (False, ["0", "2"])])
def test_a_sweeps_table_has_what_runs_and_then_the_best(maximize: bool, order: list[str]) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    show = Display(console)
    for number, status, best in ((0, "finished", 0.2), (1, "running", None), (2, "stopped", 0.7)):
        rest = {"metric": "eval_x", "maximize": maximize, "rows": 100, "seconds": 2.0, "error": None, "value": best}
        show({"event": "trial", "trial": number, "status": status, "fields": {"train.seed": 1}, "best": best, **rest})
    assert list(show._table().columns[0].cells) == ["1", *order]
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "trial 0 finished: seed 1 · eval_x 0.2000 · 100 rows in 2.0 s",
        "trial 2 stopped: seed 1 · eval_x 0.7000 · 100 rows in 2.0 s",
    ]
