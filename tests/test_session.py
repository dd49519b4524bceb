"""The cluster that a command starts for itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SCRIPT = """
import os, signal, psutil
from rayft.errors import TrainingError
from rayft.session import cluster, refuse_lost

os.setpgid(0, 0)
with cluster():
    refuse_lost()
    children = {child.name(): child for child in psutil.Process().children()}
    apart = [os.getpgid(children[name].pid) != os.getpgid(0) for name in ("gcs_server", "raylet")]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    refuse_lost()
    children["raylet"].kill()
    os.waitid(os.P_PID, children["raylet"].pid, os.WEXITED | os.WNOWAIT)
    try:
        refuse_lost()
    except TrainingError as error:
        print(apart, error)
"""


def test_a_signal_to_the_commands_group_spares_its_cluster_and_a_lost_cluster_is_told() -> None:
    environment = {"PATH": "/usr/bin:/bin", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    # Ray may tell of its raylet's end on its own, before or behind.
    assert "[True, True] Ray's process raylet on this machine has ended (by SIGKILL); the same" in done.stdout


def test_a_cluster_that_does_not_start_is_one_sentence() -> None:
    script = "from rayft.session import cluster\nwith cluster():\n    raise SystemExit('it started')"
    environment = {"PATH": "/usr/bin:/bin", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": "/proc/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=300, env=environment
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("rayft.errors.ClusterError: Ray did not start on this machine (")
    assert "/proc/nowhere" in last
