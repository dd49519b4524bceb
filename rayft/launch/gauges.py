"""What a run tells Prometheus while it works: the driver's events as gauges of the Ray cluster it runs on.

    show = Gauges(recipe.name).beside(show)

Ray's agents export them on every node, with `ray_` before each name and the run's name as the tag `run`. What draws
them is in `cluster/monitoring/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
Show = Callable[[Event], None]

METRICS = {
    "rayft_loss": "Loss of the newest optimizer step: the mean over the items of its global batch",
    "rayft_rows_per_s": "Rows of the source trained on per second, over the last 20 steps",
    "rayft_tokens_per_s": "Tokens trained on per second, over the last 20 steps, without padding",
    "rayft_data_wait": "Share of the newest step that rank 0 waited for rows, from 0 to 1",
    "rayft_step_seconds": "Seconds that the newest optimizer step took",
    "rayft_checkpoint_seconds": "Seconds from the copy of the newest checkpoint until it was committed",
    "rayft_restarts": "Worker groups after the first: after failures, when machines leave or come",
}


def figures(event: Event) -> dict[str, float]:
    """The metrics that `event` alone decides, by name: those of a step and of a checkpoint."""
    if event["event"] == "saved":
        return _known({"rayft_checkpoint_seconds": event.get("seconds")})
    if event["event"] != "step":
        return {}
    seconds, waited = event.get("seconds"), event.get("waited")
    return _known(
        {
            "rayft_loss": event["loss"],
            "rayft_rows_per_s": event.get("rows_per_s"),
            "rayft_tokens_per_s": event.get("tokens_per_s"),
            "rayft_step_seconds": seconds,
            "rayft_data_wait": waited / seconds if seconds and waited is not None else None,
        }
    )


def _known(values: dict[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None}


class Gauges:
    """The metrics of run `run`. A metric is made when it first has a value, which is when the run has joined Ray."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.groups = 0  # of workers, that have been started
        self._made: dict[str, Any] = {}

    def show(self, event: Event) -> None:
        """Sets what `event` says."""
        values = figures(event)
        if event["event"] == "stage" and event["name"] == "starting workers":
            self.groups += 1
            values["rayft_restarts"] = self.groups - 1
        for name, value in values.items():
            self._gauge(name).set(value, tags={"run": self.run})

    def beside(self, show: Show) -> Show:
        """`show`, which sets the gauges too."""

        def both(event: Event) -> None:
            show(event)
            self.show(event)

        return both

    def _gauge(self, name: str) -> Any:
        if name not in self._made:
            from ray.util.metrics import Gauge

            self._made[name] = Gauge(name, description=METRICS[name], tag_keys=("run",))
        return self._made[name]
