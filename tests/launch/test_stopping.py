"""How a run hears that it should stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from rayft.launch import stopping
from rayft.launch.stopping import Stop, request


@pytest.mark.parametrize(("number", "by"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_asks_once_and_a_second_ctrl_c_ends_at_once(tmp_path: Path, number: int, by: str) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = Stop(str(tmp_path))
    with stop.listening():
        assert stop.asked() is None
        os.kill(os.getpid(), number)
        assert stop.asked() == by
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked() == by
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_request_is_heard_and_an_old_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOK_S", 0.01)
    request(str(tmp_path), "ann")
    stop = Stop(str(tmp_path))
    with stop.listening():
        assert not (tmp_path / "stop.json").exists()
        request(str(tmp_path), "bob")
        until = time.monotonic() + 30
        while stop.asked() is None and time.monotonic() < until:
            time.sleep(0.01)
        assert stop.asked() == "a request from bob"


def test_signals_stay_as_they_are_in_other_threads(tmp_path: Path) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def listen() -> None:
        with Stop(str(tmp_path)).listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]
