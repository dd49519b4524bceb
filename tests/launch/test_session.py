"""The cluster that a command starts for itself."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import small

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SCRIPT = """
import os, signal, psutil
from rayft.errors import TrainingError
from rayft.launch.session import cluster, refuse_lost

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


STANDING = """
import os, psutil, ray, signal
from rayft.launch import agent
from rayft.launch.session import cluster

with cluster():
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    (raylet,) = [one for one in psutil.Process().children() if one.name() == "raylet"]
    started = {one.pid: " ".join(one.cmdline()) for one in raylet.children()}
    (own,) = [pid for pid, command in started.items() if agent.__file__ in command]
    assert not any("DashboardAgent" in command for command in started.values())
    print(own, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_dashboard_agent_is_started_and_what_stands_in_for_it_ends_with_its_raylet() -> None:
    environment = {"PATH": "/usr/bin:/bin", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", STANDING]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until = time.monotonic() + 120  # only how long a busy machine may take
    while psutil.pid_exists(int(done.stdout)):
        assert time.monotonic() < until, "it outlives its raylet"
        time.sleep(0.05)


def test_a_cluster_that_does_not_start_is_one_sentence() -> None:
    script = "from rayft.launch.session import cluster\nwith cluster():\n    raise SystemExit('it started')"
    environment = {"PATH": "/usr/bin:/bin", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": "/proc/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=300, env=environment
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("rayft.errors.ClusterError: Ray did not start on this machine (")
    assert "/proc/nowhere" in last


def test_a_cluster_that_wants_a_token_is_asked_once_and_told_as_what_it_is(tmp_path: Path) -> None:
    script = "from rayft.launch.session import cluster\nwith cluster(imports=()):\n    print('joined')"
    with small.Cluster(tmp_path, cpus=1, token="0" * 48) as ray:
        joining = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **ray.leads}
        for token, told in (
            (None, "asks for a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"),
            ("1" * 48, "refuses"),
        ):
            given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
            command = [sys.executable, "-c", script]
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=300, env={**joining, **given}
            )
            last = done.stderr.strip().splitlines()[-1]
            assert last.startswith(f"rayft.errors.ClusterError: the Ray cluster at {ray.leads['RAY_ADDRESS']} {told}")
            assert done.stderr.count("Failed to get cluster ID") == 1
