"""The picture of how time and memory grow: growth.png beside this file, from the figures in results.json.

    python tests/benchmarks/growth_picture.py

Time is on the left axis, memory on the right one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "results.json", HERE / "growth.png"
BLUE, ORANGE = "#1f5fbf", "#d9660a"
STYLES = ("o-", "s--", "^:")
APART = 8  # times that values have to be apart to be drawn on a logarithmic axis


@dataclass(frozen=True)
class Panel:
    """`over` is the column that grows; `time` and `memory` are columns, each with its name in the legend."""

    part: str
    table: str
    title: str
    over: str
    time: dict[str, str]
    memory: dict[str, str]
    unit: str = "s"


PANELS = (
    Panel("runs", "prepared", "texts prepared", "rows", {"seconds": "preparing"},
          {"driver_mb": "driver", "process_mb": "largest other process"}),
    Panel("growth", "rows", "rows of a prepared set", "rows", {"open_s": "opening", "order_s": "order of an epoch"},
          {"order_mb": "order", "plan_mb": "reading tasks"}),
    Panel("growth", "ranks", "ranks of a checkpoint", "ranks", {"commit_s": "commit", "own_s": "a rank's reading"},
          {"open_mb": "reader"}),
    Panel("runs", "workers", "workers of a run", "workers", {"first_step_s": "to the first step"},
          {"driver_mb": "driver", "board_mb": "board"}),
    Panel("runs", "trials", "trials of a sweep", "trials", {"ms_per_trial": "the sweep's own, per trial"},
          {"driver_mb": "driver"}, "ms"),
    Panel("runs", "models", "million parameters, two workers", "parameters_m",
          {"step_s": "a step", "first_step_s": "to the first step"},
          {"worker_mb": "worker", "checkpoint_mb": "checkpoint"}),
)  # fmt: skip


def draw(results: dict[str, Any]) -> None:
    """Draws what of it was measured."""
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if panel.table in results.get(panel.part, {}).get("found", {})]
    if not panels:
        return
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    for number, panel in enumerate(panels):
        table = results[panel.part]["found"][panel.table]
        axes = figure.add_subplot(2, 3, number + 1)
        other = axes.twinx()
        sizes = [row[panel.over] for row in table]
        for side, columns, colour in ((axes, panel.time, BLUE), (other, panel.memory, ORANGE)):
            for style, (name, label) in zip(STYLES, columns.items(), strict=False):
                side.plot(sizes, [row[name] for row in table], style, color=colour, label=label)
            _scale(side, [row[name] for row in table for name in columns], colour)
        axes.set_xscale("log")
        axes.set(title=panel.title)
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axes.xaxis.minorticks_off()
        axes.set_ylabel(panel.unit, color=BLUE)
        other.set_ylabel("MB", color=ORANGE)
        drawn = [line for side in (axes, other) for line in side.get_lines()]
        names = [line.get_label() for line in drawn]
        axes.legend(
            drawn, names, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize="small", frameon=False
        )
        axes.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=80)


def _scale(side: Any, values: list[float], colour: str) -> None:
    """Logarithmic where values are far apart; else from 0, so that what hardly grows looks so."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if max(values) > APART * min(values):
        side.set_yscale("log")
        side.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        side.yaxis.minorticks_off()
    else:
        side.set_ylim(0, 1.1 * max(values))
    side.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    side.tick_params(axis="y", colors=colour)


if __name__ == "__main__":
    draw(json.loads(RESULTS.read_text()))
