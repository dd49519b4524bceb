"""What a user sees while a command works: a live region on a terminal, plain lines elsewhere.

A `Display` is called with the plain dict events that long work sends: `stage`, `plan`, `step`, `scores`, `saved`,
`note`, `warning`, `trial` and `finished`. It prints ASCII alone where the encoding is not UTF-8.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from rayft.text import amount, counted, duration, fields_text, number, ordered, result_lines

Event = dict[str, Any]

QUIET_S = 10.0  # without a terminal: a line at each tenth of the steps, and in between at most one in so many seconds
RECENT = 50  # time left is judged by the pace of so many steps, so that a slow start is soon forgotten
BEST_TRIALS = 5  # of those that have ended, so many stay in the table
_STYLES = {"finished": "cyan", "stopped": "dim", "failed": "red"}
_HELD_OUT = (("validation_rows", "validation"), ("test_rows", "test"))


class Pace:
    """How long the remaining steps will take, from the times of the most recent ones."""

    def __init__(self) -> None:
        self.seen: deque[tuple[float, int]] = deque(maxlen=RECENT + 1)

    def add(self, now: float, step: int) -> None:
        if self.seen and step < self.seen[-1][1]:  # a restart went back to its checkpoint
            self.seen.clear()
        self.seen.append((now, step))

    def left(self, steps: int) -> float | None:
        """Seconds until step number `steps`; None while there is nothing to judge by."""
        if len(self.seen) < 2 or self.seen[-1][1] == self.seen[0][1]:
            return None
        (begin, first), (end, last) = self.seen[0], self.seen[-1]
        return (end - begin) / (last - first) * max(0, steps - last)


class Display:
    """Shows the events of one command on `console`; a context manager, since a terminal has to be given back.

    With `json` the result is left to the caller, who prints it as JSON: `finished` then shows nothing. `clock` gives
    seconds, as time.monotonic does.
    """

    def __init__(self, console: Console, json: bool = False, clock: Callable[[], float] = time.monotonic):
        self.console = console
        self.json = json
        self.clock = clock
        self.finished = False
        self.live: Live | None = None
        self.separator = "  " if _ascii(console) else " · "
        self.pace = Pace()
        self.stage = ""
        self.began = clock()
        self.told_at = self.began  # when the last line was printed
        self.tenth = 0  # of the training steps, the last one told
        self.told_step = 0
        self.figures = ""
        self.trials: dict[int, Event] = {}  # the newest event of each
        self.progress = Progress(
            SpinnerColumn("line" if _ascii(console) else "dots"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", markup=False),
            console=console,
            expand=True,
        )
        self.bar = self.progress.add_task("starting", total=None, count="")

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(console=self.console, transient=True, get_renderable=self._region, refresh_per_second=8)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        show: dict[str, Callable[[Event], None]] = {
            "stage": self._stage,
            "plan": self._plan,
            "step": self._step,
            "scores": self._scores,
            "saved": self._saved,
            "note": lambda event: self._line(f"note: {event['text']}"),
            "warning": lambda event: self._line(f"warning: {event['text']}", "yellow"),
            "finished": self._finished,
            "trial": self._trial,
        }
        show[event["event"]](event)

    # -- events

    def _stage(self, event: Event) -> None:
        name, done, total = event["name"], event.get("done"), event.get("total")
        if name != self.stage:
            self._enter(name)
        count = f"{done:,}" + (f"/{total:,}" if total else "") if done is not None else ""
        self.progress.update(self.bar, description=name, completed=done or 0, total=total, count=count)
        if count and self._quiet_for_long():
            self._line(f"{name}: {count}")

    def _enter(self, name: str) -> None:
        """Opens a stage; going back and forth between training and evaluating is told by the scores alone."""
        now = self.clock()
        if self.live and self.stage and self.stage not in ("training", "evaluating"):
            self._line(f"{self.stage}: {duration(now - self.began)}", "dim")
        if not self.live and name != "evaluating" and not (name == "training" and self.stage == "evaluating"):
            self._line(name)
        self.stage, self.began, self.figures = name, now, ""

    def _plan(self, event: Event) -> None:
        rows = [counted(event["rows"], "row")]
        rows += [f"{event[key]:,} for {name}" for key, name in _HELD_OUT if event.get(key)]
        pieces = [
            f"{counted(event['steps'], 'step')} of {counted(event['global_batch_size'], 'row')}",
            f"{event['epochs']:g} epoch{'' if event['epochs'] == 1 else 's'}" if event.get("epochs") else "",
            f"{amount(event['trainable'])} parameters to train" if event.get("trainable") is not None else "",
            f"{amount(event['frozen'])} frozen" if event.get("frozen") else "",
            counted(event["workers"], "worker"),
            f"ZeRO {event['zero_stage']}",
        ]
        self._line(f"data: {', '.join(rows)}")
        self._line(f"plan: {', '.join(piece for piece in pieces if piece)}")

    def _step(self, event: Event) -> None:
        step, steps, now = event["step"], event["steps"], self.clock()
        if self.stage != "training":
            self._enter("training")
        self.pace.add(now, step)
        left = self.pace.left(steps) if step < steps else None
        rows, tokens = event.get("rows_per_s"), event.get("tokens_per_s")
        rates = [(rows, "rows/s"), (tokens if tokens != rows else None, "tokens/s")]  # a picture is no sequence
        figures = [f"epoch {event['epoch']:.2f}", f"loss {number(event['loss'])}"]
        figures += [f"learning rate {event['learning_rate']:.3g}"]
        figures += [f"{rate:,.0f} {unit}" for rate, unit in rates if rate is not None]
        self.figures = self.separator.join(figures)
        pieces = [f"{step:,}/{steps:,}", *([f"{duration(left)} left"] if left is not None else [])]
        self.progress.update(self.bar, description="training", completed=step, total=steps, count=" ".join(pieces))
        tenth = 10 * step // steps
        just_told = step < steps and abs(step - self.told_step) <= steps // 20
        if (not self.live and tenth != self.tenth and not just_told) or self._quiet_for_long():
            self._line(self.separator.join([f"step {pieces[0]}", self.figures, *pieces[1:]]))
            self.told_step = step
        self.tenth = tenth

    def _scores(self, event: Event) -> None:
        scores = {name: value for name, value in event.items() if name not in ("event", "step", "epoch")}
        text = self.separator.join(f"{name} {number(scores[name])}" for name in ordered(scores))
        self._line(f"evaluated at step {event['step']:,} (epoch {event['epoch']:.2f}): {text}", "cyan")

    def _saved(self, event: Event) -> None:
        self._line(f"saved a checkpoint at step {event['step']:,}", "dim")

    def _trial(self, event: Event) -> None:
        """What a sweep says of a trial: a row of its table, and a line when it has ended."""
        self.trials[event["trial"]] = event
        if event["status"] in ("running", "waiting"):
            return
        told = [fields_text(event["fields"]), f"{event['metric']} {number(event['best'])}"]
        if event["rows"]:
            told.append(f"{counted(event['rows'], 'row')} in {duration(event['seconds'])}")
        if event.get("error"):
            told.append(event["error"])
        self._line(f"trial {event['trial']} {event['status']}: {self.separator.join(told)}", _STYLES[event["status"]])

    def _table(self) -> Table:
        """The trials that run, and the best of the others."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("trial", "state", "fields", "score", "best", "rows", "seconds"):
            table.add_column(title, justify="left" if title in ("state", "fields") else "right")
        running = [event for event in self.trials.values() if event["status"] == "running"]
        others = [event for event in self.trials.values() if event["status"] != "running" and event["best"] is not None]
        best = sorted(others, key=lambda event: event["best"] * (-1 if event["maximize"] else 1))[:BEST_TRIALS]
        for event in running + best:
            table.add_row(
                str(event["trial"]), event["status"], fields_text(event["fields"]), number(event["value"]),
                number(event["best"]), number(event["rows"]), duration(event["seconds"]),
            )  # fmt: skip
        return table

    def _finished(self, event: Event) -> None:
        self.finished = True
        if not self.json:
            self._close()
            for line in result_lines(event["result"]):
                self._line(line)

    # -- the two ways to show

    def _quiet_for_long(self) -> bool:
        """Whether nothing was said for a while, where there is no live region to look at."""
        return not self.live and self.clock() - self.told_at >= QUIET_S

    def _region(self) -> RenderableType:
        if self.trials:
            return Group(self._table(), self.progress)
        if not self.figures:
            return self.progress
        return Group(self.progress, Text(f"  {self.figures}", overflow="fold"))

    def _line(self, text: str, style: str = "") -> None:
        self.console.print(Text(printable(self.console, text), style), soft_wrap=True)
        self.told_at = self.clock()

    def _close(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None


def printable(console: Console, text: str) -> str:
    """`text` with what the console's encoding lacks written as backslash escapes."""
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


def _ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")
