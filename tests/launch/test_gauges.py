"""What Prometheus is told of a run: which event sets which gauge, and to what."""

from __future__ import annotations

from typing import Any

import pytest
import ray.util.metrics

from rayft.launch.gauges import METRICS, Gauges, figures

STEP = {
    "event": "step", "step": 7, "steps": 20, "epoch": 0.35, "loss": 0.5, "learning_rate": 1e-4, "rows_per_s": 120.0,
    "tokens_per_s": 2400.0, "seconds": 0.4, "waited": 0.1,
}  # fmt: skip
START = {"event": "stage", "name": "starting workers"}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """What was set since, in order: name, value, tags."""
    told: list[tuple[str, float, dict[str, str]]] = []

    class Recorder(ray.util.metrics.Gauge):
        def set(self, value: float | None, tags: dict[str, str] | None = None) -> None:
            assert value is not None
            assert tags is not None
            self._validate_tags(tags)
            told.append((self.info["name"], value, tags))

    monkeypatch.setattr(ray.util.metrics, "Gauge", Recorder)
    return told


def test_a_step_and_a_checkpoint_set_every_gauge_but_the_restarts() -> None:
    found = figures(STEP) | figures({"event": "saved", "step": 7, "seconds": 2.5})
    assert found == {
        "rayft_loss": 0.5,
        "rayft_rows_per_s": 120.0,
        "rayft_tokens_per_s": 2400.0,
        "rayft_step_seconds": 0.4,
        "rayft_data_wait": 0.25,
        "rayft_checkpoint_seconds": 2.5,
    }
    assert set(METRICS) - set(found) == {"rayft_restarts"}


@pytest.mark.parametrize(
    ("event", "names"),
    [
        ({"event": "step", "step": 1, "loss": 1.0}, {"rayft_loss"}),
        (
            {"event": "step", "step": 1, "loss": 1.0, "seconds": 0.0, "waited": 0.0},
            {"rayft_loss", "rayft_step_seconds"},
        ),
        ({"event": "saved", "step": 1}, set()),
        ({"event": "note", "text": "loss"}, set()),
        ({"event": "scores", "step": 3, "epoch": 1.0, "eval_loss": 0.2}, set()),
        ({"event": "plan", "steps": 3, "rows": 9}, set()),
        ({"event": "finished", "result": {}}, set()),
    ],
)
def test_what_an_event_does_not_say_is_not_set(event: dict[str, Any], names: set[str]) -> None:
    assert set(figures(event)) == names


def test_groups_after_the_first_are_restarts(told: list[tuple[str, float, dict[str, str]]]) -> None:
    gauges = Gauges("sms-spam")
    for event in (START, STEP, START, {"event": "stage", "name": "training"}, START):
        gauges.show(event)
    assert [value for name, value, _ in told if name == "rayft_restarts"] == [0, 1, 2]


def test_every_value_carries_the_runs_name(told: list[tuple[str, float, dict[str, str]]]) -> None:
    Gauges("sweep/trials/00003").show(STEP)
    assert len(told) == 5
    assert {tuple(tags.items()) for _, _, tags in told} == {(("run", "sweep/trials/00003"),)}


def test_events_are_shown_first_and_then_measured(told: list[tuple[str, float, dict[str, str]]]) -> None:
    seen: list[tuple[str, int]] = []
    show = Gauges("run").beside(lambda event: seen.append((event["event"], len(told))))
    show(STEP)
    show({"event": "note", "text": "nothing to measure"})
    assert seen == [("step", 0), ("note", 5)]


def test_a_gauge_is_made_once(told: list[tuple[str, float, dict[str, str]]]) -> None:
    gauges = Gauges("run")
    gauges.show(STEP)
    made = dict(gauges._made)
    gauges.show(STEP)
    assert gauges._made == made
    assert len(told) == 10


def test_nothing_is_made_before_there_is_a_value(told: list[tuple[str, float, dict[str, str]]]) -> None:
    gauges = Gauges("run")
    gauges.show({"event": "note", "text": "this is its result"})
    assert not gauges._made


def test_ray_takes_the_names_and_tags_as_they_are() -> None:
    gauges = Gauges("run")
    gauges.show(STEP)  # Ray warns of a bad name, and warnings are errors
    gauges.show({"event": "saved", "step": 7, "seconds": 2.5})
    gauges.show(START)
    assert {name: gauge.info["tag_keys"] for name, gauge in gauges._made.items()} == dict.fromkeys(METRICS, ("run",))
